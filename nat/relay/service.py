"""The relay: serves hop streams and carries circuits, as the book allows.

A handler runs in the task of its stream, so nothing here owns a nursery per circuit. A
request that cannot be served is answered with a status; a circuit that ends before its
time is reset on both sides, so that nobody takes it for complete.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from fabric.core.errors import (
    FabricError,
    RemoteProtocolError,
    ResourceExhausted,
)
from fabric.core.ids import PeerId, short
from fabric.core.signing import Signer
from fabric.core.telemetry import REFUSALS, SENT_BYTES, Counters
from fabric.net.delimited import receive_message_untrusted, send_bytes
from fabric.net.host import PeerDisconnected
from fabric.net.traversal_api import TraversalHost
from nat.relay.circuit_streams_service import open_stop
from nat.relay.config import RelayConfig
from nat.relay.core import Circuit, Refusal, RelayBook
from nat.relay.messages import (
    MAX_ADDRS,
    MAX_RELAY_MESSAGE_BYTES,
    PROTOCOL_HOP,
    PROTOCOL_VIA,
    HopConnect,
    HopReserve,
    HopStatus,
    Reservation,
    Status,
    decode_hop_untrusted,
    encode_hop,
)
from nat.relay.pump_service import break_stream, pump
from nat.relay.voucher import seal_voucher

log = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0


class RelayService:
    """Relays for others while it is active.

    Args:
        host: Whose streams.
        signer: Signs vouchers; the host's identity.
        is_member: Whether the gate admits a peer to the data plane.
        config: The limits.
        counters: Where refusals and relayed bytes are counted.

    Attributes:
        book: What is promised and carried.
    """

    def __init__(
        self,
        host: TraversalHost,
        signer: Signer,
        is_member: Callable[[PeerId], bool],
        config: RelayConfig,
        counters: Counters,
    ) -> None:
        self.book = RelayBook(config)
        self._host = host
        self._signer = signer
        self._is_member = is_member
        self._config = config
        self._counters = counters
        self._pending: Counter[PeerId] = Counter()
        self._public = False
        self._serving = False

    @property
    def active(self) -> bool:
        """Whether new reservations are accepted."""
        match self._config.volunteer:
            case "always":
                return True
            case "never":
                return False
            case "auto":
                return self._public

    def set_public(self, public: bool) -> None:
        """Take note whether the world reaches us."""
        before = self.active
        self._public = public
        self._serve_if_active()
        if self.active != before:
            log.info("relay.%s", "started" if self.active else "stopped")

    def _serve_if_active(self) -> None:
        # not before: identify lists what is served, and others take it for a relay
        if self.active and not self._serving:
            self._serving = True
            self._host.set_handler(PROTOCOL_HOP, self._serve_hop)

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Watch for peers that leave, until cancelled."""
        events = self._host.events()
        self._serve_if_active()
        if self._config.volunteer != "never":
            self._host.set_handler(PROTOCOL_VIA, self._serve_via)
        task_status.started()
        while True:
            with trio.move_on_after(SWEEP_SECONDS) as scope:
                async for event in events:
                    if isinstance(event, PeerDisconnected):
                        self.book.forget(event.peer)
            if not scope.cancelled_caught:
                return  # the host ended
            self.book.sweep(trio.current_time())

    # one request

    async def _serve_hop(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        await self._serve(peer, stream, reserved=True)

    async def _serve_via(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        await self._serve(peer, stream, reserved=False)

    async def _serve(
        self, peer: PeerId, stream: trio.abc.Stream, *, reserved: bool
    ) -> None:
        """Answer one request; the stream of a CONNECT that succeeds is the circuit."""
        with self._slot(peer) as full:
            answer = full or await self._decide(peer, stream, reserved=reserved)
            if not isinstance(answer, _Opened):
                await self._answer(stream, answer)
                return
        await self._carry(stream, answer)

    @contextmanager
    def _slot(self, peer: PeerId) -> Iterator[Refusal | None]:
        """Count a request that is being served, or yield why there is no room."""
        config = self._config
        full = self._pending.total() >= config.max_pending
        if full or self._pending[peer] >= config.max_pending_per_peer:
            which = "pending" if full else "pending_per_peer"
            yield self.book.refuse(Status.RESOURCE_LIMIT_EXCEEDED, which)
            return
        self._pending[peer] += 1
        try:
            yield None
        finally:
            self._pending[peer] -= 1
            if not self._pending[peer]:
                del self._pending[peer]

    async def _decide(
        self, peer: PeerId, stream: trio.abc.Stream, *, reserved: bool
    ) -> HopStatus | Refusal | _Opened:
        try:
            with trio.fail_after(self._config.request_seconds):
                body = await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
            request = decode_hop_untrusted(body)
        except RemoteProtocolError as exc:
            log.debug("relay.malformed peer=%s reason=%s", short(peer), exc.reason)
            return self.book.refuse(Status.MALFORMED_MESSAGE, "malformed")
        except trio.TooSlowError:
            return self.book.refuse(Status.MALFORMED_MESSAGE, "slow_request")
        ip = self._ip_of(peer)
        if ip is None:
            # spec: not over connections that are relayed themselves
            return self.book.refuse(Status.PERMISSION_DENIED, "over_a_relay")
        limited = self.book.request(peer, ip, trio.current_time())
        if limited is not None:
            return limited
        match request:
            case HopReserve():
                return self._reserve(peer, ip)
            case HopConnect(target):
                return await self._connect(peer, target, reserved=reserved)
            case HopStatus():
                return self.book.refuse(Status.UNEXPECTED_MESSAGE, "unexpected")

    def _ip_of(self, peer: PeerId) -> str | None:
        for info in self._host.connections(peer):
            if info.kind != "relay":
                return info.remote.rpartition(":")[0]
        return None

    def _reserve(self, peer: PeerId, ip: str) -> HopStatus | Refusal:
        if not self.active:
            return self.book.refuse(Status.PERMISSION_DENIED, "not_a_relay")
        member = self._is_member(peer)
        seconds = self.book.reserve(peer, ip, member=member, now=trio.current_time())
        if isinstance(seconds, Refusal):
            return seconds
        expires = int(time.time() + seconds)
        addrs = [addr for addr in self._host.addrs() if "/p2p-circuit" not in addr]
        return HopStatus(
            status=Status.OK,
            reservation=Reservation(
                expires_unix_seconds=expires,
                addrs=tuple(addrs[:MAX_ADDRS]),
                voucher=seal_voucher(self._signer, peer, expires),
            ),
            limit=self.book.limit(members=member),
        )

    async def _connect(
        self, source: PeerId, target: PeerId, *, reserved: bool
    ) -> Refusal | _Opened:
        members = self._are_members(source, target)
        if not (reserved or members):
            return self.book.refuse(Status.PERMISSION_DENIED, "via_for_members")
        circuit = self.book.connect(
            source,
            target,
            members=members,
            now=trio.current_time(),
            reserved=reserved,
        )
        if isinstance(circuit, Refusal):
            return circuit
        try:
            with trio.fail_after(self._config.connect_seconds):
                stop = await open_stop(self._host, target, source, circuit.limit)
                return _Opened(circuit, stop)
        except (FabricError, trio.TooSlowError) as exc:
            self.book.release(circuit)
            log.debug("relay.no_target circuit=%s error=%r", _name(circuit), exc)
            return self.book.refuse(Status.CONNECTION_FAILED, "target")
        except BaseException:
            self.book.release(circuit)
            raise

    def _are_members(self, *peers: PeerId) -> bool:
        return all(self._is_member(peer) for peer in peers)

    async def _answer(
        self, stream: trio.abc.Stream, answer: HopStatus | Refusal
    ) -> None:
        if isinstance(answer, Refusal):
            label = f"E_RELAY_{answer.reason.upper()}"
            self._counters.add(REFUSALS, label=label)
            answer = HopStatus(status=answer.status)
        with trio.fail_after(self._config.request_seconds):
            await send_bytes(stream, encode_hop(answer))

    # one circuit

    async def _carry(self, stream: trio.abc.Stream, opened: _Opened) -> None:
        circuit, stop = opened.circuit, opened.stop
        complete = False
        try:
            await self._answer(stream, HopStatus(status=Status.OK, limit=circuit.limit))
            complete = await self._pump(stream, opened)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, FabricError):
            log.debug("relay.broke circuit=%s", _name(circuit))
        finally:
            self.book.release(circuit)
            if not complete:
                await break_stream(stop)
                await break_stream(stream)
        await stop.aclose()

    async def _pump(self, stream: trio.abc.Stream, opened: _Opened) -> bool:
        circuit, stop = opened.circuit, opened.stop
        assert isinstance(stream, trio.abc.HalfCloseableStream)
        assert isinstance(stop, trio.abc.HalfCloseableStream)

        def take(direction: int, num_bytes: int) -> float:
            now = trio.current_time()
            if circuit.stranger and self._are_members(circuit.source, circuit.target):
                self.book.promote(circuit, now)
            wait = self.book.take(circuit, direction, num_bytes, now)
            if isinstance(wait, Refusal):
                self._counters.add(REFUSALS, label=f"E_RELAY_{wait.reason.upper()}")
                raise ResourceExhausted(f"the circuit is over its {wait.reason}")
            self._counters.add(SENT_BYTES, num_bytes, label="relayed")
            return wait

        return await pump(
            stream,
            stop,
            take,
            idle_seconds=self._config.idle_seconds,
            ends_at=lambda: circuit.ends_at,
        )


@dataclass(frozen=True)
class _Opened:
    """A circuit whose target has accepted."""

    circuit: Circuit
    stop: trio.abc.Stream


def _name(circuit: Circuit) -> str:
    up, down = circuit.carried
    return f"{short(circuit.source)}->{short(circuit.target)} {up}/{down} B"
