import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nat.reachability.observed import (
    EXPIRE_SECONDS,
    MAX_OBSERVATIONS,
    ObservedAddresses,
)
from nat.reachability.observed_mapping import Observation, allocation_of, judge

OWN = {"192.168.1.7"}
PORT = 4801
OUTSIDE = "203.0.113.1"


def saw(number, observed, *, ip=None, peer=None, port=PORT, at=0.0):
    return Observation(
        observer=peer or f"peer{number}",
        observer_ip=ip or f"198.51.{number}.9",
        local=f"192.168.1.7:{port}",
        observed=observed,
        at=at,
    )


def test_one_external_port_for_all_is_endpoint_independent():
    mapping = judge([saw(1, f"{OUTSIDE}:40001"), saw(2, f"{OUTSIDE}:40001")], OWN)
    assert mapping.kind == "endpoint_independent"
    assert mapping.external == f"{OUTSIDE}:40001"
    assert mapping.confidence == 0.75
    assert mapping.evidence == (
        f"198.51.1.9 saw {OUTSIDE}:40001",
        f"198.51.2.9 saw {OUTSIDE}:40001",
    )


def test_the_interfaces_own_address_is_no_nat():
    seen = [saw(n, f"{OUTSIDE}:{PORT}") for n in (1, 2)]
    assert judge(seen, {OUTSIDE}).kind == "none"
    assert judge(seen, OWN).kind == "endpoint_independent"  # it preserves ports


@pytest.mark.parametrize(
    ("ports", "allocation", "step"),
    [
        ([40001, 40002], "sequential", 1),
        ([40001, 40003, 40005, 40007], "sequential", 2),
        ([40001, 40002, 40009, 40010], "sequential", 1),
        ([40005, 40001, 40003], "sequential", 2),  # not in the order of dialling
        ([65534, 65535, 1024, 1025], "sequential", 1),  # the range began anew
        ([40001, 51234, 1055], "random", 0),
        ([40001, 40002, 39000], "random", 0),
        ([40001], "random", 0),
    ],
)
def test_the_distance_of_ports_tells_how_they_are_chosen(ports, allocation, step):
    assert allocation_of(ports) == (allocation, step)


def test_a_port_for_each_target_is_symmetric():
    seen = [saw(n, f"{OUTSIDE}:{40000 + n}") for n in (1, 2, 3)]
    mapping = judge(seen, OWN)
    assert mapping.kind == "address_or_port_dependent"
    assert (mapping.allocation, mapping.port_step) == ("sequential", 1)
    assert mapping.external is None
    assert mapping.external_ips == (OUTSIDE,)


def test_one_observer_gives_no_verdict():
    assert judge([saw(1, f"{OUTSIDE}:1")], OWN).kind == "unknown"
    assert judge([], OWN).kind == "unknown"


@given(
    honest=st.integers(2, 5),
    place=st.integers(0, 5),
    lie=st.tuples(st.ip_addresses(v=4), st.integers(1, 65535)),
)
def test_one_liar_does_not_move_the_verdict(honest, place, lie):
    truth = f"{OUTSIDE}:40001"
    told = [saw(n, truth) for n in range(honest)]
    told.insert(place, saw(77, f"{lie[0]}:{lie[1]}"))
    mapping = judge(told, OWN)
    assert mapping.kind == "endpoint_independent"
    assert mapping.external == truth


@given(place=st.integers(0, 3), lie=st.integers(1, 65535))
def test_one_liar_does_not_make_a_symmetric_nat_look_easy(place, lie):
    told = [saw(n, f"{OUTSIDE}:{40000 + 7 * n}") for n in range(3)]
    told.insert(place, saw(77, f"{OUTSIDE}:{lie}"))
    # at worst it repeats what one of three saw: two of four is no majority
    assert judge(told, OWN).kind != "endpoint_independent"


def test_many_identities_at_one_address_are_one_voter():
    lies = [saw(0, "9.9.9.9:9", ip="198.51.9.9", peer=f"sybil{n}") for n in range(20)]
    truth = [saw(n, f"{OUTSIDE}:40001") for n in (1, 2)]
    assert judge(lies + truth, OWN).external == f"{OUTSIDE}:40001"


def test_one_network_has_few_votes():
    lies = [saw(0, "9.9.9.9:9", ip=f"198.51.9.{n}", peer=f"s{n}") for n in range(20)]
    truth = [saw(n, f"{OUTSIDE}:40001") for n in (1, 2, 3)]
    mapping = judge(lies + truth, OWN)
    assert mapping.votes == 5
    assert mapping.external == f"{OUTSIDE}:40001"


def test_a_liar_among_two_gives_nothing_to_punch_with():
    told = [saw(1, f"{OUTSIDE}:40001"), saw(2, "9.9.9.9:9")]
    assert judge(told, OWN).kind == "unknown"


def test_neighbours_do_not_see_the_nat():
    lan = [saw(n, f"192.168.1.7:{PORT}", ip=f"192.168.1.{20 + n}") for n in range(5)]
    far = [saw(n, f"{OUTSIDE}:40001") for n in (1, 2)]
    assert judge(lan + far, OWN).kind == "endpoint_independent"
    assert judge(lan, OWN).kind == "none"


def table(*observations):
    observed = ObservedAddresses()
    for each in observations:
        observed.add(each)
    return observed


def test_ports_and_families_are_kept_apart():
    observed = table(
        saw(1, f"{OUTSIDE}:1"),
        saw(2, f"{OUTSIDE}:1"),
        saw(1, f"{OUTSIDE}:7", port=5000),
        saw(2, f"{OUTSIDE}:9", port=5000),
    )
    assert observed.mapping(PORT, OWN, 0).kind == "endpoint_independent"
    assert observed.mapping(5000, OWN, 0).kind == "address_or_port_dependent"
    assert observed.mapping(PORT, OWN, 0, version=6).kind == "unknown"
    assert observed.observers(PORT) == {"peer1", "peer2"}


def test_entries_expire_and_addresses_that_are_gone_are_forgotten():
    observed = table(saw(1, f"{OUTSIDE}:1", at=0), saw(2, f"{OUTSIDE}:1", at=100))
    assert observed.mapping(PORT, OWN, EXPIRE_SECONDS + 50).votes == 1
    observed.forget_local({"192.168.1.7"})
    assert len(observed) == 0


def test_news_is_told():
    observed = ObservedAddresses()
    assert observed.add(saw(1, f"{OUTSIDE}:1"))
    assert not observed.add(saw(1, f"{OUTSIDE}:1", at=5))
    assert observed.add(saw(1, f"{OUTSIDE}:2"))
    assert not observed.add(saw(2, "nonsense"))
    assert not observed.add(saw(2, "[2001:db8::1]:4"))  # of another family
    assert len(observed) == 1
    observed.clear()
    assert observed.mapping(PORT, OWN, 0).kind == "unknown"


texts = st.one_of(
    st.text(max_size=12),
    st.builds("{}:{}".format, st.ip_addresses(v=4), st.integers(0, 70000)),
)


@pytest.mark.slow
@given(
    st.lists(st.tuples(texts, texts, st.integers(0, 40), texts), max_size=200),
    st.integers(0, 2**32),
)
def test_forged_observations_stay_bounded_and_harmless(forged, seed):
    observed = ObservedAddresses()
    for ip, seen, peer, local in forged:
        observed.add(
            Observation(
                observer=f"p{peer}",
                observer_ip=ip,
                local=local,
                observed=seen,
                at=random.Random(seed).random(),
            )
        )
        assert len(observed) <= MAX_OBSERVATIONS
    for port in range(0, 65536, 4801):
        mapping = observed.mapping(port, OWN, 1.0)
        assert 0 <= mapping.confidence <= 1
        assert (mapping.external is None) == (
            mapping.kind in ("unknown", "address_or_port_dependent")
        )
