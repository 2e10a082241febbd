"""Members of a job with links of given kinds, as their records say it."""

import random

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.ids import PeerId
from nat.probe.estimate import quantise

HOST = (1_000, 1_000_000_000)
LAN = (1_000, 110_000_000)
WAN = (20_000, 12_500_000)
FAR = (150_000, 2_500_000)
KINDS = (FAR, WAN, LAN, HOST)


def peers(shape):
    """Names of members by a nested tuple: (2, 3) is a site of two and one of three."""

    def walk(node, path):
        if isinstance(node, int):
            return [(*path, index) for index in range(node)]
        return [
            leaf
            for index, child in enumerate(node)
            for leaf in walk(child, (*path, index))
        ]

    return {PeerId("p" + ".".join(map(str, path))): path for path in walk(shape, ())}


def links_of(shape, kinds=KINDS):
    """(rtt, rate) of each ordered pair: the kind at the depth where their ways part."""
    found = {}
    paths = peers(shape)
    depth = max(map(len, paths.values()))
    for one, mine in paths.items():
        for other, theirs in paths.items():
            if one != other:
                same = 0
                while mine[same] == theirs[same]:
                    same += 1
                found[one, other] = kinds[len(kinds) - depth + same]
    return found


def records_of(links, *, noise=1.0, rng=None, missing=0.0):
    """Records of each author; each value is off by ``noise`` at most, in steps."""
    rng = rng or random.Random(0)
    said = {}
    for (one, other), (rtt, rate) in links.items():
        if rng.random() >= missing:
            off = [noise ** rng.uniform(-1, 1) for _ in range(3)]
            said.setdefault(one, {})[other] = PublishedLink(
                rtt_microseconds=max(1000, round(rtt * off[0])),
                up_bytes_per_second=round(quantise(rate * off[1])),
                down_bytes_per_second=round(quantise(rate * off[2])),
            )
    return {peer: LinkRecord(links=links) for peer, links in said.items()}


def cuts_of(shape):
    """The islands that ``shape`` means."""
    paths = peers(shape)
    found = set()
    for path in paths.values():
        for length in range(1, len(path)):
            mine = frozenset(p for p, q in paths.items() if q[:length] == path[:length])
            if 1 < len(mine) < len(paths):
                found.add(mine)
    return frozenset(found)
