"""Rendezvous on streams: serve a point, and ask others' points. No policy here."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence

import trio

from fabric.core.errors import (
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId, short
from fabric.core.signing import Signer
from fabric.net.delimited import MessageStream
from fabric.net.host import Host
from nat.discovery.rendezvous import (
    DEFAULT_TTL_SECONDS,
    MAX_TTL_SECONDS,
    PointLimits,
    RendezvousPoint,
)
from nat.discovery.rendezvous_messages import (
    MAX_REQUEST_BYTES,
    MAX_RESPONSE_BYTES,
    PROTOCOL_RENDEZVOUS,
    Discover,
    Found,
    Register,
    Registered,
    Request,
    Response,
    Status,
    Unregister,
    decode_request_untrusted,
    decode_response_untrusted,
    encode_request,
    encode_response,
)
from nat.discovery.rendezvous_records import (
    Sighting,
    open_record_untrusted,
    seal_record,
)

log = logging.getLogger(__name__)

REQUEST_SECONDS = 10.0
"""A client must finish its request, and take its answer, within this."""
ANSWER_SECONDS = 10.0
"""A point must answer within this."""
MAX_REQUESTS_PER_STREAM = 16
MAX_STREAMS = 64
"""Clients served at once; each holds at most one request and one answer."""
E_RENDEZVOUS = "E_RENDEZVOUS"


class PointService:
    """Serves ``/rendezvous/1.0.0`` on a host.

    Args:
        host: Whose streams.
        limits: Room for registrations.
        is_member: Whether a peer is a member of our mesh.

    Attributes:
        point: The registrations.
    """

    def __init__(
        self, host: Host, limits: PointLimits, is_member: Callable[[PeerId], bool]
    ) -> None:
        self.point = RendezvousPoint(secrets.token_bytes(8), limits)
        self._is_member = is_member
        self._limiter = trio.CapacityLimiter(MAX_STREAMS)
        host.set_handler(PROTOCOL_RENDEZVOUS, self.serve)

    async def serve(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Answer the requests on one stream, until its end."""
        try:
            self._limiter.acquire_nowait()
        except trio.WouldBlock:
            self.point.refused["BUSY"] += 1
            return
        try:
            channel = MessageStream(stream, MAX_REQUEST_BYTES)
            for _ in range(MAX_REQUESTS_PER_STREAM):
                with trio.move_on_after(REQUEST_SECONDS):
                    if await self._serve_one(peer, channel):
                        continue
                return
        finally:
            self._limiter.release()

    async def _serve_one(self, peer: PeerId, channel: MessageStream) -> bool:
        """Answer one request; return whether another may follow."""
        try:
            data = await channel.receive_untrusted()
        except Unavailable:
            return False  # it has no more to ask
        request = decode_request_untrusted(data)
        member = self._is_member(peer)
        now = trio.current_time()
        response = self.point.receive(peer, request, now, member=member)
        if response is not None:
            await channel.send(encode_response(response))
        return True


class RendezvousClient:
    """Asks rendezvous points with which the host is connected.

    Args:
        host: Opens streams.
        signer: Signs our record.
    """

    def __init__(self, host: Host, signer: Signer) -> None:
        self._host = host
        self._signer = signer

    async def register(
        self, point: PeerId, namespace: str, addrs: Sequence[str], ttl_seconds: int
    ) -> int:
        """Be found in ``namespace`` at ``point``; return for how many seconds.

        Raises:
            RemoteRefused: the point says no; the reason has its status.
            Unavailable: not connected, or no answer.
            RemoteProtocolError: the answer is malformed.
        """
        # whole seconds may repeat within a test or a quick change of addresses
        record = seal_record(self._signer, addrs, time.time_ns() // 1_000_000)
        answer = await self._ask(point, Register(namespace, record, ttl_seconds))
        if not isinstance(answer, Registered):
            raise RemoteProtocolError("the point answered another question")
        _check_status(point, answer.status, answer.text)
        return answer.ttl_seconds or ttl_seconds

    async def discover(
        self, point: PeerId, namespace: str, cookie: bytes = b""
    ) -> tuple[list[Sighting], bytes]:
        """Return who is in ``namespace`` at ``point`` since ``cookie``, and the next.

        Records whose signature does not hold are left out: a point cannot invent peers
        nor move them. It can only withhold them.

        Raises:
            RemoteRefused: the point says no, E_INVALID_COOKIE after it restarted.
            Unavailable: not connected, or no answer.
            RemoteProtocolError: the answer is malformed.
        """
        answer = await self._ask(point, Discover(namespace, cookie=cookie))
        if not isinstance(answer, Found):
            raise RemoteProtocolError("the point answered another question")
        _check_status(point, answer.status, answer.text)
        sightings = []
        for registration in answer.registrations:
            try:
                record = open_record_untrusted(registration.record)
            except (RemoteProtocolError, IntegrityError) as exc:
                log.debug("rendezvous.bad point=%s why=%s", short(point), exc.reason)
                continue
            if registration.namespace == namespace:
                ttl = min(registration.ttl_seconds, MAX_TTL_SECONDS)
                sightings.append(Sighting(record, ttl or DEFAULT_TTL_SECONDS))
            await trio.lowlevel.checkpoint()  # each signature takes 0.1 ms
        return sightings, answer.cookie

    async def unregister(self, point: PeerId, namespace: str) -> None:
        """Be found there no more; best effort, there is no answer.

        Raises:
            FabricError: not connected.
        """
        stream = await self._host.open_stream(point, PROTOCOL_RENDEZVOUS)
        async with stream:
            channel = MessageStream(stream, MAX_RESPONSE_BYTES)
            await channel.send(encode_request(Unregister(namespace)))

    async def _ask(self, point: PeerId, request: Request) -> Response:
        try:
            with trio.fail_after(ANSWER_SECONDS):
                stream = await self._host.open_stream(point, PROTOCOL_RENDEZVOUS)
                async with stream:
                    channel = MessageStream(stream, MAX_RESPONSE_BYTES)
                    await channel.send(encode_request(request))
                    data = await channel.receive_untrusted()
        except trio.TooSlowError as exc:
            raise PeerTimeout(f"{short(point)} gave no answer") from exc
        except Unavailable as exc:
            raise Unavailable(f"{short(point)} gave no answer: {exc.reason}") from exc
        return decode_response_untrusted(data)


def _check_status(point: PeerId, status: Status, text: str) -> None:
    if status is not Status.OK:
        raise RemoteRefused(
            f"rendezvous point {short(point)}: {status.name}: {text}",
            code=E_RENDEZVOUS if status is not Status.E_INVALID_COOKIE else status.name,
            next_step="another point is asked; nothing to do",
            retry_after_seconds=60.0,
        )
