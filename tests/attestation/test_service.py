"""Admission end to end over memory streams, and every way it is refused."""

import pytest
import trio

from attestation.admission import E_NOT_ATTESTED, Side
from attestation.config import AttestationConfig
from attestation.messages import (
    CODEC,
    MAX_INBOUND_BYTES,
    Admitted,
    Challenge,
    Hello,
    Proof,
    Refused,
)
from attestation.states import State, Tier
from attestation.stream_service import MessageStream
from fabric.core.errors import (
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.framing import encode_frame
from fabric.core.ids import MeshId
from fabric.net.ports import PROTOCOL_ATTEST, PROTOCOL_RPC, Decision


async def test_both_sides_end_with_a_standing_and_an_open_gate(pair):
    joiner, verifier = pair
    assert not verifier.gate.allows(joiner.peer, PROTOCOL_RPC).allowed
    admitted = await joiner.service.seek(verifier.peer)
    assert admitted.tier is Tier.SOFTWARE
    assert verifier.state(joiner) is State.TRUSTED
    assert joiner.state(verifier) is State.TRUSTED
    assert verifier.gate.allows(joiner.peer, PROTOCOL_RPC).allowed
    assert joiner.gate.allows(verifier.peer, PROTOCOL_RPC).allowed
    assert verifier.entry() in joiner.grants.entries
    assert [v.subject for v in verifier.verdicts.recorded] == [joiner.peer]
    assert len(verifier.verdicts.recorded[0].evidence_digest) == 32


async def test_a_routine_pass_records_no_verdict(pair):
    joiner, verifier = pair
    for _ in range(3):
        await joiner.service.seek(verifier.peer)
    assert len(verifier.verdicts.recorded) == 1
    assert len(joiner.verdicts.recorded) == 1


async def test_without_an_invite_refused_with_the_next_step(pair):
    joiner, verifier = pair
    joiner.grants.credential.clear()
    with pytest.raises(RemoteRefused) as refused:
        await joiner.service.seek(verifier.peer)
    assert refused.value.code == "E_NOT_ADMITTED"
    assert refused.value.reason
    assert "fabric invite" in refused.value.next_step
    assert verifier.state(joiner) is State.UNKNOWN
    assert verifier.counters.snapshot()["refusals_total:E_NOT_ADMITTED"] == 1


async def test_an_exhausted_invite_is_refused_in_the_stores_words(pair):
    joiner, verifier = pair
    joiner.grants.credential[:] = [b"redemption of an exhausted invite"]
    verifier.grants.refusal = Decision(
        allowed=False,
        code="E_INVITE_EXHAUSTED",
        reason="the invite was used 3 of 3 times",
        next_step="ask for another invite",
    )
    with pytest.raises(RemoteRefused, match="3 of 3") as refused:
        await joiner.service.seek(verifier.peer)
    assert refused.value.code == "E_INVITE_EXHAUSTED"


async def test_another_mesh_is_refused(network, make_node, pair):
    _, verifier = pair
    stranger = make_node(network, mesh=MeshId("cd" * 32))
    stranger.grants.credential.append(stranger.entry())
    await network.nursery.start(stranger.service.run)
    network.connect(stranger.peer, verifier.peer)
    with pytest.raises(RemoteRefused) as refused:
        await stranger.service.seek(verifier.peer)
    assert refused.value.code == "E_WRONG_MESH"
    assert stranger.entry() not in verifier.grants.entries


async def test_measurement_outside_the_allow_list_quarantines(network, make_node, pair):
    joiner, _ = pair
    strict = make_node(network, allowed=frozenset({b"\1" * 32}))
    strict.grants.entries |= {strict.entry(), joiner.entry()}
    await network.nursery.start(strict.service.run)
    network.connect(joiner.peer, strict.peer)
    with pytest.raises(RemoteRefused) as refused:
        await joiner.service.seek(strict.peer)
    assert refused.value.code == E_NOT_ATTESTED
    assert "policy_violation" in refused.value.reason
    assert strict.state(joiner) is State.QUARANTINED
    assert strict.gate.allows(joiner.peer, PROTOCOL_RPC).code == "E_QUARANTINED"


async def test_the_joiner_appraises_the_verifier_too(network, make_node, pair):
    _, verifier = pair
    strict = make_node(network, allowed=frozenset({b"\1" * 32}))
    strict.grants.credential.append(strict.entry())
    network.connect(strict.peer, verifier.peer)
    with pytest.raises(IntegrityError, match="policy_violation"):
        await strict.service.seek(verifier.peer)
    assert strict.state(verifier) is State.QUARANTINED


async def test_a_verifier_that_is_no_member_is_not_believed(pair):
    joiner, verifier = pair
    verifier.grants.entries.clear()
    with pytest.raises(RemoteRefused, match="no member itself"):
        await joiner.service.seek(verifier.peer)
    assert joiner.state(verifier) is State.UNKNOWN


async def test_a_relayed_exchange_is_refused_but_accuses_nobody(pair):
    joiner, verifier = pair
    joiner.host.bindings[verifier.peer] = b"\1" * 32
    with pytest.raises(RemoteRefused, match="another connection") as refused:
        await joiner.service.seek(verifier.peer)
    assert refused.value.retry_after_seconds > 0
    assert verifier.state(joiner) is State.UNKNOWN
    assert verifier.verdicts.recorded == []


async def test_a_revoked_peer_is_refused_until_enrolled_again(pair):
    joiner, verifier = pair
    await joiner.service.seek(verifier.peer)
    assert verifier.gate.allows(joiner.peer, PROTOCOL_RPC).allowed
    verifier.service.revoke(joiner.peer, "key stolen")
    assert [p for p, _ in verifier.gate.changes()] == [joiner.peer]
    with pytest.raises(RemoteRefused, match="key stolen") as refused:
        await joiner.service.seek(verifier.peer)
    assert refused.value.code == "E_REVOKED"
    verifier.service.enrol(joiner.peer)
    await joiner.service.seek(verifier.peer)
    assert verifier.state(joiner) is State.TRUSTED


class Attacker:
    """Speaks the protocol by hand, with the joiner's identity."""

    def __init__(self, joiner, verifier):
        self.joiner, self.verifier = joiner, verifier

    async def __aenter__(self):
        host = self.joiner.host
        self.stream = await host.open_stream(self.verifier.peer, PROTOCOL_ATTEST)
        self.messages = MessageStream(self.stream, max_bytes=1 << 20)
        return self

    async def __aexit__(self, *_):
        await self.stream.aclose()

    async def challenge(self):
        credential = tuple(self.joiner.grants.credential)
        mesh = self.joiner.service._exchanges._local.mesh
        await self.messages.send(Hello(mesh, credential))
        reply = CODEC.decode_untrusted(await self.messages.receive())
        assert isinstance(reply, Challenge)
        return reply.nonce

    def evidence(self, nonce, *, verifier=None):
        local = self.joiner.service._exchanges._local
        peer = verifier or self.verifier.peer
        binding = self.joiner.host.channel_binding(self.verifier.peer, self.stream)
        return Side(local, peer, binding, b"j" * 32).evidence(nonce)

    async def prove(self, evidence):
        await self.messages.send(Proof(evidence, b"j" * 32))
        return CODEC.decode_untrusted(await self.messages.receive())


async def test_replayed_evidence_is_refused(pair):
    async with Attacker(*pair) as attacker:
        old = attacker.evidence(await attacker.challenge())
        assert isinstance(await attacker.prove(old), Admitted)
    async with Attacker(*pair) as attacker:
        await attacker.challenge()
        reply = await attacker.prove(old)
    assert isinstance(reply, Refused)
    assert "nonce" in reply.reason
    assert pair[1].state(pair[0]) is State.QUARANTINED


async def test_evidence_for_another_verifier_is_refused(pair, make_node, network):
    other = make_node(network)
    async with Attacker(*pair) as attacker:
        nonce = await attacker.challenge()
        reply = await attacker.prove(attacker.evidence(nonce, verifier=other.peer))
    assert isinstance(reply, Refused)
    assert "verifier" in reply.reason


async def test_garbage_evidence_is_refused(pair):
    async with Attacker(*pair) as attacker:
        await attacker.challenge()
        reply = await attacker.prove(b"\xc1" * 100)
    assert isinstance(reply, Refused)


@pytest.mark.parametrize(
    "wire",
    [
        encode_frame(b"\xc1\xff garbage"),
        encode_frame(CODEC.encode(Proof(b"", b"n" * 32))),
        (MAX_INBOUND_BYTES + 1).to_bytes(4, "big") + b"x",
        encode_frame(CODEC.encode(Hello("m"))) * 2,
        encode_frame(b"\x82\xa4type\xa5hello\xa4mesh" + b"\x91" * 4000),
    ],
    ids=["garbage", "out of order", "oversized", "two at once", "deep"],
)
async def test_a_broken_message_ends_the_exchange_and_is_counted(pair, wire):
    joiner, verifier = pair
    async with Attacker(joiner, verifier) as attacker:
        await attacker.stream.send_all(wire)
        with pytest.raises(Unavailable):
            await attacker.messages.receive()
    counted = verifier.counters.snapshot()
    assert counted["protocol_errors_total:attestation"] == 1
    assert verifier.state(joiner) is State.UNKNOWN


async def test_a_silent_peer_is_dropped_and_not_accused(pair, autojump_clock):
    joiner, verifier = pair
    async with Attacker(joiner, verifier) as attacker:
        await attacker.challenge()
        assert verifier.state(joiner) is State.CHALLENGED
        with pytest.raises(Unavailable):
            await attacker.messages.receive()
    assert verifier.state(joiner) is State.UNKNOWN
    assert verifier.verdicts.recorded == []
    await joiner.service.seek(verifier.peer)


async def test_a_silent_verifier_is_a_timeout(pair, autojump_clock):
    joiner, verifier = pair

    async def silence(peer, stream):
        await trio.sleep_forever()

    verifier.host.set_handler(PROTOCOL_ATTEST, silence)
    with pytest.raises(PeerTimeout):
        await joiner.service.seek(verifier.peer)
    assert joiner.state(verifier) is State.UNKNOWN


async def test_a_lying_verifier_is_refused(pair):
    joiner, verifier = pair

    async def unasked(peer, stream):
        await MessageStream(stream, max_bytes=1 << 20).send(
            Admitted(Tier.TEE, 1.0, b"", (verifier.entry(),))
        )

    verifier.host.set_handler(PROTOCOL_ATTEST, unasked)
    with pytest.raises(RemoteProtocolError, match="out of order"):
        await joiner.service.seek(verifier.peer)
    assert verifier.entry() not in joiner.grants.entries


async def test_a_challenge_flood_is_shed(pair, autojump_clock):
    joiner, verifier = pair
    for _ in range(6):
        await joiner.service.seek(verifier.peer)
    with pytest.raises(RemoteRefused) as refused:
        await joiner.service.seek(verifier.peer)
    assert refused.value.code == "E_BUSY"
    await trio.sleep(refused.value.retry_after_seconds)
    await joiner.service.seek(verifier.peer)


async def test_not_connected_is_unavailable(pair, network):
    joiner, verifier = pair
    network.disconnect(joiner.peer, verifier.peer)
    with pytest.raises(Unavailable):
        await joiner.service.seek(verifier.peer)


async def test_connected_members_keep_attesting(network, make_node, autojump_clock):
    config = AttestationConfig(reattest_interval_seconds=600)
    a, b = (make_node(network, config=config) for _ in range(2))
    for node in (a, b):
        node.grants.entries |= {a.entry(), b.entry()}
        await network.nursery.start(node.service.run)
    network.connect(a.peer, b.peer)
    await trio.sleep(5)
    for _ in range(10):
        assert (a.state(b), b.state(a)) == (State.TRUSTED, State.TRUSTED)
        assert a.gate.allows(b.peer, PROTOCOL_RPC).allowed
        await trio.sleep(500)
    network.disconnect(a.peer, b.peer)
    await trio.sleep(1201)
    assert (a.state(b), b.state(a)) == (State.UNKNOWN, State.UNKNOWN)
    assert [p for p, _ in a.gate.changes()] == [b.peer]


async def test_cancelling_an_exchange_leaves_no_trace(pair):
    joiner, verifier = pair
    with trio.CancelScope() as scope:
        scope.cancel()
        await joiner.service.seek(verifier.peer)
    assert joiner.state(verifier) is State.UNKNOWN
    assert not joiner.service._exchanges._open
