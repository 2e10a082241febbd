"""Punching through NATs made of namespaces and iptables, end to end.

Each figure is printed (``pytest -s``); bounds are loose because a machine that runs
the test suite is busy, and crossing NATs that answer RST takes CPUs that are not.
"""

import json
import statistics
import sys
from pathlib import Path

import pytest

from nat.punch.facts import IMPOSSIBLE
from tests.nat.punch.punch_lab import NET, Lab, missing

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
OBSERVERS = (f"{NET}.10:7001", f"{NET}.11:7001")
MEET = f"{NET}.10"
WHY_NOT = missing()
pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(WHY_NOT), reason=f"NAT lab: {WHY_NOT}"),
]


def start(lab, where, script, *args):
    path = f"PYTHONPATH={ROOT}"
    command = ("env", path, sys.executable, str(HERE / script), *args)
    return lab.start(where, *command)


def read(process):
    line = process.stdout.readline()
    assert line, "the process ended early"
    return json.loads(line)


def say(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return read(process)


def ends(lab):
    """Start the meeting point and both ends; return the one that takes commands."""
    assert read(start(lab, "pub", "punch_host.py", "meet", MEET, *OBSERVERS))
    assert read(start(lab, "hB", "punch_host.py", "serve", "B", MEET, *OBSERVERS))
    one = start(lab, "hA", "punch_host.py", "punch", "A", MEET, *OBSERVERS)
    assert read(one)
    return one


@pytest.mark.parametrize(
    ("kinds", "seconds"),
    [
        (("drop", "drop"), 0.2),
        (("drop", "rst"), 1.0),
        (("rst", "rst"), 1.0),
        (("sym", "adf"), 1.0),
        (("adf", "sym"), 1.0),
        (("sym", "public"), 0.5),
        (("public", "sym"), 0.5),
        (("drop", "public"), 0.5),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_pairs_that_can_be_direct_are(kinds, seconds):
    """Ten punches in a row succeed.

    Where both NATs answer RST, two SYNs must be under way at the same moment, which on
    wires of microseconds needs both CPUs at once: there one round may go by, as on a
    real path, and the next, from new ports, must not.
    """
    with Lab(*kinds) as lab:
        one = ends(lab)
        answers = [say(one, "punch B") for _ in range(10)]
        failures = [answer for answer in answers if not answer["ok"]]
        again = [say(one, "punch B") for _ in failures]
    assert len(failures) <= (kinds == ("rst", "rst")), failures
    assert all(answer["ok"] for answer in again)
    answers = [answer for answer in answers if answer["ok"]]
    took = [answer["ms"] / 1e3 for answer in answers]
    print(f"{kinds}: median {statistics.median(took):.3f} s, max {max(took):.3f} s")
    assert statistics.median(took) < seconds


@pytest.mark.parametrize(
    ("kinds", "whose"),
    [
        (("sym", "drop"), "our NAT maps per destination"),
        (("drop", "sym"), "the peer's NAT maps per destination"),
        (("sym", "sym"), "both sides map per destination"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_pairs_that_cannot_be_direct_say_why(kinds, whose):
    with Lab(*kinds) as lab:
        answer = say(ends(lab), "punch B")
    assert not answer["ok"]
    assert answer["code"] == IMPOSSIBLE
    assert whose in answer["reason"]
    assert answer["ms"] < 5000


def test_ports_of_a_sequential_nat_are_foretold():
    with Lab("seq", "drop") as lab:
        answer = say(ends(lab), "punch B")
    assert answer["ok"], answer
    print(f"sequential: {answer['ms']:.0f} ms")


def test_a_spoofed_connect_sends_no_packet_to_a_victim():
    victims = {
        "192.168.2.1": "192.168.2.1:8080",  # its own router
        "192.168.2.77": "192.168.2.77:8080",  # a neighbour
        "10.9.9.9": "10.9.9.9:8080",
        f"{NET}.12": f"{NET}.12:22",  # a service of the public side
        "169.254.9.9": "169.254.9.9:8080",
        "224.0.0.9": "224.0.0.9:8080",
        "127.0.0.1": "127.0.0.1:8080",
    }
    with Lab("drop", "drop") as lab:
        one = ends(lab)
        for ip in (*victims, f"{NET}.13"):
            lab.run("hB", f"iptables -A OUTPUT -p tcp --syn -d {ip}")
        named = (*victims.values(), f"{NET}.13:5000")
        assert say(one, "spoof B " + " ".join(named))["connect"]
        counted = sent_by_destination(lab.run("hB", "iptables -v -S OUTPUT"))
    assert counted.pop(f"{NET}.13") > 0  # the counters count
    assert counted == dict.fromkeys(victims, 0)


def sent_by_destination(listing):
    """Return packets by address from ``-A OUTPUT -d IP/32 .. -c PACKETS BYTES ..``."""
    rows = [line.split() for line in listing.splitlines() if " -c " in line]
    return {
        row[row.index("-d") + 1].split("/")[0]: int(row[row.index("-c") + 1])
        for row in rows
        if "-d" in row
    }


@pytest.mark.parametrize(
    ("kinds", "seconds"),
    [(("drop", "drop"), 0.5), (("rst", "rst"), 3.5), (("drop", "public"), 0.5)],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_a_relayed_control_connection_becomes_direct(kinds, seconds):
    with Lab(*kinds) as lab:
        assert read(start(lab, "pub", "punch_host.py", "meet", MEET, *OBSERVERS))
        processes = [
            start(lab, host, "dcutr_host.py", role, name, peer, MEET, *OBSERVERS)
            for host, role, name, peer in (
                ("hB", "serve", "B", "A"),
                ("hA", "dial", "A", "B"),
            )
        ]
        for process in processes:
            assert read(process)["ready"]
        server, client = (read(process) for process in processes)
    print(f"dcutr {kinds}: {client['ms']:.0f} ms")
    assert client["kind"] == "punched"
    assert client["outbound"]  # who dialled the relay is the client (DCUtR, step 5)
    assert server["kind"] in ("punched", "direct")
    assert not server["outbound"]
    assert client["ms"] < seconds * 1e3
