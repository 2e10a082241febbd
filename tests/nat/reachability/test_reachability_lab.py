"""Real NATs of each kind, three real servers outside: what a peer learns of itself."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from sims.lab.namespaces import obstacle
from sims.lab.network import Network
from sims.lab.topology import NatKind, Site, Topology

SERVERS = ("relay-0", "relay-1", "relay-2")
KINDS = [
    NatKind.NONE,
    NatKind.FULL_CONE,
    NatKind.CONE_ADF,
    NatKind.CONE,
    NatKind.CONE_REMAP,
    NatKind.RST,
    NatKind.SYMMETRIC,
    NatKind.SYMMETRIC_SEQ,
    NatKind.CGNAT,
]
NODE = (sys.executable, "-m", "tests.nat.reachability.reachability_node")
SECONDS = 60
pytestmark = [
    pytest.mark.root,
    pytest.mark.scenario,
    pytest.mark.skipif(bool(obstacle()), reason=f"no laboratory: {obstacle()}"),
]


@pytest.fixture(scope="module")
def verdicts():
    """What a peer behind each kind of NAT found, by kind."""
    names = [Site(name=name) for name in SERVERS]
    sites = [
        Site(name=f"x-{kind.value.replace('_', '-')}", kind=kind) for kind in KINDS
    ]
    with Network(Topology(sites=(*names, *sites))) as network:
        servers = [serve(network, name) for name in SERVERS]
        try:
            addrs = [server.stdout.readline().strip() for server in servers]
            with ThreadPoolExecutor(2) as pool:
                found = pool.map(lambda site: ask(network, site, addrs), sites)
                yield dict(zip(KINDS, found, strict=True)) | {"network": network}
        finally:
            for server in servers:
                server.kill()
                server.communicate(timeout=10)


def serve(network, name, role="server"):
    return subprocess.Popen(
        [*network.enter(name), *NODE, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(network, site, addrs):
    done = subprocess.run(
        [*network.enter(site.host_names[0]), *NODE, "client", *addrs],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kind", "status", "mapping", "hint"),
    [
        (NatKind.NONE, "public", "none", ""),
        (
            NatKind.FULL_CONE,
            "private",
            "endpoint_independent",
            "reachable_by_contacted",
        ),
        (NatKind.CONE_ADF, "private", "endpoint_independent", "reachable_by_contacted"),
        (NatKind.CONE, "private", "endpoint_independent", ""),
        (NatKind.CONE_REMAP, "private", "endpoint_independent", ""),
        (NatKind.RST, "private", "endpoint_independent", ""),
        (NatKind.SYMMETRIC, "private", "address_or_port_dependent", ""),
        (NatKind.SYMMETRIC_SEQ, "private", "address_or_port_dependent", ""),
        (NatKind.CGNAT, "private", "endpoint_independent", ""),
    ],
)
def test_a_peer_learns_what_stands_before_it(verdicts, kind, status, mapping, hint):
    found = verdicts[kind]
    assert (found["status"], found["mapping"]["kind"], found["hint"]) == (
        status,
        mapping,
        hint,
    )
    assert found["agreeing"] == 3
    assert found["confidence"] == "high"
    print(f"{kind}: {found['seconds']:.2f} s, {found['reason']}")


def test_the_external_address_is_the_gateways(verdicts):
    found = verdicts[NatKind.CONE_REMAP]["mapping"]["external"]
    ip, port = found.split(":")
    assert ip == verdicts["network"].public_address("x-cone-remap")
    assert port != "4801"


def test_the_way_a_symmetric_nat_chooses_ports_is_seen(verdicts):
    assert verdicts[NatKind.SYMMETRIC]["mapping"]["allocation"] == "random"
    assert verdicts[NatKind.SYMMETRIC_SEQ]["mapping"]["allocation"] == "sequential"


LIED_TO = {
    NatKind.NONE: ("public", "none"),
    NatKind.CONE_REMAP: ("private", "endpoint_independent"),
    NatKind.SYMMETRIC_SEQ: ("private", "address_or_port_dependent"),
}


def test_one_liar_among_observers_moves_no_verdict():
    """It forges what it observed, and says that it could not dial back."""
    sites = [
        Site(name=f"x-{kind.value.replace('_', '-')}", kind=kind) for kind in LIED_TO
    ]
    names = [Site(name=name) for name in (*SERVERS, "liar")]
    with Network(Topology(sites=(*names, *sites))) as network:
        servers = [serve(network, name) for name in SERVERS]
        servers.append(serve(network, "liar", "liar"))
        try:
            addrs = [server.stdout.readline().strip() for server in servers]
            # the liar first: it is asked, whoever else is
            found = [ask(network, site, addrs[::-1]) for site in sites]
        finally:
            for server in servers:
                server.kill()
                server.communicate(timeout=10)
        public = network.public_address("x-cone-remap")
    verdicts = [(each["status"], each["mapping"]["kind"]) for each in found]
    assert verdicts == list(LIED_TO.values())
    assert found[1]["mapping"]["external"].split(":")[0] == public
    externals = [each["mapping"]["external"] or "" for each in found]
    assert not any(external.startswith("203.0.113.66") for external in externals)
