"""A router in virtual time, and a mapper wired to it.

The router keeps one table for all its protocols, as real ones do. ``speaks`` says which
it answers; ``refuses`` turns grants into refusals.
"""

import random

from nat.portmap.api import Lost, Mapped
from nat.portmap.config import PortMapConfig
from nat.portmap.core import PortMapper, pcp
from nat.portmap.gateway import Gateway
from nat.portmap.lease import WantedPort
from nat.portmap.outbox import SendDatagram
from nat.portmap.upnp_messages import (
    UpnpConflict,
    UpnpFailed,
    UpnpFound,
    UpnpMap,
    UpnpMapped,
    UpnpSearch,
    UpnpUnmap,
    UpnpUnmapped,
)

GATEWAY = Gateway(address="192.168.1.1", interface="eth0", source="192.168.1.7")
OTHER_GATEWAY = Gateway(address="10.0.0.1", interface="wlan0", source="10.0.0.9")
URL = "http://192.168.1.1:5000/rootDesc.xml"


class Router:
    """The gateway's side of the three protocols."""

    def __init__(self, speaks=("pcp", "nat-pmp", "upnp"), external_ip="198.51.100.1"):
        self.speaks = set(speaks)
        self.external_ip = external_ip
        self.refuses = False
        self.refused_ports = set()
        self.mapless = False  # answers, but not to requests for mappings
        self.max_lease = 1 << 31
        self.started = 0.0
        self.table = {}  # external port -> (client, internal port, expires)

    def restart(self, now):
        self.table.clear()
        self.started = now

    def held(self, now, client=GATEWAY.source):
        """Return {internal: external} of live mappings of ``client``."""
        return {
            internal: external
            for external, (who, internal, expires) in self.table.items()
            if who == client and now < expires
        }

    def take_by_other(self, port):
        self.table[port] = ("192.168.1.99", port, 1e18)

    def datagram(self, data, now):
        """Return the answer to one datagram, or None."""
        if data[0] == pcp.VERSION:
            if "pcp" in self.speaks:
                return self._pcp(data, now)
            if "nat-pmp" in self.speaks:
                return bytes([0, data[1] | 0x80, 0, 1]) + self._epoch(now)
            return None
        return self._pmp(data, now) if "nat-pmp" in self.speaks else None

    def call(self, request, now):
        """Return the answer to one UPnP call."""
        if "upnp" not in self.speaks:
            port = 0 if isinstance(request, UpnpSearch) else request.internal_port
            return UpnpFailed(internal_port=port, reason="no answer to the search")
        match request:
            case UpnpSearch():
                return UpnpFound(url=URL, external_ip=self.external_ip)
            case UpnpUnmap():
                self._remove(request.internal_port)
                return UpnpUnmapped(internal_port=request.internal_port)
            case UpnpMap():
                return self._upnp_map(request, now)

    def _upnp_map(self, request, now):
        if self._refused(request.internal_port):
            reason = "Action not authorized"
            return UpnpFailed(internal_port=request.internal_port, reason=reason)
        holder = self._holder(request.external_port, now)
        if holder not in (None, (GATEWAY.source, request.internal_port)):
            return UpnpConflict(
                internal_port=request.internal_port,
                external_port=request.external_port,
            )
        life = min(request.lease_seconds, self.max_lease)
        expires = now + life
        self.table[request.external_port] = (
            GATEWAY.source,
            request.internal_port,
            expires,
        )
        return UpnpMapped(
            internal_port=request.internal_port,
            external_port=request.external_port,
            external_ip=self.external_ip,
            lease_seconds=life,
        )

    def _pcp(self, data, now):
        life = int.from_bytes(data[4:8], "big")
        body = data[24:]
        internal = int.from_bytes(body[16:18], "big")
        wanted = int.from_bytes(body[18:20], "big")
        external, life = self._grant(internal, wanted, life, now)
        result = 2 if self._refused(internal) else 0
        head = bytes([2, 0x81, 0, result]) + life.to_bytes(4, "big")
        address = pcp.pack_address(self.external_ip)
        ports = internal.to_bytes(2, "big") + external.to_bytes(2, "big")
        return head + self._epoch(now) + bytes(12) + body[:16] + ports + address

    def _pmp(self, data, now):
        if data[1] == 0:
            packed = pcp.pack_address(self.external_ip)[12:]
            return bytes([0, 0x80, 0, 0]) + self._epoch(now) + packed
        if self.mapless:
            return None
        internal = int.from_bytes(data[4:6], "big")
        wanted = int.from_bytes(data[6:8], "big")
        life = int.from_bytes(data[8:12], "big")
        external, life = self._grant(internal, wanted, life, now)
        result = 2 if self._refused(internal) else 0
        head = bytes([0, 0x82, 0, result]) + self._epoch(now)
        return head + data[4:6] + external.to_bytes(2, "big") + life.to_bytes(4, "big")

    def _grant(self, internal, wanted, life, now):
        if self._refused(internal) and life:
            return 0, life
        if life == 0:
            self._remove(internal)
            return 0, 0
        for external, (who, port, _) in self.table.items():
            if (who, port) == (GATEWAY.source, internal):
                wanted = external
        mine = (None, (GATEWAY.source, internal))
        while self._holder(wanted, now) not in mine:
            wanted += 1
        life = min(life, self.max_lease)
        self.table[wanted] = (GATEWAY.source, internal, now + life)
        return wanted, life

    def _refused(self, internal):
        return self.refuses or internal in self.refused_ports

    def _holder(self, external, now):
        who, port, expires = self.table.get(external, ("", 0, 0.0))
        return (who, port) if now < expires else None

    def _remove(self, internal):
        mine = [
            external
            for external, (who, port, _) in self.table.items()
            if (who, port) == (GATEWAY.source, internal)
        ]
        for external in mine:
            del self.table[external]

    def _epoch(self, now):
        return int(now - self.started).to_bytes(4, "big")


class Home:
    """A mapper behind a router; ``lossy`` loses what the mapper sends."""

    def __init__(self, router, *, ports=(4001,), seed=0, **settings):
        self.router = router
        self.now = 1000.0
        self.config = PortMapConfig(**settings)
        wanted = [WantedPort(internal_port=port) for port in ports]
        self.mapper = PortMapper(self.config, wanted, random.Random(seed))
        self.lossy = False
        self.events = []
        self.sent = 0
        self.proven = {}  # internal port -> until when the router said it would hold

    def join(self, gateway=GATEWAY):
        self.mapper.on_network_change(gateway, self.now)
        self.settle()

    def settle(self):
        """Carry everything both ways until nobody has anything to say."""
        for _ in range(200):
            self.events += self.mapper.take_events()
            commands = self.mapper.take_commands()
            if not commands:
                return
            for command in commands:
                self._carry(command)
        raise AssertionError("the mapper never stops talking")

    def _carry(self, command):
        self.sent += 1
        datagram = isinstance(command, SendDatagram)
        if datagram and self.lossy:
            return
        if datagram:
            answer = self.router.datagram(command.data, self.now)
            if answer is not None:
                self.mapper.receive_untrusted(answer, self.now)
        else:
            answer = self._call(command.request)
            self.mapper.on_upnp(command.token, answer, self.now)
        for who, internal, expires in self.router.table.values():
            if who == GATEWAY.source and not self.lossy:
                self.proven[internal] = expires

    def _call(self, request):
        if not self.lossy:
            return self.router.call(request, self.now)
        port = getattr(request, "internal_port", 0)
        return UpnpFailed(internal_port=port, reason="no answer in 6 s")

    def run(self, seconds):
        """Let ``seconds`` of virtual time pass."""
        until = self.now + seconds
        for _ in range(100_000):
            due = self.mapper.next_timeout()
            if due > until:
                self.now = until
                return
            self.now = max(self.now, due)
            self.mapper.on_timeout(self.now)
            self.settle()
        raise AssertionError("time does not pass")

    def leave(self):
        self.mapper.close(self.now)
        self.settle()
        while not self.mapper.done:
            self.now = self.mapper.next_timeout()
            self.mapper.on_timeout(self.now)
            self.settle()

    def mapped(self):
        """Return {internal: external} as the mapper believes."""
        return {m.internal_port: m.external_port for m in self.mapper.mappings()}

    def told(self):
        """Return {internal: (ip, external)} as the events alone say."""
        places = {}
        for event in self.events:
            if isinstance(event, Mapped):
                m = event.mapping
                assert m.internal_port not in places, "mapped twice without Lost"
                places[m.internal_port] = (m.external_ip, m.external_port)
            elif isinstance(event, Lost):
                assert places.pop(event.mapping.internal_port, None) is not None
        return places


def upnp_calls(home):
    return [call for call in home.mapper.take_commands() if hasattr(call, "token")]
