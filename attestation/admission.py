"""The two sides of an admission exchange, without I/O.

Rule 1: membership is asked before evidence. A peer without a grant costs us one lookup
and learns nothing but the refusal.
Rule 2: evidence is bound to (nonce, prover, verifier, channel), so that neither side's
can be shown to anyone else, later, or over another connection.
Rule 3: each object serves one exchange and takes its steps in order; a step out of
order is our bug, a message out of order is the peer's fault.

The shell brings fresh nonces, the channel binding and the answers of the ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto

import msgspec

from attestation.messages import (
    CODEC,
    MAX_AUTHORITY_BYTES,
    MAX_AUTHORITY_ENTRIES,
    MAX_CREDENTIAL_ENTRIES,
    MAX_ENTRY_BYTES,
    Admitted,
    Challenge,
    Hello,
    Proof,
    Refused,
)
from attestation.software import (
    AppraisalPolicy,
    Binding,
    Finding,
    Severity,
    accepted,
    appraise_untrusted,
    incriminating,
    make_evidence,
)
from attestation.states import Tier
from fabric.core.errors import LocalProtocolError, RemoteProtocolError
from fabric.core.ids import MeshId, PeerId
from fabric.core.signing import Signer
from fabric.net.ports import Decision

E_WRONG_MESH = "E_WRONG_MESH"
E_NOT_ADMITTED = "E_NOT_ADMITTED"
E_NOT_ATTESTED = "E_NOT_ATTESTED"
E_CHANNEL_CHANGED = "E_CHANNEL_CHANGED"
CHANNEL_RETRY_SECONDS = 1.0
"""By then two connections that opened at once are one."""
JOIN_STEP = "ask an admin for `fabric invite` and run `fabric join TOKEN`"


class Software(msgspec.Struct, frozen=True):
    """What we run: shown to verifiers, and the policy we hold others to."""

    measurement: bytes
    version: str
    policy: AppraisalPolicy = AppraisalPolicy()


class Local(msgspec.Struct, frozen=True):
    """Who we are in every exchange.

    Attributes:
        signer: Our identity.
        mesh: The mesh we belong to, or want to join.
        software: What we run, and the policy we hold others to.
    """

    signer: Signer
    mesh: MeshId
    software: Software


class Side(msgspec.Struct, frozen=True):
    """One end of one exchange.

    Attributes:
        local: Who we are.
        peer: The other end, authenticated by the connection.
        channel_binding: What this connection's ends, and no other, share.
        nonce: Fresh, 32 random bytes, for the other end's evidence.
    """

    local: Local
    peer: PeerId
    channel_binding: bytes
    nonce: bytes

    def evidence(self, nonce: bytes) -> bytes:
        """Return our evidence over the other end's ``nonce``."""
        signer, software = self.local.signer, self.local.software
        binding = Binding(nonce, signer.peer_id, self.peer, self.channel_binding)
        return make_evidence(signer, software.measurement, software.version, binding)

    def appraise_untrusted(self, evidence: bytes) -> list[Finding]:
        """Return what the other end's ``evidence`` over our nonce establishes."""
        own = self.local.signer.peer_id
        binding = Binding(self.nonce, self.peer, own, self.channel_binding)
        return appraise_untrusted(evidence, binding, self.local.software.policy)


class _Step(Enum):
    HELLO = auto()
    MEMBERSHIP = auto()
    PROOF = auto()
    VERDICT = auto()
    DONE = auto()


class VerifierExchange:
    """The side that decides. Call the four methods in the order they stand here."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._step = _Step.HELLO
        self._joiner_nonce = b""

    def receive_hello_untrusted(self, raw: bytes) -> Hello | Refused:
        """Return the Hello whose credential is to be checked, or a refusal to send."""
        self._take(_Step.HELLO, _Step.MEMBERSHIP)
        hello = CODEC.decode_untrusted(raw)
        if not isinstance(hello, Hello):
            raise RemoteProtocolError(f"{type(hello).__name__} instead of Hello")
        if hello.mesh != self._side.local.mesh:
            self._step = _Step.DONE
            return Refused(
                E_WRONG_MESH,
                f"this peer belongs to mesh {self._side.local.mesh[:12]}, not to "
                f"{hello.mesh[:12]!r}",
                JOIN_STEP,
            )
        return hello

    def on_membership(self, decision: Decision) -> Challenge | Refused:
        """Return what to send once the grants were asked."""
        self._take(_Step.MEMBERSHIP, _Step.PROOF)
        if not decision.allowed:
            self._step = _Step.DONE
            return refusal_of(decision)
        return Challenge(self._side.nonce)

    def receive_proof_untrusted(self, raw: bytes) -> list[Finding]:
        """Return the findings on the joiner's evidence."""
        self._take(_Step.PROOF, _Step.VERDICT)
        proof = CODEC.decode_untrusted(raw)
        if not isinstance(proof, Proof):
            raise RemoteProtocolError(f"{type(proof).__name__} instead of Proof")
        self._joiner_nonce = proof.nonce
        return self._side.appraise_untrusted(proof.evidence)

    def conclude(
        self,
        findings: Sequence[Finding],
        valid_seconds: float,
        authority: Iterable[bytes],
    ) -> Admitted | Refused:
        """Return the verdict to send."""
        self._take(_Step.VERDICT, _Step.DONE)
        if not accepted(findings):
            if not incriminating(findings):
                return Refused(
                    E_CHANNEL_CHANGED,
                    summary(findings),
                    "try again",
                    CHANNEL_RETRY_SECONDS,
                )
            return Refused(
                E_NOT_ATTESTED,
                f"evidence refused: {summary(findings)}"[:500],
                "install a release that this mesh allows; "
                "its admins set attestation.allowed_measurements",
            )
        evidence = self._side.evidence(self._joiner_nonce)
        fitting = fit_authority(authority)
        return Admitted(Tier.SOFTWARE, valid_seconds, evidence, fitting)

    def _take(self, expected: _Step, following: _Step) -> None:
        if self._step is not expected:
            raise LocalProtocolError(f"exchange is at {self._step}, not {expected}")
        self._step = following


class JoinerExchange:
    """The side that asks."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._challenged = False

    def hello(self, credential: Iterable[bytes]) -> Hello:
        """Return the opening message."""
        entries = tuple(credential)[:MAX_CREDENTIAL_ENTRIES]
        return Hello(self._side.local.mesh, entries)

    def receive_untrusted(self, raw: bytes) -> Proof | Refused | Admitted:
        """Return the proof to send next, or how the exchange ended.

        Raises:
            RemoteProtocolError: the message is malformed or out of order.
        """
        message = CODEC.decode_untrusted(raw)
        match message:
            case Refused():
                return message
            case Challenge(nonce=nonce) if not self._challenged:
                self._challenged = True
                return Proof(self._side.evidence(nonce), self._side.nonce)
            case Admitted() if self._challenged:
                return message
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} out of order")

    def appraise(self, admitted: Admitted) -> list[Finding]:
        """Return the findings on the verifier's own evidence."""
        return self._side.appraise_untrusted(admitted.evidence)


def refusal_of(decision: Decision) -> Refused:
    """Return ``decision`` as a message; a bare "no" gets the standard advice."""
    return Refused(
        (decision.code or E_NOT_ADMITTED)[:64],
        (decision.reason or "you are not a member of this mesh")[:500],
        (decision.next_step or JOIN_STEP)[:500],
    )


def summary(findings: Iterable[Finding]) -> str:
    """Return the findings that decided, in one line."""
    worst = [f for f in findings if f.severity is Severity.FATAL]
    return "; ".join(f"{f.code}: {f.component}: {f.message}" for f in worst)


def fit_authority(entries: Iterable[bytes]) -> tuple[bytes, ...]:
    """Return the first entries that fit in one Admitted.

    What is left out arrives by reconciliation, which the admitted peer may now use.
    """
    fitting: list[bytes] = []
    room = MAX_AUTHORITY_BYTES
    for entry in entries:
        room -= len(entry) + 8  # msgpack's header of a byte string has at most 5 B
        if room < 0 or len(fitting) == MAX_AUTHORITY_ENTRIES:
            break
        if len(entry) <= MAX_ENTRY_BYTES:
            fitting.append(entry)
    return tuple(fitting)
