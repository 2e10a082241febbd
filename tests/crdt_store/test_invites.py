"""Tokens: round trip, damage, secrecy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crdt_store.invites import make_invite, parse_token_untrusted
from fabric.core.errors import ConfigError


def token_of(world) -> str:
    addrs = ["/ip4/10.0.0.1/tcp/4001/p2p/12D3KooWabc"]
    return make_invite(world.owner, world.mesh, addrs, now=world.now)[0]


def test_a_token_holds_all_a_joiner_needs_and_hides_its_key(world) -> None:
    token = token_of(world)
    invite = parse_token_untrusted(token[:20] + "\n " + token[20:])
    assert invite.mesh_id == world.mesh.id
    assert invite.bootstrap == ("/ip4/10.0.0.1/tcp/4001/p2p/12D3KooWabc",)
    assert invite.seed.hex() not in repr(invite)
    assert repr(invite.seed) not in f"{invite!r} {invite}"


@given(data=st.data())
def test_a_damaged_token_is_a_config_error(make_world, data) -> None:
    token = token_of(make_world())
    at = data.draw(st.integers(0, len(token) - 1))
    how = data.draw(st.sampled_from(["cut", "change"]))
    change = data.draw(st.sampled_from("ABCabc019-_!"))
    damaged = token[:at] if how == "cut" else token[:at] + change + token[at + 1 :]
    if damaged == token:
        return
    with pytest.raises(ConfigError) as bad:
        parse_token_untrusted(damaged)
    assert bad.value.code == "E_BAD_TOKEN"
    assert bad.value.next_step
    assert token[20:40] not in bad.value.reason


@given(st.text(max_size=100))
def test_anything_else_is_no_token(text) -> None:
    for candidate in (text, "fabric1-" + text):
        with pytest.raises(ConfigError):
            parse_token_untrusted(candidate)
