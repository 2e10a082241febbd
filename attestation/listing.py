"""Read what is installed, for ``software.measure``. Blocking: call it in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from attestation.software import MeasuredFile, measure
from fabric.core.digest import digest

PRODUCT_PACKAGES = (
    "attestation",
    "checkpoints",
    "crdt_store",
    "dht",
    "fabric",
    "inference",
    "nat",
    "sims",
    "training",
)
"""Import packages of the distribution."""

MAIN_DEPENDENCIES = (
    "blake3",
    "cryptography",
    "libp2p",
    "msgspec",
    "peerfabric",
    "pycrdt",
    "torch",
    "trio",
)
"""Distributions whose version is measured; a missing one counts as "absent"."""


def read_files(root: Path) -> list[MeasuredFile]:
    """Return every .py file below ``root``, by path relative to ``root``'s parent."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if path.is_file():
            data = path.read_bytes()
            name = path.relative_to(root.parent).as_posix()
            found.append(MeasuredFile(name, len(data), digest(data)))
    return found


def package_roots(packages: Iterable[str]) -> list[Path]:
    """Return the directories of the ``packages`` that are installed."""
    roots = []
    for name in packages:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            roots.append(Path(next(iter(spec.submodule_search_locations))))
    return roots


def dependency_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each distribution, or "absent"."""
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def measure_installed(packages: Sequence[str] = PRODUCT_PACKAGES) -> bytes:
    """Return the measurement of what runs here."""
    files = [f for root in package_roots(packages) for f in read_files(root)]
    return measure(files, dependency_versions(MAIN_DEPENDENCIES))
