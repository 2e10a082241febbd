"""Offers, labels and TLS on real loopback sockets, under fake control streams."""

import socket
import ssl
import threading
import time
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import memory_stream_pair

from fabric.bulk.certificates import issue_identity_certificate
from fabric.bulk.tls import ACCEPTED, handshake, make_context
from fabric.core.errors import (
    ConfigError,
    IntegrityError,
    NoRoute,
    RemoteProtocolError,
    RemoteRefused,
    Unavailable,
)
from fabric.core.framing import encode_frame
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import Counters
from fabric.net.bulk_paths import open_bulk_paths
from fabric.net.data_config import DataConfig
from fabric.net.data_plane import open_data_plane
from fabric.net.offers import OFFER_REQUEST, ForBulk, ForRpc, OfferRequest
from fabric.net.ports import ALLOWED, PROTOCOL_OFFER, PROTOCOL_RPC, Decision
from fabric.net.rpc import open_rpc

DENIED = Decision(False, "E_NOT_ADMITTED", "not a member", "fabric mesh join")
SIGNERS = {name: Ed25519Signer(name.encode() * 32) for name in "abm"}
A, B, M = (SIGNERS[name].peer_id for name in "abm")


class FakeHost:
    """Control streams in memory; who is at the other end is taken on trust."""

    def __init__(self, network, peer_id):
        self.network = network
        self.peer_id = peer_id
        self.handlers = {}
        network[peer_id] = self

    def addrs(self):
        return (f"/ip4/127.0.0.1/tcp/1/p2p/{self.peer_id}",)

    def share_listener(self, take):
        pass

    def set_handler(self, protocol, handler):
        self.handlers[protocol] = handler

    async def open_stream(self, peer, protocol):
        if peer not in self.network:
            raise Unavailable(f"not connected with {peer}")
        ours, theirs = memory_stream_pair()

        async def serve():
            await self.network[peer].handlers[protocol](self.peer_id, theirs)
            await theirs.aclose()

        self.network["nursery"].start_soon(serve)
        return ours


class FakeGate:
    def __init__(self):
        self.denied = set()

    def allows(self, peer, protocol):
        return DENIED if (peer, protocol) in self.denied else ALLOWED


class Node:
    """One daemon's data plane with what stands on it."""


@asynccontextmanager
async def network(names="ab", config=DataConfig()):  # noqa: B008 - frozen
    nodes = {}
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        hosts = {"nursery": nursery}
        for name in names:
            node = nodes[SIGNERS[name].peer_id] = Node()
            node.signer, node.gate, node.counters = (
                SIGNERS[name],
                FakeGate(),
                Counters(),
            )
            node.host = FakeHost(hosts, node.signer.peer_id)
            node.plane = await stack.enter_async_context(
                open_data_plane(
                    config, node.signer, node.host, node.gate, node.counters
                )
            )
            node.rpc = await stack.enter_async_context(
                open_rpc(
                    config.rpc,
                    node.signer.peer_id,
                    node.plane,
                    node.gate,
                    node.counters,
                )
            )
            node.plane.serve_rpc(node.rpc.accept)
            node.bulk = await stack.enter_async_context(open_bulk_paths(node.plane))
            node.rpc.register("x.echo", lambda peer, request: request)
        with trio.fail_after(20):
            yield nodes
        nursery.cancel_scope.cancel()


async def until(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - other threads have no events
            await trio.sleep(0.005)


async def test_rpc_runs_over_mutual_tls():
    async with network() as nodes:
        assert await nodes[A].rpc.call(B, "x.echo", b"hello") == b"hello"
        assert await nodes[B].rpc.call(A, "x.echo", bytes(1 << 20)) == bytes(1 << 20)
        assert nodes[A].rpc.connected() == {B}
        stream = nodes[B].rpc._links.live(A)._stream
        assert stream.version() == "TLSv1.3"
        await until(lambda: nodes[A].rpc.rtt_seconds(B) is not None)


async def test_lost_is_announced_when_the_peer_goes():
    async with network() as nodes:
        await nodes[A].rpc.call(B, "x.echo", b"")
        lost = nodes[A].rpc.lost()
        await nodes[B].rpc.disconnect(A)
        assert await lost.receive() == B


async def test_refusal_of_the_gate_reaches_the_dialler():
    async with network() as nodes:
        nodes[B].gate.denied.add((A, PROTOCOL_RPC))
        with pytest.raises(RemoteRefused) as info:
            await nodes[A].rpc.call(B, "x.echo", b"")
        assert info.value.code == "E_NOT_ADMITTED"
        assert info.value.next_step == "fabric mesh join"
        assert nodes[B].counters.snapshot()["refusals_total:E_NOT_ADMITTED"] == 1


async def test_a_decision_between_offer_and_connection_counts():
    async with network() as nodes:
        ours = nodes[A].plane.identity()
        original = nodes[B].plane._grant_untrusted

        def grant_then_revoke(peer, request):
            granted = original(peer, request)
            nodes[B].gate.denied.add((A, PROTOCOL_OFFER))
            return granted

        nodes[B].plane._grant_untrusted = grant_then_revoke
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: None)
        with pytest.raises(Unavailable):
            await nodes[A].bulk.dial_bulk(B, "s")
        assert ours.der  # the handshake never began


async def test_not_connected_and_unserved_are_unavailable():
    async with network() as nodes:
        with pytest.raises(Unavailable, match="not connected"):
            await nodes[A].rpc.call(M, "x.echo", b"")
        with pytest.raises(Unavailable) as info:
            await nodes[A].bulk.dial_bulk(B, "nothing")
        assert info.value.code == "E_NO_SERVICE"


async def test_offer_with_another_peers_certificate_is_refused():
    async with network("abm") as nodes:
        stolen = nodes[A].plane.identity().der
        with pytest.raises(RemoteRefused) as info:
            await nodes[M].plane.dial(B, ForRpc(), stolen)
        assert info.value.code == "E_INTEGRITY"


async def test_an_answer_with_another_peers_certificate_is_refused():
    async with network("abm") as nodes:
        nodes[B].plane._credentials = nodes[M].plane.identity()
        with pytest.raises(IntegrityError):
            await nodes[A].rpc.call(B, "x.echo", b"")


async def test_malformed_offer_is_counted_and_answered_by_silence():
    async with network() as nodes:
        for data in (encode_frame(b"\xff" * 20), b"\xff" * 20):
            stream = await nodes[A].host.open_stream(B, PROTOCOL_OFFER)
            await stream.send_all(data)
            assert await stream.receive_some() == b""
        assert nodes[B].counters.snapshot()["protocol_errors_total:offer"] == 2


async def spend(nodes, label_of):
    """Dial B's bulk service by hand; ``label_of`` may tamper with the label."""
    ours = nodes[A].plane.identity()
    sock, granted, _ = await nodes[A].plane.dial(B, ForBulk("s"), ours.der)
    host, port = granted.addresses[0].split(":")

    def replay():
        sock.setblocking(True)
        with handshake(
            sock, ours, granted.certificate, server=False, timeout_seconds=5
        ):
            pass
        with socket.create_connection((host, int(port))) as second:
            second.settimeout(5)
            second.sendall(label_of(granted.label))
            try:
                return second.recv(1)
            except ConnectionResetError:
                return b""

    return await trio.to_thread.run_sync(replay)


@pytest.mark.parametrize(
    "label_of", [lambda label: label, lambda label: bytes(16)], ids=["replay", "guess"]
)
async def test_replayed_or_guessed_label_is_closed_and_counted(label_of):
    async with network() as nodes:
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: None)
        assert await spend(nodes, label_of) == b""
        await until(
            lambda: nodes[B].counters.snapshot().get("protocol_errors_total:data") == 1
        )


async def test_a_thief_of_the_label_without_the_key_gets_nothing():
    async with network() as nodes:
        served = []
        nodes[B].bulk.serve_bulk("s", lambda sock, peer: served.append(peer))
        ours = nodes[A].plane.identity()
        sock, granted, _ = await nodes[A].plane.dial(B, ForBulk("s"), ours.der)
        thief = issue_identity_certificate(SIGNERS["m"], time.time())

        def steal():
            sock.setblocking(True)
            with make_context(thief, granted.certificate, server=False).wrap_socket(
                sock
            ) as tls:
                return tls.recv(1)

        with pytest.raises(ssl.SSLError):
            assert await trio.to_thread.run_sync(steal) != ACCEPTED
        assert served == []


@pytest.mark.slow
async def test_silent_and_surplus_connections_hold_nothing_back():
    config = DataConfig(handshake_timeout_seconds=0.3, max_pending_connections=2)
    async with network(config=config) as nodes:
        host, port = nodes[B].plane.addresses()[0].split(":")
        silent = [await trio.open_tcp_stream(host, int(port)) for _ in range(2)]
        await until(lambda: nodes[B].plane._arrivals.pending == 2)
        surplus = await trio.open_tcp_stream(host, int(port))
        assert await silent[0].receive_some() == b""  # the oldest makes room
        assert nodes[B].counters.snapshot()["dropped_total:pending_connections"] == 1
        assert await surplus.receive_some() == b""  # closed after the timeout
        assert await nodes[A].rpc.call(B, "x.echo", b"fine") == b"fine"
        for stream in [*silent, surplus]:
            await stream.aclose()


async def test_bulk_moves_bytes_between_threads():
    async with network() as nodes:
        data = bytes(range(256)) * (8 << 10)  # 2 MiB

        def upload(sock, peer):
            assert peer == A
            buffer = bytearray(len(data))
            view = memoryview(buffer)
            while len(view):
                view = view[sock.recv_into(view) :]
            sock.sendall(b"same" if buffer == data else b"diff")

        nodes[B].bulk.serve_bulk("upload", upload)
        sock = await nodes[A].bulk.dial_bulk(B, "upload")

        def push():
            sock.sendall(data)
            answer = bytearray(4)
            sock.recv_into(answer)
            sock.close()
            return answer

        assert await trio.to_thread.run_sync(push) == b"same"


async def test_bulk_to_ourselves_needs_no_network():
    async with network("a") as nodes:
        nodes[A].bulk.serve_bulk("s", lambda sock, peer: sock.sendall(b"hi"))
        sock = await nodes[A].bulk.dial_bulk(A, "s")
        assert sock.family == socket.AF_UNIX
        buffer = bytearray(2)
        await trio.to_thread.run_sync(sock.recv_into, buffer)
        sock.close()
        assert buffer == b"hi"


async def test_bulk_connections_are_bounded_and_disconnect_cuts_them():
    async with network(config=DataConfig(max_bulk_connections=1)) as nodes:
        ended = threading.Event()

        def wait(sock, peer):
            try:
                sock.recv_into(bytearray(1))
            finally:
                ended.set()

        nodes[B].bulk.serve_bulk("wait", wait)
        sock = await nodes[A].bulk.dial_bulk(B, "wait")
        with pytest.raises(Unavailable) as info:
            await nodes[A].bulk.dial_bulk(B, "wait")
        assert info.value.code == "E_BUSY"
        await nodes[B].bulk.disconnect(A)
        await until(ended.is_set)
        await until(lambda: not nodes[B].bulk._live)
        sock.close()


async def test_leaving_ends_the_threads_of_bulk_handlers():
    ended = threading.Event()

    def wait(sock, peer):
        try:
            sock.recv_into(bytearray(1))
        finally:
            ended.set()

    async with network() as nodes:
        nodes[B].bulk.serve_bulk("wait", wait)
        sock = await nodes[A].bulk.dial_bulk(B, "wait")
    await until(ended.is_set)
    sock.close()


async def test_a_bug_in_a_bulk_handler_is_counted():
    async with network() as nodes:

        def broken(sock, peer):
            raise KeyError("oops")

        nodes[B].bulk.serve_bulk("bug", broken)
        sock = await nodes[A].bulk.dial_bulk(B, "bug")
        await until(lambda: nodes[B].counters.snapshot().get("bugs_total") == 1)
        sock.close()


async def test_addresses_come_from_the_host_when_listening_everywhere():
    async with network("a", DataConfig(listen="0.0.0.0:0")) as nodes:
        (address,) = nodes[A].plane.addresses()
        assert address.startswith("127.0.0.1:")
    async with network("a", DataConfig(advertise=("1.2.3.4:5",))) as nodes:
        assert nodes[A].plane.addresses() == ("1.2.3.4:5",)


async def test_no_address_answers_lists_each_with_its_error():
    async with network() as nodes:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        nodes[B].plane.addresses = lambda: (f"127.0.0.1:{port}", f"[::1]:{port}")
        with pytest.raises(NoRoute, match=rf"127\.0\.0\.1:{port}.*"):
            await nodes[A].rpc.call(B, "x.echo", b"")


async def test_identity_certificate_is_renewed_in_time():
    async with network("a") as nodes:
        plane = nodes[A].plane
        first = plane.identity()
        assert plane.identity() is first
        plane._issued -= 4 * 86400
        assert plane.identity().der != first.der


async def test_an_address_that_cannot_be_bound_is_the_operators_business():
    async def listen(text):
        config, host = DataConfig(listen=text), FakeHost({}, A)
        async with open_data_plane(config, SIGNERS["a"], host, FakeGate(), Counters()):
            pass

    with pytest.raises(ConfigError, match="nonsense"):
        await listen("nonsense")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError) as info:
            await listen(f"127.0.0.1:{taken.getsockname()[1]}")
    assert info.value.code == "E_LISTEN"


async def test_certificate_that_does_not_parse_is_refused_by_code():
    async with network() as nodes:
        stream = await nodes[A].host.open_stream(B, PROTOCOL_OFFER)
        request = OfferRequest(ForRpc(), b"nonsense")
        await stream.send_all(encode_frame(OFFER_REQUEST.encode(request)))
        assert b"E_PROTOCOL" in await stream.receive_some()
        with pytest.raises(RemoteProtocolError):
            nodes[B].plane._acceptors[ForRpc].admit_untrusted(A, request, time.time())
