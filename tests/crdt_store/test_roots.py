"""The root gives way to another; what the old key signs afterwards is void."""

import itertools

import pytest

from crdt_store.clock import stamp
from crdt_store.grants import founded_untrusted, sign_succession
from crdt_store.outcome import Outcome
from crdt_store.roles import Role
from fabric.core.errors import ConfigError
from tests.crdt_store.conftest import key_of

NEW, NEWER, THIEF = key_of(301), key_of(302), key_of(303)


def succession(world, old, new, kept, at=-50):
    when = stamp(world.now + at)
    return sign_succession(old, world.mesh.id, new.peer_id, kept, when)


def offered(replica, world, *entries):
    return [replica.ingest_untrusted(e.raw, world.now) for e in entries]


def test_the_new_root_grants_and_the_old_one_no_more(world):
    replica = world.replica()
    change = succession(world, world.root, NEW, [world.founding.id])
    assert offered(replica, world, change) == [Outcome.ACCEPTED]
    assert replica.authority.root == NEW.peer_id
    assert replica.authority.role_of(world.owner.peer_id, world.now) is Role.OWNER
    back_dated = world.grant(world.root, THIEF, Role.OWNER, at=world.now - 99)
    fresh = world.grant(NEW, world.stranger, Role.OWNER)
    outcomes = offered(replica, world, back_dated, fresh)
    assert outcomes == [Outcome.UNAUTHORISED, Outcome.ACCEPTED]
    assert replica.authority.role_of(world.stranger.peer_id, world.now) is Role.OWNER


def test_the_first_succession_held_stands(world):
    replica = world.replica()
    change = succession(world, world.root, NEW, [world.founding.id])
    stolen = [
        succession(world, world.root, THIEF, [world.founding.id], at)
        for at in (-60, -40)
    ]
    outcomes = offered(replica, world, change, *stolen)
    assert outcomes == [Outcome.ACCEPTED, *[Outcome.UNAUTHORISED] * 2]
    assert replica.authority.root == NEW.peer_id


def test_what_is_not_kept_leaves(world):
    replica = world.replica()
    extra = world.grant(world.root, world.stranger, Role.ADMIN)
    change = succession(world, world.root, NEW, [world.founding.id])
    assert offered(replica, world, extra, change) == [Outcome.ACCEPTED] * 2
    assert replica.authority.role_of(world.stranger.peer_id, world.now) is None
    replica.check_integrity()


def test_every_order_of_arrival_ends_alike(world):
    first = succession(world, world.root, NEW, [world.founding.id], at=-50)
    second = succession(world, NEW, NEWER, [], at=-40)
    grant = world.grant(NEWER, world.stranger, Role.OWNER)
    prints = set()
    for order in itertools.permutations((first, second, grant)):
        replica = world.replica()
        for _ in range(3):  # a refused entry is offered again
            offered(replica, world, *order)
        assert replica.authority.root == NEWER.peer_id
        assert replica.authority.role_of(world.stranger.peer_id, world.now)
        prints.add(replica.index(authority=True).fingerprint())
    assert len(prints) == 1


def test_a_succession_survives_a_restart(world):
    replica = world.replica()
    change = succession(world, world.root, NEW, [world.founding.id])
    grant = world.grant(NEW, world.stranger, Role.OWNER)
    offered(replica, world, change, grant)
    again = world.replica()
    again.restore(replica.authority_entries(), world.now)
    assert again.authority.root == NEW.peer_id
    assert again.authority.role_of(world.stranger.peer_id, world.now) is Role.OWNER


def test_only_a_root_gives_way(world):
    replica = world.replica()
    change = succession(world, world.owner, THIEF, [])
    assert offered(replica, world, change) == [Outcome.UNAUTHORISED]


def test_a_daemon_checks_what_founds_its_mesh(world):
    raw, owner = world.founding.raw, world.owner.peer_id
    mesh = founded_untrusted("lab", world.root.public_key, raw, owner)
    assert mesh == world.mesh
    for name, root, grant, peer in (
        ("other", world.root.public_key, raw, owner),
        ("lab", THIEF.public_key, raw, owner),
        ("lab", world.root.public_key, b"x" * 100, owner),
        ("lab", world.root.public_key, raw, THIEF.peer_id),
        ("", world.root.public_key, raw, owner),
        (
            "lab",
            world.root.public_key,
            raw[:70] + bytes([raw[70] ^ 1]) + raw[71:],
            owner,
        ),
    ):
        with pytest.raises(ConfigError):
            founded_untrusted(name, root, grant, peer)
