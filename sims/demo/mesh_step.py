"""Step 1: four daemons, a mesh, three invites, and a stranger who is refused."""

from __future__ import annotations

import secrets

from crdt_store.grants import Mesh
from crdt_store.invites import make_invite, parse_token_untrusted
from fabric.core.errors import FabricError, RemoteRefused
from fabric.core.signing import Ed25519Signer
from sims.demo.view import DemoView
from sims.local import LocalMesh, wait_until

PEERS = ("ada", "bob", "cy", "dee")
STRANGER = "eve"
NEWCOMER = "fay"
CONNECT_SECONDS = 30.0
SETTINGS = ("train.worker_threads=1",)


def build_mesh(mesh: LocalMesh, view: DemoView) -> str:
    """Start the peers and join them; return why the stranger was refused.

    Raises:
        FabricError: a daemon did not start, or the stranger was let in.
    """
    mesh.start_all((*PEERS, STRANGER), SETTINGS)
    owner, *others = PEERS
    mesh.create_mesh(owner, "demo")
    view.say(f"{owner} created mesh {mesh.mesh[:8]}")
    for name in others:
        token = mesh.client(owner).invite(uses=1)
        mesh.client(name).join(token)
        view.say(f"{name} joined with an invite of its own")
    refusal = _try_as_stranger(mesh, owner)
    view.say(f"{STRANGER} was refused: {refusal}")
    mesh.kill(STRANGER)
    wait_for_links(mesh, PEERS)
    return refusal


def _try_as_stranger(mesh: LocalMesh, owner: str) -> str:
    """Have the stranger try with a token that no admin signed."""
    genuine = parse_token_untrusted(mesh.client(owner).invite(uses=1))
    forged, _ = make_invite(
        Ed25519Signer(secrets.token_bytes(32)),
        Mesh(genuine.mesh.name, genuine.mesh.root),
        genuine.bootstrap,
        now=0.0,
    )
    try:
        mesh.client(STRANGER).join(forged)
    except RemoteRefused as error:
        return f"{error.code}: {error.reason}; next: {error.next_step}"
    raise FabricError("a peer without an invite was let in", code="E_DEMO")


def wait_for_links(mesh: LocalMesh, names: tuple[str, ...]) -> None:
    """Return when each of ``names`` has a connection with all others."""

    def linked() -> bool:
        views = [mesh.client(name).status() for name in names]
        ids = {view.peer for view in views}
        return all(
            {p.peer for p in view.peers if p.connected} >= ids - {view.peer}
            for view in views
        )

    wait_until(linked, CONNECT_SECONDS, "the members to connect with each other")
