"""One admission exchange, from either side: streams in and out, cores decide."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import trio

from attestation.admission import (
    E_CHANNEL_CHANGED,
    E_NOT_ADMITTED,
    E_NOT_ATTESTED,
    JoinerExchange,
    Local,
    Side,
    VerifierExchange,
    summary,
)
from attestation.config import AttestationConfig
from attestation.gate import E_REVOKED
from attestation.limits import AttemptLimits
from attestation.messages import (
    MAX_INBOUND_BYTES,
    MAX_MESSAGE_BYTES,
    NONCE_BYTES,
    Admitted,
    Proof,
    Refused,
)
from attestation.ports import AdmissionPorts
from attestation.software import Finding, accepted, incriminating
from attestation.standings import Standings
from attestation.states import Event, State, Tier
from attestation.stream_service import MessageStream
from fabric.core.digest import digest
from fabric.core.errors import (
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.ids import PeerId
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS, Counters
from fabric.net.host import Host
from fabric.net.ports import PROTOCOL_ATTEST

E_BUSY = "E_BUSY"


class AdmissionExchanges:
    """Runs exchanges and keeps the standings that follow from them.

    Args:
        host: Opens the control streams and knows their channel binding.
        local: Who we are.
        ports: The store of grants.
        standings: Where results are kept.
        config: Periods and bounds.
        counters: Where refusals are counted.
        clock: Monotonic seconds.
        on_attested: Told each peer whose evidence passed.
    """

    def __init__(
        self,
        host: Host,
        local: Local,
        ports: AdmissionPorts,
        standings: Standings,
        config: AttestationConfig,
        counters: Counters,
        *,
        clock: Callable[[], float],
        on_attested: Callable[[PeerId], None],
    ) -> None:
        self._host = host
        self._local = local
        self._ports = ports
        self._standings = standings
        self._config = config
        self._counters = counters
        self._clock = clock
        self._on_attested = on_attested
        self._open: Counter[PeerId] = Counter()
        self._limits = AttemptLimits(
            config.peer_attempts_per_minute,
            config.newcomer_attempts_per_minute,
            config.max_exchanges,
        )

    async def seek(self, peer: PeerId) -> Admitted:
        """Be admitted by ``peer`` and appraise it in turn; both hold a standing then.

        Bounded by ``config.exchange_timeout_seconds``. Cancelled: neither side trusts
        the other by this exchange, or the peer alone trusts us.

        Raises:
            RemoteRefused: the peer refused us, or is itself no member of the mesh.
            IntegrityError: the peer's own evidence did not hold.
            RemoteProtocolError: the peer broke the protocol.
            Unavailable: the peer cannot be reached, left, or was slow (PeerTimeout).
        """
        with self._exchange(peer):
            try:
                with trio.fail_after(self._config.exchange_timeout_seconds):
                    admitted = await self._ask(peer)
            except trio.TooSlowError as exc:
                raise PeerTimeout("the peer did not finish the admission") from exc
        self._on_attested(peer)
        return admitted

    async def serve(self, peer: PeerId, stream: trio.abc.Stream) -> None:
        """Answer one inbound exchange; the host closes the stream afterwards."""
        messages = MessageStream(stream, max_bytes=MAX_INBOUND_BYTES)
        member = self._ports.membership(peer).allowed
        wait = self._limits.begin(peer, member=member, now=self._clock())
        try:
            with trio.fail_after(self._config.exchange_timeout_seconds):
                if wait:
                    await self._refuse(messages, _busy(wait))
                    return
                try:
                    with self._exchange(peer):
                        exchange = VerifierExchange(self._side(peer, stream))
                        await self._verify(peer, messages, exchange)
                finally:
                    self._limits.end(peer)
        except RemoteProtocolError:
            self._counters.add(PROTOCOL_ERRORS, label="attestation")
        except (Unavailable, trio.TooSlowError):
            self._counters.add(REFUSALS, label="E_UNFINISHED")

    async def _ask(self, peer: PeerId) -> Admitted:
        stream = await self._host.open_stream(peer, PROTOCOL_ATTEST)
        async with stream:
            messages = MessageStream(stream, max_bytes=MAX_MESSAGE_BYTES)
            exchange = JoinerExchange(self._side(peer, stream))
            await messages.send(exchange.hello(self._ports.credential()))
            reply = exchange.receive_untrusted(await messages.receive())
            if isinstance(reply, Proof):
                await messages.send(reply)
                reply = exchange.receive_untrusted(await messages.receive())
        match reply:
            case Refused():
                raise RemoteRefused(
                    reply.reason,
                    code=reply.code,
                    next_step=reply.next_step,
                    retry_after_seconds=reply.retry_after_seconds,
                )
            case Admitted():
                self._ports.ingest_untrusted(reply.authority)
                self._appraise_verifier(peer, exchange, reply)
                return reply
            case _:
                raise RemoteProtocolError("a second challenge in one exchange")

    def _appraise_verifier(
        self, peer: PeerId, exchange: JoinerExchange, admitted: Admitted
    ) -> None:
        revoked = self._revocation(peer)
        if revoked is not None:
            raise RemoteRefused(f"revoked: {revoked}", code=E_REVOKED)
        decision = self._ports.membership(peer)
        if not decision.allowed:
            raise RemoteRefused(
                f"the peer that admitted us is no member itself: {decision.reason}",
                code=E_NOT_ADMITTED,
                next_step="join through another peer, or ask for a new invite",
            )
        findings = exchange.appraise(admitted)
        self._judge(peer, findings, admitted.evidence)
        if not accepted(findings):
            if not incriminating(findings):
                raise Unavailable(summary(findings), code=E_CHANNEL_CHANGED)
            raise IntegrityError(
                f"the peer's own evidence does not hold: {summary(findings)}",
                code=E_NOT_ATTESTED,
            )

    async def _verify(
        self, peer: PeerId, messages: MessageStream, exchange: VerifierExchange
    ) -> None:
        hello = exchange.receive_hello_untrusted(await messages.receive())
        if isinstance(hello, Refused):
            await self._refuse(messages, hello)
            return
        if hello.credential:
            self._ports.ingest_untrusted(hello.credential)
        reason = self._revocation(peer)
        if reason is not None:
            await self._refuse(messages, _revoked(reason))
            return
        challenge = exchange.on_membership(self._ports.membership(peer))
        if isinstance(challenge, Refused):
            await self._refuse(messages, challenge)
            return
        self._standings.apply(peer, Event.CHALLENGED)
        await messages.send(challenge)
        raw = await messages.receive()
        findings = exchange.receive_proof_untrusted(raw)
        self._judge(peer, findings, raw)
        valid = 2 * self._config.reattest_interval_seconds
        authority = self._ports.authority_entries() if accepted(findings) else ()
        verdict = exchange.conclude(findings, valid, authority)
        if isinstance(verdict, Refused):
            await self._refuse(messages, verdict)
            return
        self._on_attested(peer)
        await messages.send(verdict)

    def _judge(self, peer: PeerId, findings: list[Finding], evidence: bytes) -> None:
        self._standings.apply(peer, Event.CHALLENGED)
        verdict = None
        if accepted(findings):
            valid = 2 * self._config.reattest_interval_seconds
            now = self._clock()
            verdict = self._standings.accept(peer, Tier.SOFTWARE, valid, now)
        elif incriminating(findings):
            reason = summary(findings)
            verdict = self._standings.apply(peer, Event.REJECTED, reason)
        if verdict is not None:
            kept = msgspec.structs.replace(verdict, evidence_digest=digest(evidence))
            self._ports.verdicts.record(kept)

    def _revocation(self, peer: PeerId) -> str | None:
        standing = self._standings.of(peer, self._clock())
        if standing.state is State.REVOKED:
            return standing.reason
        return self._ports.verdicts.revocation(peer)

    async def _refuse(self, messages: MessageStream, refusal: Refused) -> None:
        self._counters.add(REFUSALS, label=refusal.code)
        await messages.send(refusal)

    @contextmanager
    def _exchange(self, peer: PeerId) -> Iterator[None]:
        """Note an open exchange; the last to end unanswered leaves no challenge."""
        self._open[peer] += 1
        try:
            yield
        finally:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]
                state = self._standings.of(peer, self._clock()).state
                if state is State.CHALLENGED:
                    self._standings.apply(peer, Event.UNREACHABLE)

    def _side(self, peer: PeerId, stream: trio.abc.Stream) -> Side:
        channel = self._host.channel_binding(peer, stream)
        return Side(self._local, peer, channel, os.urandom(NONCE_BYTES))


def _busy(wait: float) -> Refused:
    return Refused(
        E_BUSY,
        "too many admission attempts; this one was not looked at",
        f"wait {wait:.0f} s or ask another member",
        wait,
    )


def _revoked(reason: str) -> Refused:
    return Refused(
        E_REVOKED,
        f"revoked: {reason}"[:500],
        "ask an admin to enrol this peer again",
    )
