"""Two network namespaces and a veth between them, shaped by tbf: real TCP, real loss.

Sockets are made inside a namespace by a thread that entered it; a socket stays where it
was made, so tests use them like any other.
"""

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

NETNS = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_NUMBERS = itertools.count()


def _able():
    return (
        sys.platform == "linux"
        and os.geteuid() == 0
        and all(shutil.which(name) for name in ("ip", "tc", "iptables"))
    )


needs_namespaces = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(
        not _able(), reason="needs root, iproute2 and iptables for namespaces"
    ),
]


def run(*words):
    subprocess.run(words, check=True, capture_output=True)


class Link:
    """Ends "a" (10.77.0.1) and "b" (10.77.0.2)."""

    def __init__(self, names):
        self._names = names

    def inside(self, end, function):
        """Return what ``function()`` returns in a thread inside the namespace."""

        def enter_and_call():
            with open(f"/run/netns/{self._names[end]}") as where:
                if _LIBC.setns(where.fileno(), NETNS):
                    raise OSError(ctypes.get_errno(), "setns")
            return function()

        with ThreadPoolExecutor(1) as pool:  # the thread ends with its namespace
            return pool.submit(enter_and_call).result()

    def address(self, end):
        return {"a": "10.77.0.1", "b": "10.77.0.2"}[end]

    def listener(self, end):
        return self.inside(
            end, lambda: socket.create_server((self.address(end), 0), backlog=128)
        )

    def pair(self):
        """Return connected sockets (of a, of b)."""
        with self.listener("b") as listener:
            left = self.inside(
                "a", lambda: socket.create_connection(listener.getsockname(), 5)
            )
            right, _ = listener.accept()
        left.settimeout(None)
        return left, right

    def black_hole(self):
        """Drop all packets at a's end, in both directions, without a word."""
        for chain in ("INPUT", "OUTPUT"):
            name = self._names["a"]
            run(
                *("ip", "netns", "exec", name, "iptables", "-w", "-A", chain),
                *("-j", "DROP"),
            )

    def shape(self, end, bytes_per_second):
        """Limit what ``end`` sends."""
        rate = f"{int(bytes_per_second * 8)}bit"
        burst = max(16_000, int(bytes_per_second / 100))
        name = self._names[end]
        run(
            *("ip", "netns", "exec", name, "tc", "qdisc", "replace", "dev", "v"),
            *("root", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms"),
        )


@contextmanager
def veth_link():
    number = next(_NUMBERS)
    names = {end: f"fb{os.getpid()}-{number}{end}" for end in "ab"}
    made = []
    try:
        for name in names.values():
            run("ip", "netns", "add", name)
            made.append(name)
        a, b = names["a"], names["b"]
        run(
            *("ip", "link", "add", "v", "netns", a, "type", "veth"),
            *("peer", "name", "v", "netns", b),
        )
        link = Link(names)
        for end, name in names.items():
            address = f"{link.address(end)}/24"
            run("ip", "-n", name, "addr", "add", address, "dev", "v")
            run("ip", "-n", name, "link", "set", "v", "up")
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield link
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
