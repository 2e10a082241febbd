"""A laboratory network that exists: built, changed while it runs, and always removed.

Namespaces are named after the process that made them; those of a process that is gone
are removed before the next network is built.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

import msgspec

from fabric.core.errors import ConfigError, FabricError
from sims.lab.enter import NAMESPACES, socket_in
from sims.lab.namespaces import obstacle, remove_namespace, run_step, sweep
from sims.lab.plan import (
    SWITCH,
    Script,
    Step,
    build_edge,
    build_site,
    build_switch,
    edge_of,
    gateways_of,
    host_address,
    public_address,
    settle_host,
)
from sims.lab.topology import PUBLIC_BITS, NatKind, Site, Topology
from sims.local import start_time_of

END_SECONDS = 5.0
_serial = itertools.count()


class Network:
    """The namespaces of one topology; use as a context manager.

    Raises:
        ConfigError: this machine cannot build one, or the topology is impossible.
    """

    def __init__(self, topology: Topology) -> None:
        topology.check()
        self.topology = topology
        own = os.getpid()
        self.prefix = f"lab.{own}.{start_time_of(own)}.{next(_serial)}."
        self._links: dict[str, subprocess.Popen[bytes]] = {}
        self._uplinks: dict[str, int] = {}
        self._places = {
            host: (site.name, index)
            for site in topology.sites
            for index, host in enumerate(site.host_names)
        }
        self._moves = 0

    def __enter__(self) -> Network:
        """Build the network."""
        reason = obstacle()
        if reason:
            raise ConfigError(
                f"no laboratory here: {reason}",
                code="E_LAB",
                next_step="run it as root on Linux with iproute2 and nftables",
            )
        sweep()
        try:
            script = self._script()
            build_switch(script, ip6=self.topology.has_ip6)
            for number, site in enumerate(self.topology.sites, 1):
                build_site(script, site, number)
            self._run(script.steps())
            for site in self.topology.sites:
                self._start_link(site)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove everything."""
        self._remove()

    def namespace(self, role: str) -> str:
        """Return the name of the namespace of a host, gateway or the switch."""
        return self.prefix + role

    def enter(self, role: str) -> tuple[str, ...]:
        """Return what to put before a command that is to run in ``role``."""
        return ("ip", "netns", "exec", self.namespace(role))

    def socket(
        self, role: str, kind: socket.SocketKind = socket.SOCK_STREAM
    ) -> socket.socket:
        """Return an IPv4 socket of this process that is in ``role``'s network."""
        return socket_in(self.namespace(role), kind)

    def address(self, host: str) -> str:
        """Return the host's own address: private behind a gateway."""
        name, index = self._places[host]
        number = self.topology.number(name)
        return host_address(self.topology.site(name), number, index, self._up(name))

    def public_address(self, site: str) -> str:
        """Return the site's address on the public network."""
        return public_address(self.topology.number(site), self._up(site))

    def received_bytes(self, host: str) -> int:
        """Return how much the host's device has received since it was made."""
        argv = [*self.enter(host), "cat", "/sys/class/net/eth0/statistics/rx_bytes"]
        done = subprocess.run(argv, capture_output=True, check=True)
        return int(done.stdout)

    def received_bytes6(self, host: str) -> int:
        """Return how much the host has received in IPv6 packets."""
        argv = [*self.enter(host), "cat", "/proc/net/snmp6"]
        done = subprocess.run(argv, capture_output=True, check=True, text=True)
        counters = dict(line.split() for line in done.stdout.splitlines())
        return int(counters["Ip6InOctets"])

    def renumber(self, site: str) -> None:
        """Give the site another public address; flows through the old one are dead."""
        old = self.public_address(site)
        self._uplinks[site] = self._up(site) + 1
        role, device = edge_of(self.topology.site(site))
        lines = [
            # in this order: a second address of a network goes with the first
            f"addr del {old}/{PUBLIC_BITS} dev {device}",
            f"addr add {self.public_address(site)}/{PUBLIC_BITS} dev {device}",
        ]
        self._inside(role, lines)

    def swap_gateway(self, site: str, kind: NatKind) -> None:
        """Put another gateway, of another kind and address, before the site's hosts.

        Raises:
            ConfigError: the site has no gateway, or would have none.
        """
        before = self.topology.site(site)
        if NatKind.NONE in (before.kind, kind):
            raise ConfigError(f"{site}: a gateway can only replace a gateway")
        number = self.topology.number(site)
        self._stop_link(site)
        # veth devices outlive "netns del" for a moment, their names are needed now
        self._inside(SWITCH, [f"link del up{number}", f"link del gl{number}"])
        gone = [f"netns del {self.namespace(role)}" for role in gateways_of(before)]
        self._run([_ip(gone)])
        self._uplinks[site] = self._up(site) + 1
        after = msgspec.structs.replace(before, kind=kind)
        sites = tuple(after if s.name == site else s for s in self.topology.sites)
        self.topology = msgspec.structs.replace(self.topology, sites=sites)
        script = self._script()
        build_edge(script, after, number, self._up(site))
        self._run(script.steps())
        self._start_link(after)

    def move_host(self, host: str, site: str) -> None:
        """Plug a host behind a gateway into another site: its old address is gone."""
        target, number = self.topology.site(site), self.topology.number(site)
        old_site, _ = self._places[host]
        if NatKind.NONE in (target.kind, self.topology.site(old_site).kind):
            raise ConfigError(f"{host}: both sites need a gateway")
        self._moves += 1
        index = target.hosts + self._moves
        port = f"h{self.topology.number(self.topology.site_of(host).name)}-"
        port += str(self.topology.site_of(host).host_names.index(host))
        self._inside(SWITCH, [f"link set {port} master lan{number}"])
        self._inside(host, [f"addr del {self.address(host)}/24 dev eth0"])
        self._places[host] = (site, index)
        script = self._script()
        settle_host(script, host, target, number, index)
        self._run(script.steps())

    def black_hole(self, site: str) -> None:
        """Swallow everything from and to the site; no end is told."""
        number = self.topology.number(site)
        self._inside(SWITCH, [f"link set up{number} nomaster"])

    def restore(self, site: str) -> None:
        """End a black hole."""
        number = self.topology.number(site)
        self._inside(SWITCH, [f"link set up{number} master pub"])

    def split(self, sites: Sequence[str]) -> None:
        """Give ``sites`` a public network of their own; no end is told."""
        lines = ["link add pub2 type bridge", "link set pub2 up"]
        ports = [f"up{self.topology.number(site)}" for site in sites]
        lines += [f"link set {port} master pub2" for port in ports]
        self._inside(SWITCH, lines)

    def join(self, sites: Sequence[str]) -> None:
        """End the split of ``sites``."""
        ports = [f"up{self.topology.number(site)}" for site in sites]
        lines = [f"link set {port} master pub" for port in ports]
        self._inside(SWITCH, [*lines, "link del pub2"])

    def _script(self) -> Script:
        return Script(self.prefix, self.topology.net6)

    def _up(self, site: str) -> int:
        return self._uplinks.get(site, 0)

    def _inside(self, role: str, lines: list[str]) -> None:
        argv = ("ip", "-n", self.namespace(role), "-batch", "-")
        self._run([Step(argv, "\n".join(lines) + "\n")])

    def _run(self, steps: list[Step]) -> None:
        for step in steps:
            run_step(step)

    def _start_link(self, site: Site) -> None:
        if not site.shape.is_carried:
            return
        role, device = edge_of(site)
        number = self.topology.number(site.name)
        options = {
            "ends": [
                [self.namespace(role), device],
                [self.namespace(SWITCH), f"up{number}"],
            ],
            "delay": site.shape.delay_seconds,
            "loss": site.shape.loss,
            "queue_bytes": site.shape.queue_bytes,
            "seed": f"{self.topology.seed} {site.name}",
        }
        argv = [sys.executable, "-m", "sims.lab.delay_link", json.dumps(options)]
        link = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._links[site.name] = link
        assert link.stdout is not None  # asked for above
        if link.stdout.readline() != b"ready\n":
            raise FabricError(f"the link of {site.name} did not start", code="E_LAB")

    def _stop_link(self, site: str) -> None:
        link = self._links.pop(site, None)
        if link is None:
            return
        link.kill()
        link.wait(END_SECONDS)
        for pipe in (link.stdin, link.stdout):
            if pipe is not None:
                pipe.close()

    def _remove(self) -> None:
        for site in list(self._links):
            self._stop_link(site)
        for path in NAMESPACES.glob(f"{self.prefix}*"):
            remove_namespace(path.name)


def _ip(lines: list[str]) -> Step:
    return Step(("ip", "-batch", "-"), "\n".join(lines) + "\n")
