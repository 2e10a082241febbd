"""How the command line writes numbers, addresses, tables and findings."""

import pytest

from fabric.app.addr_text import short_addr
from fabric.app.cli_net import finding_text, ping_text
from fabric.app.cli_output import mbit, milliseconds, show_table
from fabric.app.control_messages import PingView
from nat.doctor.findings import fail, ok

RELAY = "12D3KooWE21YiUmQcyAjNaBZscEb7h4Lcc5MZabsgrPNBVGcvgUF"


def test_numbers_have_units_and_few_digits():
    assert [mbit(v) for v in (None, 0.08, 94.13, 940.2, 1250.0)] == (
        [None, "0.08 Mb/s", "94.1 Mb/s", "940 Mb/s", "1.25 Gb/s"]
    )
    assert [milliseconds(v) for v in (None, 0.42, 84.25, 104.3)] == (
        [None, "0.4 ms", "84.2 ms", "104 ms"]
    )


@pytest.mark.parametrize(
    ("addr", "text"),
    [
        (f"/ip4/203.0.113.9/tcp/4001/p2p/{RELAY}", "203.0.113.9:4001"),
        (f"/ip6/2001:db8::1/tcp/4001/p2p/{RELAY}", "[2001:db8::1]:4001"),
        (f"/ip4/203.0.113.9/tcp/1/p2p/{RELAY}/p2p-circuit/p2p/x", "via BVGcvgUF"),
        ("/dns4/relay.example/tcp/443/p2p/x", "relay.example:443"),
        ("/memory/7", "/memory/7"),
    ],
)
def test_an_address_is_short(addr, text):
    assert short_addr(addr) == text


def test_a_row_of_status_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ("PEER", "NAME", "ROLE", "ALIVE", "PATH", "RTT", "UP", "DOWN", "TRUST")
    row = ("2QgQLXo6", "anna", "worker", "suspect", "punched", "84.2 ms")
    show_table(
        (*columns, "NOTE"),
        [(*row, "94.1 Mb/s", "1.25 Gb/s", "software", "")],
        optional=("NOTE",),
    )
    head, line = capsys.readouterr().out.splitlines()
    assert line.split() == " ".join((*row, "94.1 Mb/s 1.25 Gb/s software")).split()
    assert "NOTE" not in head
    show_table(("A", "NOTE"), [("x", "E_NO_ROUTE")], optional=("NOTE",))
    assert "E_NO_ROUTE" in capsys.readouterr().out


def test_a_finding_wraps_under_its_details():
    long = fail("relay", "E_NO_RELAY", "no slot " * 12, "start one " * 8)
    assert len(finding_text(long).splitlines()) == 2
    lines = finding_text(long, 60).splitlines()
    assert len(lines) > 4
    assert all(len(line) <= 60 for line in lines)
    assert all(line.startswith(" " * 22) for line in lines[1:])
    assert "".join(" ".join(lines).split()) == "".join(finding_text(long).split())
    assert finding_text(ok("mtu", "1500 B"), 60) == finding_text(ok("mtu", "1500 B"))


def test_a_ping_shows_the_upgrade():
    view = PingView(RELAY, "direct", 31.2, ("direct", "relay"), "relay", 84.4)
    assert ping_text(view) == "BVGcvgUF relay 84 ms -> direct 31 ms  (also relay)"
