import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.addresses import AddressClass
from nat.reachability.autonat import AddressVerdict
from nat.reachability.config import ReachabilityConfig
from nat.reachability.core import (
    REACHABLE_BY_CONTACTED,
    Candidate,
    Reachability,
    announced_addrs,
    candidates,
    farther,
    filtering_of,
    judge,
    scope_of,
)
from nat.reachability.observed_mapping import Mapping
from nat.reachability.schedule import Schedule

CONFIG = ReachabilityConfig()
OWN = "/ip4/203.0.113.1/tcp/4801"
LAN = "/ip4/192.168.1.7/tcp/4801"
LOOP = "/ip4/127.0.0.1/tcp/4801"
CIRCUIT = "/ip4/198.51.100.1/tcp/1/p2p/R/p2p-circuit"
NATTED = Mapping(
    kind="endpoint_independent",
    external="203.0.113.1:4801",
    external_ips=("203.0.113.1",),
    votes=2,
)


def servers(count):
    return {f"s{n}": f"198.51.{n}.1" for n in range(count)}


def said(*answers, address=OWN):
    return {
        f"s{n}": [AddressVerdict(address, answer, "said")]
        for n, answer in enumerate(answers)
    }


def verdict(*answers, source="interface", mapping=Mapping(), own_ips=()):  # noqa: B008
    return judge(
        [Candidate(OWN, source)],
        said(*answers),
        servers(len(answers)),
        mapping,
        CONFIG,
        own_ips,
    )


@pytest.mark.parametrize("source", ["interface", "mapped", "announced"])
def test_two_servers_that_connect_make_an_address_public(source):
    got = verdict(True, True, source=source)
    assert (got.status, got.confidence, got.addresses) == ("public", "medium", (OWN,))
    assert verdict(True, True, True).confidence == "high"


def test_where_only_one_server_exists_it_is_believed_a_little():
    got = verdict(True)
    assert (got.status, got.confidence) == ("public", "low")
    assert verdict(False).status == "private"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_liar_among_three_servers_does_not_move_the_verdict(place):
    for truth, status in ((True, "public"), (False, "private")):
        answers = [truth] * 3
        answers[place] = not truth
        assert verdict(*answers).status == status


@pytest.mark.parametrize(
    ("confirmed", "own_ips", "ip6_only"),
    [
        (["/ip6/2001:db8::1/tcp/1"], {"192.168.1.7", "2001:db8::1"}, True),
        (["/ip6/2001:db8::1/tcp/1", OWN], {"192.168.1.7", "2001:db8::1"}, False),
        (["/ip6/2001:db8::1/tcp/1"], {"127.0.0.1", "::1", "2001:db8::1"}, False),
    ],
)
def test_ipv6_alone_leaves_those_out_who_have_none(confirmed, own_ips, ip6_only):
    asked = [Candidate(address, "interface") for address in confirmed]
    verdicts = {
        peer: tuple(AddressVerdict(each.address, True, "") for each in asked)
        for peer in servers(2)
    }
    got = judge(asked, verdicts, servers(2), NATTED, CONFIG, own_ips)
    assert got.status == "public"
    assert (got.open_to_all, got.open_to_the_internet) == (not ip6_only, not ip6_only)
    told = announced_addrs(got, [], [CIRCUIT], [], CONFIG)
    assert (CIRCUIT in told) == ip6_only
    assert set(confirmed) <= set(told)


def test_servers_that_disagree_or_say_nothing_give_no_verdict():
    assert verdict(None, None).status == "unknown"
    assert verdict(True, False).status == "unknown"
    assert judge([], {}, {}, Mapping(), CONFIG).status == "unknown"


def test_identities_behind_one_address_have_one_vote():
    verdicts = said(True, False, False)
    verdicts |= {f"sybil{n}": verdicts["s0"] for n in range(9)}
    ips = servers(3) | {f"sybil{n}": "198.51.0.1" for n in range(9)}
    got = judge([Candidate(OWN, "interface")], verdicts, ips, Mapping(), CONFIG)
    assert got.status == "private"


def test_behind_a_nat_a_hole_that_we_made_does_not_make_us_public():
    got = verdict(True, True, True, source="observed", mapping=NATTED)
    assert got.status == "private"
    assert got.hint == REACHABLE_BY_CONTACTED
    assert got.addresses == ()


@pytest.mark.parametrize(
    ("answers", "filtering"),
    [
        ([True, True, False], "address_dependent"),
        ([False, False], "address_and_port_dependent"),
        ([None], "unknown"),
        ([True, False], "unknown"),
    ],
)
def test_dial_backs_to_the_observed_address_tell_the_filter(answers, filtering):
    got = verdict(*answers, source="observed", mapping=NATTED)
    assert filtering_of(got) == filtering
    assert filtering_of(verdict(*answers)) == "unknown"


def test_a_nat_without_a_mapped_port_is_private_whatever_servers_say():
    got = judge([], {}, servers(2), NATTED, CONFIG, {"192.168.1.7"})
    assert (got.status, got.confidence, got.hint) == ("private", "medium", "")
    symmetric = Mapping(external_ips=("203.0.113.1",), votes=3)
    assert judge([], {}, servers(2), symmetric, CONFIG).status == "private"


def test_observers_that_see_our_own_interface_do_not_make_us_private():
    got = judge([], {}, servers(2), NATTED, CONFIG, {"203.0.113.1"})
    assert got.status == "unknown"


def test_a_mapped_port_that_works_is_public_behind_the_nat():
    asked = [Candidate(OWN, "mapped")]
    got = judge(asked, said(True, True), servers(2), NATTED, CONFIG, {"192.168.1.7"})
    assert got.status == "public"


def test_others_are_those_that_reach_farthest():
    assert scope_of(["127.0.0.1", "192.168.1.1", "8.8.8.8"]) is AddressClass.PUBLIC
    assert scope_of(["127.0.0.1", "192.168.1.1"]) is AddressClass.PRIVATE
    assert scope_of(["127.0.0.1"]) is AddressClass.LOOPBACK
    assert scope_of([]) is AddressClass.PUBLIC


@pytest.mark.parametrize(
    ("ip", "scope", "is_farther"),
    [
        ("8.8.8.8", AddressClass.PRIVATE, True),
        ("192.168.1.9", AddressClass.LOOPBACK, True),
        ("100.64.0.1", AddressClass.PRIVATE, True),
        ("192.168.1.9", AddressClass.PRIVATE, False),
        ("127.0.0.1", AddressClass.PRIVATE, False),
        ("8.8.8.8", AddressClass.PUBLIC, False),
        ("224.0.0.1", AddressClass.LOOPBACK, False),
    ],
)
def test_who_is_farther_away_than_those_who_were_asked(ip, scope, is_farther):
    assert farther(ip, scope) is is_farther


@pytest.mark.parametrize(
    ("ip", "world"), [("127.0.0.1", False), ("192.168.1.1", False), ("8.8.8.8", True)]
)
def test_only_the_internet_opens_us_to_the_internet(ip, world):
    """Who volunteers as a relay because its own host reaches it helps nobody."""
    address = f"/ip4/{ip}/tcp/4001"
    asked = [Candidate(address, "interface")]
    ips = dict.fromkeys(("s0", "s1"), ip)
    got = judge(asked, said(True, True, address=address), ips, Mapping(), CONFIG)
    assert got.status == "public"
    assert got.open_to_the_internet is world


def test_candidates_are_of_the_scope_and_the_best_source_wins():
    got = candidates([LAN, OWN], [OWN], [], NATTED, AddressClass.PUBLIC)
    assert got == (Candidate(OWN, "mapped"),)
    got = candidates([LAN], [], [], NATTED, AddressClass.PUBLIC)
    assert got == (Candidate(OWN, "observed"),)
    got = candidates([LAN], [], [], Mapping(), AddressClass.PRIVATE)
    assert got == (Candidate(LAN, "interface"),)
    assert candidates([CIRCUIT, "x"], [], [], Mapping(), AddressClass.PUBLIC) == ()


# what to announce


def announce(status="unknown", addresses=(), reports=(), announced=(), listening=None):
    return announced_addrs(
        Reachability(status=status, addresses=addresses, reports=reports),
        [LOOP, LAN] if listening is None else listening,
        [CIRCUIT],
        announced,
        CONFIG,
    )


def test_a_public_peer_announces_what_works_and_its_lan():
    assert announce("public", (OWN,)) == (OWN, LAN)


def test_a_private_peer_announces_its_circuits_and_its_lan():
    assert announce("private") == (CIRCUIT, LAN)


def test_the_operators_addresses_come_first_in_any_case():
    assert announce("private", announced=("/ip4/9.9.9.9/tcp/1",))[0].startswith(
        "/ip4/9"
    )


def test_while_nothing_is_known_whatever_may_work_is_announced():
    untested = judge([Candidate(OWN, "mapped")], {}, {}, Mapping(), CONFIG).reports
    assert announce(reports=untested) == (CIRCUIT, OWN, LAN)
    assert announce(listening=[OWN]) == (CIRCUIT, OWN)


def test_a_refuted_address_is_not_announced():
    reports = verdict(False, False).reports
    assert OWN not in announce("unknown", reports=reports, listening=[OWN, LAN])


def test_a_host_alone_announces_loopback():
    got = announced_addrs(Reachability(), [LOOP], [], [], CONFIG)
    assert got == (LOOP,)


@given(
    st.sampled_from(["public", "private", "unknown"]),
    st.lists(st.sampled_from([OWN, LAN, LOOP, CIRCUIT, "bad"]), max_size=40),
    st.lists(st.sampled_from([OWN, CIRCUIT]), max_size=40),
)
def test_announcements_are_bounded_and_each_once(status, listening, circuits):
    config = ReachabilityConfig(max_announced=3)
    got = announced_addrs(Reachability(status=status), listening, circuits, (), config)
    assert len(got) == len(set(got)) <= 3


answers = st.lists(st.sampled_from([True, False, None]), max_size=6)


@given(answers, st.sampled_from(["interface", "mapped", "announced", "observed"]))
def test_verdicts_are_what_servers_said(given_answers, source):
    got = verdict(*given_answers, source=source, mapping=NATTED)
    yes, no = given_answers.count(True), given_answers.count(False)
    if got.status == "public":
        assert source != "observed"
        assert yes > no
        assert got.agreeing == yes
    if got.status == "private" and source != "observed":
        assert no > yes
    assert got.reason


# when


def test_rounds_come_soon_then_later_and_slowly_when_stable():
    schedule = Schedule(CONFIG, 100.0)
    assert schedule.due == 100.5
    due = []
    now = 101.0
    for _ in range(12):
        schedule.finished("unknown", now)
        due.append(schedule.due - now)
    assert due[:4] == [5, 10, 20, 40]
    assert due[-1] == CONFIG.stable_seconds
    schedule.finished("private", now)
    assert schedule.due == now + 900
    schedule.hurry(now + 10)
    assert schedule.due == now + 10.5
    schedule.hurry(now + 10.2)  # events do not push it away
    assert schedule.due == now + 10.5
    schedule.finished("unknown", now)
    assert schedule.due == now + 5
