"""Whole members of a mesh in a laboratory of NATs, and bytes between two of them."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

from benchmarks.contest import Contestant, Message, Process, secrets
from benchmarks.contract import Row, Sample, compare, note
from sims.lab.lab import HOME_PORT, PUBLIC_LISTEN
from sims.lab.network import Network
from sims.lab.topology import NatKind, Site, Topology

RELAYS = (Site(name="relay-0"), Site(name="relay-1"))
HOMES = ("a", "b")
READY_SECONDS = 30.0
CROSS_SECONDS = 5.0
PAUSE_SECONDS = 0.2
RELAYED_BYTES = 64 << 20
UNLIMITED = 1e12
NO_BUDGET: Mapping[str, object] = {
    f"nat.relay.max_bytes_per_second{whose}": UNLIMITED
    for whose in ("", "_per_peer", "_per_circuit")
}
"""For relays whose speed is measured: as they come, they give a circuit 16 MB/s."""


def peers_behind(kind: NatKind) -> Topology:
    """Return two homes of ``kind`` and two relays."""
    homes = tuple(Site(name=name, kind=kind) for name in HOMES)
    return Topology(sites=(*RELAYS, *homes))


class Members:
    """A member in each host of ``network``, in one mesh; ``stack`` ends them.

    Args:
        network: Its hosts.
        stack: Owns the processes.
        settings: Of each member.
        watch: Whether to note when contacts were made.

    Attributes:
        processes: By host.
        ids: PeerIds by host.
    """

    def __init__(
        self,
        network: Network,
        stack: ExitStack,
        settings: Mapping[str, object] | None = None,
        *,
        watch: bool = False,
    ) -> None:
        self.processes: dict[str, Process] = {}
        root = tempfile.mkdtemp(prefix="fabric-bench-")
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        for site in network.topology.sites:
            enter = network.enter(site.name)
            process = Process(sys.executable, "fabric_member", enter=enter)
            stack.callback(process.close)
            self.processes[site.name] = process
            public = site.kind is NatKind.NONE
            listen = PUBLIC_LISTEN if public else f"/ip4/0.0.0.0/tcp/{HOME_PORT}"
            own = {"name": site.name, "host.listen": [listen], **(settings or {})}
            home = f"{root}/{site.name}"
            process.tell({"home": home, "settings": own, "watch": watch})
        for process in self.processes.values():  # they start side by side
            process.listen()
        self.ids = self._form()

    def _form(self) -> dict[str, str]:
        founder, *others = self.processes
        founded = self.ask(founder, {"do": "found", "name": "bench"})
        ids: dict[str, str] = {founder: founded["peer"]}
        for host in others:
            asked = {"do": "join", "token": founded["token"]}
            ids[host] = self.ask(host, asked)["peer"]
        return ids

    def ask(self, host: str, message: Message) -> Message:
        """Return the answer of the member in ``host``.

        Raises:
            RuntimeError: it refused; the text is its reason.
        """
        answer = self.processes[host].ask(message)
        if "error" in answer:
            raise RuntimeError(f"{host}, {message.get('do', 'start')}: {answer}")
        return answer

    def contacts(self) -> list[Message]:
        """Return the homes' contacts with each other."""
        one, other = HOMES
        return [
            self.ask(mine, {"do": "contacts", "peer": self.ids[theirs]})
            for mine, theirs in ((one, other), (other, one))
        ]

    def open(self, *, relayed: bool) -> None:
        """Open a bulk connection between the homes, of the kind that is wanted.

        A home that joined a moment ago may have no relay yet, or no observers.
        """
        asked = {"do": "open", "peer": self.ids["b"]}
        deadline = time.monotonic() + READY_SECONDS
        while True:
            answer = self.processes["a"].ask(asked)
            if answer.get("relayed") is relayed:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"no path of the kind in question: {answer}")
            time.sleep(PAUSE_SECONDS)


def bulk_direct(bench: str, case: str, num_bytes: int, rounds: int) -> Row:
    """Send bytes between two homes behind cones, beside raw TLS on the same way."""
    with Network(peers_behind(NatKind.CONE)) as network, ExitStack() as stack:
        members = Members(network, stack)
        members.open(relayed=False)
        fabric = Contestant(members.processes["b"], members.processes["a"])
        raw = raw_tls(network, stack, "b", punched_pair(network))
        ours: list[Sample] = []
        theirs: list[Sample] = []
        for number in range(rounds):
            note(f"{case}: round {number + 1} of {rounds}")
            ours.append(fabric.run({"bytes": num_bytes, "peer": members.ids["b"]}))
            theirs.append(raw.run({"bytes": num_bytes}))
    return compare(bench, case, "MB/s", "raw ssl sockets", ours, theirs)


def bulk_relayed(bench: str, num_bytes: int, rounds: int) -> Iterator[Row]:
    """Send bytes between two homes that only a relay connects.

    The rival is raw TLS over one of the two legs, from a home to a relay. The relays
    have no budget here.
    """
    with Network(peers_behind(NatKind.SYMMETRIC)) as network, ExitStack() as stack:
        members = Members(network, stack, NO_BUDGET)
        members.open(relayed=True)
        fabric = Contestant(members.processes["b"], members.processes["a"])
        relays = [members.processes[site.name] for site in RELAYS]
        relay = RELAYS[0].name
        raw = raw_tls(network, stack, relay, dialled_pair(network, relay))
        ours: list[Sample] = []
        relaying: list[Sample] = []
        theirs: list[Sample] = []
        for number in range(rounds):
            note(f"bulk_relayed: round {number + 1} of {rounds}")
            before = _cpu(relays)
            asked = {"bytes": num_bytes, "peer": members.ids["b"]}
            ours.append(fabric.run(asked, relays))
            spent = (_cpu(relays) - before) / (num_bytes / 1e9)
            relaying.append(Sample(value=spent))
            theirs.append(raw.run({"bytes": num_bytes}))
    rival = "raw ssl, one leg"
    yield compare(bench, "bulk_relayed", "MB/s", rival, ours, theirs)
    why = "CPU of the relay alone"
    yield compare(bench, "bulk_relayed_relay_cpu", "s/GB", "none", relaying, [], why)


def _cpu(processes: Sequence[Process]) -> float:
    total: float = sum(p.ask({"do": "usage"})["cpu"] for p in processes)
    return total


def raw_tls(
    network: Network,
    stack: ExitStack,
    to: str,
    ends: tuple[socket.socket, socket.socket],
) -> Contestant:
    """Return raw TLS from home "a" to the host ``to`` over a connection's ``ends``."""
    one, other = ends
    server_secrets, client_secrets = secrets()
    processes = []
    for host, role, sock, secret in (
        (to, "serve", other, server_secrets),
        ("a", "dial", one, client_secrets),
    ):
        number = sock.fileno()
        enter = network.enter(host)
        process = Process(sys.executable, "raw_tls", role, enter=enter, fds=[number])
        sock.close()
        stack.callback(process.close)
        process.ask({**secret, "fd": number})
        processes.append(process)
    server, client = processes
    return Contestant(server, client)


def punched_pair(
    network: Network, ports: Sequence[int] = (35_001, 35_002)
) -> tuple[socket.socket, socket.socket]:
    """Return both ends of one connection between the homes: both dial (RFC 9293, 3.5).

    The gateways keep ports, so the public endpoints are known.
    """
    one, other = ends = tuple(network.socket(host) for host in HOMES)
    for sock, port in zip(ends, ports, strict=True):
        sock.bind(("0.0.0.0", port))
    one.setblocking(False)
    one.connect_ex((network.public_address("b"), ports[1]))
    other.settimeout(CROSS_SECONDS)
    other.connect((network.public_address("a"), ports[0]))
    for sock in ends:
        sock.setblocking(True)
    return one, other


def dialled_pair(
    network: Network, host: str, port: int = 35_001
) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection from home "a" to a public ``host``."""
    with network.socket(host) as listener, ExitStack() as undo:
        listener.bind(("0.0.0.0", port))
        listener.listen(1)
        listener.settimeout(CROSS_SECONDS)
        one = undo.enter_context(network.socket("a"))
        one.settimeout(CROSS_SECONDS)
        one.connect((network.public_address(host), port))
        other, _ = listener.accept()
        undo.pop_all()
    for sock in (one, other):
        sock.setblocking(True)
    return one, other
