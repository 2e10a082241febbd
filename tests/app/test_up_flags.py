"""What the flags of ``fabric up`` set."""

import pytest

from fabric.app.config import NodeConfig, load_node_config
from fabric.app.home import Home
from fabric.app.up_flags import settings_of
from fabric.core.errors import ConfigError


def configured(tmp_path, *assignments, **flags):
    home = Home.find(tmp_path / "home")
    return load_node_config(home, settings_of(assignments, **flags))


def test_nothing_given_sets_nothing(tmp_path):
    assert settings_of() == {}
    assert configured(tmp_path).nat.relay.volunteer == "auto"


@pytest.mark.parametrize(("ok", "volunteer"), [(True, "always"), (False, "never")])
def test_relay_ok(tmp_path, ok, volunteer):
    config = configured(tmp_path, "nat.relay.volunteer=auto", relay_ok=ok)
    assert config.nat.relay.volunteer == volunteer


def test_name_and_listen(tmp_path):
    config = configured(tmp_path, name="anna", listen="/ip4/127.0.0.1/tcp/0")
    assert config.display_name == "anna"
    assert config.host.listen == ("/ip4/127.0.0.1/tcp/0",)


def test_budget(tmp_path):
    text = "20Mbit, peer=5Mbit, relay=1MB, connections=200"
    config = configured(tmp_path, budget=text)
    budget = config.data.budget
    assert budget.max_up_bytes_per_second == 2.5e6
    assert budget.max_up_bytes_per_second_per_peer == 625e3
    assert budget.max_connections == 200
    assert config.nat_in_budget.relay.max_bytes_per_second == 1e6


def test_relaying_takes_no_more_than_all_may_send(tmp_path):
    config = configured(tmp_path, budget="20Mbit")
    assert config.nat_in_budget.relay.max_bytes_per_second == 2.5e6
    assert config.nat.relay.max_bytes_per_second == 32e6
    unlimited = configured(tmp_path, budget="peer=5Mbit")
    assert unlimited.nat_in_budget == unlimited.nat
    assert NodeConfig().nat_in_budget == NodeConfig().nat


@pytest.mark.parametrize(
    ("budget", "code", "words"),
    [
        ("20Mbit,vram=80%", "E_BUDGET_PART", "'vram'"),
        ("twenty", "E_BUDGET_FORM", "not a rate"),
        ("connections=many", "E_BUDGET_FORM", "'many'"),
        ("peer=1kbit", "E_BUDGET_FORM", "below"),
    ],
)
def test_what_cannot_be_meant_says_how_to_write_it(budget, code, words):
    with pytest.raises(ConfigError) as caught:
        settings_of(budget=budget)
    assert caught.value.code == code
    assert words in caught.value.reason
    assert caught.value.next_step
