"""Membership on real daemons: invites, refusals, restarts, what survives a kill."""

import secrets

import pytest

from crdt_store.grants import Mesh
from crdt_store.invites import make_invite, parse_token_untrusted
from fabric.app.addr_text import short_addr
from fabric.app.home import Home
from fabric.core.errors import FabricError, RemoteRefused
from fabric.core.signing import Ed25519Signer
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0
"""Longest wait for what takes a moment on a machine that is not busy."""


def row_of(mesh, name, peer):
    """Return the row of ``peer`` in the status that ``name`` shows, or None."""
    rows = mesh.client(name).status().peers
    return next((row for row in rows if row.peer == peer), None)


def await_link(mesh, name, peer):
    def linked():
        row = row_of(mesh, name, peer)
        return row is not None and row.connected

    wait_until(linked, SOON, f"{name} to be connected with {peer}")


def forge(token):
    """Return an invite for the same mesh and members that no admin signed."""
    genuine = parse_token_untrusted(token)
    forged, _ = make_invite(
        Ed25519Signer(secrets.token_bytes(32)),
        Mesh(genuine.mesh.name, genuine.mesh.root),
        genuine.bootstrap,
        now=0.0,
    )
    return forged


def test_invites_and_refusals(mesh, form):
    token = form("p0", "p1")
    owner = mesh.client("p0")
    mesh.start_all(("q0", "q1", "q2"))

    with pytest.raises(RemoteRefused) as forged:
        mesh.client("q0").join(forge(token))
    assert forged.value.exit_code == 4
    assert forged.value.code
    assert forged.value.reason
    assert forged.value.next_step
    assert mesh.client("q0").status().state == "no mesh"
    assert row_of(mesh, "p0", mesh.client("q0").status().peer) is None

    once = owner.invite(uses=1)
    mesh.client("q1").join(once)
    with pytest.raises(FabricError) as spent:
        mesh.client("q2").join(once)
    assert spent.value.exit_code == 4
    assert spent.value.next_step
    assert mesh.client("q2").status().state == "no mesh"

    mesh.client("q2").join(owner.invite(uses=1))  # a refusal is not held against it
    names = ("p0", "p1", "q1", "q2")
    ids = {mesh.client(name).status().peer for name in names}

    def converged():
        views = [mesh.client(name).status() for name in names]
        return all(
            {row.peer for row in view.peers if row.name and row.connected}
            == ids - {view.peer}
            for view in views
        )

    wait_until(converged, SOON, "all members to know and reach each other")

    def roles():  # a role is known with the invite that gave it
        return {row.name: row.role for row in mesh.client("q2").status().peers}

    known = {"p0": "owner", "p1": "worker", "q1": "worker"}
    wait_until(lambda: roles() == known, SOON, "the roles of all")


def test_newcomer_joins_while_the_inviter_is_away(mesh, form):
    form("p0", "p1")

    token = mesh.client("p0").invite(uses=2)
    mesh.start_all(("q0", "q1"))
    mesh.client("q1").join(token)
    first = mesh.client("q1").status().peer

    def heard():  # p1 names a role once it knows the invite that gave it
        return getattr(row_of(mesh, "p1", first), "role", "") == "worker"

    wait_until(heard, SOON, "p1 to hear of the invite")
    mesh.kill("p0")
    mesh.client("q0").join(token)
    await_link(mesh, "q0", mesh.client("p1").status().peer)


def test_restarted_daemon_comes_back(mesh, form, tiny_spec):
    """SIGKILL and a start on the same home: same identity, same mesh, nothing lost."""
    form("p0", "p1")
    before = {name: mesh.client(name).status() for name in ("p0", "p1")}

    mesh.kill("p1")
    mesh.start("p1")
    after = mesh.client("p1").status()
    assert (after.peer, after.mesh) == (before["p1"].peer, before["p1"].mesh)
    assert after.state == "member"
    await_link(mesh, "p0", after.peer)
    # both take a new port: the owner must hear of p1's before it loses its own
    heard = f"it announces {short_addr(after.addrs[0])}"
    owner = mesh.client("p0")
    wait_until(
        lambda: any(line.startswith(heard) for line in owner.why("p1")),
        SOON,
        "p1's new address at p0",
    )

    # the owner dies as soon as it has answered; nobody else may know the job yet
    spec = tiny_spec(rounds=1, inner_steps=1, min_peers=1)
    job = mesh.client("p0").submit(spec).id
    mesh.kill("p0")
    mesh.start("p0")
    assert [row.job for row in mesh.client("p0").jobs()] == [job]
    assert mesh.client("p0").status().peer == before["p0"].peer
    wait_until(
        lambda: any(row.job == job for row in mesh.client("p1").jobs()),
        SOON,
        "the job to reach the other member",
    )


def test_leaving_forgets_the_mesh(mesh, form):
    form("p0", "p1")
    peer = mesh.client("p1").status().peer
    mesh.client("p1").leave()
    assert mesh.client("p1").status().state == "no mesh"
    assert not Home.find(mesh.directory / "p1").mesh_file.exists()
    wait_until(
        lambda: not getattr(row_of(mesh, "p0", peer), "connected", False),
        SOON,
        "the owner to see that the peer is gone",
    )
    mesh.client("p1").join(mesh.client("p0").invite())
    assert mesh.client("p1").status().peer == peer
