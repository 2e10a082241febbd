"""Load one typed configuration tree: defaults < TOML file < environment < flags.

The only module that reads ``FABRIC__*`` from the environment. A misspelt key is an
error that names the nearest right one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fabric.core.errors import ConfigError

PREFIX = "FABRIC__"
"""``FABRIC__STORE__SYNC_PERIOD_SECONDS=3`` sets ``store.sync_period_seconds``."""

C = TypeVar("C", bound=msgspec.Struct)
Tree = dict[str, Any]


def load_config(
    kind: type[C],
    file: Path,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
) -> C:
    """Return the configuration, validated once.

    Args:
        kind: The root Struct.
        file: TOML file; need not exist.
        environ: The process environment.
        flags: Dotted keys and values from the command line.

    Raises:
        ConfigError: unknown key, wrong type or value; the message has the path.
    """
    tree = _read(file)
    for name, text in sorted(environ.items()):
        if name.startswith(PREFIX):
            set_at(
                tree, name[len(PREFIX) :].lower().split("__"), parse_value(text), name
            )
    for key, value in flags.items():
        set_at(tree, key.split("."), value, key)
    _check_keys(kind, tree, "")
    try:
        return msgspec.convert(tree, kind, strict=True)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{file}: {exc}", next_step="correct that setting") from exc


def _read(file: Path) -> Tree:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{file} is not TOML: {exc}", next_step="correct that line"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc


def parse_value(text: str) -> object:
    """Return ``text`` as TOML reads a value, else as the string it is."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_assignment(text: str) -> tuple[str, object]:
    """Return (key, value) of ``key=value``; the value as TOML reads it.

    Raises:
        ConfigError: there is no equals sign.
    """
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f"{text!r} is not key=value")
    return key.strip(), parse_value(value)


def set_at(tree: Tree, path: list[str], value: object, origin: str = "") -> None:
    """Put ``value`` at ``path`` in nested tables, making those that are missing.

    Raises:
        ConfigError: part of the path is a value; ``origin`` names who wants it.
    """
    for part in path[:-1]:
        branch = tree.setdefault(part, {})
        if not isinstance(branch, dict):
            raise ConfigError(
                f"{origin or '.'.join(path)}: {part} is a value, not a section"
            )
        tree = branch
    tree[path[-1]] = value


def _check_keys(kind: type[msgspec.Struct], tree: Tree, path: str) -> None:
    """Refuse the first key that ``kind`` lacks, with the nearest name."""
    fields = {f.name: f.type for f in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            known = f"did you mean {path}{near[0]}?" if near else "remove it"
            raise ConfigError(f"unknown setting {path}{key}", next_step=known)
        inner = fields[key]
        if (
            isinstance(value, dict)
            and isinstance(inner, type)
            and issubclass(inner, msgspec.Struct)
        ):
            _check_keys(inner, value, f"{path}{key}.")
