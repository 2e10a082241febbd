import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric.core.signing import Ed25519Signer
from nat.relay.circuit_addresses import (
    CircuitAddress,
    announceable,
    by_relay,
    failure_domain,
    parse_circuit_untrusted,
)

R, S, T = (Ed25519Signer(bytes([n]) * 32).peer_id for n in (1, 2, 3))
AT = f"/ip4/203.0.113.7/tcp/4801/p2p/{R}"
AT6 = f"/ip6/2001:db8::7/tcp/4801/p2p/{R}"


def test_a_circuit_address_is_taken_apart():
    assert parse_circuit_untrusted(f"{AT}/p2p-circuit") == CircuitAddress(AT, R)
    full = parse_circuit_untrusted(f"{AT6}/p2p-circuit/p2p/{T}")
    assert full == CircuitAddress(AT6, R, T)


@pytest.mark.parametrize(
    "addr",
    [
        "",
        AT,
        "/p2p-circuit",
        f"/p2p/{R}/p2p-circuit",
        "/ip4/203.0.113.7/tcp/4801/p2p-circuit",
        "/ip4/203.0.113.7/tcp/4801/p2p/nobody/p2p-circuit",
        f"/dns4/example.com/tcp/1/p2p/{R}/p2p-circuit",
        f"/ip4/203.0.113.7/udp/1/quic-v1/p2p/{R}/p2p-circuit",
        f"{AT}/p2p-circuit/p2p/{T}/p2p-circuit",
        f"{AT}/p2p-circuit/p2p/{S}/p2p-circuit/p2p/{T}",
        f"{AT}/p2p-circuit/ip4/1.2.3.4/tcp/1/p2p/{T}",
    ],
)
def test_what_is_no_circuit_over_one_tcp_relay_is_none(addr):
    assert parse_circuit_untrusted(addr) is None


@given(st.text(max_size=200) | st.lists(st.sampled_from(AT.split("/"))).map("/".join))
def test_any_text_is_an_address_or_none(text):
    parse_circuit_untrusted(text)


def test_relays_are_found_by_what_leads_to_the_target():
    found = by_relay(
        [
            f"{AT}/p2p-circuit",
            f"{AT6}/p2p-circuit/p2p/{T}",
            f"{AT}/p2p-circuit/p2p/{T}",
            f"/ip4/198.51.100.1/tcp/1/p2p/{S}/p2p-circuit/p2p/{R}",  # another's
            f"/ip4/198.51.100.1/tcp/1/p2p/{T}",  # direct
        ],
        T,
    )
    assert found == {R: (AT, AT6)}
    many = [f"/ip4/203.0.113.{n}/tcp/1/p2p/{R}/p2p-circuit" for n in range(20)]
    assert len(by_relay(many, T)[R]) == 4


def test_relays_of_one_network_fail_together():
    assert failure_domain([AT]) == "203.0.113.0/24"
    assert failure_domain(["/dns4/example.com/tcp/1", AT6]) == "2001:db8::/48"
    assert failure_domain(["/dns4/example.com/tcp/1"]) == ""


def test_a_relay_cannot_send_dials_to_somebody_elses_machine():
    victim = f"/ip4/198.51.100.9/tcp/25/p2p/{R}"
    other_id = f"/ip4/203.0.113.7/tcp/4801/p2p/{S}"
    other_port = f"/ip4/203.0.113.7/tcp/443/p2p/{R}"
    dialled = "/ip4/203.0.113.7/tcp/4801"
    offered = [victim, other_id, other_port, AT6, AT, "nonsense"]
    assert announceable(R, "203.0.113.7", dialled, offered) == (AT, other_port, AT6)
    assert announceable(R, "203.0.113.7", "", offered) == (other_port, AT6, AT)
