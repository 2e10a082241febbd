"""An ordered set of entry ids with fingerprints of ranges, kept up to date per change.

Each slot has a position (62 bits of a hash), so an overwrite changes one place. A range
is [low, high), with 0 and END as the outer bounds. Its fingerprint is a hash of the
count and the sum of the ids modulo 2^256: additive, so a bucket's sum is updated by one
subtraction, and a query costs the number of buckets, not of entries.

Source: Meyer, "Range-Based Set Reconciliation" (arXiv:2212.13567).

A limit: an authorised author with about 2^10 slots of its own can, with some 2^33 work,
choose ids whose sums collide (generalised birthday, Wagner 2002) and so have replicas
disagree about *its own* slots, nobody else's. TODO(#4): salt the ids per session.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from crdt_store.entry import Slot
from fabric.core.digest import digest

_BITS = 62  # a bound must fit a signed 64-bit integer
END = 1 << _BITS
FINGERPRINT_BYTES = 12
_MODULUS = (1 << 256) - 1
_BUCKET = 256
"""Ids per bucket before it is split; near sqrt(10^5)."""

Item = tuple[int, bytes]
"""(position, entry id)."""


def position(slot: Slot) -> int:
    """Return where ``slot`` stands in the order."""
    key, author = slot
    return int.from_bytes(digest(author + key.encode())[:8], "big") >> (64 - _BITS)


class RangeIndex:
    """Sorted buckets of items, each with the sum of its ids."""

    def __init__(self) -> None:
        self._buckets: list[list[Item]] = [[]]
        self._sums: list[int] = [0]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _bucket_of(self, item: Item) -> int:
        low, high = 0, len(self._buckets) - 1
        while low < high:  # first bucket whose last item is >= item
            middle = (low + high) // 2
            if self._buckets[middle][-1] < item:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, at: int, entry_id: bytes) -> None:
        """Insert an item that is not in the set."""
        index = self._bucket_of((at, entry_id))
        bucket = self._buckets[index]
        insort(bucket, (at, entry_id))
        self._sums[index] += int.from_bytes(entry_id, "big")
        self._count += 1
        if len(bucket) > 2 * _BUCKET:
            tail = bucket[_BUCKET:]
            del bucket[_BUCKET:]
            moved = sum(int.from_bytes(i, "big") for _, i in tail)
            self._sums[index] -= moved
            self._buckets.insert(index + 1, tail)
            self._sums.insert(index + 1, moved)

    def remove(self, at: int, entry_id: bytes) -> None:
        """Remove an item that is in the set.

        Raises:
            KeyError: it is not.
        """
        index = self._bucket_of((at, entry_id))
        bucket = self._buckets[index]
        place = bisect_left(bucket, (at, entry_id))
        if place == len(bucket) or bucket[place] != (at, entry_id):
            raise KeyError(at)
        del bucket[place]
        self._sums[index] -= int.from_bytes(entry_id, "big")
        self._count -= 1
        if not bucket and len(self._buckets) > 1:
            del self._buckets[index], self._sums[index]

    def _place(self, at: int) -> tuple[int, int]:
        index = self._bucket_of((at, b""))
        return index, bisect_left(self._buckets[index], (at, b""))

    def items(self, low: int, high: int) -> list[Item]:
        """Return the items in [low, high), in order."""
        (first, start), (last, stop) = self._place(low), self._place(high)
        if first == last:
            return self._buckets[first][start:stop]
        found = self._buckets[first][start:]
        for bucket in self._buckets[first + 1 : last]:
            found += bucket
        return found + self._buckets[last][:stop]

    def count(self, low: int, high: int) -> int:
        """Return how many items are in [low, high)."""
        return self._total(low, high)[0]

    def _total(self, low: int, high: int) -> tuple[int, int]:
        (first, start), (last, stop) = self._place(low), self._place(high)
        if first == last:
            inside = self._buckets[first][start:stop]
            return len(inside), sum(int.from_bytes(i, "big") for _, i in inside)
        head, tail = self._buckets[first][start:], self._buckets[last][:stop]
        count = len(head) + len(tail)
        count += sum(len(b) for b in self._buckets[first + 1 : last])
        total = sum(self._sums[first + 1 : last])
        total += sum(int.from_bytes(i, "big") for _, i in head)
        total += sum(int.from_bytes(i, "big") for _, i in tail)
        return count, total

    def fingerprint(self, low: int = 0, high: int = END) -> bytes:
        """Return 12 bytes that tell whether two replicas hold the same ids here."""
        count, total = self._total(low, high)
        packed = count.to_bytes(8, "big") + (total & _MODULUS).to_bytes(32, "big")
        return digest(packed)[:FINGERPRINT_BYTES]

    def cuts(self, low: int, high: int, parts: int) -> list[int]:
        """Return increasing upper bounds of at most ``parts`` like-sized sub-ranges.

        The last is ``high``.
        """
        items = self.items(low, high)
        step = max(1, -(-len(items) // parts))
        bounds: list[int] = []
        for place in range(step, len(items), step):
            at = items[place][0]
            if at > (bounds[-1] if bounds else low):
                bounds.append(at)
        return [*bounds, high]

    def check_integrity(self) -> None:
        """Assert that buckets are sorted, sums match and the count is right."""
        flat = [item for bucket in self._buckets for item in bucket]
        assert flat == sorted(flat)
        assert len(flat) == self._count
        for bucket, total in zip(self._buckets, self._sums, strict=True):
            assert sum(int.from_bytes(i, "big") for _, i in bucket) == total
