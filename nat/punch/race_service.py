"""The race of one punch: many sockets, of which both ends keep the same one.

Dials from the punched port go to every target in a tight loop; the listener on the same
port takes what the dials miss: a SYN that comes between two tries, or from a port that
a symmetric NAT chose. Each connection proves itself with nonces.
"""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial

import trio

from fabric.net.socket_options import set_liveness
from nat.punch.config import PunchConfig
from nat.punch.core import RetrySchedule, SocketAgreement
from nat.punch.facts import Address
from nat.punch.messages import NONCE_BYTES
from nat.punch.port_service import bound_socket, family_of

_OCCUPIED = frozenset({errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EISCONN})
"""The listener has this very connection: it will prove itself there."""
_HOPELESS = frozenset({errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EACCES})
"""No route for this family, or a local firewall: trying again changes nothing."""
_OCCUPIED_WAIT_SECONDS = 0.01
KNOCK_SECONDS = (0.0, 0.1, 0.3)
"""Pauses before the knocks at one listener; few, for it may be a stranger's."""


async def dial_loop(
    target: Address, port: int, schedule: RetrySchedule
) -> trio.socket.SocketType | None:
    """Return a connection from ``port`` to ``target``, or None when tries ran out.

    Lasts until then; bound it at the call site. Nothing stays open when cancelled.
    """
    began = trio.current_time()
    while True:
        delay = schedule.next_delay(trio.current_time() - began)
        if delay is None:
            return None
        if schedule.near:
            _leave_cpu(schedule.side)
        if delay:
            await trio.sleep(delay)
        try:
            with trio.move_on_after(schedule.patience()):
                return await _dial_once(target, port)
        except OSError as exc:
            if exc.errno in _HOPELESS:
                return None
            if exc.errno in _OCCUPIED:
                await trio.sleep(_OCCUPIED_WAIT_SECONDS)


async def _dial_once(target: Address, port: int) -> trio.socket.SocketType:
    sock = bound_socket(family_of(target[0]), port)
    try:
        await sock.connect(target)
    except BaseException:
        sock.close()
        raise
    return sock


def _leave_cpu(side: int) -> None:
    """Move this thread to one half of its CPUs; it may leave that at once again.

    Two ends on one machine (a lab, containers) that share a CPU never send at the same
    time: one's SYN is refused within its own system call. The scheduler, which saw
    them exchange messages, would keep them together.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    with suppress(OSError):
        allowed = os.sched_getaffinity(0)
        half = sorted(allowed)[side::2]
        if half:
            os.sched_setaffinity(0, half)
            os.sched_setaffinity(0, allowed)


class PunchRace:
    """One end of one punch, from SYNC to a socket.

    Args:
        config: Bounds.
        port: The punched port.
        listeners: Listen on it; not closed here.
        agreement: Decides which socket is kept.
        rng: Draws the jitter.
        rtt: Round trip of the control stream in seconds.
        side: 0 or 1; the two ends differ.
    """

    def __init__(
        self,
        config: PunchConfig,
        port: int,
        listeners: Sequence[trio.socket.SocketType],
        agreement: SocketAgreement,
        rng: random.Random,
        rtt: float,
        side: int,
    ) -> None:
        self._config = config
        self._port = port
        self._listeners = listeners
        self._agreement = agreement
        self._new_schedule = partial(RetrySchedule, config, rng, rtt, side)
        self._unproven = 0
        self._nursery: trio.Nursery | None = None
        self._open = False
        self.winner: trio.socket.SocketType | None = None
        self.tries = 0

    async def run(
        self,
        targets: Iterable[Address],
        doors: Iterable[tuple[Address, bytes]] = (),
    ) -> socket.socket | None:
        """Return the socket that both ends keep, or None; all others are closed.

        Lasts until one is found; bound it at the call site with :meth:`stop`.

        Args:
            targets: Where to dial from the punched port.
            doors: Listeners of the peer that the world reaches, with what to send
                there first.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._stay_open)
                for listener in self._listeners:
                    nursery.start_soon(self._accept, listener)
                for target in targets:
                    nursery.start_soon(self._dial, target)
                for address, key in doors:
                    nursery.start_soon(self._knock, address, key)
        except BaseException:
            if self.winner is not None:
                self.winner.close()
            raise
        finally:
            self._nursery = None
        if self.winner is None:
            return None
        set_liveness(self.winner, patient=True)
        sock = socket.socket(fileno=self.winner.detach())
        sock.setblocking(False)
        return sock

    def stop(self) -> None:
        """End the race without a winner, unless there is one."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def offer(self, sock: socket.socket) -> bool:
        """Let a connection that came to another listener take part; then it is owned.

        Returns whether there is still a race for it and room in it.
        """
        full = self._unproven >= self._config.max_accepted
        if self._nursery is None or not self._open or full:
            return False
        taken = trio.socket.from_stdlib_socket(sock)
        self._nursery.start_soon(self._prove, taken)
        return True

    async def _stay_open(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Take what is offered until the race is called off.

        A nursery whose tasks have ended takes no more, a moment before its owner runs
        again; whoever offers in between must be told no.
        """
        self._open = True
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._open = False

    async def _accept(self, listener: trio.socket.SocketType) -> None:
        while True:
            try:
                sock, _ = await listener.accept()
            except OSError:  # the connection was reset before we took it
                await trio.sleep(_OCCUPIED_WAIT_SECONDS)
                continue
            if self._unproven >= self._config.max_accepted or self._nursery is None:
                sock.close()
            else:
                self._nursery.start_soon(self._prove, sock)

    async def _dial(self, target: Address) -> None:
        schedule = self._new_schedule()
        try:
            while (sock := await dial_loop(target, self._port, schedule)) is not None:
                await self._prove(sock)
        finally:
            self.tries += schedule.tries

    async def _knock(self, address: Address, key: bytes) -> None:
        """Dial a public listener, as any data-plane connection would.

        Who is there may not have its race open yet: a round trip that was measured on a
        busy machine is longer than the way. It then hangs up, and is asked again.
        """
        for pause in KNOCK_SECONDS:
            await trio.sleep(pause)
            await self._knock_once(address, key)

    async def _knock_once(self, address: Address, key: bytes) -> None:
        sock = trio.socket.socket(family_of(address[0]), socket.SOCK_STREAM)
        try:
            await sock.connect(address)
            await sock.send(key)  # fits an empty buffer
        except OSError:
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        await self._prove(sock)

    async def _prove(self, sock: trio.socket.SocketType) -> None:
        """Make ``sock`` the winner or close it."""
        self._unproven += 1
        try:
            with trio.move_on_after(self._config.prove_seconds):
                await self._exchange(sock)
        except OSError:
            pass  # this one broke; others may hold
        finally:
            self._unproven -= 1
            if sock is not self.winner:
                sock.close()

    async def _exchange(self, sock: trio.socket.SocketType) -> None:
        if self._agreement.greeting:
            await sock.send(self._agreement.greeting)
        shown = b""
        while len(shown) < NONCE_BYTES:  # and not a byte of what follows
            part = await sock.recv(NONCE_BYTES - len(shown))
            if not part:
                return
            shown += part
        verdict = self._agreement.judge(shown)
        if verdict == "reply":
            try:
                await sock.send(self._agreement.reply)
            except OSError:
                self._agreement.broke()
                raise
        if verdict in ("reply", "won"):
            self.winner = sock
            self.stop()
