"""An Internet Gateway Device on loopback, honest or hostile, for the real client."""

import re
import socket
from contextlib import asynccontextmanager, suppress

import trio

SERVICE = "urn:schemas-upnp-org:service:WANIPConnection:1"
DESCRIPTION = f"""<?xml version="1.0"?>
<root xmlns="urn:schemas-upnp-org:device-1-0"><device>
<deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:1</deviceType>
<deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANDevice:1</deviceType>
<deviceList><device>
<deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:1</deviceType>
<serviceList><service><serviceType>{SERVICE}</serviceType>
<controlURL>%s</controlURL><eventSubURL>/e</eventSubURL><SCPDURL>/s</SCPDURL>
</service></serviceList>
</device></deviceList></device></deviceList></device></root>"""


class Igd:
    """State and manners of the device.

    Attributes:
        table: {external port: (client, internal port, lease)}.
        permanent_only: Refuse leases (error 725).
        no_lookup: GetSpecificPortMappingEntry finds nothing, as in some routers.
        control: The control URL that the description names.
        location: The URL that the answer to a search names; "" is the right one.
        hostile: "endless" sends headers and a body without end, "drip" a byte a second.
    """

    def __init__(self, address, http_port):
        self.address = address
        self.url = f"http://{address}:{http_port}/desc.xml"
        self.table = {}
        self.permanent_only = self.no_lookup = False
        self.external_ip = "198.51.100.1"
        self.control = "/control"
        self.location = ""
        self.hostile = ""
        self.requests = 0

    def soap(self, action, fields):
        """Return (status, fields) of the answer."""
        port = int(fields.get("NewExternalPort", 0))
        match action:
            case "GetExternalIPAddress":
                return 200, {"NewExternalIPAddress": self.external_ip}
            case "GetSpecificPortMappingEntry":
                if self.no_lookup or port not in self.table:
                    return 500, {"errorCode": 714}
                client, internal, lease = self.table[port]
                return 200, {
                    "NewInternalPort": internal,
                    "NewInternalClient": client,
                    "NewEnabled": 1,
                    "NewPortMappingDescription": "x",
                    "NewLeaseDuration": lease,
                }
            case "AddPortMapping":
                return self._add(port, fields)
            case "DeletePortMapping":
                self.table.pop(port, None)
                return 200, {}
        return 500, {"errorCode": 401}

    def _add(self, port, fields):
        client = fields["NewInternalClient"]
        lease = int(fields["NewLeaseDuration"])
        if self.permanent_only and lease:
            return 500, {"errorCode": 725}
        if port in self.table and self.table[port][0] != client:
            return 500, {"errorCode": 718}
        self.table[port] = (client, int(fields["NewInternalPort"]), lease)
        return 200, {}


async def _answer_http(igd, stream):
    async with stream:
        request = b""
        while b"\r\n\r\n" not in request:
            request += await stream.receive_some(4096)
        igd.requests += 1
        head, _, body = request.partition(b"\r\n\r\n")
        size = re.search(rb"(?i)content-length: *(\d+)", head)
        while size and len(body) < int(size[1]):
            body += await stream.receive_some(4096)
        if igd.hostile:
            await _misbehave(igd, stream)
        elif head.startswith(b"GET"):
            await _send(stream, 200, DESCRIPTION % igd.control)
        else:
            action = re.search(rb"#(\w+)", head)[1].decode()
            found = re.findall(rb"<(New\w+)>([^<]*)<", body)
            fields = {name.decode(): value.decode() for name, value in found}
            status, answer = igd.soap(action, fields)
            await _send(stream, status, _envelope(action, status, answer))


def _envelope(action, status, fields):
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
    if status != 200:
        inner = (
            f'<UPnPError xmlns="urn:schemas-upnp-org:control-1-0">{inner}</UPnPError>'
        )
        inner = f"<s:Fault><detail>{inner}</detail></s:Fault>"
    else:
        inner = f'<u:{action}Response xmlns:u="{SERVICE}">{inner}</u:{action}Response>'
    schema = "http://schemas.xmlsoap.org/soap/envelope/"
    return f'<s:Envelope xmlns:s="{schema}"><s:Body>{inner}</s:Body></s:Envelope>'


async def _send(stream, status, text):
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n"
    await stream.send_all(f"{head}Connection: close\r\n\r\n{text}".encode())


async def _misbehave(igd, stream):
    await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        if igd.hostile == "endless":
            await stream.send_all(bytes(1 << 20))
        else:
            await stream.send_all(b"x")
            with trio.move_on_after(1):  # the client hangs up at the end
                await stream.receive_some(1)


async def _serve_http(igd, stream):
    # the client was ended
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await _answer_http(igd, stream)


async def _answer_searches(igd, sock):
    while True:
        data, sender = await sock.recvfrom(2048)
        if data.startswith(b"M-SEARCH"):
            location = igd.location or igd.url
            text = f"HTTP/1.1 200 OK\r\nST: x\r\nLocation: {location}\r\n\r\n"
            await sock.sendto(text.encode(), sender)


@asynccontextmanager
async def open_igd(address):
    """Serve a device at ``address``; port 1900 must be free there."""
    (listener,) = await trio.open_tcp_listeners(0, host=address)
    igd = Igd(address, listener.socket.getsockname()[1])
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind((address, 1900))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_searches, igd, sock)
            nursery.start_soon(
                trio.serve_listeners,
                lambda stream: _serve_http(igd, stream),
                [listener],
            )
            yield igd
            nursery.cancel_scope.cancel()
