"""Notice within a second that this machine's network changed (elsewhere: five).

On Linux the kernel tells; what it tells is only a reason to look, because it does not
tell everything (routes that go with a link go silently). So after a moment's gathering
all is asked for anew, and the difference is the news. What was not seen whole, because
the machine is busy or the network changed meanwhile, is no view: nothing is said to be
gone that was only not seen.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from fabric.core.telemetry import DROPPED, Counters
from fabric.net.tasks import collapse_group
from nat.reachability.netwatch import NetworkChanged, NetworkView, NetworkWatch, view_of
from nat.reachability.netwatch_netlink import (
    GETADDR,
    GETLINK,
    GETNEIGH,
    GETROUTE,
    GROUPS,
    DumpEnded,
    Message,
    dump_request,
    parse_untrusted,
)

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.5
"""An address and its routes come as many messages."""
POLL_SECONDS = 5.0
"""Where the kernel does not tell."""
DUMP_SECONDS = 2.0
"""The kernel answers in milliseconds, but we may be too busy to read it."""
FIRST_LOOKS = 3
"""Looks in vain after which the kernel is not asked at all."""
EVENT_ROOM = 16
"""A listener that lags behind so many changes starts anew anyway."""
_RECEIVE_BYTES = 65536
"""The kernel sends at most 32 KiB at once."""
_PROBES = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Documentation addresses; a UDP connect sends nothing and chooses our address."""


class NetworkWatcher:
    """Tells views and changes. Made by :func:`open_netwatch`."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._core = NetworkWatch()
        self._asks_kernel = sys.platform == "linux"
        self._listeners: list[trio.MemorySendChannel[NetworkChanged]] = []

    def view(self) -> NetworkView:
        """Return the network as last seen."""
        return self._core.view

    def changes(self) -> trio.MemoryReceiveChannel[NetworkChanged]:
        """Return a new bounded channel of changes (overflow is dropped, counted)."""
        send, receive = trio.open_memory_channel[NetworkChanged](EVENT_ROOM)
        self._listeners.append(send)
        return receive

    async def start(self) -> None:
        """Look for the first time, and so decide how from now on."""
        view = None
        for _ in range(FIRST_LOOKS if self._asks_kernel else 0):
            view = view or await _look()
        self._asks_kernel = view is not None
        self._core.start(view or _own_addresses())

    async def watch(self) -> None:
        """Publish changes until cancelled."""
        if self._asks_kernel:
            await self._watch_netlink()
        while True:
            await trio.sleep(POLL_SECONDS)
            await self._look_again()

    async def _watch_netlink(self) -> None:
        """Look again whenever the kernel says something; return if it cannot."""
        try:
            sock = _netlink(GROUPS)
        except OSError as exc:
            log.warning("netwatch.polling reason=%s", exc)
            return
        with sock:
            await self._look_until_seen()  # what happened before we listened
            while True:
                if not self._core.matters(await _receive(sock)):
                    continue
                with trio.move_on_after(GATHER_SECONDS):
                    while True:
                        await _receive(sock)
                await self._look_until_seen()

    async def _look_until_seen(self) -> None:
        while True:
            if await self._look_again():
                return
            await trio.sleep(GATHER_SECONDS)

    async def _look_again(self) -> bool:
        """Publish what is different now; False when it could not be seen."""
        view = await _look() if self._asks_kernel else _own_addresses()
        if view is None:
            return False
        changed = self._core.update(view)
        if changed is not None:
            self._publish(changed)
        return True

    def _publish(self, changed: NetworkChanged) -> None:
        log.info(
            "network.changed gone=%s new=%s gateway=%s",
            sorted(changed.gone_addresses),
            sorted(changed.new_addresses),
            changed.gateway_changed,
        )
        for listener in tuple(self._listeners):
            try:
                listener.send_nowait(changed)
            except trio.WouldBlock:
                self._counters.add(DROPPED, label="network_changes")
            except trio.BrokenResourceError:
                self._listeners.remove(listener)

    def close(self) -> None:
        """End the channels."""
        for listener in self._listeners:
            listener.close()


@asynccontextmanager
async def open_netwatch(counters: Counters) -> AsyncIterator[NetworkWatcher]:
    """Watch the network inside the block; the first view is there at once."""
    watcher = NetworkWatcher(counters)
    await watcher.start()
    with collapse_group():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher.watch)
            try:
                yield watcher
            finally:
                watcher.close()
                nursery.cancel_scope.cancel()


def _netlink(groups: int) -> trio.socket.SocketType:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, groups))
    except OSError:
        sock.close()
        raise
    return trio.socket.from_stdlib_socket(sock)


async def _receive(sock: trio.socket.SocketType) -> list[Message]:
    """Return what the kernel says next; a lost message is a reason to look, too."""
    try:
        data, sender = await sock.recvfrom(_RECEIVE_BYTES)
    except OSError as exc:  # ENOBUFS: it said more than we read
        log.debug("netwatch.overrun error=%r", exc)
        return [DumpEnded(errno.EINTR)]
    # any process may send to a netlink socket; only the kernel has port 0
    return parse_untrusted(data) if sender[0] == 0 else []


async def _look() -> NetworkView | None:
    """Return the network as the kernel has it now; None when it was not seen whole."""
    try:
        with trio.fail_after(DUMP_SECONDS):
            return await _dump()
    except (OSError, trio.TooSlowError) as exc:
        log.debug("netwatch.dump_failed error=%r", exc)
    return None


async def _dump() -> NetworkView:
    messages: list[Message] = []
    with _netlink(0) as sock:
        for kind in (GETLINK, GETADDR, GETROUTE, GETNEIGH):
            await sock.send(dump_request(kind, kind))
            while True:
                part = await _receive(sock)
                messages += part
                ends = [each for each in part if isinstance(each, DumpEnded)]
                if any(each.error == errno.EINTR for each in ends):
                    raise InterruptedError("the dump is not whole")
                if ends:
                    break
    return view_of(messages)


def _own_addresses() -> NetworkView:
    """Return the addresses that the system would use towards the world."""
    found = set()
    for target, family in _PROBES:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((target, 9))
            except OSError:
                continue  # no route: not connected this way
            bits = 32 if family == socket.AF_INET else 128
            found.add(f"{sock.getsockname()[0]}/{bits}")
    return NetworkView(frozenset(found))
