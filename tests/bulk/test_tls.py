"""The mutual handshake over socket pairs: who gets in, and how the rest are refused."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fabric.bulk.certificates import (
    JobStatement,
    issue_identity_certificate,
    issue_job_certificate,
    job_credentials,
    make_worker_key,
)
from fabric.bulk.tls import ACCEPTED, ALPN, handshake, make_context
from fabric.core.errors import (
    FabricError,
    IntegrityError,
    PeerTimeout,
    RemoteProtocolError,
    Unavailable,
)
from fabric.core.signing import Ed25519Signer

NOW = time.time()
ALICE = issue_identity_certificate(Ed25519Signer(b"a" * 32), NOW)
BOB = issue_identity_certificate(Ed25519Signer(b"b" * 32), NOW)
MALLORY = issue_identity_certificate(Ed25519Signer(b"m" * 32), NOW)


def tcp_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
    return left, right


def meet(client, client_wants, server, server_wants, pair=tcp_pair):
    """Both handshakes at once; each result is a TLS socket or the error."""
    left, right = pair()

    def side(sock, mine, wanted, is_server):
        try:
            return handshake(sock, mine, wanted, server=is_server, timeout_seconds=5)
        except FabricError as exc:
            return exc

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(side, left, client, client_wants, False)
        two = pool.submit(side, right, server, server_wants, True)
        return one.result(), two.result()


@pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair])
def test_both_sides_are_authenticated(pair):
    client, server = meet(ALICE, BOB.der, BOB, ALICE.der, pair)
    with client, server:
        assert client.version() == "TLSv1.3"
        assert client.getpeercert(binary_form=True) == BOB.der
        assert server.getpeercert(binary_form=True) == ALICE.der
        assert client.selected_alpn_protocol() == ALPN
        assert client.gettimeout() is None
        client.sendall(b"hello")
        assert server.recv(5) == b"hello"


def test_job_credentials_work_and_the_key_needs_no_file():
    pem, spki = make_worker_key()
    now = time.time()  # not NOW: a slow run may reach this line when that is long ago
    claim = JobStatement("j", 1, spki, int(now), int(now) + 600)
    worker = job_credentials(
        pem, issue_job_certificate(Ed25519Signer(b"a" * 32), claim, now)
    )
    client, server = meet(worker, BOB.der, BOB, worker.der)
    with client, server:
        assert server.getpeercert(binary_form=True) == worker.der


def test_client_with_another_certificate_is_refused_and_learns_it():
    client, server = meet(MALLORY, BOB.der, BOB, ALICE.der)
    assert isinstance(server, IntegrityError)
    assert isinstance(client, RemoteProtocolError | Unavailable)


def test_server_with_another_certificate_is_refused():
    client, server = meet(ALICE, BOB.der, MALLORY, ALICE.der)
    assert isinstance(client, IntegrityError)
    assert isinstance(server, FabricError)


def test_certificate_without_its_key_does_not_load():
    thief = type(ALICE)(ALICE.der, ALICE.certificate_pem, MALLORY.key_pem)
    left, right = tcp_pair()
    with right, pytest.raises(ValueError, match="do not match"):
        handshake(left, thief, BOB.der, server=False, timeout_seconds=5)
    assert left.fileno() == -1


def test_expired_certificate_is_refused_by_the_handshake_itself():
    old = issue_identity_certificate(Ed25519Signer(b"a" * 32), NOW - 8 * 86400)
    client, server = meet(old, BOB.der, BOB, old.der)
    assert isinstance(server, IntegrityError)
    assert isinstance(client, FabricError)


def test_garbage_instead_of_tls_is_a_protocol_error():
    left, right = tcp_pair()
    right.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
    with right, pytest.raises(RemoteProtocolError):
        handshake(left, ALICE, BOB.der, server=True, timeout_seconds=5)
    assert left.fileno() == -1  # closed


def test_silence_is_a_timeout_and_closing_is_unavailable():
    left, right = tcp_pair()
    with right, pytest.raises(PeerTimeout):
        handshake(left, ALICE, BOB.der, server=True, timeout_seconds=0.05)
    left, right = tcp_pair()
    right.close()
    with pytest.raises(Unavailable):
        handshake(left, ALICE, BOB.der, server=True, timeout_seconds=5)


def test_other_alpn_is_refused():
    left, right = tcp_pair()
    context = make_context(ALICE, BOB.der, server=False)
    context.set_alpn_protocols(["libp2p"])
    with ThreadPoolExecutor(1) as pool, left, right:
        answer = pool.submit(
            handshake, right, BOB, ALICE.der, server=True, timeout_seconds=5
        )
        with context.wrap_socket(left) as tls:
            assert tls.recv(1) != ACCEPTED
        with pytest.raises(RemoteProtocolError, match="ALPN"):
            answer.result()


def test_an_offer_that_is_no_certificate_is_an_integrity_error():
    with pytest.raises(IntegrityError):
        make_context(ALICE, b"nonsense", server=False)
