"""The rules of ARCHITECTURE.md that import-linter cannot say, executable."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "fabric",
    "nat",
    "dht",
    "crdt_store",
    "training",
    "inference",
    "attestation",
    "checkpoints",
    "sims",
)
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TORCH_ROOMS = ("training/worker/", "inference/worker/", "checkpoints/torch_io/")


@cache
def tree(path):
    return ast.parse(path.read_text())


@cache
def imports(path):
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def place(path):
    return path.relative_to(ROOT).as_posix()


def may_hold_trio(path):
    return place(path).startswith(("fabric/net/", "fabric/app/")) or (
        path.name == "service.py" or path.name.endswith("_service.py")
    )


TORCH = {"torch", "transformers", "safetensors", "numpy"}
PICKLES = {"pickle", "marshal", "shelve", "dill"}
RULES = {
    "trio only in shells": lambda path: (
        "trio" not in imports(path) or may_hold_trio(path)
    ),
    "torch only in its rooms": lambda path: (
        not imports(path) & TORCH or place(path).startswith(TORCH_ROOMS)
    ),
    "libp2p only in its adapters": lambda path: (
        "libp2p" not in imports(path) or place(path).startswith("fabric/net/libp2p_")
    ),
    "no pickle": lambda path: not imports(path) & PICKLES,
    "at most 400 lines": lambda path: len(path.read_text().splitlines()) <= 400,
    "a docstring": lambda path: bool(ast.get_docstring(tree(path))),
    "package files import nothing of ours": lambda path: (
        path.name != "__init__.py" or imports(path) <= {"importlib"}
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_file_keeps_the_rule(rule):
    """One test for all files: a test of each file and rule took half a minute."""
    assert len(FILES) > 500
    assert [place(path) for path in FILES if not RULES[rule](path)] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("fabric.app.daemon", {"torch", "transformers", "numpy"}),
        ("fabric.app.cli", {"torch", "transformers", "trio", "libp2p"}),
        ("checkpoints.cli", {"torch", "transformers", "trio", "libp2p"}),
        ("training.worker.__main__", {"trio", "libp2p"}),
        ("inference.worker.__main__", {"trio", "libp2p"}),
    ],
)
def test_process_loads_no_forbidden_library(module, forbidden):
    code = f"import sys, {module}; print(*sorted({forbidden!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == []
