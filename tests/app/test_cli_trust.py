"""Who may do what, from the command line, with real daemons."""

import os

import pytest

from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0


@pytest.fixture(scope="module")
def founded(mesh, fabric):
    """Three peers; the mesh was made by the command line. (homes, passphrase)."""
    mesh.start_all(("ann", "ben", "cat"))
    homes = {name: mesh.directory / name for name in ("ann", "ben", "cat")}
    done = fabric("mesh", "init", "lab", "--home", homes["ann"], "--json")
    assert done.code == 0, done.err
    token = mesh.client("ann").invite(uses=2)
    mesh.client("ben").join(token)
    mesh.client("cat").join(token)
    wait_until(
        lambda: {p.name for p in mesh.client("ann").status().peers} == {"ben", "cat"},
        SOON,
        "ann to know their names",
    )
    return homes, done.json


def rows(fabric, home):
    found = fabric("trust", "list", "--home", home, "--json").rows
    return {row["subject"]: row for row in found}


def peer(mesh, name):
    return mesh.client(name).status().peer


def test_the_root_names_admins_and_gives_way(mesh, fabric, founded, tmp_path):
    homes, made = founded
    home, first = homes["ann"], made["root_file"]
    env = {**os.environ, "FABRIC_ROOT_PASSPHRASE": made["passphrase"]}
    ben = peer(mesh, "ben")

    def grant(file, role, **options):
        words = ("grant", "ben", "--role", role, "--root-file", file)
        return fabric("mesh", *words, "--home", home, "--json", **options)

    assert grant(first, "admin").refusal["code"] == "E_CONFIG"  # no passphrase
    assert grant(first, "admin", env=env).code == 0
    wait_until(
        lambda: mesh.client("ben").status().role == "admin", SOON, "ben to be an admin"
    )
    second = tmp_path / "second.json"
    words = ("rotate-root", first, second, "--home", home, "--json")
    assert fabric("mesh", *words, env=env).code == 0
    refused = grant(first, "owner", env=env)
    assert (refused.code, refused.refusal["code"]) == (4, "E_NOT_AUTHORISED")
    assert rows(fabric, home)[ben]["role"] == "admin"
    again = fabric(
        "mesh", "rotate-root", first, tmp_path / "x", "--home", home, env=env
    )
    assert again.code == 2
    assert "last rotation" in again.err


def test_a_revoked_peer_is_out_and_an_invite_can_be(mesh, fabric, founded):
    homes, _ = founded
    home, cat = homes["ann"], peer(mesh, "cat")
    done = fabric("revoke", "cat", "--reason", "lost laptop", "--home", home)
    assert done.code == 0, done.err
    row = rows(fabric, home)[cat]
    assert (row["code"], "lost laptop" in row["reason"]) == ("E_REVOKED", True)
    wait_until(
        lambda: rows(fabric, homes["ben"])[cat]["code"] == "E_REVOKED",
        SOON,
        "ben to hear of it",
    )
    assert "lost laptop" in fabric("why", cat, "--home", homes["ben"]).out
    token = mesh.client("ann").invite()
    (key,) = (
        s
        for s, r in rows(fabric, home).items()
        if r["kind"] == "invite" and not r["used"]
    )
    assert fabric("revoke", key, "--home", home).code == 0
    assert rows(fabric, home)[key]["code"] == "E_REVOKED"
    assert token.startswith("fabric1-")
    text = fabric("trust", "list", "--home", home).out
    assert "INVITE" in text
    assert "E_REVOKED" in text
    assert fabric("revoke", "nobody", "--home", home).code != 0
    assert fabric("revoke", "ann", "--home", homes["ben"]).code != 0  # an owner


def test_an_invite_as_qr_code(fabric, founded):
    homes, _ = founded
    done = fabric("invite", "--qr", "--home", homes["ann"])
    assert done.out.startswith("fabric1-")
    assert "\u2588" in done.err


def test_who_left_is_gone_from_every_view(mesh, fabric, founded):
    homes, _ = founded
    assert fabric("leave", "--home", homes["ben"]).code == 0
    wait_until(
        lambda: "ben" not in {p.name for p in mesh.client("ann").status().peers},
        SOON,
        "ben to be gone",
    )
