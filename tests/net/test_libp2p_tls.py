"""libp2p TLS: the handshake, with ours and with hostile peers."""

import socket
import time
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey
from OpenSSL import SSL

from fabric.bulk import certificates
from fabric.core.signing import Ed25519Signer
from fabric.core.telemetry import REFUSALS, Counters
from fabric.net.libp2p_tls import FabricTls, TlsFailure

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SECONDS = 10
pytestmark = pytest.mark.slow


class End:
    """One side: an identity, its TLS transport and what it counted."""

    def __init__(self, clock=time.time):
        self.signer = Ed25519Signer.generate()
        self.counters = Counters()
        self.id = ID.from_base58(self.signer.peer_id)
        keys = create_new_key_pair(self.signer.seed)
        self.tls = FabricTls(keys, self.signer, clock, self.counters)

    def refused(self, code):
        return self.counters.snapshot().get(f"{REFUSALS}:{code}", 0)


@asynccontextmanager
async def sockets():
    one, two = socket.socketpair()
    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (one, two)]
    async with streams[0], streams[1]:
        yield (
            RawConnection(TrioTCPStream(streams[0]), True),
            RawConnection(TrioTCPStream(streams[1]), False),
        )


class Outcome:
    """The sessions or errors of the dialling and the accepting side."""

    dialler = acceptor = None


async def shake(dialler, acceptor, wanted=None):
    """Run both sides of a handshake; return what became of each."""
    outcome = Outcome()

    async def run(name, secure, connection, *arguments):
        try:
            setattr(outcome, name, await secure(connection, *arguments))
        except HandshakeFailure as exc:
            setattr(outcome, name, exc)
            await connection.close()

    async with sockets() as (one, two):
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    run,
                    "dialler",
                    dialler.tls.secure_outbound,
                    one,
                    wanted or acceptor.id,
                )
                nursery.start_soon(run, "acceptor", acceptor.tls.secure_inbound, two)
    return outcome


async def test_both_sides_learn_the_other_and_share_a_binding():
    one, two = End(), End()
    outcome = await shake(one, two)
    assert outcome.dialler.get_remote_peer() == two.id
    assert outcome.acceptor.get_remote_peer() == one.id
    assert outcome.dialler.is_initiator
    assert not outcome.acceptor.is_initiator
    assert len(outcome.dialler.channel_binding) == 32
    assert outcome.dialler.channel_binding == outcome.acceptor.channel_binding
    again = await shake(one, two)
    assert again.dialler.channel_binding != outcome.dialler.channel_binding
    assert one.counters.snapshot() == two.counters.snapshot() == {}


@asynccontextmanager
async def sessions():
    one, two = End(), End()
    async with sockets() as raw:
        made = {}

        async def accept():
            made["two"] = await two.tls.secure_inbound(raw[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            made["one"] = await one.tls.secure_outbound(raw[0], two.id)
        yield made["one"], made["two"]


async def all_of(session, size):
    parts = bytearray()
    while len(parts) < size:
        parts += await session.read()
    return bytes(parts)


async def test_reads_are_exact_ordered_and_end_at_the_close():
    blob = bytes(range(256)) * 8192  # 2 MiB: many records
    size = len(blob)
    async with sessions() as (one, two):
        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.write, blob)
                nursery.start_soon(two.write, blob)  # both ways at once
                for sizes in ((5, 200_000), (1, 70_000)):
                    head, rest = [await two.read(n) for n in sizes]
                    assert head + rest == blob[: sum(sizes)]
                    blob = blob[sum(sizes) :]
                assert await all_of(two, len(blob)) == blob
                assert len(await all_of(one, size)) == size
            await one.close()
            assert await two.read_message() == b""
            assert await two.read(7) == b""


async def test_a_forged_record_breaks_the_connection():
    async with sessions() as (one, two):
        await one.conn.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with trio.fail_after(SECONDS), pytest.raises(Exception, match="TLS: "):
            await two.read_message()


async def test_a_wrong_peer_is_refused_before_it_learns_who_asks():
    one, two, wanted = End(), End(), End()
    outcome = await shake(one, two, wanted.id)
    assert isinstance(outcome.dialler, PeerIDMismatchesPubkey)
    assert isinstance(outcome.acceptor, TlsFailure)  # told by an alert
    assert one.refused("E_WRONG_PEER") == 1
    assert two.refused("E_TLS_HANDSHAKE") == 1


@pytest.mark.parametrize("shift", [-8 * 86400.0, 3600.0])
async def test_a_server_whose_certificate_is_out_of_its_time_is_refused(shift):
    one, two = End(), End(clock=lambda: time.time() + shift)
    outcome = await shake(one, two)
    assert "expired or not yet valid" in str(outcome.dialler)
    assert one.refused("E_TLS_CERTIFICATE") == 1


async def test_a_certificate_is_replaced_at_half_its_life():
    end, now = End(), time.time()
    context = end.tls._fresh_context(now)
    assert end.tls._fresh_context(now + 3 * 86400) is context
    assert end.tls._fresh_context(now + 4 * 86400) is not context
    assert end.tls._fresh_context(now - 1) is not context  # the clock was set back


async def dial_raw(end, context_of):
    """Let a client of our making connect to ``end``; return the handshake's error."""
    async with sockets() as (one, two):
        result = {}

        async def accept():
            try:
                await end.tls.secure_inbound(two)
            except HandshakeFailure as exc:
                result["error"] = exc
            await two.close()

        async def dial():
            connection = SSL.Connection(context_of(), None)
            connection.set_connect_state()
            try:
                while True:
                    try:
                        connection.do_handshake()
                    except SSL.WantReadError:
                        await one.write(drain(connection))
                    else:
                        await one.write(drain(connection))
                        return
                    data = await one.read(65536)
                    if not data:
                        return
                    connection.bio_write(data)
            except SSL.Error:
                return

        with trio.fail_after(SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept)
                nursery.start_soon(dial)
        return result.get("error")


def drain(connection):
    parts = []
    try:
        while True:
            parts.append(connection.bio_read(65536))
    except SSL.WantReadError:
        return b"".join(parts)


def client_context(credentials=None, alpn=(b"libp2p",), extra=(), version=None):
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_max_proto_version(version or SSL.TLS1_3_VERSION)
    context.set_verify(SSL.VERIFY_NONE)
    if alpn:
        context.set_alpn_protos(list(alpn))
    if credentials is not None:
        context.use_certificate(x509.load_der_x509_certificate(credentials.der))
        context.use_privatekey(load_pem_private_key(credentials.key_pem, None))
    for der in extra:
        context.add_extra_chain_cert(x509.load_der_x509_certificate(der))
    return context


def identity(signer=None, age=0.0):
    signer = signer or Ed25519Signer.generate()
    return certificates.issue_identity_certificate(signer, time.time() - age)


def without_extension():
    """A certificate that says nothing of libp2p."""
    key = ec.generate_private_key(ec.SECP256R1())
    other = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x")
    now = time.time()
    return certificates._self_sign(key, other, now, now + 60)


def with_another_key():
    """The extension of one certificate around the key of another."""
    stolen = x509.load_der_x509_certificate(identity().der).extensions[0].value
    key = ec.generate_private_key(ec.SECP256R1())
    now = time.time()
    return certificates._self_sign(key, stolen, now, now + 60)


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: client_context(), "E_TLS_NO_CERTIFICATE"),
        (lambda: client_context(without_extension()), "E_TLS_CERTIFICATE"),
        (lambda: client_context(with_another_key()), "E_TLS_CERTIFICATE"),
        (lambda: client_context(identity(age=8 * 86400)), "E_TLS_CERTIFICATE"),
        (lambda: client_context(identity(), alpn=()), "E_TLS_ALPN"),
        (lambda: client_context(identity(), alpn=(b"h2",)), "E_TLS_ALPN"),
        (
            lambda: client_context(identity(), extra=(identity().der,)),
            "E_TLS_CERTIFICATE",
        ),
        (
            lambda: client_context(identity(), version=SSL.TLS1_2_VERSION),
            "E_TLS_HANDSHAKE",
        ),
    ],
    ids=[
        "none",
        "no-extension",
        "stolen",
        "expired",
        "no-alpn",
        "other-alpn",
        "chain",
        "tls1.2",
    ],
)
async def test_a_client_without_a_proven_identity_is_refused_and_counted(make, code):
    end = End()
    error = await dial_raw(end, make)
    assert isinstance(error, TlsFailure)
    assert end.refused(code) == 1
    assert end.counters.snapshot() == {f"{REFUSALS}:{code}": 1}


async def test_names_of_muxers_before_libp2p_are_passed_over():
    end = End()
    offers = (b"/yamux/1.0.0", b"/mplex/6.7.0", b"libp2p")
    assert await dial_raw(end, lambda: client_context(identity(), offers)) is None
    assert end.counters.snapshot() == {}


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        bytes(4096),
        b"\x16\x03\x01\xff\xff" + bytes(70_000),
        b"\x16\x03\x01\x40\x00\x01\x00\xff\xff" + b"\xff" * 80_000,
        b"",
    ],
    ids=["http", "zeroes", "long-record", "long-message", "nothing"],
)
async def test_garbage_is_refused_and_counted(garbage):
    end = End()
    async with sockets() as (one, two):

        async def send():
            with suppress(IOException):  # the other side may be gone before the end
                await one.write(garbage)
            await one.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with trio.fail_after(SECONDS), pytest.raises(TlsFailure):
                await end.tls.secure_inbound(two)
            await two.close()
    assert end.refused("E_TLS_HANDSHAKE") == 1


def test_our_certificate_has_the_libp2p_extension_first_and_another_key():
    signer = Ed25519Signer.generate()
    credentials = identity(signer)
    certificate = x509.load_der_x509_certificate(credentials.der)
    assert certificate.extensions[0].oid == certificates.LIBP2P_TLS_OID
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    spki = certificate.public_key().public_bytes(
        Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    )
    assert signer.public_key not in spki
