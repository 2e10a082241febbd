"""A mesh of real daemons on loopback: each its own process, folder and identity.

The directory of a simulation holds one home per peer and ``sim.json`` with their pids,
so that another terminal can act on them. Processes are ended by recorded pid alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from fabric.app.client import Client, connect
from fabric.app.home import Home
from fabric.core.errors import ConfigError, FabricError, PeerTimeout, Unavailable

START_SECONDS = 60.0
"""Longest wait for a daemon's first answer; importing libp2p takes a few seconds."""
POLL_SECONDS = 0.1


class SimPeer(msgspec.Struct, frozen=True):
    """One daemon of a simulation; ``started`` guards against a reused pid."""

    name: str
    home: str
    pid: int
    started: int
    """Start time of the process in clock ticks after boot (proc(5), field 22)."""


class SimState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``sim.json`` holds."""

    mesh: str
    peers: tuple[SimPeer, ...]


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """How a daemon is started.

    Attributes:
        enter: Put before the command: what moves it into another network.
        listen: Where its control plane listens.
        settings: ``key=value`` for its configuration.
    """

    enter: tuple[str, ...] = ()
    listen: str = "/ip4/127.0.0.1/tcp/0"
    settings: tuple[str, ...] = ()


def on_loopback(name: str) -> Launch:
    """Start the daemon called ``name`` in this machine's own network."""
    return Launch()


def start_time_of(pid: int) -> int:
    """Return the start time of process ``pid`` in clock ticks; 0 if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


class LocalMesh:
    """The daemons under one directory.

    Args:
        directory: Holds everything; created by :meth:`start`.
        launch: Says how the daemon of a name is started.
    """

    def __init__(
        self, directory: Path, launch: Callable[[str], Launch] = on_loopback
    ) -> None:
        self.directory = directory.absolute()
        self._launch = launch
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._peers: dict[str, SimPeer] = {}
        self.mesh = ""

    @classmethod
    def open(cls, directory: Path) -> LocalMesh:
        """Return the simulation that ``fabric sim up`` left in ``directory``.

        Raises:
            ConfigError: there is none.
        """
        mesh = cls(directory)
        try:
            raw = (mesh.directory / "sim.json").read_bytes()
            state = msgspec.json.decode(raw, type=SimState)
        except FileNotFoundError:
            raise ConfigError(
                f"no simulation in {mesh.directory}", next_step="run `fabric sim up`"
            ) from None
        except msgspec.MsgspecError as exc:
            raise ConfigError(f"{mesh.directory}/sim.json: {exc}") from exc
        mesh.mesh = state.mesh
        mesh._peers = {peer.name: peer for peer in state.peers}
        return mesh

    @property
    def names(self) -> list[str]:
        """Names of the peers whose process lives."""
        return [name for name in self._peers if self.alive(name)]

    def peer(self, name: str) -> SimPeer:
        """Return the peer called ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._peers:
            known = ", ".join(self._peers)
            raise ConfigError(f"no peer {name!r}", next_step=f"peers: {known}")
        return self._peers[name]

    def alive(self, name: str) -> bool:
        """Return whether the peer's process lives (a stopped one does)."""
        peer = self.peer(name)
        child = self._children.get(name)
        if child is not None and child.poll() is not None:
            return False
        return start_time_of(peer.pid) == peer.started != 0

    def client(self, name: str) -> Client:
        """Return a client of the peer's daemon."""
        return connect(self.peer(name).home)

    def start(self, name: str, settings: Sequence[str] = ()) -> SimPeer:
        """Start a daemon called ``name``; wait until it answers.

        Raises:
            PeerTimeout: it did not within START_SECONDS.
            FabricError: it ended; the reason holds the end of its log.
        """
        peer = self._spawn(name, settings)
        self._await_answer(peer)
        return peer

    def start_all(self, names: Iterable[str], settings: Sequence[str] = ()) -> None:
        """Start several daemons side by side; wait until all answer."""
        for peer in [self._spawn(name, settings) for name in names]:
            self._await_answer(peer)

    def _spawn(self, name: str, settings: Sequence[str]) -> SimPeer:
        root = self.directory / name
        home = Home.find(root)
        home.create()
        launch = self._launch(name)
        texts = (*launch.settings, *settings)
        flags = [part for text in texts for part in ("--set", text)]
        argv = [*launch.enter, sys.executable, "-m", "fabric.app.cli", "up"]
        argv += ["--home", str(root), "--name", name, "--listen", launch.listen, *flags]
        with home.log_file.open("ab") as log:
            child = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children[name] = child
        started = start_time_of(child.pid)
        self._peers[name] = SimPeer(name, str(root), child.pid, started)
        self._save()
        return self._peers[name]

    def _await_answer(self, peer: SimPeer) -> None:
        def answers() -> bool:
            if not self.alive(peer.name):
                raise FabricError(
                    f"the daemon of {peer.name} ended:\n{self.log_tail(peer.name)}"
                )
            try:
                connect(peer.home).status()
            except Unavailable:
                return False
            return True

        wait_until(answers, START_SECONDS, f"the daemon of {peer.name} to answer")

    def log_tail(self, name: str, lines: int = 20) -> str:
        """Return the end of the daemon's log."""
        text = Home.find(Path(self.peer(name).home)).log_file.read_text(
            "utf-8", "replace"
        )
        return "\n".join(text.splitlines()[-lines:])

    def create_mesh(self, owner: str, name: str) -> str:
        """Create a mesh owned by peer ``owner``; return its id."""
        self.mesh = self.client(owner).mesh_init(name)
        self._save()
        return self.mesh

    def kill(self, name: str) -> None:
        """End the peer's process with SIGKILL."""
        self._signal(name, signal.SIGKILL)
        child = self._children.get(name)
        if child is not None:
            child.wait(10)

    def pause(self, name: str) -> None:
        """Stop the peer's process where it stands (SIGSTOP)."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a paused peer go on."""
        self._signal(name, signal.SIGCONT)

    def partition(self, groups: Sequence[Sequence[str]]) -> None:
        """Cut contact between peers of different ``groups``.

        Each daemon refuses the peers of the other groups: no dial, no accept, live
        connections closed.
        """
        ids = {n: self.client(n).status().peer for group in groups for n in group}
        for group in groups:
            others = tuple(ids[n] for n in ids if n not in group)
            for name in group:
                self.client(name).partition(others)

    def heal(self) -> None:
        """End every partition."""
        for name in self.names:
            self.client(name).partition(())

    def down(self, grace_seconds: float = 10.0) -> None:
        """End all daemons: SIGTERM, then SIGKILL after ``grace_seconds``."""
        living = self.names
        for name in living:
            self._signal(name, signal.SIGCONT)
            self._signal(name, signal.SIGTERM)
        try:
            wait_until(
                lambda: not any(self.alive(name) for name in living),
                grace_seconds,
                "the daemons to end",
            )
        except PeerTimeout:
            for name in self.names:
                self.kill(name)
        for child in self._children.values():
            child.wait(grace_seconds)  # those that are ours leave no zombie
        (self.directory / "sim.json").unlink(missing_ok=True)

    def _signal(self, name: str, number: signal.Signals) -> None:
        if self.alive(name):
            os.kill(self.peer(name).pid, number)

    def _save(self) -> None:
        state = SimState(self.mesh, tuple(self._peers.values()))
        path = self.directory / "sim.json"
        path.with_suffix(".tmp").write_bytes(msgspec.json.encode(state))
        path.with_suffix(".tmp").replace(path)


def wait_until(
    condition: Callable[[], bool],
    seconds: float,
    what: str,
    *,
    poll: float = POLL_SECONDS,
) -> None:
    """Return when ``condition()`` holds.

    Raises:
        PeerTimeout: it did not hold within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise PeerTimeout(f"waited {seconds:g} s for {what}")
        time.sleep(poll)
