"""Links measured because somebody asks: a plan before any job has run.

Links are measured and published for the members of running jobs alone: an idle mesh
costs nothing. Who plans asks each member in turn for its links to some others; one
probes at a time, so that probes do not share an uplink and measure each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Protocol

import msgspec
import trio

from crdt_store.link_records import MAX_LINKS, LinkRecord
from fabric.app.links import as_record
from fabric.core.codec import Codec
from fabric.core.errors import FabricError
from fabric.core.ids import PeerId
from fabric.net.ports import LinkMeasurement
from fabric.net.rpc_api import Rpc
from nat.probe.estimate import quantise_link

TELL = "links.tell"
"""RPC method that answers with our links to the peers of the request."""
MAX_BYTES = 16 << 10
MEMBER_SECONDS = 30.0
"""For the probes of one member; what it measured by then it tells."""
MARGIN_SECONDS = 3.0
SURVEY_SECONDS = 150.0
"""For all of them; the rest stays unmeasured and is said to be."""

PeerText = Annotated[str, msgspec.Meta(max_length=64)]


class Tell(msgspec.Struct, frozen=True, tag="links_tell"):
    """Ask for the links to ``peers``; those unknown are measured."""

    peers: Annotated[tuple[PeerText, ...], msgspec.Meta(max_length=MAX_LINKS)]


_REQUEST: Codec[Tell] = Codec(Tell, max_bytes=MAX_BYTES)
_ANSWER: Codec[LinkRecord] = Codec(LinkRecord, max_bytes=MAX_BYTES)


class Prober(Protocol):
    """What measures: ``nat.probe.service.ProbeService``."""

    async def measure(self, peer: PeerId) -> LinkMeasurement:
        """Return a measurement no older than the configured age; probes if need be."""
        ...


def serve_survey(
    rpc: Rpc, prober: Prober, members: Callable[[], frozenset[PeerId]]
) -> None:
    """Tell members of our links to other members."""
    one = trio.Lock()

    async def tell(peer: PeerId, request: bytes) -> bytes:
        asked = _REQUEST.decode_untrusted(request)
        others = [PeerId(each) for each in asked.peers if each in members()]
        async with one:  # probes of two plans would share our uplink
            return _ANSWER.encode(await own_links(prober, others))

    rpc.register_async(TELL, tell)


async def own_links(prober: Prober, others: list[PeerId]) -> LinkRecord:
    """Return our links to ``others``: of those that answer within the time."""
    found: dict[PeerId, LinkMeasurement] = {}
    with trio.move_on_after(MEMBER_SECONDS):
        for other in others:
            try:
                found[other] = quantise_link(await prober.measure(other), None)
            except FabricError:
                continue  # unmeasured, and said to be
    return as_record(found)


async def survey(
    rpc: Rpc,
    own: PeerId,
    own_record: Callable[[list[PeerId]], Awaitable[LinkRecord]],
    members: list[PeerId],
    known: Mapping[PeerId, LinkRecord],
) -> tuple[dict[PeerId, LinkRecord], tuple[str, ...]]:
    """Return ``known`` and what was measured of the other links, and who did not tell.

    Args:
        rpc: Asks the others.
        own: Our PeerId.
        own_record: Measures our own links.
        members: Whose links with each other are wanted.
        known: By author; pairs that either end knows are not measured again.
    """
    records = {peer: dict(record.links) for peer, record in known.items()}
    silent: list[str] = []
    with trio.move_on_after(SURVEY_SECONDS):
        for peer, others in shares(members, known).items():
            try:
                with trio.fail_after(MEMBER_SECONDS + MARGIN_SECONDS):
                    if peer == own:
                        record = await own_record(others)
                    else:
                        request = _REQUEST.encode(Tell(tuple(others)))
                        answer = await rpc.call(peer, TELL, request)
                        record = _ANSWER.decode_untrusted(answer)
            except (FabricError, trio.TooSlowError) as exc:
                silent.append(f"{peer}: {exc}")
                continue
            records[peer] = records.get(peer, {}) | dict(record.links)
    found = {peer: LinkRecord(links=links) for peer, links in records.items()}
    return found, tuple(silent)


def shares(
    members: list[PeerId], known: Mapping[PeerId, LinkRecord]
) -> dict[PeerId, list[PeerId]]:
    """Return whom each member is to measure: each unknown pair once, dealt evenly."""
    order = sorted(set(members))
    empty = LinkRecord()
    dealt: dict[PeerId, list[PeerId]] = {peer: [] for peer in order}
    for index, one in enumerate(order):
        for other in order[index + 1 :]:
            said = other in known.get(one, empty).links
            if said or one in known.get(other, empty).links:
                continue
            first, second = sorted((one, other), key=lambda peer: len(dealt[peer]))
            if len(dealt[first]) < MAX_LINKS:
                dealt[first].append(second)
    return {peer: others for peer, others in dealt.items() if others}
