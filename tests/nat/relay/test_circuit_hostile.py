"""Relays that lie, and circuits for nothing: no connection, no place taken for long."""

from contextlib import asynccontextmanager, suppress

import pytest
import trio

from fabric.core.errors import FabricError
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import PROTOCOL_ERRORS, REFUSALS
from fabric.net.delimited import receive_message_untrusted
from fabric.net.traversal_api import ConnectionInfo
from nat.relay.circuit_streams_service import DATA_PREFIX
from nat.relay.messages import (
    MAX_RELAY_MESSAGE_BYTES,
    HopStatus,
    Status,
    StopStatus,
    encode_hop,
)
from tests.nat.relay.lying_relay import LyingRelay, fake_relay, held, status
from tests.nat.relay.relay_network import SECONDS, client, peer, reserved, until

pytestmark = pytest.mark.slow


@asynccontextmanager
async def lying(**settings):
    async with peer() as made, client(**settings) as two:
        liar = LyingRelay(made)
        await reserved(two, made)
        with trio.fail_after(2 * SECONDS):
            yield liar, two


async def test_a_relay_that_makes_up_a_peer_gets_no_control_connection():
    impostor = Ed25519Signer.generate().peer_id
    async with lying() as (liar, two):
        stream, answer = await liar.stop(two.id, impostor)
        assert answer == StopStatus(Status.OK)
        with suppress(FabricError):  # it can only be itself
            await liar.made.host.adopt(two.id, stream, _outbound())
        await until(lambda: two.counted(f"{PROTOCOL_ERRORS}:E_WRONG_PEER") == 1)
        assert impostor not in two.host.connected()


def _outbound():
    return ConnectionInfo(kind="relay", outbound=True)


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1", b"\x00fabric-dada\n", b"\x13" + b"garbage" * 3, b"\xff"],
)
async def test_a_circuit_for_nothing_that_we_know_is_closed(first):
    claimed = Ed25519Signer.generate().peer_id
    async with lying() as (liar, two):
        stream, answer = await liar.stop(two.id, claimed, first)
        assert answer == StopStatus(Status.OK)
        with suppress(trio.BrokenResourceError):
            await drain(stream)  # it ends
        assert two.host.connected() == {liar.made.id}
        assert not two.circuits._inbound._open


async def drain(stream):
    while await stream.receive_some():
        pass


async def test_silent_circuits_take_half_of_the_places_at_most_and_not_for_long():
    names = [Ed25519Signer.generate().peer_id for _ in range(6)]
    async with lying(max_inbound=8, first_bytes_seconds=0.5) as (liar, two):
        answers = [await liar.stop(two.id, name) for name in names]
        given = [answer.status for _, answer in answers]
        assert given.count(Status.OK) == 4
        assert given.count(Status.RESOURCE_LIMIT_EXCEEDED) == 2
        assert two.counted(f"{REFUSALS}:E_CIRCUITS_FULL") == 2
        await until(lambda: not two.circuits._inbound._open)
        for stream, _ in answers:
            await stream.aclose()


async def test_circuits_come_from_members_and_relays_that_we_asked_only():
    async with client() as two, peer() as made:
        liar = LyingRelay(made)
        two.gate.strangers.add(made.id)
        await made.host.connect(two.id, two.host.addrs())
        claimed = Ed25519Signer.generate().peer_id
        with trio.fail_after(SECONDS):
            _, answer = await liar.stop(two.id, claimed, DATA_PREFIX)
        assert answer == StopStatus(Status.PERMISSION_DENIED)
        assert two.counted(f"{REFUSALS}:E_CIRCUIT_UNEXPECTED") == 1


async def test_what_a_relay_says_about_its_addresses_is_not_believed():
    async with peer() as made, client() as two:
        victim = f"/ip4/203.0.113.5/tcp/25/p2p/{made.id}"
        LyingRelay(made, addrs=(victim, f"/ip4/127.0.0.1/tcp/9/p2p/{made.id}"))
        await reserved(two, made)
        assert two.announced == (
            f"{made.host.addrs()[0]}/p2p-circuit",
            f"/ip4/127.0.0.1/tcp/9/p2p/{made.id}/p2p-circuit",
        )


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff\xff\xff",
        b"\x00",
        encode_hop(HopStatus(status=Status.OK)),  # and no reservation
        encode_hop(HopStatus(status=999)),
        b"",
    ],
)
async def test_a_relay_that_answers_nonsense_is_not_held(answer):
    async def serve(peer, stream):
        await receive_message_untrusted(stream, MAX_RELAY_MESSAGE_BYTES)
        await stream.send_all(answer)

    async with fake_relay(serve) as made, client() as two:
        two.circuits.set_candidates({made.id: made.host.addrs()})
        await until(lambda: any(each.why for each in status(two)))
        assert held(two) == frozenset()
        assert two.announced == ()
