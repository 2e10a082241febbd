"""Evidence: what holds, what does not, and that nothing makes the appraisal raise."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attestation.listing import measure_installed, package_roots, read_files
from attestation.software import (
    BROKEN_CHAIN,
    CHANNEL_MISMATCH,
    POLICY_VIOLATION,
    AppraisalPolicy,
    Binding,
    MeasuredFile,
    accepted,
    appraise_untrusted,
    incriminating,
    make_evidence,
    measure,
)
from fabric.core.digest import digest
from fabric.core.signing import DOMAIN_ENTRY, Ed25519Signer

PROVER, OTHER, VERIFIER = (Ed25519Signer(bytes([n]) * 32) for n in (1, 2, 3))
MEASUREMENT = b"\5" * 32
BINDING = Binding(b"n" * 32, PROVER.peer_id, VERIFIER.peer_id, b"c" * 32)
RAW = make_evidence(PROVER, MEASUREMENT, "0.1.0", BINDING)
ANY = AppraisalPolicy()


def codes(findings):
    return [(f.component, f.code) for f in findings]


def test_genuine_evidence_is_accepted_and_reported():
    findings = appraise_untrusted(RAW, BINDING, ANY)
    assert accepted(findings)
    assert codes(findings) == [("measurement", "unchecked")]
    assert MEASUREMENT.hex() in findings[0].message


@pytest.mark.parametrize(
    ("change", "component", "code"),
    [
        ({"nonce": b"m" * 32}, "nonce", BROKEN_CHAIN),
        ({"verifier": OTHER.peer_id}, "verifier", BROKEN_CHAIN),
        ({"prover": OTHER.peer_id}, "signature", BROKEN_CHAIN),
        ({"channel_binding": b"d" * 32}, "channel", CHANNEL_MISMATCH),
    ],
)
def test_evidence_for_anything_else_is_refused(change, component, code):
    expected = msgspec.structs.replace(BINDING, **change)
    findings = appraise_untrusted(RAW, expected, ANY)
    assert not accepted(findings)
    assert codes(findings) == [(component, code)]
    assert incriminating(findings) == (code == BROKEN_CHAIN)


def test_a_peer_that_signs_anothers_name_is_refused():
    lie = msgspec.structs.replace(BINDING, prover=OTHER.peer_id)
    raw = make_evidence(PROVER, MEASUREMENT, "0.1.0", lie)
    assert codes(appraise_untrusted(raw, BINDING, ANY)) == [("prover", BROKEN_CHAIN)]


def test_another_domains_signature_is_refused():
    class WrongDomain:
        peer_id = PROVER.peer_id
        public_key = PROVER.public_key

        def sign(self, domain, payload):
            return PROVER.sign(DOMAIN_ENTRY, payload)

    raw = make_evidence(WrongDomain(), MEASUREMENT, "0.1.0", BINDING)
    assert codes(appraise_untrusted(raw, BINDING, ANY)) == [("signature", BROKEN_CHAIN)]


def test_allow_list_decides():
    yes = AppraisalPolicy(frozenset({MEASUREMENT}))
    no = AppraisalPolicy(frozenset({b"\6" * 32}))
    assert accepted(appraise_untrusted(RAW, BINDING, yes))
    findings = appraise_untrusted(RAW, BINDING, no)
    assert not accepted(findings)
    assert codes(findings) == [("measurement", POLICY_VIOLATION)]


def test_no_findings_is_not_acceptance():
    assert not accepted([])


def test_every_bit_flip_is_refused():
    for at in range(len(RAW) * 8):
        flipped = bytearray(RAW)
        flipped[at // 8] ^= 1 << (at % 8)
        assert not accepted(appraise_untrusted(bytes(flipped), BINDING, ANY)), at


def test_truncated_extended_and_oversized_are_refused():
    for raw in (b"", RAW[:-1], RAW + b"\0", RAW * 20, b"\x91" * 900):
        findings = appraise_untrusted(raw, BINDING, ANY)
        assert not accepted(findings)
        assert findings[0].code == BROKEN_CHAIN


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_garbage_is_refused_without_raising(raw):
    assert not accepted(appraise_untrusted(raw, BINDING, ANY))


FILES = [
    MeasuredFile("a.py", 1, digest(b"a")),
    MeasuredFile("b.py", 1, digest(b"b")),
]


def test_measurement_ignores_order_and_nothing_else():
    base = measure(FILES, {"x": "1", "y": "2"})
    assert measure(reversed(FILES), {"y": "2", "x": "1"}) == base
    renamed = [MeasuredFile("c.py", 1, FILES[0].digest), FILES[1]]
    assert measure(renamed, {"x": "1", "y": "2"}) != base
    assert measure(FILES, {"x": "1", "y": "3"}) != base
    assert measure(FILES[:1], {"x": "1", "y": "2"}) != base


def test_reader_sees_every_python_file_and_each_change(tmp_path):
    package = tmp_path / "p"
    (package / "sub").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "sub" / "m.py").write_text("x = 1\n")
    (package / "data.bin").write_bytes(b"\0")
    before = read_files(package)
    assert [f.path for f in before] == ["p/__init__.py", "p/sub/m.py"]
    (package / "sub" / "m.py").write_text("x = 2\n")
    assert measure(read_files(package), {}) != measure(before, {})


def test_the_installed_product_can_be_measured():
    assert len(package_roots(["attestation", "no_such_package_here"])) == 1
    first = measure_installed(["attestation"])
    assert len(first) == 32
    assert first == measure_installed(["attestation"])
