"""One punch over a control stream, as initiator and as responder.

See ``punch_messages.py`` for the exchange and ``punch_core.py`` for its rules.
"""

from __future__ import annotations

import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from fabric.core.errors import (
    FabricError,
    NoRoute,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.framing import FrameReader, encode_frame
from fabric.core.ids import PeerId
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.host import Host
from fabric.net.offers import format_address
from fabric.net.tasks import collapse_group
from nat.history import PunchNotes
from nat.punch.addresses import (
    OwnSide,
    is_same_site,
    parse_addresses_untrusted,
    select_targets,
)
from nat.punch.config import PunchConfig
from nat.punch.core import SocketAgreement, round_trip
from nat.punch.facts import FAILED, Address, NatFacts, can_punch, explain_failure
from nat.punch.messages import (
    NONCE_BYTES,
    PROTOCOL_PUNCH,
    PUNCH,
    PunchConnect,
    PunchRefused,
    PunchSync,
)
from nat.punch.port_service import PunchPort
from nat.punch.race_service import PunchRace

REFUSED_TARGETS = "punch_target"
"""Label of addresses in a CONNECT that were not dialled."""


@dataclass(frozen=True)
class Surroundings:
    """What a punch needs to know, asked anew each time; all answer from memory.

    Attributes:
        observers: "ip:port" of data-plane listeners that the world reaches.
        local_ips: Addresses of our interfaces.
        facts: What is known of our NAT.
        listeners: "ip:port" at which the world reaches our data plane, if it does.
    """

    observers: Callable[[], Sequence[str]]
    local_ips: Callable[[], Sequence[str]]
    facts: Callable[[], NatFacts]
    listeners: Callable[[], Sequence[str]]


class PunchExchange:
    """Plays both roles; holds the races under way, for :meth:`claim`."""

    def __init__(
        self,
        host: Host,
        config: PunchConfig,
        surroundings: Surroundings,
        counters: Counters,
        rng: random.Random,
    ) -> None:
        self._host = host
        self._config = config
        self._surroundings = surroundings
        self._counters = counters
        self._rng = rng
        self._races: dict[bytes, PunchRace] = {}

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Return whether ``label`` is the nonce of a race, which then owns ``sock``."""
        race = self._races.get(label)
        return race is not None and race.offer(sock)

    async def initiate(
        self, peer: PeerId, notes: PunchNotes | None = None
    ) -> socket.socket:
        """Return a connected, non-blocking socket to ``peer``.

        Args:
            peer: Who.
            notes: Filled with what is learnt on the way, however it ends.

        Raises:
            NoRoute: see ``code``: E_PUNCH_IMPOSSIBLE, E_PUNCH_FAILED, E_PUNCH_BUSY.
            Unavailable: no control connection, or it broke.
            RemoteRefused: the peer's gate refuses us.
            RemoteProtocolError: the peer's answer is malformed.
        """
        notes = notes if notes is not None else PunchNotes()
        with _fresh_port() as port:
            own, stream = await self._prepare(port, peer)
            try:
                return await self._initiate_on(_Frames(stream), port, own, notes)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                raise Unavailable(f"control stream broke: {exc}") from exc
            finally:
                # shielded: a cancellation here would lose the socket that was punched
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)

    async def _prepare(
        self, port: PunchPort, peer: PeerId
    ) -> tuple[OwnSide, trio.abc.Stream]:
        """Observe the port and open the stream, both at once: each costs round trips"""
        opened: list[trio.abc.Stream] = []

        async def open_stream() -> None:
            opened.append(await self._host.open_stream(peer, PROTOCOL_PUNCH))

        try:
            with collapse_group(), _deadline(self._config.exchange_seconds):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(open_stream)
                    own = await self._observe(port)
        except BaseException:
            for stream in opened:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)
            raise
        return own, opened[0]

    async def _initiate_on(
        self, frames: _Frames, port: PunchPort, own: OwnSide, notes: PunchNotes
    ) -> socket.socket:
        mine = self._connect_message(own)
        with _deadline(self._config.exchange_seconds):
            sent = trio.current_time()
            await frames.send(mine)
            reply = await frames.receive_untrusted()
            took = trio.current_time() - sent
            if isinstance(reply, PunchRefused):
                raise reply.as_error()
            if not isinstance(reply, PunchConnect):
                raise RemoteProtocolError("punch: SYNC where CONNECT was expected")
            notes.peer = reply.facts
            targets, doors = self._plan(own, reply, own.facts, reply.facts)
            notes.endpoints = (*targets, *(address for address, _ in doors))
            await frames.send(PunchSync())
            notes.agreed(trio.current_time())
        agreement = SocketAgreement(initiator=True, own=mine.nonce, peer=reply.nonce)
        rtt = round_trip(took, reply.held_seconds)
        race = self._race(port, agreement, rtt, 0)
        with self._registered(mine.nonce, race):
            await trio.sleep(rtt / 2)
            sock = None
            with trio.move_on_after(self._config.punch_seconds):
                sock = await race.run(targets, doors)
        notes.tries = race.tries
        if sock is None:
            raise _failed(own.facts, reply.facts, self._config.punch_seconds)
        return sock

    async def respond(
        self,
        peer_frames: trio.abc.Stream,
        admit: Callable[[], None],
        notes: PunchNotes | None = None,
    ) -> socket.socket | None:
        """Return the socket that the initiator punched with us, or None.

        Args:
            peer_frames: The control stream; the caller closes it.
            admit: Called when a request was read; raises what refuses it.
            notes: Filled with what is learnt on the way, however it ends.

        Raises:
            RemoteProtocolError: the peer sent something else than a punch.
        """
        frames = _Frames(peer_frames)
        notes = notes if notes is not None else PunchNotes()
        with _deadline(self._config.exchange_seconds):
            request = await frames.receive_untrusted()
        received = trio.current_time()
        if not isinstance(request, PunchConnect):
            raise RemoteProtocolError("punch: the first message is no CONNECT")
        try:
            admit()
            notes.peer = request.facts
            with _fresh_port() as port:
                return await self._respond_on(frames, port, request, received, notes)
        except (RemoteProtocolError, trio.BrokenResourceError):
            raise
        except FabricError as exc:
            notes.error = exc
            self._counters.add(REFUSALS, label=exc.code)
            with _deadline(self._config.exchange_seconds):
                await frames.send(PunchRefused.of(exc))
            return None

    async def _respond_on(
        self,
        frames: _Frames,
        port: PunchPort,
        request: PunchConnect,
        received: float,
        notes: PunchNotes,
    ) -> socket.socket | None:
        own = await self._observe(port)
        targets, doors = self._plan(own, request, request.facts, own.facts)
        notes.endpoints = (*targets, *(address for address, _ in doors))
        mine = self._connect_message(own, trio.current_time() - received)
        with _deadline(self._config.exchange_seconds):
            sent = trio.current_time()
            await frames.send(mine)
            if not isinstance(await frames.receive_untrusted(), PunchSync):
                raise RemoteProtocolError("punch: no SYNC after CONNECT")
        agreement = SocketAgreement(initiator=False, own=mine.nonce, peer=request.nonce)
        rtt = round_trip(trio.current_time() - sent)
        race = self._race(port, agreement, rtt, 1)
        sock = None
        with self._registered(mine.nonce, race):
            # the initiator starts half a round trip later, and ends later
            seconds = self._config.punch_seconds + self._config.prove_seconds
            with trio.move_on_after(seconds):
                sock = await _until_closed(
                    frames, race, lambda: race.run(targets, doors)
                )
        notes.tries = race.tries
        if sock is None:
            notes.error = _failed(own.facts, request.facts, self._config.punch_seconds)
        return sock

    async def _observe(self, port: PunchPort) -> OwnSide:
        around = self._surroundings
        return await port.observe(
            around.observers(),
            around.facts(),
            around.local_ips(),
            self._config.observe_seconds,
        )

    def _connect_message(self, own: OwnSide, held: float = 0.0) -> PunchConnect:
        listeners = tuple(self._surroundings.listeners())[:2]
        return PunchConnect(
            nonce=secrets.token_bytes(NONCE_BYTES),
            addresses=tuple(format_address(*address) for address in own.offered()),
            listeners=listeners,
            facts=own.facts,
            held_seconds=min(held, 60.0),
        )

    def _plan(
        self, own: OwnSide, peer: PunchConnect, asker: NatFacts, asked: NatFacts
    ) -> tuple[tuple[Address, ...], tuple[tuple[Address, bytes], ...]]:
        """Return what to dial, and which listeners with what key.

        Raises:
            NoRoute: E_PUNCH_IMPOSSIBLE, said from the side of ``asker``.
        """
        theirs = parse_addresses_untrusted(peer.addresses)
        targets, refused = select_targets(own, theirs)
        if refused:
            self._counters.add(REFUSALS, len(refused), label=REFUSED_TARGETS)
        known = parse_addresses_untrusted(peer.listeners)
        doors, _ = select_targets(own, known)
        ours = tuple(self._surroundings.listeners())
        decision = can_punch(asker, asked, same_site=is_same_site(own, theirs))
        if not decision.allowed and not doors and not ours:
            raise NoRoute(
                decision.reason, code=decision.code, next_step=decision.next_step
            )
        return targets, tuple((door, peer.nonce) for door in doors)

    def _race(
        self, port: PunchPort, agreement: SocketAgreement, rtt: float, side: int
    ) -> PunchRace:
        rng = random.Random(self._rng.getrandbits(64))
        return PunchRace(
            self._config, port.number, port.listeners, agreement, rng, rtt, side
        )

    @contextmanager
    def _registered(self, nonce: bytes, race: PunchRace) -> Iterator[None]:
        self._races[nonce] = race
        try:
            yield
        finally:
            del self._races[nonce]


class _Frames:
    """Messages on one control stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = FrameReader(max_bytes=PUNCH.max_bytes)
        self._ready: list[bytes] = []

    async def send(self, message: PunchConnect | PunchSync | PunchRefused) -> None:
        await self._stream.send_all(encode_frame(PUNCH.encode(message)))

    async def receive_untrusted(self) -> PunchConnect | PunchSync | PunchRefused:
        while not self._ready:
            data = await self._stream.receive_some(PUNCH.max_bytes)
            if not data:
                raise Unavailable("the peer ended the punch")
            self._ready += self._reader.feed(data)
            if len(self._ready) > 1:
                raise RemoteProtocolError("punch: messages out of turn")
        return PUNCH.decode_untrusted(self._ready.pop())

    async def wait_closed(self) -> None:
        """Return when the other end is closed or says anything more."""
        try:
            await self._stream.receive_some(1)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def _until_closed(
    frames: _Frames,
    race: PunchRace,
    run: Callable[[], Awaitable[socket.socket | None]],
) -> socket.socket | None:
    """Run the race, which ends when the initiator gives up and closes its stream."""

    async def watch() -> None:
        await frames.wait_closed()
        race.stop()

    result = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            result = await run()
            nursery.cancel_scope.cancel()
    except BaseException:  # also cancelled while the watch ended
        if result is not None:
            result.close()
        raise
    return result


@contextmanager
def _fresh_port() -> Iterator[PunchPort]:
    try:
        port = PunchPort()
    except OSError as exc:
        raise NoRoute(f"no local port to punch from: {exc}", code=FAILED) from exc
    with port:
        yield port


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as exc:
        raise NoRoute(
            f"the punch was not agreed on within {seconds:g} s", code=FAILED
        ) from exc


def _failed(own: NatFacts, peer: NatFacts, seconds: float) -> NoRoute:
    reason, may_pass = explain_failure(own, peer, seconds)
    return NoRoute(
        reason,
        code=FAILED if may_pass else "E_PUNCH_IMPOSSIBLE",
        next_step="map a port on one of the two routers, or use IPv6",
    )
