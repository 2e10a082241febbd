"""The doctor's lines, word for word."""

import pytest

from fabric.app.cli_net import exit_status, finding_text
from nat.doctor.core import diagnose
from nat.doctor.facts import (
    CircuitTried,
    ClockSample,
    Dialled,
    Facts,
    Link,
    Listening,
    Mdns,
    Members,
    PathMtu,
    PeerFacts,
    PortMapping,
    Punched,
    Reachability,
    Refusal,
    Relaying,
    Relays,
    Remembered,
    Rendezvous,
    Reservation,
)
from nat.doctor.peer import why_not_better

CONTROL = "192.168.1.7:4001"
SYMMETRIC = Reachability(
    verdict="private",
    confidence="high",
    mapping="per_destination",
    external="203.0.113.9",
    num_observers=3,
)
CONE = Reachability(
    verdict="private",
    confidence="high",
    mapping="endpoint_independent",
    external="203.0.113.9:4001",
    num_observers=3,
)
BOTH_SYMMETRIC = Refusal(
    "E_PUNCH_IMPOSSIBLE",
    "both sides map per destination (symmetric NAT): relay stays",
    "map a port on one of the two routers, or use IPv6",
)
WELL = Facts(
    own_version="0.1.0",
    listening=Listening(
        control=(CONTROL,),
        data=("192.168.1.7:4002",),
        dialled=(Dialled("192.168.1.7:4001"), Dialled("192.168.1.7:4002")),
        has_rules=True,
    ),
    clocks=(ClockSample("bob", 0.02), ClockSample("eve", -0.3)),
    reachability=CONE,
    port_mapping=PortMapping(mapped=("203.0.113.9:4001",), method="upnp"),
    relays=Relays(held=(Reservation("r1", 0.021, 3000), Reservation("r2", 0.043))),
    relaying=Relaying(active=False),
    udp="answered",
    ipv6=("2a00::7",),
    mtus=(PathMtu("bob", 1500, 1448), PathMtu("eve", 1400, 1348)),
    links=(
        Link(peer="bob", up=5e6, down=1e7),
        Link(peer="eve", up=2.5e6, down=3e6, path="punched"),
    ),
    versions={"bob": "0.1.0", "eve": "0.1.4"},
    bootstraps=(Dialled("/ip4/198.51.100.1/tcp/4001"),),
    members=Members(known=("bob", "eve"), connected=("bob", "eve")),
    rendezvous=Rendezvous(sentence="registered at 2 rendezvous points", registered=2),
    mdns=Mdns(state="announcing", heard=1),
    remembered=Remembered(peers=2),
)


def text(facts):
    return "\n".join(finding_text(f).rstrip() for f in diagnose(facts))


def found(facts, name):
    return next(f for f in diagnose(facts) if f.name == name)


def test_a_peer_behind_a_kind_nat():
    assert (
        text(WELL)
        == """\
ok    clock           within 0.1 s of 2 peers
ok    listen          control 192.168.1.7:4001; data 192.168.1.7:4002
ok    firewall        2 own ports dialled: all answer; packet filter rules exist
ok    udp             a peer's machine answers UDP
ok    ipv6            2a00::7
ok    reachability    private, high confidence: others reach us by punching or relay
ok    nat             one mapping for all destinations at 203.0.113.9:4001: \
punching works
ok    port-mapping    203.0.113.9:4001 by upnp
ok    relay           slots at r1 21 ms, r2 43 ms
ok    relaying        not for others: the internet does not reach this peer, as far \
as is known
ok    mtu             1400 B (segments of 1348 B) to eve
ok    bootstraps      1 of 1 answer
ok    members         2 of 2 connected
ok    rendezvous      registered at 2 rendezvous points
ok    mdns            announcing; heard 1 member
ok    peers-file      2 peers remembered for a restart
ok    bandwidth       slowest of 2 links: eve, up 20 Mbit/s, down 24 Mbit/s, punched
ok    versions        2 members on 0.1"""
    )
    assert exit_status(list(diagnose(WELL))) == 0


def test_a_peer_behind_a_symmetric_nat_that_is_relayed():
    peer = PeerFacts(
        peer="bob",
        addresses=(
            Dialled("10.0.0.5:4001", "no answer within 3 s", source="record"),
            Dialled("via r1", dialled=False),
        ),
        admission="trusted",
        admission_reason="software evidence held",
        connected=True,
        path="relay",
        rtt_seconds=0.084,
        circuits=(
            CircuitTried("r1", seconds=0.09, age_seconds=61),
            CircuitTried("r2", Refusal("E_RELAY_FULL", "no room"), 0.02, 7200),
        ),
        punched=Punched(
            seconds=3.0,
            endpoints=("203.0.113.8:4001",),
            attempts=120,
            age_seconds=12,
            refusal=BOTH_SYMMETRIC,
        ),
        nat=SYMMETRIC,
    )
    facts = Facts(
        own_version="0.1.0",
        reachability=SYMMETRIC,
        port_mapping=PortMapping(mapped=("100.64.1.2:4001",), public=False),
        relays=Relays(held=(Reservation("r1"),)),
        peer=peer,
    )
    lines = text(facts).splitlines()
    assert (
        lines[lines.index(next(li for li in lines if "nat   " in li)) :]
        == """\
warn  nat             maps per destination (symmetric NAT) at 203.0.113.9 \
(E_NAT_SYMMETRIC)
                      next: enable UPnP or forward a TCP port on the router, or use \
IPv6; until then peers behind such a NAT are reached through a relay
warn  port-mapping    the router maps 100.64.1.2:4001, which is not public either \
(E_MAPPING_PRIVATE)
                      next: a second router is in between (carrier-grade NAT): ask \
the provider for a public address, or use IPv6
warn  relay           slot at r1 only (E_RELAY_FEW)
                      next: a second relay: on a member with a public address, run \
`fabric up --relay-ok`
warn  relaying        not measured (E_NOT_MEASURED)
                      next: join a mesh: then this peer may relay
warn  mtu             not measured (E_NOT_MEASURED)
                      next: connect with a member directly
warn  bootstraps      not measured (E_NOT_MEASURED)
                      next: join through an invite: it names them
warn  members         not measured (E_NOT_MEASURED)
                      next: `fabric mesh init NAME`, or `fabric join TOKEN`
warn  rendezvous      not measured (E_NOT_MEASURED)
                      next: join a mesh: then its meeting points are asked
warn  mdns            not measured (E_NOT_MEASURED)
                      next: ask again in a few seconds
warn  peers-file      not measured (E_NOT_MEASURED)
                      next: join a mesh: then peers are remembered
warn  bandwidth       not measured (E_NOT_MEASURED)
                      next: start a job: its links are probed
warn  versions        not measured (E_NOT_MEASURED)
                      next: connect with a member
ok    peer.member     bob is a member
ok    peer.addresses  10.0.0.5:4001 [record]: no answer within 3 s; via r1: \
through a relay
ok    peer.gate       open
ok    peer.admission  trusted: software evidence held
warn  peer.nat        bob says that its NAT maps per destination (symmetric NAT) \
(E_NAT_SYMMETRIC)
                      next: map a port on the router of bob, or use IPv6
ok    peer.relay      r1: ok in 90 ms (1 min ago), r2: E_RELAY_FULL no room (2 h ago)
warn  peer.punch      both sides map per destination (symmetric NAT): relay stays, \
it took 3000 ms, 120 dials, to 203.0.113.8:4001 (12 s ago) (E_PUNCH_IMPOSSIBLE)
                      next: map a port on one of the two routers, or use IPv6
warn  peer.path       relay 84 ms: both sides map per destination (symmetric NAT): \
relay stays (E_RELAYED)
                      next: jobs run meanwhile, slower; map a port on one router, or \
use IPv6""".splitlines()
    )
    assert exit_status(list(diagnose(facts))) == 0  # slow, but it works


def test_a_peer_that_nobody_reaches():
    peer = PeerFacts(
        peer="bob",
        not_member=Refusal("E_NOT_MEMBER", "revoked by alice", "ask alice"),
        addresses=(),
        gate=Refusal("E_NOT_MEMBER", "revoked by alice"),
        admission="quarantined",
        admission_reason="measurement not allowed",
        last_error=Refusal("E_NO_ROUTE", "no address of bob answers", "start it"),
        retry_in_seconds=42,
        circuits=(CircuitTried("r1", Refusal("E_NO_RESERVATION", "no such slot")),),
    )
    lines = text(Facts(peer=peer)).splitlines()
    assert (
        lines[lines.index(next(li for li in lines if "peer.member" in li)) :]
        == """\
fail  peer.member     revoked by alice (E_NOT_MEMBER)
                      next: ask alice
fail  peer.addresses  none known (E_NO_ADDRESS)
                      next: start bob, or join it again with a fresh invite
fail  peer.gate       revoked by alice (E_NOT_MEMBER)
                      next: `fabric why` on the peer's side
fail  peer.admission  quarantined: measurement not allowed (E_QUARANTINED)
                      next: `fabric doctor` on bob: its evidence must be accepted again
warn  peer.nat        not measured (E_NOT_MEASURED)
                      next: it says so when a hole is punched
fail  peer.relay      r1: E_NO_RESERVATION no such slot (E_CIRCUIT)
                      next: on a member with a public address, run \
`fabric up --relay-ok`
warn  peer.punch      not measured (E_NOT_MEASURED)
                      next: it follows once a relay connects the two
fail  peer.path       not connected: no address of bob answers; next dial in 42 s \
(E_NO_ROUTE)
                      next: start it""".splitlines()
    )
    assert exit_status(list(diagnose(Facts(peer=peer)))) == 3


def changed(**facts):
    values = {field: getattr(WELL, field) for field in WELL.__struct_fields__}
    return Facts(**{**values, **facts})


REFUSED = Dialled("192.168.1.7:4001", "connection refused")
GOOD = Dialled("192.168.1.7:4002")
LISTENING = {"control": (CONTROL,), "data": ("192.168.1.7:4002",)}
NO_RELAY = Relays(refused=(("r1", Refusal("E_BUSY", "full")),))
ALONE_BUT_ONE = Members(known=("bob", "eve"), connected=("bob",))
ON_LOOPBACK = Listening(control=("127.0.0.1:1",), data=("127.0.0.1:2",))
MDNS_FAILED = Mdns(state="failed", reason="no multicast here")
ON_HOST = Reachability(verdict="public", confidence="low", scope="host", external="a")
PUBLIC = Reachability(verdict="public", confidence="high", mapping="none", external="a")


def case(name, status, code, words, **facts):
    return pytest.param(name, status, code, words, changed(**facts), id=code + words)


@pytest.mark.parametrize(
    ("name", "status", "code", "words", "facts"),
    [
        case(
            "clock",
            *("warn", "E_CLOCK_SKEW", "8.0 s behind the mesh"),
            clocks=(ClockSample("b", 7), ClockSample("c", 9)),
        ),
        case(
            "clock",
            *("fail", "E_CLOCK_SKEW", "90.0 s ahead of"),
            clocks=(ClockSample("b", -90),),
        ),
        case(
            "clock",
            *("warn", "E_CLOCK_PEER", "c is 99.0 s off"),
            clocks=(ClockSample("b", 0), ClockSample("c", 99), ClockSample("d", 0)),
        ),
        case(
            "listen",
            *("fail", "E_NOT_LISTENING", "control ; data"),
            listening=Listening(),
        ),
        case(
            "listen",
            *("warn", "E_LOOPBACK_ONLY", "nobody outside"),
            listening=Listening(control=("127.0.0.1:1",), data=("a:2",)),
        ),
        case(
            "firewall",
            *("warn", "E_FIREWALL", "connection refused"),
            listening=Listening(dialled=(REFUSED, GOOD), **LISTENING),
        ),
        case(
            "firewall",
            *("fail", "E_FIREWALL", "4001: connection refused"),
            listening=Listening(dialled=(REFUSED,), **LISTENING),
        ),
        case("udp", "warn", "E_UDP_BLOCKED", "lets no UDP out", udp="blocked"),
        case("udp", "warn", "E_UDP_SILENT", "no peer's machine", udp="silent"),
        case("ipv6", "warn", "E_NO_IPV6", "no global address", ipv6=()),
        case("ipv6", "ok", "OK", "is public", ipv6=(), reachability=PUBLIC),
        case("reachability", "ok", "OK", "public at a", reachability=PUBLIC),
        case(
            "reachability",
            *("warn", "E_REACHABILITY_UNKNOWN", "unknown, 1 observer"),
            reachability=Reachability(num_observers=1),
        ),
        case("nat", "ok", "OK", "none in between", reachability=PUBLIC),
        case(
            "nat",
            *("warn", "E_NAT_SYMMETRIC", "per destination"),
            reachability=SYMMETRIC,
        ),
        case("port-mapping", "ok", "OK", "not needed", reachability=PUBLIC),
        case(
            "port-mapping",
            *("warn", "E_NO_MAPPING", "no router"),
            port_mapping=PortMapping(),
        ),
        case(
            "port-mapping",
            *("warn", "E_UPNP", "says 718"),
            port_mapping=PortMapping(refusal=Refusal("E_UPNP", "says 718")),
        ),
        case(
            "relay",
            *("fail", "E_NO_RELAY", "full; private, and not connected with eve"),
            relays=NO_RELAY,
            members=ALONE_BUT_ONE,
        ),
        case(
            "relaying",
            *("ok", "OK", "2 reservations, 1 circuit, within a budget of 20 Mbit/s"),
            relaying=Relaying(
                active=True, reservations=2, circuits=1, max_bytes_per_second=2.5e6
            ),
        ),
        case(
            *("relaying", "ok", "OK", "volunteer=never"),
            relaying=Relaying(active=False, volunteer="never"),
        ),
        case("relay", "warn", "E_NO_RELAY", "2 of 2 connected", relays=NO_RELAY),
        case(
            "relay",
            *("warn", "E_NO_RELAY", "full"),
            relays=NO_RELAY,
            reachability=Reachability(),
            members=ALONE_BUT_ONE,
        ),
        case("relay", "warn", "E_NO_RELAY", "full", relays=NO_RELAY, members=None),
        case("relay", "ok", "OK", "not needed", relays=Relays(), reachability=PUBLIC),
        case(
            "relay",
            *("ok", "OK", "open to all of this machine"),
            relays=NO_RELAY,
            reachability=ON_HOST,
            members=ALONE_BUT_ONE,
        ),
        case("reachability", "ok", "OK", "from this machine", reachability=ON_HOST),
        case("ipv6", "warn", "E_NO_IPV6", "no global", ipv6=(), reachability=ON_HOST),
        case(
            "port-mapping",
            *("warn", "E_NO_MAPPING", "no router"),
            port_mapping=PortMapping(),
            reachability=ON_HOST,
        ),
        case(
            "port-mapping",
            *("ok", "OK", "is a public address"),
            port_mapping=PortMapping(
                needless=True,
                refusal=Refusal("MAP_NOT_NEEDED", "a is a public address"),
            ),
        ),
        case(
            "port-mapping",
            *("ok", "OK", "loopback only"),
            port_mapping=PortMapping(),
            listening=ON_LOOPBACK,
        ),
        case("firewall", "ok", "OK", "loopback only", listening=ON_LOOPBACK),
        case("mtu", "ok", "OK", "1500 B to bob", mtus=(PathMtu("bob", 1500),)),
        case(
            "rendezvous",
            *("warn", "E_ISLAND", "knows 1 members: zoe"),
            rendezvous=Rendezvous(sentence="it knows 1 members", unconnected=("zoe",)),
        ),
        case(
            "rendezvous",
            *("warn", "E_NO_RENDEZVOUS", "none of 1; r1: no answer"),
            rendezvous=Rendezvous(sentence="none of 1", failed=(("r1", "no answer"),)),
        ),
        case("rendezvous", "ok", "OK", "none", rendezvous=Rendezvous(sentence="none")),
        case(
            "rendezvous",
            *("warn", "E_NO_RENDEZVOUS", "islands of this mesh"),
            rendezvous=Rendezvous(sentence="none"),
            members=ALONE_BUT_ONE,
        ),
        case("mdns", "warn", "E_MDNS", "no multicast", mdns=MDNS_FAILED),
        case("mdns", "ok", "OK", "off", mdns=Mdns(state="off")),
        case(
            "peers-file",
            *("warn", "E_PEERS_FILE", "is damaged"),
            remembered=Remembered(problem=Refusal("E_PEERS_FILE", "it is damaged")),
        ),
        case(
            "mtu",
            *("warn", "E_MTU_SMALL", "1000 B"),
            mtus=(PathMtu("bob", 1000, 948), PathMtu("eve", 1500, 1448)),
        ),
        case(
            "bootstraps",
            *("warn", "E_BOOTSTRAP", "1 of 2 answer"),
            bootstraps=(REFUSED, GOOD),
        ),
        case(
            "bootstraps",
            *("fail", "E_BOOTSTRAP", "0 of 1 answer; 192"),
            bootstraps=(REFUSED,),
            members=Members(known=("b",)),
        ),
        case(
            "bootstraps",
            *("warn", "E_BOOTSTRAP", "0 of 1"),
            bootstraps=(REFUSED,),
        ),
        case("members", "ok", "OK", "no other member", members=Members()),
        case(
            "members",
            *("fail", "E_ISLAND", "alone; missing b, c"),
            members=Members(known=("b", "c")),
        ),
        case(
            "members",
            *("warn", "E_ISLAND", "an island"),
            members=Members(known=tuple("bcde"), connected=("b",)),
        ),
        case(
            "members",
            *("warn", "E_MEMBERS_AWAY", "missing d"),
            members=Members(known=tuple("bcd"), connected=("b", "c")),
        ),
        case(
            "members",
            *("ok", "OK", "1 long gone"),
            members=Members(known=tuple("bc"), connected=("b",), stale=("c",)),
        ),
        case(
            "bandwidth",
            *("warn", "E_LINK_SLOW", "0.08 Mbit/s"),
            links=(Link(peer="b", up=1e4, down=1e6),),
        ),
        case(
            "versions",
            *("warn", "E_VERSION_DIFFERS", "b 0.2.0"),
            versions={"b": "0.2.0", "c": "0.1.9"},
        ),
    ],
)
def test_each_finding(name, status, code, words, facts):
    finding = found(facts, name)
    assert (finding.status, finding.code) == (status, code)
    assert words in finding.detail


def test_nothing_measured_is_never_good_news():
    for finding in diagnose(Facts()):
        assert finding.status == "warn", finding
        assert finding.code == "E_NOT_MEASURED"


def test_why_a_path_is_not_better():
    relayed = PeerFacts(peer="bob", connected=True, path="relay")
    both = PeerFacts(peer="bob", connected=True, path="relay", nat=SYMMETRIC)
    assert why_not_better(both, SYMMETRIC) == (
        "both sides map per destination (symmetric NAT)"
    )
    assert why_not_better(both, CONE).startswith("the peer's NAT")
    assert why_not_better(relayed, SYMMETRIC).startswith("our NAT")
    assert why_not_better(relayed, CONE) == "no hole punch was tried yet"
    direct = PeerFacts(peer="bob", connected=True, path="direct")
    assert why_not_better(direct, SYMMETRIC) == ""
