import subprocess
import sys

import pytest

from training.worker.reference import train

pytestmark = pytest.mark.slow


def test_the_reference_trains_on_the_tokens_asked_for_and_says_when_done(spec):
    lines = list(train(spec(), 2000))
    per_step = 2 * 16
    assert lines[0]["tokens"] == 0
    assert [line["done"] for line in lines].count(True) == 1
    assert lines[-1]["done"]
    assert 2000 <= lines[-1]["tokens"] < 2000 + per_step
    assert lines[-1]["validation_loss"] < lines[0]["validation_loss"]


def test_a_worker_imports_neither_trio_nor_libp2p():
    program = """
import sys
from training.worker.__main__ import keep_trio_out
assert "torch" not in sys.modules, "the sandbox must stand before torch"
keep_trio_out()
import training.worker.participant
assert "torch" in sys.modules
sys.exit(bool(sys.modules.get("trio")) or "libp2p" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_the_daemon_side_imports_no_torch():
    program = "import sys, training.service; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
