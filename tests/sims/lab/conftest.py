"""Plain sockets inside a laboratory network."""

import socket
from contextlib import ExitStack

import pytest

from sims.lab.namespaces import obstacle
from sims.lab.network import Network

SILENCE_SECONDS = 0.4
"""How long a dial waits that nobody should answer; loopback answers in 0.1 ms."""
ANSWER_SECONDS = 5.0


class Wire:
    """Opens sockets in a network's hosts and closes them at the end."""

    def __init__(self, network, stack):
        self.network = network
        self._stack = stack

    def open(self, host, kind=socket.SOCK_STREAM, port=0):
        sock = self._stack.enter_context(self.network.socket(host, kind))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("0.0.0.0", port))
        sock.settimeout(ANSWER_SECONDS)
        return sock

    def listen(self, host, port=0):
        sock = self.open(host, port=port)
        sock.listen(16)
        return sock

    def accept(self, listener):
        sock, address = listener.accept()
        self._stack.enter_context(sock)
        sock.settimeout(ANSWER_SECONDS)
        return sock, address

    def dial(self, host, address, port=0, seconds=ANSWER_SECONDS):
        """Return the connected socket, or the name of what happened instead."""
        sock = self.open(host, port=port)
        sock.settimeout(seconds)
        try:
            sock.connect(address)
        except OSError as exc:
            return type(exc).__name__
        sock.settimeout(ANSWER_SECONDS)
        return sock

    def address_of(self, listener, site):
        return (self.network.public_address(site), listener.getsockname()[1])


@pytest.fixture
def wire_of():
    """Return a function that gives a Wire of a network."""
    with ExitStack() as stack:
        yield lambda network: Wire(network, stack)


@pytest.fixture
def lab_network():
    """Return a function that builds a topology for the test."""
    if obstacle():
        pytest.skip(obstacle())
    with ExitStack() as stack:
        yield lambda topology: stack.enter_context(Network(topology))
