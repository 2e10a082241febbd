"""Software evidence: a signed measurement of the installed product, and its appraisal.

The measurement is only as honest as the host that made it: it proves which identity
claims which files, fresh and for this channel, and earns :attr:`Tier.SOFTWARE` at most.
No clock, no files: ``listing.py`` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Annotated

import msgspec

from fabric.core.codec import Codec
from fabric.core.digest import digest
from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId, public_key_of
from fabric.core.signing import DOMAIN_EVIDENCE, Signer, verify

Bytes32 = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Name64 = Annotated[str, msgspec.Meta(max_length=64)]

MAX_EVIDENCE_BYTES = 1024
"""A signed software evidence has about 330 B."""

BROKEN_CHAIN = "broken_evidence_chain"
POLICY_VIOLATION = "policy_violation"
CHANNEL_MISMATCH = "channel_mismatch"
"""Right claim, other connection: a relayed exchange, or two connections of one pair
that opened at once. Refused, but not held against the prover."""


class MeasuredFile(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One installed file: path relative to the install root, size in bytes, BLAKE3."""

    path: str
    size: int
    digest: bytes


class Listing(msgspec.Struct, frozen=True, array_like=True):
    """Everything that is measured."""

    files: tuple[MeasuredFile, ...]
    dependencies: tuple[tuple[str, str], ...]
    """(distribution, version)."""


_LISTING: Codec[Listing] = Codec(Listing, max_bytes=1 << 24)


def measure(files: Iterable[MeasuredFile], dependencies: Mapping[str, str]) -> bytes:
    """Return the 32-byte measurement of a listing, whatever its order."""
    listing = Listing(tuple(sorted(files)), tuple(sorted(dependencies.items())))
    return digest(b"fabric/measurement/1\0" + _LISTING.encode(listing))


class Binding(msgspec.Struct, frozen=True):
    """What evidence must be bound to, so that it cannot be shown elsewhere or later."""

    nonce: bytes
    prover: PeerId
    verifier: PeerId
    channel_binding: bytes


class SoftwareEvidence(msgspec.Struct, frozen=True, tag="software", tag_field="kind"):
    """What the prover claims and for whom."""

    measurement: Bytes32
    version: Name64
    nonce: Bytes32
    prover: Name64
    verifier: Name64
    channel_binding: Annotated[bytes, msgspec.Meta(max_length=64)]


class SignedEvidence(msgspec.Struct, frozen=True, array_like=True):
    """The claim's exact bytes and the prover's signature over them."""

    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_EVIDENCE_BYTES)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_EVIDENCE: Codec[SoftwareEvidence] = Codec(
    SoftwareEvidence, max_bytes=MAX_EVIDENCE_BYTES
)
_SIGNED: Codec[SignedEvidence] = Codec(SignedEvidence, max_bytes=MAX_EVIDENCE_BYTES)


def make_evidence(
    signer: Signer, measurement: bytes, version: str, binding: Binding
) -> bytes:
    """Return the encoded, signed claim of ``signer`` for one challenge."""
    claim = SoftwareEvidence(
        measurement=measurement,
        version=version,
        nonce=binding.nonce,
        prover=binding.prover,
        verifier=binding.verifier,
        channel_binding=binding.channel_binding,
    )
    payload = _EVIDENCE.encode(claim)
    signature = signer.sign(DOMAIN_EVIDENCE, payload)
    return _SIGNED.encode(SignedEvidence(payload, signature))


class Severity(IntEnum):
    """What a finding means for the verdict."""

    INFO = 0
    WARNING = 1
    FATAL = 2


class Finding(msgspec.Struct, frozen=True):
    """One thing an appraisal established."""

    component: str
    severity: Severity
    code: str
    message: str


def accepted(findings: Sequence[Finding]) -> bool:
    """Return whether no finding is fatal. No findings at all is not acceptance."""
    return bool(findings) and all(f.severity < Severity.FATAL for f in findings)


def incriminating(findings: Sequence[Finding]) -> bool:
    """Return whether a fatal finding speaks against the prover itself."""
    fatal = [f for f in findings if f.severity is Severity.FATAL]
    return any(f.code != CHANNEL_MISMATCH for f in fatal)


class AppraisalPolicy(msgspec.Struct, frozen=True):
    """Which claims pass. An empty allow-list accepts, and reports, any measurement."""

    allowed_measurements: frozenset[bytes] = frozenset()


def appraise_untrusted(
    raw: bytes, expected: Binding, policy: AppraisalPolicy
) -> list[Finding]:
    """Return what ``raw`` establishes about ``expected.prover``. Never raises.

    A broken chain ends the appraisal: what an unsigned claim says is not reported.
    """
    try:
        signed = _SIGNED.decode_untrusted(raw)
        key = public_key_of(expected.prover)
    except RemoteProtocolError as exc:
        return [_broken("encoding", str(exc))]
    if not verify(key, DOMAIN_EVIDENCE, signed.payload, signed.signature):
        return [_broken("signature", "not the prover's signature over this claim")]
    try:
        claim = _EVIDENCE.decode_untrusted(signed.payload)
    except RemoteProtocolError as exc:
        return [_broken("claim", str(exc))]
    found = _appraise_binding(claim, expected)
    if not found:
        found = [_appraise_measurement(claim, policy)]
    return found


def _appraise_binding(claim: SoftwareEvidence, expected: Binding) -> list[Finding]:
    wrong = []
    if claim.nonce != expected.nonce:
        wrong.append(_broken("nonce", "not the nonce of this challenge"))
    if claim.prover != expected.prover:
        wrong.append(_broken("prover", f"made for prover {claim.prover}"))
    if claim.verifier != expected.verifier:
        wrong.append(_broken("verifier", f"made for verifier {claim.verifier}"))
    if claim.channel_binding != expected.channel_binding:
        message = "made for another connection; try again"
        wrong.append(Finding("channel", Severity.FATAL, CHANNEL_MISMATCH, message))
    return wrong


def _appraise_measurement(claim: SoftwareEvidence, policy: AppraisalPolicy) -> Finding:
    name = f"{claim.measurement.hex()} (version {claim.version})"
    if not policy.allowed_measurements:
        message = f"{name}; no allow-list is set, so any is accepted"
        return Finding("measurement", Severity.INFO, "unchecked", message)
    if claim.measurement in policy.allowed_measurements:
        return Finding("measurement", Severity.INFO, "allowed", name)
    message = f"{name} is not in the allow-list"
    return Finding("measurement", Severity.FATAL, POLICY_VIOLATION, message)


def _broken(component: str, message: str) -> Finding:
    return Finding(component, Severity.FATAL, BROKEN_CHAIN, message)
