"""py-libp2p's host, announcing exactly what it is told.

The stock host cuts an address at its first ``/p2p/``, which in a circuit address names
the relay: what it would announce instead leads to the relay as if that were us.
"""

from __future__ import annotations

from libp2p.host.basic_host import BasicHost
from multiaddr import Multiaddr


class AnnouncingHost(BasicHost):
    """A BasicHost whose addresses are those announced, or else those listened on."""

    # the base class asks for addresses while it is constructed
    announced: tuple[Multiaddr, ...] = ()

    def get_addrs(self) -> list[Multiaddr]:
        """Return the addresses that others can dial, each ending in our id."""
        ours = Multiaddr(f"/p2p/{self.get_id()}")
        addrs = self.announced or self.get_transport_addrs()
        return [addr.encapsulate(ours) for addr in addrs]
