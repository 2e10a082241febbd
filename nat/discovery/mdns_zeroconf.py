"""The zeroconf library behind four calls; it runs threads of its own.

Everything here blocks or is called from those threads: ``mdns_service.py`` keeps it
away from the event loop.
"""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import zeroconf

from fabric.core.errors import Unavailable
from nat.addresses import endpoint_of
from nat.discovery.mdns import SERVICE

MAX_WAITING_NAMES = 256
"""Names heard and not looked up yet: as many as peers are believed."""
MAX_NAME_CHARS = 255
LOOKUP_MILLISECONDS = 300
"""A peer's TXT record comes with its name; another responder must be asked for it."""
E_MDNS = "E_MDNS"


class Inbox:
    """Names that the library's thread hears, for a reader elsewhere: bounded.

    Args:
        wake: Tells the reader; must not block.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._names: deque[str] = deque()
        self.dropped = 0

    def put(self, name: str) -> None:
        """Add ``name`` unless it waits already or there is no room."""
        with self._lock:
            if name in self._names:
                return
            if len(self._names) >= MAX_WAITING_NAMES or len(name) > MAX_NAME_CHARS:
                self.dropped += 1
                return
            self._names.append(name)
        self._wake()

    def take(self) -> str | None:
        """Return the next name, or None."""
        with self._lock:
            return self._names.popleft() if self._names else None


class ZeroconfLink:
    """One announcement, and an ear for those of others.

    Args:
        inbox: Takes the names heard.
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._zeroconf: zeroconf.Zeroconf | None = None
        self._browser: zeroconf.ServiceBrowser | None = None

    def open(
        self, name: str, text: bytes, addrs: Sequence[str], interfaces: Sequence[str]
    ) -> None:
        """Announce and listen; takes about half a second.

        Args:
            name: Peer-name, unique.
            text: Data of the TXT record.
            addrs: Multiaddrs with IP and TCP port, for the SRV and A records.
            interfaces: IP addresses of the interfaces to use; all if empty.

        Raises:
            Unavailable: multicast is not possible here.
        """
        with _mapped():
            _check_interfaces(interfaces)
            self._zeroconf = zeroconf.Zeroconf(
                interfaces=list(interfaces) or zeroconf.InterfaceChoice.All,
                ip_version=zeroconf.IPVersion.V4Only,
                use_asyncio=False,
            )
            # the name is random: probing for another owner would take 1.7 s
            self._zeroconf.register_service(
                _service(name, text, addrs), cooperating_responders=True
            )
            self._browser = zeroconf.ServiceBrowser(
                self._zeroconf, SERVICE, handlers=[self._heard]
            )

    def _heard(
        self,
        zeroconf: zeroconf.Zeroconf,
        service_type: str,
        name: str,
        state_change: zeroconf.ServiceStateChange,
    ) -> None:
        # called by name from the browser's thread
        if state_change.name != "Removed":
            self._inbox.put(name)

    def lookup(self, name: str) -> bytes:
        """Return the TXT record of ``name``; empty if nobody says it.

        Raises:
            Unavailable: the network went away.
        """
        if self._zeroconf is None:
            return b""
        with _mapped():
            info = zeroconf.ServiceInfo(SERVICE, name)
            info.load_from_cache(self._zeroconf)
            if not info.text:
                info.request(self._zeroconf, LOOKUP_MILLISECONDS)
            return info.text or b""

    def close(self) -> None:
        """Say goodbye and end the threads; takes a quarter of a second."""
        opened, self._zeroconf = self._zeroconf, None
        browser, self._browser = self._browser, None
        with _mapped():
            if browser is not None:
                browser.cancel()  # its thread would outlive the rest
            if opened is not None:
                opened.close()


def _check_interfaces(interfaces: Sequence[str]) -> None:
    """Raise OSError unless each is ours: the library would leave its socket open."""
    for ip in interfaces:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))


def _service(name: str, text: bytes, addrs: Sequence[str]) -> zeroconf.ServiceInfo:
    ends = [end for end in map(endpoint_of, addrs) if end is not None]
    return zeroconf.ServiceInfo(
        SERVICE,
        f"{name}.{SERVICE}",
        port=ends[0][1] if ends else 0,
        addresses=sorted({ip.packed for ip, _ in ends}),
        properties=text,
        server=f"{name}.p2p.local.",
    )


@contextmanager
def _mapped() -> Iterator[None]:
    """Turn the library's errors into ours; RuntimeError is its "no interface".

    Its TimeoutError is an OSError.
    """
    try:
        yield
    except (OSError, RuntimeError, zeroconf.Error) as exc:
        raise Unavailable(
            f"no multicast on this network: {str(exc) or type(exc).__name__}",
            code=E_MDNS,
            next_step="allow UDP port 5353 and multicast, or set discovery.mdns = false"
            "; members elsewhere are found all the same",
        ) from exc
