"""What the README tells people to type exists."""

import re
import shlex
from pathlib import Path

import pytest

from fabric.app.cli import app, mount_verbs
from fabric.app.config import NodeConfig
from fabric.app.config_loader import load_config
from fabric.app.up_flags import settings_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
VERBS = sorted(
    set(re.findall(r"^fabric ((?:mesh |sim )?[a-z]+)", README, re.MULTILINE))
)
TARGETS = sorted(set(re.findall(r"`?make ([a-z]+)", README)))


@pytest.fixture(scope="module", autouse=True)
def all_verbs():
    mount_verbs(["--help"])


@pytest.mark.parametrize("verb", VERBS)
def test_verb_exists(verb):
    command = app
    for name in verb.split():
        command = command[name]
    assert command.help


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_exists(target):
    assert re.search(rf"^{target}:.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)


def command_lines(document):
    """The ``fabric`` lines of the fenced blocks, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if FABRIC.match(line)]


FABRIC = re.compile(r"(\.venv/bin/)?fabric ")
TYPED = [
    arguments[1:]
    for document in ("README.md", "CONTRIBUTING.md")
    for arguments in command_lines((ROOT / document).read_text())
]


@pytest.mark.parametrize("arguments", TYPED, ids=" ".join)
def test_command_line_is_understood(arguments):
    command, bound, _ = app.parse_args(
        arguments, exit_on_error=False, print_error=False
    )
    assert callable(command)
    if command.__name__ == "up":
        given = {k: v for k, v in bound.arguments.items() if k != "home"}
        settings = settings_of(given.pop("set", ()), **given)
        load_config(NodeConfig, ROOT / "no-such.toml", {}, settings)


PACKAGES = [
    "fabric",
    "nat",
    "attestation",
    "crdt_store",
    "dht",
    "training",
    "inference",
    "checkpoints",
    "sims",
]
ADVICE = sorted(
    {
        found
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for found in re.findall(
            r"`fabric ((?:mesh |sim |content )?[a-z]+)", path.read_text()
        )
    }
)


@pytest.mark.parametrize("verb", ADVICE)
def test_advice_names_verbs_that_exist(verb):
    command = app
    for name in verb.split():
        command = command[name]


def test_enough_is_found():
    assert len(TYPED) > 15
    assert {"up", "mesh init", "invite", "join", "status", "run"} <= set(VERBS)
    assert {"demo", "test", "bench"} <= set(TARGETS)


def test_files_named_in_the_documents_exist():
    named = set()
    for document in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        named |= set(
            re.findall(r"`([a-z_]+(?:/[a-z_A-Z.-]+)+\.(?:py|md|toml|json))`", text)
        )
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert missing == []
