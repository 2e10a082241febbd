"""Plans without a mesh: links from a file, and what is wrong with a file."""

from pathlib import Path

import pytest

from crdt_store.link_records import LinkRecord, PublishedLink
from fabric.core.errors import ConfigError
from fabric.core.ids import PeerId
from fabric.jobs.plan.linkfile import load_ground
from fabric.jobs.plan.measured import PeerFacts, ground_of
from fabric.jobs.plan.quantities import parse_size, seconds_text, size_text
from fabric.jobs.topology.islands import topology_of
from tests.jobs.topology.worlds import LAN, WAN, links_of, peers, records_of

EXAMPLES = Path(__file__).parents[3] / "examples"


def load(tmp_path, text):
    path = tmp_path / "links.toml"
    path.write_text(text)
    return load_ground(path)


def test_the_example_of_two_sites_has_two_sites():
    ground = load_ground(EXAMPLES / "links-two-sites.toml")
    assert ground.levels == ("site", "internet")
    assert [place.size for place in ground.root.children] == [2, 2]
    assert [place.up for place in ground.root.children] == [12.5e6, 12.5e6]
    assert ground.root.children[0].children[0].up == 1e9
    assert ground.ranks[3].memory_bytes == 4 << 30
    assert any("stay together" in line for line in ground.reasons)


def test_uniform_levels_are_taken_as_they_are(tmp_path):
    ground = load(
        tmp_path,
        '[rank]\nmemory = "1GiB"\n[[level]]\nname = "host"\nsize = 3\nrate = "1GB"\n'
        '[[level]]\nname = "site"\nsize = 5\nrate = "1Gbit"\nrtt_ms = 1\n',
    )
    assert (ground.root.level, ground.root.size) == (2, 15)
    assert ground.levels == ("host", "site")
    host = ground.root.children[4]
    assert (host.start, host.stop, host.up, host.rtt_seconds) == (12, 15, 1.25e8, 1e-3)
    assert host.children[0].up == 1e9


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither levels nor peers"),
        ("[[level]]\nname='a'\nsize=1\nrate='1MB'\n", "size"),
        ("[[level]]\nname='a'\nsize=2\nrate='fast'\n", "not a rate"),
        ("[[level]]\nname='a'\nsize=4000\nrate='1MB'\n" * 2, "ranks >"),
        ("[[peer]]\nname='a'\n[[link]]\nbetween=['a','b']\nup='1MB'\n", "no [[peer]]"),
        ("[[peer]]\nname='a'\nmemory='much'\n", "not a size"),
        ("[[peer]]\nnme='a'\n", "nme"),
        ("\x00", "links.toml"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        load(tmp_path, text)


def test_a_way_out_is_as_wide_as_the_widest_link_through_it():
    """A slow other end is its own limit, not ours; directions are kept apart."""
    a, b, c = (PeerId(name) for name in "abc")

    def link(up, down):
        return PublishedLink(
            rtt_microseconds=2000, up_bytes_per_second=up, down_bytes_per_second=down
        )

    records = {
        a: LinkRecord(
            links={b: link(10_000_000, 4_000_000), c: link(1_000_000, 500_000)}
        ),
        b: LinkRecord(links={c: link(1_000_000, 500_000)}),
    }
    facts = {a: PeerFacts(name="ann")}
    root = ground_of(topology_of(records, "abc"), facts).root
    by_name = {place.name: place for place in root.walk()}
    assert by_name["c"].up == 500_000
    assert by_name["c"].down == 1_000_000
    outer = root if by_name["ann"] in root.children else root.children[0]
    assert by_name["ann"].up == 10_000_000
    assert by_name["ann"].down == 4_000_000
    assert outer.size >= 2


def test_peers_with_several_ranks_are_hosts():
    shape = (2, 1)
    facts = {peer: PeerFacts(name=peer, ranks=2) for peer in peers(shape)}
    ground = ground_of(
        topology_of(records_of(links_of(shape, (WAN, LAN))), peers(shape)), facts
    )
    assert ground.levels == ("host", "site", "internet")
    assert [rank.name for rank in ground.ranks][:2] == ["p0.0/0", "p0.0/1"]
    assert [place.level for place in ground.root.children] == [2, 1]


def test_amounts_for_people():
    assert parse_size("16GiB") == 16 << 30
    assert parse_size("500MB") == 500_000_000
    assert parse_size(7) == 7
    assert size_text(3 << 29) == "1.5 GiB"
    assert [seconds_text(s) for s in (123, 1.5, 0.0021, 3e-5)] == [
        "123 s",
        "1.5 s",
        "2.1 ms",
        "30 us",
    ]
