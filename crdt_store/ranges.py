"""An ordered set of entry ids with fingerprints of ranges, kept up to date per change.

Each slot has a position (62 bits of a hash), so an overwrite changes one place. A range
is [low, high), with 0 and END as the outer bounds.

*The sum of a range* is the sum modulo 2^4096 of its ids, each stretched to 4096 bits:
additive, so a change costs one stretch (0.8 us) and a query costs the number of
buckets. It is that wide because authors choose their ids. To make two sets of own
entries sum up alike is a generalised birthday problem, which takes about
2^(2 sqrt(bits)) steps (Wagner 2002): 2^32 for 256 bits, 2^128 for 4096, however many
slots the author fills. Salting the ids instead would cost a pass over all of them per
session. LtHash (Lewi et al. 2019) is as strong with 2 KiB per sum, four times as much.

*The fingerprint of a range* is 8 bytes of a hash of salt, count and sum. So short a
value could be ground too, if it were always the same; the initiator of each session
draws a salt that no author could know when it wrote.

Source: Meyer, "Range-Based Set Reconciliation" (arXiv:2212.13567).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from functools import lru_cache

from crdt_store.entry import Slot
from fabric.core.digest import digest, long_digest

_BITS = 62  # a bound must fit a signed 64-bit integer
END = 1 << _BITS
FINGERPRINT_BYTES = 8
_SUM_BYTES = 512
_MASK = (1 << 8 * _SUM_BYTES) - 1
_BUCKET = 64
"""Ids per bucket when it is split: at 10^5 ids, adding the sums of all buckets and
stretching the ids of half a bucket cost about the same."""

Item = tuple[int, bytes]
"""(position, entry id)."""


def position(slot: Slot) -> int:
    """Return where ``slot`` stands in the order."""
    key, author = slot
    return int.from_bytes(digest(author + key.encode())[:8], "big") >> (64 - _BITS)


@lru_cache(maxsize=2048)  # those of the buckets that a session looks into
def _stretched(entry_id: bytes) -> int:
    return int.from_bytes(long_digest(entry_id, _SUM_BYTES), "big")


def _sum(items: Iterable[Item]) -> int:
    return sum(_stretched(entry_id) for _, entry_id in items) & _MASK


class RangeIndex:
    """Sorted buckets of items, each with the sum of its ids."""

    def __init__(self) -> None:
        self._buckets: list[list[Item]] = [[]]
        self._sums: list[int] = [0]
        self._count = 0
        self._whole = 0

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
        stretched = _stretched(entry_id)
        self._sums[index] = (self._sums[index] + stretched) & _MASK
        self._whole = (self._whole + stretched) & _MASK
        self._count += 1
        if len(bucket) > 2 * _BUCKET:
            tail = bucket[_BUCKET:]
            del bucket[_BUCKET:]
            moved = _sum(tail)
            self._sums[index] = (self._sums[index] - moved) & _MASK
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
        stretched = _stretched(entry_id)
        self._sums[index] = (self._sums[index] - stretched) & _MASK
        self._whole = (self._whole - stretched) & _MASK
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
        (first, start), (last, stop) = self._place(low), self._place(high)
        return sum(len(b) for b in self._buckets[first:last]) + stop - start

    def _total(self, low: int, high: int) -> int:
        (first, start), (last, stop) = self._place(low), self._place(high)
        whole = sum(self._sums[first:last])
        return (whole + self._head(last, stop) - self._head(first, start)) & _MASK

    def _head(self, index: int, stop: int) -> int:
        """Return the sum of the first ``stop`` items of a bucket."""
        bucket = self._buckets[index]
        if 2 * stop <= len(bucket):
            return _sum(bucket[:stop])
        return self._sums[index] - _sum(bucket[stop:])

    def fingerprint(self, low: int = 0, high: int = END, *, salt: bytes = b"") -> bytes:
        """Return 8 bytes that tell whether two replicas hold the same ids here.

        Args:
            low: First position of the range.
            high: First position beyond it.
            salt: Unknown to all authors; empty only to compare with our own past.
        """
        return self._packed_digest(low, high, salt)[:FINGERPRINT_BYTES]

    def whole_digest(self) -> bytes:
        """Return 32 bytes that stand for the whole set, for ever."""
        return self._packed_digest(0, END, b"")

    def _packed_digest(self, low: int, high: int, salt: bytes) -> bytes:
        if (low, high) == (0, END):  # what every idle reconciliation compares
            count, total = self._count, self._whole
        else:
            count, total = self.count(low, high), self._total(low, high)
        packed = count.to_bytes(8, "big") + total.to_bytes(_SUM_BYTES, "big")
        return digest(packed + salt)

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
            assert _sum(bucket) == total
        assert self._whole == sum(self._sums) & _MASK
