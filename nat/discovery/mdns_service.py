"""mDNS as a service: announce this peer on the local network, hear the others.

Starting never waits for the network, and a network without multicast is a finding for
the doctor, never the end of the daemon.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import msgspec
import trio

from fabric.core.errors import FabricError, RemoteProtocolError, Unavailable
from fabric.core.ids import MeshId, PeerId, short
from nat.addresses import AddressClass, classify
from nat.discovery.config import DiscoveryConfig
from nat.discovery.mdns import (
    Neighbours,
    encode_text,
    local_addrs,
    new_name,
    read_text_untrusted,
    tag_of,
)
from nat.discovery.mdns_zeroconf import Inbox, ZeroconfLink

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""After a failure, unless our addresses change sooner."""
CLOSE_SECONDS = 2.0
LOOKUP_PAUSE_SECONDS = 0.02
"""50 names a second are looked at, however many are shouted."""

Learn = Callable[[Mapping[PeerId, Sequence[str]]], None]


class MdnsReport(msgspec.Struct, frozen=True):
    """How it stands, for `fabric doctor`.

    Attributes:
        state: "idle" where we listen on no address of a local network.
        reason: Why it failed or is idle.
        next_step: What the operator can do.
        heard: Members heard of on this network.
        dropped: Announcements over a bound, or malformed.
    """

    state: Literal["off", "idle", "starting", "announcing", "failed"]
    reason: str = ""
    next_step: str = ""
    heard: int = 0
    dropped: int = 0


class MdnsService:
    """See the module.

    Args:
        own: Our id.
        mesh: Whose members are announced and heard.
        config: Switches.
        addrs: Our current multiaddrs, ending in our id.
        learn: Takes the members heard, as hints.
    """

    def __init__(
        self,
        own: PeerId,
        mesh: MeshId,
        config: DiscoveryConfig,
        addrs: Callable[[], Sequence[str]],
        learn: Learn,
    ) -> None:
        self._config = config
        self._addrs = addrs
        self._learn = learn
        self._tag = tag_of(mesh)
        self._name = new_name(random.SystemRandom())
        self._neighbours = Neighbours(own)
        self._malformed = 0
        self._state = MdnsReport("starting" if config.mdns else "off")
        self._changed = trio.Event()
        self._loopback = any(
            classify(ip) is AddressClass.LOOPBACK for ip in config.mdns_interfaces
        )

    def report(self) -> MdnsReport:
        """Return how it stands."""
        return msgspec.structs.replace(
            self._state,
            heard=len(self._neighbours),
            dropped=self._neighbours.dropped + self._malformed,
        )

    def network_changed(self) -> None:
        """Announce anew if our addresses are others now."""
        self._changed.set()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Announce and listen until cancelled."""
        task_status.started()
        if not self._config.mdns:
            await trio.sleep_forever()
        while True:
            addrs = self._current()
            if not addrs:
                self._set(MdnsReport("idle", "no address on a local network"))
                await self._until_changed(addrs)
                continue
            try:
                await self._announce(addrs)
            except Unavailable as exc:
                self._set(MdnsReport("failed", exc.reason, exc.next_step))
                with trio.move_on_after(RETRY_SECONDS):
                    await self._until_changed(addrs)

    def _current(self) -> tuple[str, ...]:
        return local_addrs(self._addrs(), loopback=self._loopback)

    def _set(self, state: MdnsReport) -> None:
        if state != self._state:
            log.info("mdns.%s reason=%s", state.state, state.reason)
        self._state = state

    async def _until_changed(self, addrs: tuple[str, ...]) -> None:
        """Return once our local addresses differ from ``addrs``."""
        while self._current() == addrs:
            with trio.move_on_after(self._config.mdns_poll_seconds):
                await self._changed.wait()
            self._changed = trio.Event()

    async def _announce(self, addrs: tuple[str, ...]) -> None:
        """Announce ``addrs`` and listen until they change.

        Raises:
            Unavailable: multicast is not possible here.
        """
        wake, woken = trio.open_memory_channel[None](1)  # one says "look again"
        token = trio.lowlevel.current_trio_token()
        inbox = Inbox(lambda: _wake_from_thread(token, wake))
        link = ZeroconfLink(inbox)
        try:
            # not abandoned: it ends within a second, and must before it is closed
            await trio.to_thread.run_sync(
                link.open,
                self._name,
                encode_text(addrs, self._tag),
                addrs,
                self._config.mdns_interfaces,
            )
            self._set(MdnsReport("announcing"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, link, inbox, woken)
                await self._until_changed(addrs)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_SECONDS):
                await _close(link)

    async def _listen(
        self, link: ZeroconfLink, inbox: Inbox, woken: trio.MemoryReceiveChannel[None]
    ) -> None:
        """Pass on what is heard, one name after the other."""
        while True:
            await woken.receive()
            while (name := inbox.take()) is not None:
                try:
                    text = await trio.to_thread.run_sync(
                        link.lookup, name, abandon_on_cancel=True
                    )
                    self._hear_untrusted(text)
                except Unavailable as exc:
                    log.debug("mdns.lookup reason=%s", exc.reason)
                except RemoteProtocolError as exc:
                    self._malformed += 1
                    log.debug("mdns.malformed reason=%s", exc.reason)
                await trio.sleep(LOOKUP_PAUSE_SECONDS)

    def _hear_untrusted(self, text: bytes) -> None:
        heard = read_text_untrusted(text, self._tag, loopback=self._loopback)
        if heard is None:
            return
        if self._neighbours.accept(heard, trio.current_time()):
            log.info("mdns.heard peer=%s", short(heard.peer))
            self._learn({heard.peer: heard.addrs})


def _wake_from_thread(
    token: trio.lowlevel.TrioToken, wake: trio.MemorySendChannel[None]
) -> None:
    """Wake the listener from the library's thread, which must not wait for it."""

    def knock() -> None:
        try:
            wake.send_nowait(None)
        except (trio.WouldBlock, trio.BrokenResourceError):
            return  # it looks already, or looks no more

    try:
        token.run_sync_soon(knock)
    except trio.RunFinishedError:
        return


async def _close(link: ZeroconfLink) -> None:
    try:
        await trio.to_thread.run_sync(link.close, abandon_on_cancel=True)
    except FabricError as exc:
        log.debug("mdns.close reason=%s", exc.reason)
