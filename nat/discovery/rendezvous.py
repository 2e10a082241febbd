"""The core of a rendezvous point: who registered where, for how long, within bounds.

    REGISTER ----> valid? room? ----> (namespace, peer) -> record, expiry, serial
    DISCOVER ----> serials after the cookie's, a page at a time, and the next cookie

Each registration takes the next serial number. A cookie is (instance, namespace,
serial): "what is newer than this". The instance changes with every start, so a cookie
from before a restart is refused (E_INVALID_COOKIE) instead of hiding what came since.

Nobody is told which namespaces exist: a namespace of ours is known to members only.
Strangers are served, because two islands of one mesh may share nothing but a point of
another mesh, but they leave half of the room to the members of this one.

Source: libp2p specs, rendezvous/README.md, revision 3.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

from fabric.core.errors import IntegrityError, RemoteProtocolError
from fabric.core.ids import PeerId
from fabric.core.protobuf import (
    all_bytes,
    decode_message_untrusted,
    encode_message,
    last_bytes,
)
from nat.discovery.rendezvous_messages import (
    MAX_NAMESPACE_CHARS,
    PAGE,
    Discover,
    Found,
    Register,
    Registered,
    Request,
    Response,
    Status,
    Unregister,
)
from nat.discovery.rendezvous_records import (
    MAX_ADDRS,
    PeerRecord,
    Sighting,
    addrs_to_bytes,
    id_from_bytes_untrusted,
    id_to_bytes,
    open_record_untrusted,
)
from nat.multiaddr_bytes import decode_multiaddrs_untrusted

DEFAULT_TTL_SECONDS = 2 * 3600
MAX_TTL_SECONDS = 72 * 3600
"""Spec, "Registration Lifetime"."""
MIN_TTL_SECONDS = 60
"""Below the spec's recommendation of 2 h: a peer may know that it leaves soon."""
RATE_PER_SECOND = 1.0
BURST = 30
"""Requests of one peer: registering and asking once a minute is the honest use."""
_INSTANCE_BYTES = 8
_TAG_BYTES = 8
_SERIAL_BYTES = 8


@dataclass(frozen=True)
class PointLimits:
    """What a point keeps for others; see DiscoveryConfig."""

    registrations: int = 4096
    strangers: int = 2048
    per_peer: int = 16


@dataclass(frozen=True)
class Registration:
    """One peer in one namespace.

    Attributes:
        record: Its addresses.
        raw: What it registered, when that can be verified by others.
        serial: Grows with every registration here.
        expires_at: Monotonic seconds.
        stranger: It was no member when it registered.
    """

    record: PeerRecord
    raw: bytes
    serial: int
    expires_at: float
    stranger: bool


class RendezvousPoint:
    """See the module.

    Args:
        instance: 8 random bytes, drawn at every start.
        limits: Room.

    Attributes:
        refused: Requests refused, by status name.
    """

    def __init__(self, instance: bytes, limits: PointLimits) -> None:
        if len(instance) != _INSTANCE_BYTES:
            raise ValueError(f"instance of {len(instance)} B")
        self.refused: Counter[str] = Counter()
        self._instance = instance
        self._limits = limits
        self._spaces: dict[str, dict[PeerId, Registration]] = {}
        self._of_peer: Counter[PeerId] = Counter()
        self._strangers = 0
        self._total = 0
        self._serial = 0
        self._earliest = float("inf")
        self._old_form: dict[PeerId, None] = {}
        self._budgets: dict[PeerId, tuple[float, float]] = {}

    def __len__(self) -> int:
        """Return how many registrations are kept."""
        return self._total

    def receive(
        self, peer: PeerId, request: Request, now: float, *, member: bool = False
    ) -> Response | None:
        """Serve one request of ``peer``; None has no answer.

        Args:
            peer: Who asks, as the connection authenticated it.
            request: What.
            now: Monotonic seconds.
            member: Whether it is a member of our mesh.
        """
        response: Response | None
        if not self._within_rate(peer, now, member=member):
            response = _busy(request, "too many requests, wait a minute")
        else:
            match request:
                case Register():
                    response = self._register(peer, request, now, member)
                case Unregister(namespace):
                    self._remove(namespace, peer)
                    response = None
                case Discover():
                    response = self._discover(peer, request, now)
        if response is not None and response.status is not Status.OK:
            self.refused[response.status.name] += 1
        return response

    def registered(self, namespace: str, now: float) -> tuple[Sighting, ...]:
        """Return who is in ``namespace``: for the point itself, which is a peer too."""
        space = self._spaces.get(namespace, {}).values()
        return tuple(
            Sighting(r.record, r.expires_at - now) for r in space if r.expires_at > now
        )

    def check_integrity(self) -> None:
        """Assert that the counts agree with what is kept."""
        kept = [r for space in self._spaces.values() for r in space.values()]
        assert self._total == len(kept) <= self._limits.registrations
        assert self._strangers == sum(r.stranger for r in kept)
        assert self._of_peer.total() == len(kept)
        assert all(n <= self._limits.per_peer for n in self._of_peer.values())
        assert all(self._spaces.values())
        assert len({r.serial for r in kept}) == len(kept)

    def _within_rate(self, peer: PeerId, now: float, *, member: bool) -> bool:
        limit = self._limits.registrations
        if peer not in self._budgets and len(self._budgets) >= limit:
            # idle peers have a full budget again: forgetting them costs nothing
            self._budgets = {
                p: (left, at)
                for p, (left, at) in self._budgets.items()
                if left + (now - at) * RATE_PER_SECOND < BURST
            }
            # many new identities must not keep members out: the mesh bounds those
            if len(self._budgets) >= limit and not member:
                return False
        left, at = self._budgets.get(peer, (BURST, now))
        left = min(BURST, left + (now - at) * RATE_PER_SECOND)
        allowed = left >= 1
        self._budgets[peer] = (left - 1 if allowed else left, now)
        return allowed

    def _register(
        self, peer: PeerId, request: Register, now: float, member: bool
    ) -> Registered:
        ttl = request.ttl_seconds or DEFAULT_TTL_SECONDS
        if not _is_namespace(request.namespace):
            return Registered(Status.E_INVALID_NAMESPACE, "1 to 255 characters")
        if not MIN_TTL_SECONDS <= ttl <= MAX_TTL_SECONDS:
            return Registered(
                Status.E_INVALID_TTL, f"{MIN_TTL_SECONDS} to {MAX_TTL_SECONDS} seconds"
            )
        try:
            record, raw = _read_record_untrusted(request.record)
        except (RemoteProtocolError, IntegrityError) as exc:
            return Registered(Status.E_INVALID_SIGNED_PEER_RECORD, exc.reason)
        if record.peer != peer:
            return Registered(
                Status.E_NOT_AUTHORIZED, "a peer can register only itself"
            )
        held = self._spaces.get(request.namespace, {}).get(peer)
        if held is not None and record.seq < held.record.seq:
            # RFC 0003, "Peer Store APIs": a record never replaces a newer one
            return Registered(Status.E_INVALID_SIGNED_PEER_RECORD, "an older record")
        if held is None and not self._has_room(peer, now, member):
            return Registered(Status.E_UNAVAILABLE, "no room, ask another point")
        self._note_form(peer, old=not raw)
        self._add(request.namespace, record, raw, now + ttl, member)
        return Registered(Status.OK, "", ttl)

    def _has_room(self, peer: PeerId, now: float, member: bool) -> bool:
        if self._is_full(peer, member) and now >= self._earliest:
            self._expire(now)
        return not self._is_full(peer, member)

    def _is_full(self, peer: PeerId, member: bool) -> bool:
        if self._of_peer[peer] >= self._limits.per_peer:
            return True
        if self._total >= self._limits.registrations:
            return True
        return not member and self._strangers >= self._limits.strangers

    def _add(
        self, namespace: str, record: PeerRecord, raw: bytes, until: float, member: bool
    ) -> None:
        self._remove(namespace, record.peer)
        self._serial += 1
        registration = Registration(record, raw, self._serial, until, not member)
        # the newest is last, so a page is a slice from the end of what is known
        self._spaces.setdefault(namespace, {})[record.peer] = registration
        self._of_peer[record.peer] += 1
        self._total += 1
        self._strangers += not member
        self._earliest = min(self._earliest, until)

    def _remove(self, namespace: str, peer: PeerId) -> None:
        space = self._spaces.get(namespace, {})
        held = space.pop(peer, None)
        if held is None:
            return
        if not space:
            del self._spaces[namespace]
        self._total -= 1
        self._strangers -= held.stranger
        self._of_peer[peer] -= 1
        if not self._of_peer[peer]:
            del self._of_peer[peer]
            self._old_form.pop(peer, None)

    def _expire(self, now: float) -> None:
        gone = [
            (namespace, peer)
            for namespace, space in self._spaces.items()
            for peer, registration in space.items()
            if registration.expires_at <= now
        ]
        for namespace, peer in gone:
            self._remove(namespace, peer)
        self._earliest = min(
            (r.expires_at for space in self._spaces.values() for r in space.values()),
            default=float("inf"),
        )

    def _note_form(self, peer: PeerId, *, old: bool) -> None:
        """Remember who speaks the old revision: it is answered likewise."""
        if old:
            self._old_form[peer] = None
        else:
            self._old_form.pop(peer, None)

    def _discover(self, peer: PeerId, request: Discover, now: float) -> Found:
        if not _is_namespace(request.namespace):
            # the spec lists every namespace here; ours are known to members only
            return Found(Status.E_INVALID_NAMESPACE, "name a namespace")
        since = self._read_cookie(request.namespace, request.cookie)
        if since is None:
            return Found(Status.E_INVALID_COOKIE, "ask again without a cookie")
        space = self._spaces.get(request.namespace, {})
        newer = [
            r for r in space.values() if r.serial > since and r.expires_at > now
        ]  # in the order of their serials
        page = newer[: min(request.limit or PAGE, PAGE)]
        last = page[-1].serial if page else since
        old = peer in self._old_form
        return Found(
            Status.OK,
            registrations=tuple(
                Register(
                    request.namespace,
                    _in_old_form(r.record) if old or not r.raw else r.raw,
                    max(1, int(r.expires_at - now)),
                )
                for r in page
            ),
            cookie=self._cookie(request.namespace, last),
        )

    def _cookie(self, namespace: str, serial: int) -> bytes:
        return self._instance + _tag(namespace) + serial.to_bytes(_SERIAL_BYTES, "big")

    def _read_cookie(self, namespace: str, cookie: bytes) -> int | None:
        if not cookie:
            return 0
        head = self._instance + _tag(namespace)
        if len(cookie) != len(head) + _SERIAL_BYTES or not cookie.startswith(head):
            return None
        return int.from_bytes(cookie[len(head) :], "big")


def _is_namespace(text: str) -> bool:
    return 0 < len(text) <= MAX_NAMESPACE_CHARS


def _tag(namespace: str) -> bytes:
    return blake2b(namespace.encode(), digest_size=_TAG_BYTES).digest()


def _busy(request: Request, text: str) -> Response | None:
    match request:
        case Register():
            return Registered(Status.E_UNAVAILABLE, text)
        case Discover():
            return Found(Status.E_UNAVAILABLE, text)
        case Unregister():
            return None


def _read_record_untrusted(data: bytes) -> tuple[PeerRecord, bytes]:
    """Return the record, and its envelope if it came in one.

    The old revision's PeerInfo {1: id, 2: addrs} has no signature in field 5.
    """
    fields = decode_message_untrusted(data)
    if 5 in fields:
        return open_record_untrusted(data), data
    peer = id_from_bytes_untrusted(last_bytes(fields, 1))
    addrs = decode_multiaddrs_untrusted(all_bytes(fields, 2)[:MAX_ADDRS])
    return PeerRecord(peer, 0, addrs), b""


def _in_old_form(record: PeerRecord) -> bytes:
    raws = addrs_to_bytes(record.addrs, record.peer)
    return encode_message([(1, id_to_bytes(record.peer)), *((2, raw) for raw in raws)])
