"""A model's config.json: where it stands in a state, and how it is read."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoints.directories import disk_errors
from checkpoints.manifest import Json
from fabric.core.errors import IntegrityError

MODEL_CONFIG_KEY = "model_config"
MAX_CONFIG_BYTES = 32 << 20
"""Largest config or index read."""


def read_json_untrusted(path: Path) -> dict[str, Json]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: there is no such file.
        IntegrityError: too large, or not a JSON object.
    """
    with disk_errors(path), path.open("rb") as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    try:
        if len(text) > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} B")
        value = json.loads(text.decode())
        if not isinstance(value, dict):
            raise ValueError("not an object")  # noqa: TRY004  (bytes, not our type)
    except (ValueError, RecursionError) as exc:
        raise IntegrityError(
            f"{path}: {str(exc)[:200]}",
            code="E_JSON",
            next_step="the file is damaged: fetch the model again",
        ) from exc
    return value
