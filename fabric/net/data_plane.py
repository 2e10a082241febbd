"""The data plane: a TCP listener, and offers that say who may connect to it and why.

It knows how a connection comes about. What a connection is for is known by acceptors:
RPC (here), bulk services (``bulk_paths.py``) and workers (``paths.py``).
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import (
    AsyncIterator,
    Collection,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager

import trio

from fabric.bulk.certificates import (
    IDENTITY_LIFE_SECONDS,
    Credentials,
    check_identity_certificate_untrusted,
    issue_identity_certificate,
)
from fabric.bulk.tls import make_context
from fabric.core.errors import (
    FabricError,
    LocalProtocolError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    ResourceExhausted,
    Unavailable,
)
from fabric.core.framing import FrameReader, encode_frame
from fabric.core.ids import PeerId, short
from fabric.core.signing import Signer
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.acceptors import Acceptor, AcceptRpc, RpcAcceptor
from fabric.net.arrivals import Arrivals
from fabric.net.data_config import DataConfig
from fabric.net.failures import network_errors
from fabric.net.host import Host, OpenStream
from fabric.net.offers import (
    MAX_ADDRESSES,
    OFFER_REPLY,
    OFFER_REQUEST,
    ForJob,
    ForRpc,
    Offer,
    OfferGranted,
    OfferPurpose,
    OfferRefused,
    OfferRequest,
    OfferTable,
    endpoint_of_multiaddr,
    format_address,
    ip_of_multiaddr,
    new_label,
)
from fabric.net.pacing import SocketRegistry
from fabric.net.path_race import (
    RELAY_AFTER_SECONDS,
    RPC_RELAY_AFTER_SECONDS,
    open_path,
)
from fabric.net.ports import (
    ALL_PATHS,
    PROTOCOL_OFFER,
    PROTOCOL_RPC,
    Gate,
    PathKind,
    PathProvider,
)
from fabric.net.tasks import collapse_group
from fabric.net.tcp_dial import send_all
from fabric.net.tls_stream import secure

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_data_plane(
    config: DataConfig, signer: Signer, host: Host, gate: Gate, counters: Counters
) -> AsyncIterator[DataPlane]:
    """Listen and serve offers; leaving closes the listener.

    Args:
        config: Where to listen; limits.
        signer: The identity that vouches for our certificates.
        host: Control plane: carries the offers.
        gate: Asked for every offer and again when its label comes back.
        counters: Refusals, protocol errors, drops.

    Raises:
        ConfigError: ``config.listen`` is malformed or cannot be bound.
    """
    plane = DataPlane(config, signer, host, gate, counters)
    with collapse_group():
        async with trio.open_nursery() as nursery:
            await nursery.start(plane.registry.run)
            await nursery.start(plane.run)
            yield plane
            nursery.cancel_scope.cancel()


class DataPlane:
    """Opens and accepts connections; also the RPC service's ``Connector``.

    Attributes:
        registry: Every socket that is open: its budget, its traffic, its end.
    """

    def __init__(
        self,
        config: DataConfig,
        signer: Signer,
        host: Host,
        gate: Gate,
        counters: Counters,
    ) -> None:
        self.config = config
        self.peer_id = signer.peer_id
        self.counters = counters
        self._signer = signer
        self._host = host
        self._gate = gate
        self._offers = OfferTable(
            life_seconds=config.label_life_seconds,
            max_offers=config.max_offers,
            max_per_peer=config.max_offers_per_peer,
        )
        self._acceptors: dict[type[OfferPurpose], Acceptor] = {}
        self._arrivals = Arrivals(config, self, counters)
        self._provider: PathProvider | None = None
        self._open_stream: OpenStream = host.open_stream
        self._mapped: tuple[str, ...] = ()
        self.registry = SocketRegistry(config.budget)
        self._credentials = issue_identity_certificate(signer, time.time())
        self._issued = time.time()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen until cancelled; started means that the address is bound."""

        def ready() -> None:
            self._host.set_handler(PROTOCOL_OFFER, self._serve_offer)
            if self.config.share_port:
                self._host.share_listener(self._arrivals.take)
            task_status.started()

        await self._arrivals.listen(ready)

    async def accept_socket(
        self, sock: socket.socket, kind: PathKind, label_seconds: float | None = None
    ) -> None:
        """Serve a socket that a punch or a relay brought; run it in a task.

        Args:
            sock: Connected; owned.
            kind: What brought it.
            label_seconds: Its label must come within this; None is the handshake's.
        """
        seconds = self.config.handshake_timeout_seconds
        await self._arrivals.serve(sock, kind, label_seconds or seconds)

    def set_path_provider(self, provider: PathProvider) -> None:
        """Ask ``provider`` where plain dials do not lead."""
        self._provider = provider

    def set_opener(self, open_stream: OpenStream) -> None:
        """Open the streams of offers so: it may connect and attest first."""
        self._open_stream = open_stream

    def advertise(self, addresses: Sequence[str]) -> None:
        """Offer these "ip:port" too: those that a router maps to our listener."""
        self._mapped = tuple(addresses)

    @property
    def port(self) -> int:
        """The TCP port of the listener."""
        return self._arrivals.bound[0][1]

    def addresses(self) -> tuple[str, ...]:
        """Return the addresses ("ip:port") that an offer of ours names."""
        if self.config.advertise:
            return self.config.advertise[:MAX_ADDRESSES]
        own = [ip for addr in self._host.addrs() if (ip := ip_of_multiaddr(addr))]
        ours: list[str] = []
        for ip, port in self._arrivals.bound:
            if ip in ("0.0.0.0", "::"):
                same = (each for each in own if (":" in each) == (":" in ip))
                ours += (format_address(each, port) for each in same)
            else:
                ours.append(format_address(ip, port))
        found = (*ours, *self._mapped) or (format_address("127.0.0.1", self.port),)
        return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]

    def shared_addresses(self) -> tuple[str, ...]:
        """Return "ip:port" of the control plane, which takes labels too."""
        if not self.config.share_port or self.config.advertise:
            return ()
        found = map(endpoint_of_multiaddr, self._host.addrs())
        return tuple(dict.fromkeys(filter(None, found)))[:MAX_ADDRESSES]

    def serve(self, purpose: type[OfferPurpose], acceptor: Acceptor) -> None:
        """Let ``acceptor`` decide about offers of type ``purpose``."""
        if purpose in self._acceptors:
            raise LocalProtocolError(f"{purpose.__name__} has an acceptor already")
        self._acceptors[purpose] = acceptor

    def serve_rpc(self, accept: AcceptRpc) -> None:
        """Hand inbound RPC streams to ``accept``, which owns them."""
        timeout = self.config.handshake_timeout_seconds
        self.serve(ForRpc, RpcAcceptor(self.identity, accept, timeout))

    def identity(self) -> Credentials:
        """Return our identity certificate, renewed in its first half of life."""
        now = time.time()
        if not 0 <= now - self._issued < IDENTITY_LIFE_SECONDS / 2:
            self._credentials = issue_identity_certificate(self._signer, now)
            self._issued = now
        return self._credentials

    async def connect(
        self, peer: PeerId, kinds: Collection[PathKind] = ALL_PATHS
    ) -> tuple[trio.abc.Stream, PathKind]:
        """Return an authenticated stream to ``peer`` for RPC, and its kind of path.

        Raises:
            Unavailable: no control connection, or no path of ``kinds``.
            RemoteRefused: the peer's gate refuses us.
            IntegrityError: what answers is not ``peer``.
        """
        ours = self.identity()
        sock, granted, kind = await self.dial(peer, ForRpc(), ours.der, kinds)
        try:
            check_identity_certificate_untrusted(granted.certificate, peer, time.time())
            context = make_context(ours, granted.certificate, server=False)
        except BaseException:
            sock.close()
            raise
        with self._deadline(f"TLS handshake with {peer}"):
            stream = await secure(sock, context, granted.certificate, server=False)
        return stream, kind

    async def dial(
        self,
        peer: PeerId,
        purpose: OfferPurpose,
        certificate: bytes,
        kinds: Collection[PathKind] = ALL_PATHS,
    ) -> tuple[socket.socket, OfferGranted, PathKind]:
        """Return a connected, non-blocking socket whose label was sent, and its kind.

        The caller checks the granted certificate, and owns the socket.

        Raises:
            Unavailable: no control connection, no path of ``kinds``, or the peer has
                nobody for this purpose now.
            RemoteRefused: the peer refuses us.
        """
        self.registry.check(peer)
        with self._deadline(f"offer to {peer}"):
            reply = await self._ask(peer, OfferRequest(purpose, certificate))
        if isinstance(reply, OfferRefused):
            raise reply.as_error()
        hasty = isinstance(purpose, ForRpc)
        with self._deadline(f"connection to {peer}"):
            sock, kind = await open_path(
                peer,
                reply.addresses,
                self._provider,
                shared=reply.shared,
                relay_after_seconds=(
                    RPC_RELAY_AFTER_SECONDS if hasty else RELAY_AFTER_SECONDS
                ),
                kinds=kinds,
            )
            try:
                self._enter(sock, peer, purpose, kind)
                await send_all(trio.socket.from_stdlib_socket(sock), reply.label)
            except BaseException:
                sock.close()
                raise
        return sock, reply, kind

    async def disconnect(self, peer: PeerId) -> None:
        """Void the offers made to ``peer`` and cut its sockets, workers' too."""
        self._offers.forget(peer)
        self.registry.shut_down(peer)
        await trio.lowlevel.checkpoint()

    async def _ask(
        self, peer: PeerId, request: OfferRequest
    ) -> OfferGranted | OfferRefused:
        stream = await self._open_stream(peer, PROTOCOL_OFFER)
        try:
            await stream.send_all(encode_frame(OFFER_REQUEST.encode(request)))
            frame = await _receive_frame_untrusted(stream, OFFER_REPLY.max_bytes)
            return OFFER_REPLY.decode_untrusted(frame)
        finally:
            await trio.aclose_forcefully(stream)

    async def _serve_offer(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        reply: OfferGranted | OfferRefused
        try:
            with self._deadline(f"offer request of {peer}"):
                frame = await _receive_frame_untrusted(stream, OFFER_REQUEST.max_bytes)
                request = OFFER_REQUEST.decode_untrusted(frame)
                try:
                    reply = self._grant_untrusted(peer, request)
                except FabricError as exc:
                    self.counters.add(REFUSALS, label=exc.code)
                    reply = OfferRefused.of(exc)
                await stream.send_all(encode_frame(OFFER_REPLY.encode(reply)))
        except RemoteProtocolError as exc:
            self.counters.add(PROTOCOL_ERRORS, label="offer")
            logger.info("offer.malformed peer=%s reason=%s", short(peer), exc.reason)
        except Unavailable:
            logger.debug("offer.broken peer=%s", short(peer))

    def _grant_untrusted(self, peer: PeerId, request: OfferRequest) -> OfferGranted:
        self._check_gate(peer, request.purpose)
        self.registry.check(peer)
        acceptor = self._acceptors.get(type(request.purpose))
        if acceptor is None:
            raise Unavailable("nobody here serves this purpose", code="E_NO_SERVICE")
        der, ours = acceptor.admit_untrusted(peer, request, time.time())
        label = new_label()
        offer = Offer(peer, request.purpose, request.certificate, ours)
        self._offers.add(label, offer, trio.current_time())
        return OfferGranted(label, der, self.addresses(), self.shared_addresses())

    def _enter(
        self, sock: socket.socket, peer: PeerId, purpose: OfferPurpose, kind: PathKind
    ) -> None:
        """Pace and watch ``sock`` from now on; a worker's leaves this process."""
        leaves = isinstance(purpose, ForJob)
        self.registry.add(sock, peer, kind, leaves=leaves)

    def _check_gate(self, peer: PeerId, purpose: OfferPurpose) -> None:
        protocol = PROTOCOL_RPC if isinstance(purpose, ForRpc) else PROTOCOL_OFFER
        decision = self._gate.allows(peer, protocol)
        if not decision.allowed:
            raise RemoteRefused(
                decision.reason, code=decision.code, next_step=decision.next_step
            )

    def claim(self, label: bytes, sock: socket.socket) -> bool:
        """Take ``sock`` if ``label`` is the nonce of a punch that dials back."""
        if label in self._offers or self._provider is None:
            return False
        return self._provider.claim(label, sock)

    def redeem(self, label: bytes) -> Offer:
        """Return and close the offer of ``label``; what changed since it counts."""
        offer = self._offers.redeem(label, trio.current_time())
        self._check_gate(offer.peer, offer.purpose)
        return offer

    async def take(self, offer: Offer, sock: socket.socket, kind: PathKind) -> None:
        """Hand ``sock`` to the acceptor of the offer's purpose, within the budget."""
        try:
            self._enter(sock, offer.peer, offer.purpose, kind)
        except ResourceExhausted:
            sock.close()
            raise
        await self._acceptors[type(offer.purpose)].take(offer, sock, kind)

    @contextmanager
    def _deadline(self, what: str) -> Iterator[None]:
        """Bound a step of the handshake; too slow is a PeerTimeout that names it."""
        try:
            with (
                network_errors(what),
                trio.fail_after(self.config.handshake_timeout_seconds),
            ):
                yield
        except trio.TooSlowError as exc:
            raise PeerTimeout(f"{what} took too long") from exc


async def _receive_frame_untrusted(stream: trio.abc.Stream, max_bytes: int) -> bytes:
    """Return the one frame that the peer sends on this stream."""
    reader = FrameReader(max_bytes=max_bytes)
    while data := await stream.receive_some(max_bytes):
        for frame in reader.feed(data):
            return frame
    raise Unavailable("control stream closed before its message")
