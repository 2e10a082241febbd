"""Configuration: precedence, types, and misspelt keys."""

import msgspec
import pytest

from fabric.app.config_loader import load_config, parse_assignment
from fabric.core.errors import ConfigError


class Inner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    sync_seconds: float = 5.0
    max_peers: int = 8


class Root(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str = "x"
    store: Inner = Inner()


def load(tmp_path, text="", environ=(), **flags):
    file = tmp_path / "config.toml"
    if text:
        file.write_text(text)
    return load_config(Root, file, dict(environ), flags)


def test_defaults_without_a_file(tmp_path):
    assert load(tmp_path) == Root()


def test_precedence(tmp_path):
    text = '[store]\nsync_seconds = 1.0\nmax_peers = 2\nname = ""'
    with pytest.raises(ConfigError, match=r"unknown setting store\.name"):
        load(tmp_path, text)
    text = 'name = "file"\n[store]\nsync_seconds = 1.0\nmax_peers = 2'
    environ = {"FABRIC__STORE__SYNC_SECONDS": "3.0", "FABRIC__NAME": "env", "HOME": "/"}
    got = load(tmp_path, text, environ.items(), name="flag")
    assert got == Root(name="flag", store=Inner(sync_seconds=3.0, max_peers=2))


@pytest.mark.parametrize(
    ("text", "reason", "next_step"),
    [
        ("[store]\nmax_peer = 3", "store.max_peer", "store.max_peers"),
        ("nome = 'x'", "unknown setting nome", "did you mean name?"),
        ("[store]\nmax_peers = 'many'", "$.store.max_peers", "correct"),
        ("[store", "not TOML", "correct that line"),
        ("zzz = 1", "unknown setting zzz", "remove it"),
    ],
)
def test_mistakes_name_their_place(tmp_path, text, reason, next_step):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert reason in caught.value.reason
    assert next_step in caught.value.next_step
    assert caught.value.exit_code == 2


def test_value_where_a_section_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="name is a value"):
        load(tmp_path, "name = 'x'", [("FABRIC__NAME__DEEP", "1")])


@pytest.mark.parametrize(
    ("text", "want"),
    [("a.b=3", ("a.b", 3)), ("a=x y", ("a", "x y")), ("a = true", ("a", True))],
)
def test_assignment(text, want):
    assert parse_assignment(text) == want


def test_assignment_without_sign():
    with pytest.raises(ConfigError, match="not key=value"):
        parse_assignment("abc")
