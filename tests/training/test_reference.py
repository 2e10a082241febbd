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


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("training.worker.__main__, training.worker.participant", "trio"),
        ("training.worker.__main__, training.worker.participant", "libp2p"),
        ("training.service", "torch"),
    ],
)
def test_no_process_holds_both_trio_and_torch(modules, absent):
    program = f"import sys, {modules}; sys.exit({absent!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
