"""A laboratory: real daemons in the hosts of a network, and a mesh of them.

Control sockets are files, so this process talks to every daemon from outside.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from fabric.app.client import Client
from fabric.app.control_messages import PeerView
from fabric.core.errors import ConfigError
from sims.lab.network import Network
from sims.lab.topology import IpVersions, NatKind, Topology
from sims.local import Launch, LocalMesh, start_time_of

PUBLIC_PORT = 443
"""Where public hosts listen: the one port that every firewall lets out."""
PUBLIC_LISTEN = f"/ip4/0.0.0.0/tcp/{PUBLIC_PORT}"
HOME_PORT = 4001
"""Of the first host behind a gateway; each other takes the next. With equal ports the
gateway would have to translate one of them differently for each destination."""
JOIN_USES = 200


class Lab:
    """A network with a daemon in each host; use as a context manager.

    Args:
        topology: Has at least one public host.
        settings: ``key=value`` for every daemon.
        listen: By host, where others than the defaults are wanted.

    Attributes:
        network: To change while daemons run.
        mesh: The daemons, by name of their host.
    """

    def __init__(
        self,
        topology: Topology,
        settings: Sequence[str] = (),
        listen: Mapping[str, str] | None = None,
    ) -> None:
        self.public = [s.name for s in topology.sites if s.kind is NatKind.NONE]
        if not self.public:
            raise ConfigError("a laboratory needs a public host to meet at")
        self.network = Network(topology)
        # a Unix socket's path holds 107 bytes
        self._root = Path(tempfile.mkdtemp(prefix=_own_prefix()))
        self._settings = tuple(settings)
        self._listen = dict(listen or {})
        self.mesh = LocalMesh(self._root, self._launch)
        self._ids: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Lab:
        """Build the network; no daemon runs yet."""
        _sweep_homes()
        self._stack.callback(shutil.rmtree, self._root, ignore_errors=True)
        with ExitStack() as undo:
            undo.push(self._stack)
            self._stack.enter_context(self.network)
            self._stack.callback(self._down)
            undo.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the daemons, then remove the network and the homes."""
        self._stack.close()

    @property
    def hosts(self) -> list[str]:
        """Names of all hosts, in the topology's order."""
        sites = self.network.topology.sites
        return [name for site in sites for name in site.host_names]

    def client(self, host: str) -> Client:
        """Return a client of the daemon in ``host``."""
        return self.mesh.client(host)

    def start(self, hosts: Sequence[str] = ()) -> None:
        """Start the daemons of ``hosts`` (all by default), side by side."""
        names = list(hosts) or self.hosts
        self.mesh.start_all(names)
        for name in names:
            self._ids[name] = self.client(name).status().peer

    def form(
        self,
        hosts: Sequence[str] = (),
        joined: Callable[[str], None] = lambda host: None,
    ) -> str:
        """Make one mesh of started hosts; return an invite that others can use.

        Args:
            hosts: The first founds the mesh; all, from a public host on, by default.
            joined: Told of each host that has joined.
        """
        names = list(hosts) or sorted(self.hosts, key=lambda h: h not in self.public)
        self.mesh.create_mesh(names[0], "lab")
        token = self.client(names[0]).invite(uses=JOIN_USES)
        joined(names[0])
        for name in names[1:]:
            self.client(name).join(token)
            joined(name)
        return token

    def peer(self, host: str) -> str:
        """Return the PeerId of the daemon in ``host``."""
        return self._ids[host]

    def view(self, host: str, other: str) -> PeerView | None:
        """Return what ``host`` says of ``other``; None before it knows of it."""
        rows = self.client(host).status().peers
        return next((row for row in rows if row.peer == self.peer(other)), None)

    def log(self, host: str, lines: int = 60) -> str:
        """Return the end of a daemon's log."""
        return self.mesh.log_tail(host, lines)

    def _launch(self, name: str) -> Launch:
        site = self.network.topology.site_of(name)
        port = HOME_PORT + site.host_names.index(name)
        usual = listen_on(site.ip, PUBLIC_PORT if name in self.public else port)
        return Launch(
            enter=self.network.enter(name),
            listen=self._listen.get(name, usual),
            settings=self._settings,
        )

    def halt(self) -> None:
        """End all daemons at once; the network and their logs stay."""
        for name in self.mesh.names:
            self.mesh.kill(name)

    def _down(self) -> None:
        for name in self.mesh.names:
            self.mesh.resume(name)
        self.mesh.down(grace_seconds=5)


def listen_on(ip: IpVersions, port: int) -> str:
    """Return the wildcards of ``ip`` as ``fabric up --listen`` takes them."""
    found = [f"/ip4/0.0.0.0/tcp/{port}"] if ip.has_ip4 else []
    found += [f"/ip6/::/tcp/{port}"] if ip.has_ip6 else []
    return ",".join(found)


def _own_prefix() -> str:
    own = os.getpid()
    return f"fabric-lab-{own}.{start_time_of(own)}-"


def _sweep_homes() -> None:
    """Remove the homes of laboratories whose process was killed."""
    for path in Path(tempfile.gettempdir()).glob("fabric-lab-*.*-*"):
        pid, _, started = path.name.split("-")[2].partition(".")
        if pid.isdigit() and start_time_of(int(pid)) != int(started or 0):
            shutil.rmtree(path, ignore_errors=True)
