"""What a partition let in, on real daemons: the merge decides, and nobody told a token.

One invite for one peer is used on both sides; meanwhile a peer is revoked on one side
and works on in the other.
"""

import pytest

from crdt_store.invites import parse_token_untrusted
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0
"""Longest wait for what takes a moment on a machine that is not busy."""
MEMBERS = ("p0", "p1", "p2", "p3")
SIDES = ("p0", "p1", "q0"), ("p2", "p3", "q1")
"""The q are newcomers; p3 is to be revoked while it is on the other side."""


def peer(mesh, name):
    return mesh.client(name).status().peer


def row(mesh, name, subject, kind="invited"):
    rows = mesh.client(name).trust()
    return next((r for r in rows if (r.subject, r.kind) == (subject, kind)), None)


def names_seen(mesh, name):
    return {r.name for r in mesh.client(name).status().peers if r.connected}


def told(mesh, name):
    """What this peer knows of its own standing: its own judgement, others' words."""
    view = mesh.client(name).status()
    own = [r.code for r in mesh.client(name).trust() if r.subject == view.peer]
    return {*own, *(r.note for r in view.peers)}


def test_the_merge_decides_who_stays(mesh, form):
    form(*MEMBERS)
    mesh.start_all(("q0", "q1"), ("log_level=DEBUG",))
    wait_until(
        lambda: all(names_seen(mesh, n) >= set(MEMBERS) - {n} for n in MEMBERS),
        SOON,
        "all links",
    )
    token = mesh.client("p0").invite(uses=1)
    ids = {name: peer(mesh, name) for name in (*MEMBERS, "q0", "q1")}
    wait_until(
        lambda: all(
            any(r.kind == "invite" and r.used == 0 for r in mesh.client(n).trust())
            for n in MEMBERS
        ),
        SOON,
        "all to know the invite",
    )
    for side, other in (SIDES, SIDES[::-1]):
        for name in set(side) & set(MEMBERS):  # the newcomers have no mesh yet
            mesh.client(name).partition(tuple(ids[n] for n in other))
    mesh.client("q0").join(token)
    mesh.client("q1").join(token)
    mesh.client("p0").revoke(ids["p3"], "stolen")
    for name, newcomer in (("p1", "q0"), ("p2", "q1")):
        wait_until(
            lambda n=name, q=newcomer: (
                row(mesh, n, ids[q]) and not row(mesh, n, ids[q]).code
            ),
            SOON,
            f"{newcomer} to be a member on its side",
        )
    wait_until(
        lambda: getattr(row(mesh, "p1", ids["p3"]), "code", "") == "E_REVOKED",
        SOON,
        "the mainland to know of the revocation",
    )
    assert not row(mesh, "p2", ids["p3"]).code, "the island does not know"

    mesh.heal()

    def decided():
        views = [mesh.client(n).trust() for n in ("p0", "p1", "p2")]
        codes = [
            {r.subject: r.code for r in rows if r.kind == "invited"} for rows in views
        ]
        return codes[0] == codes[1] == codes[2] and {
            codes[0].get(ids["q0"], "-"),
            codes[0].get(ids["q1"], "-"),
        } == {"", "E_INVITE_EXHAUSTED"}

    wait_until(decided, SOON, "the same first one to stand everywhere")
    stands, lost = sorted(("q0", "q1"), key=lambda q: row(mesh, "p1", ids[q]).code)
    assert stands == "q0", "the first by its clock"
    assert "no uses left" in row(mesh, "p2", ids[lost]).reason
    wait_until(
        lambda: (
            not names_seen(mesh, "p1") & {lost, "p3"}
            and not names_seen(mesh, "p2") & {lost, "p3"}
        ),
        SOON,
        "those without authority to be cut off",
    )
    # the states are equal before all connections are back
    wait_until(
        lambda: names_seen(mesh, "p0") >= {"p1", "p2", "q0"}, SOON, "p0 to see the rest"
    )
    # nor does the island bring it back: it knows now, and says so to whoever asks
    wait_until(
        lambda: row(mesh, "p2", ids["p3"]).code == "E_REVOKED",
        SOON,
        "the island to know",
    )
    assert "stolen" in row(mesh, "p2", ids["p3"]).reason
    # and those who are out are told why
    for name, code in ((lost, "E_INVITE_EXHAUSTED"), ("p3", "E_REVOKED")):
        wait_until(lambda n=name, c=code: c in told(mesh, n), SOON, f"{name} to know")

    # what a token is made of is in no log and no file but the newcomers' own
    seed = parse_token_untrusted(token).seed
    for name in (*MEMBERS, "q0", "q1"):
        for path in (mesh.directory / name).rglob("*"):
            if not path.is_file():
                continue
            found = path.read_bytes()
            for secret in (
                token.encode(),
                token[8:40].encode(),
                seed,
                seed.hex().encode(),
            ):
                assert secret not in found, path
