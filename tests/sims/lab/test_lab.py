"""A laboratory with daemons: they start inside, join, answer from outside, end."""

import os
import signal
import time

import msgspec
import pytest

from fabric.core.errors import ConfigError, FabricError, NoRoute
from sims.lab.command import judge, row_of, show_pairs, stopped_once, topology_of
from sims.lab.enter import NAMESPACES
from sims.lab.lab import Lab
from sims.lab.measure import Pair, PairResult, all_pairs, measure_pairs
from sims.lab.namespaces import obstacle
from sims.lab.topology import NatKind, Site, Topology
from sims.local import start_time_of

SETTINGS = ("data.listen=0.0.0.0:0",)


def result(**facts):
    return PairResult(one="a", other="b", kinds="cone/rst", **facts)


class TestResult:
    def test_relay_is_not_enough_where_direct_is_possible(self):
        relayed = {"first_path": "relay", "path": "relay"}
        assert not result(can_be_direct=True, **relayed).as_expected
        assert result(can_be_direct=False, **relayed).as_expected
        assert not result(can_be_direct=False).as_expected

    def test_a_row_marks_what_should_be_better(self):
        row = row_of(result(can_be_direct=True, first_path="relay", path="relay"))
        assert row[0] == "a b"
        assert row[4] == "relay !"

    def test_pairs(self):
        assert all_pairs("abc") == [Pair("a", "b"), Pair("a", "c"), Pair("b", "c")]


class TestVerdict:
    def test_exit_codes_tell_what_fell_short(self):
        good = result(can_be_direct=False, first_path="relay", path="relay")
        relayed = result(can_be_direct=True, first_path="relay", path="relay")
        judge([good, result(can_be_direct=True, first_path="direct", path="direct")])
        with pytest.raises(FabricError) as info:
            judge([good, relayed])
        assert (info.value.code, info.value.exit_code) == ("E_NOT_DIRECT", 1)
        with pytest.raises(NoRoute) as info:
            judge([good, relayed, result(can_be_direct=False)])
        assert info.value.exit_code == 3
        assert "1 of 3" in info.value.reason

    def test_the_table_ends_with_how_long_it_took(self, capsys):
        one = result(can_be_direct=False, first_path="relay", path="relay")
        show_pairs([msgspec.structs.replace(one, first_rpc_seconds=1.5)])
        said = capsys.readouterr()
        assert "a b" in said.out
        assert "1 of 1 pairs can call each other: after 1.5 s in the median" in said.err


class TestStopping:
    def test_the_first_signal_stops_and_the_next_ones_do_not_disturb(self):
        before = signal.getsignal(signal.SIGTERM)
        removed = []
        with pytest.raises(KeyboardInterrupt):
            self.run(removed)
        assert removed == ["all"]
        assert signal.getsignal(signal.SIGTERM) == before

    def run(self, removed):
        with stopped_once():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os.kill(os.getpid(), signal.SIGINT)
                removed.append("all")


class TestOptions:
    def test_one_site_per_kind(self):
        topology = topology_of("cone,cone,only_443", 2, 20, 50)
        topology.check()
        names = [site.name for site in topology.sites]
        assert names == ["relay-0", "relay-1", "cone-1", "cone-2", "only_443-1"]
        assert topology.sites[2].shape.delay_seconds == pytest.approx(0.02)
        assert topology.sites[0].shape.rate_mbit == 0

    @pytest.mark.parametrize(("kinds", "relays"), [("coen", 1), ("cone", 0)])
    def test_refuses(self, kinds, relays):
        with pytest.raises(ConfigError):
            topology_of(kinds, relays, 0, 0)

    def test_needs_a_public_host(self):
        with pytest.raises(ConfigError, match="public host"):
            Lab(Topology(sites=(Site(name="home", kind=NatKind.CONE),)))


@pytest.mark.root
@pytest.mark.scenario
@pytest.mark.slow
@pytest.mark.skipif(bool(obstacle()), reason=obstacle() or "-")
def test_daemons_in_their_networks_form_a_mesh():
    home = Site(name="home", kind=NatKind.CONE)
    with Lab(Topology(sites=(Site(name="relay"), home)), SETTINGS) as lab:
        lab.start()
        pids = [lab.mesh.peer(host).pid for host in lab.hosts]
        joined = {}
        lab.form(joined=lambda host: joined.update({host: time.monotonic()}))
        assert list(joined) == ["relay", "home"]
        (found,) = measure_pairs(lab, all_pairs(lab.hosts), joined, 20)
        assert found.as_expected
        assert found.path == "direct"
        assert lab.view("home", "relay").name == "relay"
        assert any("80.80." in addr for addr in lab.client("relay").status().addrs)
        prefix = lab.network.prefix
    assert not list(NAMESPACES.glob(f"{prefix}*"))
    assert [start_time_of(pid) for pid in pids] == [0, 0]
