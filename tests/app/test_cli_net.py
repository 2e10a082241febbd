"""doctor, ping, peers and why against real daemons."""

import subprocess
import sys

import pytest

from fabric.app.client import connect
from fabric.core.errors import FabricError
from sims.local import wait_until

pytestmark = [pytest.mark.scenario, pytest.mark.slow]

SOON = 60.0


@pytest.fixture(scope="module")
def homes(mesh):
    """Two peers in one mesh that know each other."""
    mesh.start_all(("anna", "bert"))
    a, b = mesh.client("anna"), mesh.client("bert")
    a.mesh_init("lab")
    b.join(a.invite())
    homes = tuple(mesh.directory / name for name in ("anna", "bert"))

    def linked():
        rows = [row for home in homes for row in connect(home).status().peers]
        return len(rows) == 2 and all(row.connected and row.name for row in rows)

    wait_until(linked, SOON, "the two to know each other")
    return homes


def findings(outcome):
    return {row["name"]: row for row in outcome.rows}


def test_all_is_well_between_two(fabric, homes):
    a, _ = homes
    done = fabric("doctor", "--peer", "bert", "--home", a, "--json")
    assert done.code == 0, done.out
    found = findings(done)
    for name in ("clock", "udp", "mtu", "members", "versions"):
        assert found[name]["status"] == "ok", found[name]
    assert found["listen"]["code"] == "E_LOOPBACK_ONLY"
    # reached by this machine only, whatever the verdict is by now
    assert found["relaying"]["detail"].startswith("not for others")
    for name in ("member", "addresses", "gate", "admission", "punch", "path"):
        assert found[f"peer.{name}"]["status"] == "ok", found[f"peer.{name}"]
    assert all(row["next_step"] for row in found.values() if row["status"] != "ok")
    text = fabric("doctor", "--home", a).out
    assert "ok    clock" in text
    assert "next: " in text
    assert "peer.path" not in text


def test_ping_and_peers_show_paths(fabric, homes):
    a, _ = homes
    done = fabric("ping", "bert", "--count", "2", "--home", a)
    assert done.out.count(" direct ") == 2
    (row,) = fabric("peers", "--home", a, "--json").rows
    assert row["control"] == ["direct"]
    assert row["version"]
    assert row["addrs"][0].startswith("/ip4/127.0.0.1/tcp/")
    assert "direct" in fabric("peers", "--home", a).out
    status = fabric("status", "--home", a, "--json").json
    assert status["peers"][0]["up_mbit"] is None  # nothing was measured yet


def test_flags_of_up_take_effect(fabric, homes, short_dir):
    refused = fabric("up", "--home", short_dir / "dora", "--budget", "20Mbit,vram=80%")
    assert refused.code == 2
    assert "E_BUDGET_PART" in refused.err
    assert "next: " in refused.err
    a, _ = homes
    home = short_dir / "cleo"
    flags = ("--listen", "/ip4/127.0.0.1/tcp/0", "--relay-ok", "--budget", "20Mbit")
    argv = [sys.executable, "-m", "fabric.app.cli", "up", "--home", str(home), *flags]
    with (short_dir / "cleo.log").open("w") as log:
        daemon = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(home), SOON, "cleo to be up")
        connect(home).join(connect(a).invite())
        found = findings(fabric("doctor", "--home", home, "--json"))
        assert found["relaying"]["detail"].startswith("for others: ")
        assert found["relaying"]["detail"].endswith("budget of 20 Mbit/s")
        connect(home).leave()
        assert fabric("down", "--home", home).code == 0
        assert daemon.wait(SOON) == 0
    finally:
        daemon.kill()
        daemon.wait()


def answers(home):
    try:
        return connect(home).status().state == "no mesh"
    except FabricError:
        return False


def test_refusals(fabric, homes, short_dir):
    a, _ = homes
    nobody = fabric("doctor", "--peer", "nobody", "--home", a, "--json")
    assert (nobody.code, nobody.refusal["code"]) == (3, "E_NO_PEER")
    away = fabric("doctor", "--home", short_dir / "none", "--json")
    assert (away.code, away.refusal["code"]) == (3, "E_NO_DAEMON")


def test_a_killed_peer_is_told_apart(fabric, homes, mesh):
    a, _ = homes
    mesh.kill("bert")
    wait_until(
        lambda: not any(row.connected for row in connect(a).status().peers),
        SOON,
        "the loss of b",
    )
    done = fabric("doctor", "--peer", "bert", "--home", a, "--json")
    found = findings(done)
    assert done.code == 3
    assert found["members"]["code"] == "E_ISLAND"
    assert "connection refused" in found["peer.addresses"]["detail"]
    assert found["peer.path"]["status"] == "fail"
    assert found["peer.path"]["next_step"]
    why = fabric("why", "bert", "--home", a).out
    assert "connection refused" in why
    assert "next: " in why
    assert fabric("doctor", "--home", a).code == 1
