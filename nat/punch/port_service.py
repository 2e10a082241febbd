"""A local port to punch from: bound once, shared by observers, listener and dials.

A NAT maps a local port, so the connection that learns the mapping, those that punch and
the listener for what comes back must all have the same one (SO_REUSEPORT).
"""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Sequence
from contextlib import suppress

import trio

from fabric.core.errors import RemoteProtocolError, Unavailable
from fabric.core.framing import FrameReader
from fabric.net.offers import OBSERVE_LABEL, parse_address_untrusted
from fabric.net.port_reuse import share
from nat.punch.addresses import OwnSide, classify_ip, parse_addresses_untrusted
from nat.punch.facts import Address, NatFacts, learn_mapping

_MAX_ANSWER_BYTES = 64
_LISTEN_BACKLOG = 16
_MAX_LOCAL = 4
_RESERVE_AFTER_SECONDS = 0.2
_SECOND_OPINION_SECONDS = 0.4


def bound_socket(family: int, port: int) -> trio.socket.SocketType:
    """Return a TCP socket on ``port`` of all interfaces, which others may share.

    Raises:
        OSError: the port is taken by somebody who does not share.
    """
    return trio.socket.from_stdlib_socket(_bound(family, port))


def _bound(family: int, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        share(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    except BaseException:
        sock.close()
        raise
    return sock


def family_of(ip: str) -> int:
    """Return the address family of the IP ``ip``."""
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


class PunchPort:
    """A fresh port with a listener; leaving closes all that it still owns.

    Attributes:
        number: The port.
        listeners: Accept what arrives at it.
    """

    def __init__(self) -> None:
        first = bound_socket(socket.AF_INET, 0)
        self.listeners = [first]
        self.number = int(first.getsockname()[1])
        self._observers: list[trio.socket.SocketType] = []
        self._local_ips: list[str] = []
        with suppress(OSError):  # without IPv6 there is IPv4
            self.listeners.append(bound_socket(socket.AF_INET6, self.number))
        try:
            for listener in self.listeners:
                listener.listen(_LISTEN_BACKLOG)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PunchPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the listeners and the connections with observers."""
        for sock in (*self.listeners, *self._observers):
            sock.close()
        self.listeners, self._observers = [], []

    async def observe(
        self,
        observers: Sequence[str],
        known: NatFacts,
        local_ips: Sequence[str],
        seconds: float,
    ) -> OwnSide:
        """Return our side of a punch from this port as ``observers`` see it.

        Two observers at different addresses are asked (one is enough where the mapping
        is known to be the same for all); their connections stay open, which keeps the
        mapping. Those that do not answer in ``seconds`` are left out.
        """
        enough = 1 if known.mapping == "endpoint_independent" else 2
        chosen = choose_observers(observers, enough + 1)
        answers: dict[int, Address] = {}
        # consecutive mappings are compared, so the SYNs leave in a known order: here
        # and now, for tasks that are due together run in any
        begun = [self._begin(target) for target in chosen[:enough]]
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                for index, sock in enumerate(begun):
                    nursery.start_soon(
                        self._ask_into, answers, index, sock, enough, nursery
                    )
                for target in chosen[enough:]:
                    nursery.start_soon(
                        self._ask_reserve, answers, target, enough, nursery
                    )
        seen = tuple(answers[index] for index in sorted(answers))[:enough]
        ips = dict.fromkeys((*self._local_ips, *local_ips))
        usable = [ip for ip in ips if classify_ip(ip) != "forbidden"][:_MAX_LOCAL]
        return OwnSide(
            observed=seen,
            local=tuple((ip, self.number) for ip in usable),
            facts=learn_mapping(seen, known),
        )

    async def _ask_reserve(
        self,
        answers: dict[int, Address],
        target: Address,
        enough: int,
        nursery: trio.Nursery,
    ) -> None:
        """Ask the observer in reserve, when the others are slow."""
        await trio.sleep(_RESERVE_AFTER_SECONDS)
        begun = self._begin(target)
        await self._ask_into(answers, enough, begun, enough, nursery)

    async def _ask_into(
        self,
        answers: dict[int, Address],
        index: int,
        begun: trio.socket.SocketType | None,
        enough: int,
        nursery: trio.Nursery,
    ) -> None:
        """Ask one observer; the last needed answer ends the others."""
        if begun is None:
            return
        try:
            answers[index] = await self._ask(begun)
        except (OSError, Unavailable, RemoteProtocolError):
            return
        if len(answers) >= enough:
            nursery.cancel_scope.cancel()
        # a second opinion is worth a moment, not the whole patience: relays die
        until = trio.current_time() + _SECOND_OPINION_SECONDS
        nursery.cancel_scope.deadline = min(nursery.cancel_scope.deadline, until)

    def _begin(self, target: Address) -> trio.socket.SocketType | None:
        """Send a SYN to ``target`` before returning; None if that is not possible."""
        try:
            plain = _bound(family_of(target[0]), self.number)
        except OSError:
            return None
        code = plain.connect_ex(target)
        sock = trio.socket.from_stdlib_socket(plain)
        self._observers.append(sock)
        return sock if code in (0, errno.EINPROGRESS) else None

    async def _ask(self, sock: trio.socket.SocketType) -> Address:
        await trio.lowlevel.wait_writable(sock)
        if failed := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(failed, os.strerror(failed))
        self._local_ips.append(str(sock.getsockname()[0]))
        await sock.send(OBSERVE_LABEL)  # 16 bytes fit an empty buffer
        reader = FrameReader(max_bytes=_MAX_ANSWER_BYTES)
        while data := await sock.recv(_MAX_ANSWER_BYTES):
            for frame in reader.feed(data):
                return parse_address_untrusted(frame.decode("ascii", "replace"))
        raise Unavailable("the observer closed the connection")


def choose_observers(
    observers: Sequence[str], count: int, rng: random.Random | None = None
) -> list[Address]:
    """Return ``count`` of ``observers``, those at different IPs first.

    Two ports of one IP tell less: a NAT may map by address and not by port.
    """
    addresses = list(parse_addresses_untrusted(observers))
    (rng or random.Random()).shuffle(addresses)
    by_ip: dict[str, list[Address]] = {}
    for address in addresses:
        by_ip.setdefault(address[0], []).append(address)
    rounds = [group[0] for group in by_ip.values()]
    rest = [address for group in by_ip.values() for address in group[1:]]
    return (rounds + rest)[:count]
