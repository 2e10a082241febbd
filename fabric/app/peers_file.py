"""The peers remembered across restarts: one small file, written whole or not at all.

It is a convenience: whatever is wrong with it is reported, the file set aside, and the
daemon starts without. Nothing in it is believed but as addresses to try.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from fabric.app.known_addrs import MAX_ADDRS, KnownAddr, addr_untrusted
from fabric.app.membership_file import save_private
from fabric.app.peer_book import MAX_PEERS, PeerBook
from fabric.core.errors import ConfigError, FabricError, RemoteProtocolError
from fabric.core.ids import MAX_PEER_ID_CHARS, PeerId, public_key_of

log = logging.getLogger(__name__)

VERSION = 1
MAX_FILE_BYTES = 8 << 20
"""1,000 peers with 16 addresses of 300 characters and their counts are below this."""
SAVE_SECONDS = 60.0
SAVE_GRACE_SECONDS = 2.0
"""How long the last save may take at the end."""
E_PEERS_FILE = "E_PEERS_FILE"


class _Peer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peer: Annotated[str, msgspec.Meta(max_length=MAX_PEER_ID_CHARS)]
    addrs: Annotated[tuple[KnownAddr, ...], msgspec.Meta(max_length=MAX_ADDRS)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    peers: Annotated[tuple[_Peer, ...], msgspec.Meta(max_length=MAX_PEERS)]


@dataclass(frozen=True)
class Remembered:
    """What was read.

    Attributes:
        peers: Addresses with their history, by peer.
        problem: Why nothing or not everything was read, or None.
    """

    peers: dict[PeerId, tuple[KnownAddr, ...]]
    problem: FabricError | None = None


def parse_peers_untrusted(
    data: bytes, wall: float
) -> dict[PeerId, tuple[KnownAddr, ...]]:
    """Return the peers in ``data``: the one door through which a file comes in.

    Times in the future are cut to ``wall`` (the clock was wrong when they were noted),
    or one bad entry would count as the best address for ever.

    Raises:
        RemoteProtocolError: not such a file, or out of bounds.
    """
    if len(data) > MAX_FILE_BYTES:
        raise RemoteProtocolError(f"{len(data)} B > {MAX_FILE_BYTES} B")
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise RemoteProtocolError(str(exc)) from exc
    if file.version != VERSION:
        raise RemoteProtocolError(f"version {file.version}, not {VERSION}")
    peers = {}
    for entry in file.peers:
        public_key_of(entry.peer)
        peer = PeerId(entry.peer)
        for known in entry.addrs:
            if addr_untrusted(peer, known.addr) != known.addr:
                raise RemoteProtocolError(f"{known.addr!r} is no address of {peer}")
            known.seen = min(known.seen, wall)
            known.succeeded = min(known.succeeded, wall)
        peers[peer] = entry.addrs
    return peers


def load_peers(path: Path, wall: float) -> Remembered:
    """Return the peers remembered in ``path``; a damaged file is moved aside."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return Remembered({})
    except OSError as exc:
        return Remembered({}, _problem(path, f"cannot be read: {exc.strerror}", ""))
    try:
        return Remembered(parse_peers_untrusted(data, wall))
    except RemoteProtocolError as exc:
        aside = path.with_suffix(".damaged")
        try:
            path.replace(aside)
        except OSError as moved:
            log.warning("peers_file.stuck path=%s error=%s", path, moved.strerror)
        return Remembered({}, _problem(path, f"is damaged: {exc}", f"{aside} keeps it"))


def save_peers(path: Path, peers: Mapping[PeerId, tuple[KnownAddr, ...]]) -> None:
    """Write ``peers`` to ``path``.

    Raises:
        ConfigError: the folder cannot be written.
    """
    entries = tuple(_Peer(peer, addrs) for peer, addrs in sorted(peers.items()))
    try:
        save_private(path, msgspec.json.encode(_File(VERSION, entries[:MAX_PEERS])))
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be written: {exc.strerror}",
            code=E_PEERS_FILE,
            next_step="free space, or make the data folder writable",
        ) from exc


def _problem(path: Path, what: str, where: str) -> FabricError:
    return ConfigError(
        f"{path} {what}",
        code=E_PEERS_FILE,
        next_step="nothing: peers are learnt again" + (f"; {where}" if where else ""),
    )


class PeersFile:
    """Keeps the addresses of a :class:`PeerBook` on disk.

    Args:
        path: The file.
        book: Recalls now; read at every save.

    Attributes:
        problem: What is wrong with the file, for the doctor, or None.
    """

    def __init__(self, path: Path, book: PeerBook) -> None:
        self._path = path
        self._book = book
        found = load_peers(path, time.time())
        self.problem = found.problem
        if found.problem is not None:
            log.warning("peers_file.bad reason=%s", found.problem.reason)
        book.recall(found.peers)
        self._saved = found.peers

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Save now and then, and once more when cancelled."""
        task_status.started()
        try:
            while True:
                await trio.sleep(SAVE_SECONDS)
                await self.save()
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(SAVE_GRACE_SECONDS):
                await self.save()

    async def save(self) -> None:
        """Write what the book knows, if that changed; a failure is kept and logged."""
        peers = self._book.remembered()
        if peers == self._saved:
            return
        try:
            await trio.to_thread.run_sync(
                save_peers, self._path, peers, abandon_on_cancel=True
            )
        except ConfigError as exc:
            if self.problem is None:
                log.warning("peers_file.unsaved reason=%s", exc.reason)
            self.problem = exc
        else:
            self._saved = peers
            self.problem = None
