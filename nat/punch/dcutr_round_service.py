"""One round of ``/libp2p/dcutr`` in either role, and the dials that follow it.

Source: libp2p specs, relay/DCUtR.md, "The Protocol"; steps are numbered as there.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import msgspec
import trio

from fabric.core.errors import FabricError, NoRoute, RemoteProtocolError, Unavailable
from fabric.core.ids import PeerId, short
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.delimited import receive_message_untrusted
from fabric.net.offers import format_address
from fabric.net.socket_options import set_liveness
from fabric.net.traversal_api import ConnectionInfo, ConnectionKind, TraversalHost
from nat.history import PunchNotes
from nat.multiaddr_bytes import tcp_endpoint, tcp_multiaddr
from nat.punch.addresses import OwnSide, classify_ip, select_targets
from nat.punch.config import PunchConfig
from nat.punch.core import RetrySchedule, round_trip
from nat.punch.exchange_service import REFUSED_TARGETS
from nat.punch.facts import FAILED, Address
from nat.punch.messages import (
    CONNECT,
    MAX_DCUTR_BYTES,
    PROTOCOL_DCUTR,
    SYNC,
    HolePunch,
    decode_hole_punch_untrusted,
    encode_hole_punch,
)
from nat.punch.race_service import dial_loop

logger = logging.getLogger(__name__)

_UNILATERAL_SECONDS = 1.0
"""Bound of dialling announced public addresses first; a NAT may swallow the SYNs."""
_UNILATERAL_TRIES = 3
_ADOPT_SECONDS = 5.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ControlSurroundings:
    """What an upgrade needs to know, asked anew each time; all answer from memory.

    Attributes:
        port: The TCP port that control connections leave from and arrive at; 0 if it
            is not shared, then nothing is punched.
        observed: Multiaddrs at which peers see that port.
        local_ips: Addresses of our interfaces.
        announced: Multiaddrs that a peer announces.
        settled: Whether observers have answered. Before that we have no address to
            tell, and a punch from one side alone spoils the next: a gateway that tracks
            windows (Linux's does) lets the peer's SYN in by the mapping of our old one,
            and then takes our new one, with another sequence number, for foreign for
            two minutes.
    """

    port: Callable[[], int]
    observed: Callable[[], Sequence[str]]
    local_ips: Callable[[], Sequence[str]]
    announced: Callable[[PeerId], Sequence[str]]
    settled: Callable[[], bool] = lambda: True

    def own_side(self) -> OwnSide:
        """Return our end of a punch from the control port."""
        port = self.port()
        return OwnSide(
            observed=_endpoints(self.observed()),
            local=tuple((ip, port) for ip in self.local_ips()),
        )


class NotReady(NoRoute):
    """One of the two has no address to tell yet: ask again in a moment."""


class DcutrRound:
    """Plays both roles; args as :class:`nat.punch.dcutr_service.DcutrService`."""

    def __init__(
        self,
        host: TraversalHost,
        config: PunchConfig,
        surroundings: ControlSurroundings,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._host = host
        self._config = config
        self._around = surroundings
        self._counters = counters
        self._rng = rng

    def is_direct(self, peer: PeerId) -> bool:
        """Return whether a connection with ``peer`` needs no relay."""
        return any(info.kind != "relay" for info in self._host.connections(peer))

    async def dial_announced(self, peer: PeerId) -> None:
        """Try the addresses that the peer says are public, as an ordinary client.

        A few SYNs each, not a punch: the peer may announce what is not its own.
        """
        announced = _endpoints(self._around.announced(peer))
        public = [a for a in announced if classify_ip(a[0]) == "public"]
        if public:
            targets, _ = select_targets(self._around.own_side(), public)
            few = msgspec.structs.replace(self._config, max_tries=_UNILATERAL_TRIES)
            rtt = _UNILATERAL_SECONDS
            schedule = partial(RetrySchedule, few, self._rng, rtt, 0)
            with trio.move_on_after(_UNILATERAL_SECONDS):
                await self._race(peer, targets, schedule, kind="direct", client=True)

    async def start(self, peer: PeerId, notes: PunchNotes) -> None:
        """Do steps 1 to 5 once, as the side that was dialled through the relay.

        ``notes`` is filled with what is learnt on the way, however it ends.

        Raises:
            NotReady: nobody has told us, or the peer, the address of the port yet.
            RemoteRefused: the peer's gate refuses us, or it has no DCUtR.
        """
        if not self._around.settled():
            raise NotReady("no peer has told us yet how our NAT maps the control port")
        own = self._around.own_side()
        stream = await self._open(peer)
        try:
            with _deadline(self._config.exchange_seconds):
                sent = trio.current_time()
                await stream.send_all(_connect_message(own))
                reply = await _answer_untrusted(stream)
                rtt = round_trip(trio.current_time() - sent)
                targets = notes.endpoints = self._select(own, reply)
                await stream.send_all(encode_hole_punch(HolePunch(SYNC)))
                notes.agreed(trio.current_time())
            await trio.sleep(rtt / 2)
            with trio.move_on_after(self._config.punch_seconds):
                schedule = partial(RetrySchedule, self._config, self._rng, rtt, 0)
                await self._race(peer, targets, schedule, kind="punched", client=False)
        finally:
            await trio.aclose_forcefully(stream)

    async def _open(self, peer: PeerId) -> trio.abc.Stream:
        with _deadline(self._config.exchange_seconds):
            return await self._host.open_stream(peer, PROTOCOL_DCUTR)

    async def answer_untrusted(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Do steps 3 to 5 once, as the side that dialled through the relay.

        Raises:
            RemoteProtocolError: the peer sent something else than CONNECT and SYNC.
            Unavailable: it ended the stream early.
        """
        if not self._around.settled():
            return  # it asks again
        own = self._around.own_side()
        reader = _Reader(stream)
        with _deadline(self._config.exchange_seconds):
            request = await reader.receive_untrusted(CONNECT)
            targets = self._select(own, request)
            sent = trio.current_time()
            await stream.send_all(_connect_message(own))
            await reader.receive_untrusted(SYNC)
            rtt = round_trip(trio.current_time() - sent)
        if self.is_direct(peer):
            return
        with trio.move_on_after(self._config.punch_seconds):
            schedule = partial(RetrySchedule, self._config, self._rng, rtt, 1)
            await self._race(peer, targets, schedule, kind="punched", client=True)

    def _select(self, own: OwnSide, message: HolePunch) -> tuple[Address, ...]:
        targets, refused = select_targets(own, _endpoints(message.addrs))
        if refused:
            self._counters.add(REFUSALS, len(refused), label=REFUSED_TARGETS)
        return targets

    async def _race(
        self,
        peer: PeerId,
        targets: Sequence[Address],
        new_schedule: Callable[[], RetrySchedule],
        *,
        kind: ConnectionKind,
        client: bool,
    ) -> None:
        """Dial all ``targets`` until one is a connection with ``peer``; bound it.

        The client takes one socket after the other, so that its choice is the one
        choice; the server lets the client speak first on every socket it got.
        """
        port = self._around.port()
        if not port or not targets:
            return
        turn = trio.Lock() if client else None
        async with trio.open_nursery() as nursery:

            async def attempt(target: Address) -> None:
                schedule = new_schedule()
                while sock := await dial_loop(target, port, schedule):
                    info = _describe(sock, target, kind, client=client)
                    if await self._adopt(peer, sock, info, turn):
                        nursery.cancel_scope.cancel()

            async def until_direct() -> None:
                # it may come in at our listener, which no event tells
                while not self.is_direct(peer):  # noqa: ASYNC110
                    await trio.sleep(_POLL_SECONDS)
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_direct)
            async with trio.open_nursery() as dials:
                for target in targets:
                    dials.start_soon(attempt, target)
            nursery.cancel_scope.cancel()

    async def _adopt(
        self,
        peer: PeerId,
        sock: trio.socket.SocketType,
        info: ConnectionInfo,
        turn: trio.Lock | None,
    ) -> bool:
        set_liveness(sock)
        stream = trio.SocketStream(sock)
        try:
            async with turn or nullcontext():
                # to the end, or the connection that ended the race would be cut by it
                with trio.CancelScope(shield=True), trio.fail_after(_ADOPT_SECONDS):
                    await self._host.adopt(peer, stream, info)
        except (FabricError, trio.TooSlowError, OSError) as exc:
            logger.info("dcutr.adopt_failed peer=%s error=%r", short(peer), exc)
            await trio.aclose_forcefully(stream)
            return False
        except BaseException:
            sock.close()
            raise
        return True


class _Reader:
    """Messages of one stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    async def receive_untrusted(self, kind: int) -> HolePunch:
        """Return the next message, which must be of type ``kind``."""
        body = await receive_message_untrusted(self._stream, MAX_DCUTR_BYTES)
        message = decode_hole_punch_untrusted(body)
        if message.kind != kind:
            raise RemoteProtocolError(f"HolePunch of type {message.kind}, not {kind}")
        return message


async def _answer_untrusted(stream: trio.abc.Stream) -> HolePunch:
    """Return the CONNECT that answers ours; a peer without an address to tell ends it.

    Raises:
        NotReady: the stream ended instead.
    """
    try:
        return await _Reader(stream).receive_untrusted(CONNECT)
    except (Unavailable, trio.BrokenResourceError) as exc:
        raise NotReady("the peer does not know yet how its NAT maps its port") from exc


def _connect_message(own: OwnSide) -> bytes:
    addrs = tuple(tcp_multiaddr(*address) for address in own.observed[:4])
    return encode_hole_punch(HolePunch(CONNECT, addrs))


def _endpoints(multiaddrs: Sequence[str]) -> tuple[Address, ...]:
    found = (tcp_endpoint(addr) for addr in multiaddrs)
    return tuple(dict.fromkeys(address for address in found if address))


def _describe(
    sock: trio.socket.SocketType, target: Address, kind: ConnectionKind, *, client: bool
) -> ConnectionInfo:
    try:
        ip, port = sock.getsockname()[:2]
        local = format_address(ip, port)
    except OSError:
        local = ""
    remote = format_address(*target)
    return ConnectionInfo(kind=kind, outbound=client, local=local, remote=remote)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as exc:
        raise NoRoute(
            f"the upgrade was not agreed on within {seconds:g} s", code=FAILED
        ) from exc
