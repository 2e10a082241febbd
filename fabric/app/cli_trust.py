"""Verbs about who is trusted: trust list, revoke, and what needs the root key."""

from __future__ import annotations

import getpass
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cyclopts

from crdt_store.clock import stamp
from crdt_store.grants import Grant, sign_grant, sign_succession
from crdt_store.roles import Role
from crdt_store.trust_row import TrustRow
from fabric.app.cli_output import show_json, show_table, show_text, talk
from fabric.app.client import Client, connect
from fabric.app.home import Home
from fabric.app.root_key import (
    RootKey,
    new_passphrase,
    read_root_key,
    write_root_key,
)
from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId, short
from fabric.core.signing import Ed25519Signer

PASSPHRASE_VARIABLE = "FABRIC_ROOT_PASSPHRASE"
ROOT_FILE = "mesh-root.json"


def mesh_init(
    name: str,
    *,
    root_file: Path | None = None,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Create a mesh with this peer as its owner.

    The mesh's root key goes to a file of its own, sealed with a passphrase that is
    shown once, or is $FABRIC_ROOT_PASSPHRASE. It is needed only to name owners and
    admins: keep the file away from this machine.

    Args:
        name: Name of the mesh, for people.
        root_file: Where to put the root key instead of this peer's data directory.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    file = root_file or Home.find(home).data / ROOT_FILE
    given = os.environ.get(PASSPHRASE_VARIABLE)
    passphrase = given or new_passphrase()
    mesh = connect(home).mesh_init(name, root_file=file, passphrase=passphrase)
    if json:
        row = {"mesh": mesh, "name": name, "root_file": str(file)}
        show_json(row if given else {**row, "passphrase": passphrase})
    else:
        show_text(mesh)
    _tell_sealed(file, None if given else passphrase)
    talk("next: `fabric invite` makes a token for another machine")


def grant(
    peer: str,
    *,
    role: str,
    root_file: Path | None = None,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Give a member a role: an owner names admins; the root key names owners too.

    Args:
        peer: Peer id, end of it, or name.
        role: owner, admin, worker, client, relay or verifier.
        root_file: Sign with the root key in this file.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    client = connect(home)
    if root_file is None:
        client.grant(peer, role)
    else:
        key = _open(root_file)
        subject = _resolve(client, peer)
        terms = Grant(_role(role), may_delegate=role in ("owner", "admin"))
        now = stamp(time.time())
        entry = sign_grant(key.signer, key.mesh.id, subject, terms, now)
        client.add_authority(entry.raw)
    if json:
        show_json({"peer": peer, "role": role})


def rotate_root(
    root_file: Path,
    new_file: Path,
    *,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """Replace the root key; a copy of the old file is worth nothing afterwards.

    Grants that the old root signed stay. A key that was stolen *before* could do what
    it liked: then make a new mesh.

    Args:
        root_file: The present root key.
        new_file: Where to put the new one.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    client = connect(home)
    key = _open(root_file)
    present, signed = client.root_signed()
    if key.signer.peer_id != present:
        raise ConfigError(
            f"{root_file} holds {short(key.signer.peer_id)}, the root of this mesh is "
            f"{short(present)}",
            code="E_OLD_ROOT",
            next_step="use the root key file of the last rotation",
        )
    fresh = RootKey(key.mesh, Ed25519Signer.generate())
    entry = sign_succession(
        key.signer, key.mesh.id, fresh.signer.peer_id, signed, stamp(time.time())
    )
    _seal(new_file, fresh)  # on disk before the mesh follows it
    client.add_authority(entry.raw)
    if json:
        show_json({"root": fresh.signer.peer_id, "root_file": str(new_file)})
    talk(f"{root_file} is void: delete it and its copies")


def export_root(root_file: Path, to: Path, *, json: bool = False) -> None:
    """Write a copy of the root key, sealed with another passphrase.

    Args:
        root_file: The present root key.
        to: The new file.
        json: Print JSON.
    """
    _seal(to, _open(root_file))
    if json:
        show_json({"root_file": str(to)})


def trust_list(*, home: Path | None = None, json: bool = False) -> None:
    """Show who is a member, by whose word, and which invites there are.

    Args:
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    client = connect(home)
    rows = client.trust()
    if json:
        for row in rows:
            show_json(row)
        return
    status = client.status()
    names = {p.peer: p.name for p in status.peers} | {status.peer: status.name}
    show_table(
        ("MEMBER", "NAME", "ROLE", "BY", "SINCE", "STATE"),
        ((short(r.subject), names.get(r.subject), *_cells(r)) for r in rows if _is(r)),
    )
    invites = [row for row in rows if not _is(row)]
    if invites:
        show_table(
            ("INVITE", "USED", "ROLE", "BY", "SINCE", "STATE"),
            ((short(r.subject), f"{r.used}/{r.uses}", *_cells(r)) for r in invites),
        )


def revoke(
    peer: str,
    *,
    reason: str = "",
    lift: bool = False,
    home: Path | None = None,
    json: bool = False,
) -> None:
    """End the membership of a peer, or an invite; what it wrote before stays.

    Args:
        peer: Peer id, end of it, or name; or the end of an invite's id.
        reason: Shown to the peer and in `fabric trust list`.
        lift: Take back this peer's own revocation instead.
        home: Directory of the peer to talk to.
        json: Print JSON.
    """
    client = connect(home)
    if lift:
        client.lift_revocation(peer)
    else:
        client.revoke(peer, reason)
    if json:
        show_json({"peer": peer, "revoked": not lift})


def _is(row: TrustRow) -> bool:
    return row.kind != "invite"


def _cells(row: TrustRow) -> Iterator[str]:
    yield row.role or "-"
    yield short(row.by)
    yield time.strftime("%Y-%m-%d %H:%M", time.localtime(row.since))
    yield f"{row.code} {row.reason}" if row.code else "ok"


def _resolve(client: Client, text: str) -> PeerId:
    status = client.status()
    known = [(status.peer, status.name), *((p.peer, p.name) for p in status.peers)]
    found = {p for p, name in known if name == text or p.endswith(text)}
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} peers are called {text!r}",
            next_step="give the whole peer id: fabric status --json",
        )
    return PeerId(found.pop())


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError:
        known = ", ".join(Role)
        raise ConfigError(f"no role {text!r}", next_step=f"roles: {known}") from None


def _open(file: Path) -> RootKey:
    given = os.environ.get(PASSPHRASE_VARIABLE)
    if given is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"the passphrase of {file} is needed",
                next_step=f"set ${PASSPHRASE_VARIABLE}, or use a terminal",
            )
        given = getpass.getpass(f"passphrase of {file}: ")
    return read_root_key(file, given.strip())


def _seal(file: Path, key: RootKey) -> None:
    passphrase = new_passphrase()
    write_root_key(file, key, passphrase)
    _tell_sealed(file, passphrase)


def _tell_sealed(file: Path, passphrase: str | None) -> None:
    talk(f"root key: {file}; it names owners and admins, move it off this machine")
    if passphrase is not None:
        talk(f"its passphrase, shown only now: {passphrase}")


def add_to(app: cyclopts.App) -> None:
    """Add these verbs to ``app``."""
    mesh = cyclopts.App(name="mesh", help="Create a mesh; use its root key.")
    mesh.command(name="init")(mesh_init)
    for verb in (grant, rotate_root, export_root):
        mesh.command(verb)
    trust = cyclopts.App(name="trust", help="Who is in the mesh, by whose word.")
    trust.command(name="list")(trust_list)
    app.command(mesh)
    app.command(trust)
    app.command(revoke)
