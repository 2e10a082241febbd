"""A tiny random Llama over bytes, and what transformers generates with it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = ["The quick brown fox", "A", "import trio\n" * 5, "zzz"]
NEW_TOKENS = 16


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a saved model with ``reference.json``: prompt -> tokens.

    Made in another process: importing trio's tests and transformers into one is slow,
    and no process of ours holds both.
    """
    directory = tmp_path_factory.mktemp("model")
    script = Path(__file__).parent / "make_model.py"
    subprocess.run(
        [sys.executable, script, directory, json.dumps(PROMPTS), str(NEW_TOKENS)],
        check=True,
        timeout=120,
    )
    return directory
