"""Links in a TOML file: plans without a mesh, and of machines that do not exist.

Either uniform levels, innermost first::

    [rank]
    memory = "16GiB"
    flops = 4e13

    [[level]]
    name = "host"           # what its links are called
    size = 8                # ranks in a host
    rate = "50GB"           # in and out of each of them
    rtt_ms = 0.01

    [[level]]
    name = "site"
    size = 4                # hosts in the site
    rate = "12GB"

or peers and the links between them, from which the levels are found as in a mesh::

    [[peer]]
    name = "ann"
    memory = "8GiB"         # also flops, ranks, rate (between its ranks)

    [[link]]
    between = ["ann", "bob"]
    rtt_ms = 20
    up = "100Mbit"          # from the first to the second
    down = "20Mbit"         # default: as up
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId
from fabric.jobs.plan.ground import UNSHARED, Ground, Place, Rank
from fabric.jobs.plan.measured import HOST_BYTES_PER_SECOND, PeerFacts, ground_of
from fabric.jobs.plan.quantities import parse_size
from fabric.jobs.topology.islands import topology_of
from fabric.net.budget_config import parse_rate

MAX_FILE_BYTES = 4 << 20
MAX_RANKS = 4096
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class _Rank(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memory: str | float = 0
    flops: Positive = 1e11


class _Level(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    size: Annotated[int, msgspec.Meta(ge=2, le=MAX_RANKS)]
    rate: str
    rtt_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class _Peer(_Rank, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Name
    ranks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    rate: str = ""


class _Link(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    between: tuple[Name, Name]
    up: str
    down: str = ""
    rtt_ms: Positive = 1.0


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rank: _Rank = _Rank()
    level: Annotated[tuple[_Level, ...], msgspec.Meta(max_length=8)] = ()
    peer: Annotated[tuple[_Peer, ...], msgspec.Meta(max_length=MAX_RANKS)] = ()
    link: tuple[_Link, ...] = ()


def load_ground(path: Path) -> Ground:
    """Return the ground that the file ``path`` describes.

    Raises:
        ConfigError: it cannot be read, or describes nothing.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: more than {MAX_FILE_BYTES} B")
        found = msgspec.convert(tomllib.loads(data.decode()), _File)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:  # TOML, UTF-8 or a field
        raise ConfigError(f"{path}: {exc}") from exc
    if found.level and not found.peer and not found.link:
        return _uniform(found, path)
    if found.peer and not found.level:
        return _found(found, path)
    raise ConfigError(
        f"{path}: neither levels nor peers, or both",
        next_step="describe [[level]], or [[peer]] and [[link]]",
    )


def _uniform(file: _File, path: Path) -> Ground:
    total = 1
    for level in file.level:
        total *= level.size
    if total > MAX_RANKS:
        raise ConfigError(f"{path}: {total} ranks > {MAX_RANKS}")
    memory = parse_size(file.rank.memory)
    ranks = tuple(
        Rank(name=f"r{n}", memory_bytes=memory, flops=file.rank.flops)
        for n in range(total)
    )
    rates = [parse_rate(level.rate) for level in file.level]

    def place(level: int, start: int) -> Place:
        size, children = 1, []
        for inner in file.level[:level]:
            size *= inner.size
        if level:
            step = size // file.level[level - 1].size
            children = [place(level - 1, start + n) for n in range(0, size, step)]
        outermost = level == len(file.level)
        name = f"{file.level[level - 1].name}{start // size}" if level else f"r{start}"
        return Place(
            name=name,
            level=level,
            start=start,
            stop=start + size,
            up=UNSHARED if outermost else rates[level],
            down=UNSHARED if outermost else rates[level],
            rtt_seconds=0.0 if outermost else file.level[level].rtt_ms / 1e3,
            children=tuple(children),
        )

    return Ground(
        root=place(len(file.level), 0),
        ranks=ranks,
        levels=tuple(level.name for level in file.level),
        reasons=(
            f"{path.name} says so: "
            + " x ".join(
                f"{level.size} ({level.name})" for level in reversed(file.level)
            ),
        ),
    )


def _found(file: _File, path: Path) -> Ground:
    facts = {
        PeerId(peer.name): PeerFacts(
            name=peer.name,
            memory_bytes=parse_size(peer.memory or file.rank.memory),
            flops=peer.flops if peer.flops != _Rank().flops else file.rank.flops,
            ranks=peer.ranks,
            host_bytes_per_second=(
                parse_rate(peer.rate) if peer.rate else HOST_BYTES_PER_SECOND
            ),
        )
        for peer in file.peer
    }
    said: dict[PeerId, dict[str, PublishedLink]] = {}
    for link in file.link:
        for end in link.between:
            if end not in facts:
                raise ConfigError(
                    f"{path}: a link with {end!r}, which is no [[peer]]",
                    next_step=f"peers are {', '.join(sorted(facts)[:8])}",
                )
        up = parse_rate(link.up)
        first, second = link.between
        said.setdefault(PeerId(first), {})[second] = PublishedLink(
            rtt_microseconds=max(1, round(link.rtt_ms * 1e3)),
            up_bytes_per_second=round(up),
            down_bytes_per_second=round(parse_rate(link.down) if link.down else up),
        )
    # a record holds 32 links of a mesh; those of a file need not fit a slot
    records = {peer: LinkRecord(links=links) for peer, links in said.items()}
    return ground_of(topology_of(records, facts), facts)
