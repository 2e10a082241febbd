"""A real router in namespaces: Debian's miniupnpd, hosts behind it, one outside.

::

    host0 192.168.77.10 --lan0 \\
                                gateway --wan0-- outside 5.5.5.9
    host1 192.168.78.10 --lan1 /

The outer addresses look public because miniupnpd refuses to map at others; nothing
leaves the namespaces.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager

import trio

ROUTER = "/usr/sbin/miniupnpd"
WAN, OUTSIDE = "5.5.5.1", "5.5.5.9"
PATIENCE_SECONDS = 60
"""Longest wait for anything; a loaded machine is slow."""
RULES = """
flush ruleset
table inet filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        iifname != wan0 accept
        ct state established,related accept
        jump miniupnpd
    }
    chain miniupnpd { }
    chain prerouting {
        type nat hook prerouting priority -100;
        jump prerouting_miniupnpd
    }
    chain postrouting {
        type nat hook postrouting priority 100;
        jump postrouting_miniupnpd
        oifname wan0 masquerade
    }
    chain prerouting_miniupnpd { }
    chain postrouting_miniupnpd { }
}
"""
CONFIG = """
ext_ifname=wan0
listening_ip=lan0
listening_ip=lan1
port=5000
min_lifetime=5
max_lifetime=86400
secure_mode=yes
system_uptime=no
uuid=a4619093-01d9-496d-b3eb-9d09585a107a
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
upnp_table_name=filter
upnp_nat_table_name=filter
allow 1024-65535 0.0.0.0/0 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
CALL = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), 3) as sock:
    print(sock.recv(64).decode())
"""


def missing():
    """Return why the lab cannot be built here, or ""."""
    if os.geteuid():
        return "needs root for network namespaces"
    for program, package in ((ROUTER, "miniupnpd-nftables"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"needs the Debian package {package}"
    version = subprocess.run([ROUTER, "--version"], capture_output=True, text=True)
    if "nftables" not in version.stdout + version.stderr:
        return "needs the Debian package miniupnpd-nftables, this is another backend"
    made = subprocess.run(["ip", "netns", "add", f"pm{os.getpid()}t"], check=False)
    subprocess.run(["ip", "netns", "del", f"pm{os.getpid()}t"], check=False)
    return "needs the right to make network namespaces" if made.returncode else ""


class RouterLab:
    """The namespaces and the router process."""

    def __init__(self, folder, *, wan=WAN):
        self._prefix = f"pm{os.getpid()}"
        self._folder = folder
        self.wan = wan
        self._config = CONFIG
        self._router = None
        self.log = b""
        self._logged = trio.Event()
        self._nursery = None

    def name(self, which):
        return f"{self._prefix}{which}"

    def build(self):
        for which in ("g", "o", "h0", "h1"):
            run("ip", "netns", "add", self.name(which))
            self.inside(which, "ip", "link", "set", "lo", "up")
        self._wire("o", f"{OUTSIDE}/24", "wan0", f"{self.wan}/24")
        for index in (0, 1):
            subnet = f"192.168.{77 + index}"
            host = f"h{index}"
            self._wire(host, f"{subnet}.10/24", f"lan{index}", f"{subnet}.1/24")
            self.inside(host, "ip", "route", "add", "default", "via", f"{subnet}.1")
        self.inside("g", "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.load_rules()

    def load_rules(self):
        """Begin with no mapping, as a router does that lost its power."""
        self.inside("g", "nft", "-f", "-", input=RULES)

    def destroy(self):
        for which in ("h0", "h1", "o", "g"):
            subprocess.run(["ip", "netns", "del", self.name(which)], check=False)

    def inside(self, which, *command, **options):
        return run("ip", "netns", "exec", self.name(which), *command, **options)

    def _wire(self, which, address, gateway_end, gateway_address):
        one, two = f"{self.name(which)}a", f"{self.name(which)}b"
        run("ip", "link", "add", one, "type", "veth", "peer", "name", two)
        for end, where, name, cidr in (
            (one, which, "eth0", address),
            (two, "g", gateway_end, gateway_address),
        ):
            run("ip", "link", "set", end, "netns", self.name(where), "name", name)
            self.inside(where, "ip", "addr", "add", cidr, "dev", name)
            self.inside(where, "ip", "link", "set", name, "up")

    # -- the router -------------------------------------------------------------------

    async def start_router(self, nursery, *, pmp=True, upnp=True):
        """Start miniupnpd and return when it serves."""
        yes = {True: "yes", False: "no"}
        text = f"{CONFIG}enable_natpmp={yes[pmp]}\nenable_upnp={yes[upnp]}\n"
        config = self._folder / "miniupnpd.conf"
        config.write_text(text)
        pid_file = self._folder / "miniupnpd.pid"
        self.log = b""
        self._router = await trio.lowlevel.open_process(
            [
                *("ip", "netns", "exec", self.name("g")),
                *(ROUTER, "-d", "-f", str(config), "-P", str(pid_file)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        nursery.start_soon(self._read_log, self._router.stdout)
        await self.logged(b"Listening for NAT-PMP" if pmp else b"HTTP listening on")

    async def stop_router(self):
        """End miniupnpd, which says nothing to anybody, and forget its mappings."""
        if self._router is not None:
            self._router.send_signal(signal.SIGKILL)
            with trio.CancelScope(shield=True), trio.fail_after(PATIENCE_SECONDS):
                await self._router.wait()
            self._router = None
        self.load_rules()

    async def logged(self, text, times=1):
        """Return when the router logged ``text`` that often since its start."""
        with trio.fail_after(PATIENCE_SECONDS):
            while self.log.count(text) < times:
                await self._logged.wait()

    async def _read_log(self, pipe):
        async for chunk in pipe:
            self.log += chunk
            self._logged.set()
            self._logged = trio.Event()

    def mapped_ports(self):
        """Return the external ports that the kernel forwards now."""
        rules = json.loads(self.inside("g", "nft", "-j", "list", "ruleset"))
        ports = []
        for item in rules["nftables"]:
            parts = item.get("rule", {}).get("expr", [])
            if any("dnat" in part for part in parts):
                values = [part["match"]["right"] for part in parts if "match" in part]
                # the other number is that of TCP, 6
                ports += [v for v in values if isinstance(v, int) and v > 1023]
        return sorted(ports)

    def call_from_outside(self, port):
        """Return what answers at the router's port, as text."""
        python = (sys.executable, "-c", CALL, self.wan, str(port))
        return self.inside("o", *python).strip()

    # -- hosts ------------------------------------------------------------------------

    @asynccontextmanager
    async def host(self, index, *ports, **settings):
        """Run ``portmap_host`` in a host; it leaves when the block ends.

        A removal may take long on a busy machine, where each call starts a process.
        """
        settings = {"close_seconds": 20.0, **settings}
        process = await trio.lowlevel.open_process(
            ["ip", "netns", "exec", self.name(f"h{index}"), sys.executable]
            + ["-m", "tests.nat.portmap.portmap_host", "--config", json.dumps(settings)]
            + [str(port) for port in ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        host = Host(process)
        try:
            yield host
            if not host.left:
                await host.leave()
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await process.stdin.aclose()
                await process.stdout.aclose()


class Host:
    """A running ``portmap_host``."""

    def __init__(self, process):
        self._process = process
        self._buffer = b""
        self.seen = []
        self.left = False

    async def event(self, kind, **facts):
        """Return the next event of ``kind`` with ``facts``; skip others."""
        with trio.fail_after(PATIENCE_SECONDS):
            while True:
                event = await self._next()
                self.seen.append(event)
                same = all(event.get(name) == value for name, value in facts.items())
                if event["event"] == kind and same:
                    return event

    async def change_network(self):
        await self._process.stdin.send_all(b"change\n")

    async def leave(self):
        """Ask it to leave and return the seconds that it took."""
        self.left = True
        start = trio.current_time()
        await self._process.stdin.aclose()
        await self.event("closed")
        return trio.current_time() - start

    async def _next(self):
        while b"\n" not in self._buffer:
            chunk = await self._process.stdout.receive_some(4096)
            assert chunk, f"the host ended after {self.seen}"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def run(*command, input=None):
    """Run ``command`` and return its output."""
    done = subprocess.run(command, input=input, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@contextmanager
def built(lab):
    """Have the namespaces of ``lab`` while the block runs."""
    try:
        lab.build()
        yield lab
    finally:
        lab.destroy()
