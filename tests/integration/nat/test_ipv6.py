"""IPv6: alone it is enough, and beside an IPv4 that cannot be crossed it is the way."""

import os
import socket

import pytest

from fabric.core.errors import FabricError
from sims.lab.lab import Lab
from sims.lab.measure import DIRECT_PATHS
from sims.lab.namespaces import obstacle
from sims.lab.topology import IpVersions, NatKind, Site, Topology
from sims.local import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.scenario,
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(obstacle()) or not socket.has_ipv6, reason=obstacle() or "no IPv6 here"
    ),
]

WHOLE = int(os.environ.get("SOAK_FACTOR", "1")) > 1
CONTENT = os.urandom(8 << 20)
DIRECT_SECONDS = 40.0


def ping(lab, one, other):
    """Return the path of one call, or nothing when it fails."""
    try:
        (view,) = lab.client(one).ping(lab.peer(other), 1)
    except FabricError:
        return ""
    return view.path


def circuits(lab, host):
    """Return the addresses at which others reach ``host`` through relays."""
    return [a for a in lab.client(host).status().addrs if "p2p-circuit" in a]


def transfer(lab, tmp_path, here, there):
    """Fetch content; return the share of its bytes that came over IPv6."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(CONTENT)
    root = lab.client(here).content_add(source)
    before = lab.network.received_bytes6(there)
    lab.client(there).content_get(root, copy)
    assert copy.read_bytes() == CONTENT
    return (lab.network.received_bytes6(there) - before) / len(CONTENT)


@pytest.mark.parametrize("net6", ["2001:db8", "fd00:1ab"] if WHOLE else ["2001:db8"])
def test_ipv6_alone_is_enough(tmp_path, net6):
    sites = tuple(Site(name=name, ip=IpVersions.V6) for name in ("one", "two"))
    with Lab(Topology(sites=sites, net6=net6)) as lab:
        lab.start()
        lab.form()
        for one, other in (("one", "two"), ("two", "one")):
            wait_until(
                lambda one=one, other=other: ping(lab, one, other) == "direct",
                DIRECT_SECONDS,
                f"{one} to reach {other} directly",
            )
        assert transfer(lab, tmp_path, "one", "two") > 1


def test_ipv6_is_taken_where_ipv4_is_behind_symmetric_nats(formed, tmp_path):
    homes = (
        Site(name=name, kind=NatKind.SYMMETRIC, ip=IpVersions.BOTH) for name in "ab"
    )
    lab, _ = formed(
        Site(name="relay-0", ip=IpVersions.BOTH),
        Site(name="relay-1"),
        *homes,
        Site(name="c", kind=NatKind.SYMMETRIC),
    )
    wait_until(
        lambda: ping(lab, "a", "b") in DIRECT_PATHS, DIRECT_SECONDS, "a and b direct"
    )
    assert transfer(lab, tmp_path, "a", "b") > 1
    # who has IPv4 only reaches them all the same: they keep their relays
    for host in "ab":
        wait_until(lambda host=host: circuits(lab, host), DIRECT_SECONDS, "circuits")
    wait_until(lambda: ping(lab, "c", "a") == "relay", DIRECT_SECONDS, "c reaches a")
