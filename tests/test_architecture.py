"""The rules of ARCHITECTURE.md that import-linter cannot say, executable."""

import ast
import subprocess
import sys
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


def imports(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def place(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=place)
class TestFile:
    def test_trio_only_in_shells(self, path):
        if "trio" in imports(path):
            where = place(path)
            assert where.startswith(("fabric/net/", "fabric/app/")) or (
                path.name == "service.py" or path.name.endswith("_service.py")
            )

    def test_torch_only_in_its_rooms(self, path):
        if imports(path) & {"torch", "transformers", "safetensors", "numpy"}:
            assert place(path).startswith(TORCH_ROOMS)

    def test_libp2p_only_in_its_adapters(self, path):
        if "libp2p" in imports(path):
            assert place(path).startswith("fabric/net/libp2p_")

    def test_no_pickle(self, path):
        assert not imports(path) & {"pickle", "marshal", "shelve", "dill"}

    def test_size(self, path):
        assert len(path.read_text().splitlines()) <= 400

    def test_docstring(self, path):
        assert ast.get_docstring(ast.parse(path.read_text()))

    def test_package_files_import_nothing_of_ours(self, path):
        if path.name == "__init__.py":
            assert imports(path) <= {"importlib"}


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
