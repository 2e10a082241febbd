"""DDP, FSDP2 and DeepSpeed programs over the backend: gloo's losses."""

import pytest

pytestmark = pytest.mark.slow


def check(found, names):
    reference = found[0]["ddp gloo"]
    for rank, result in found.items():
        for name in names:
            assert result[name] == pytest.approx(reference, abs=1e-5), (rank, name)
    assert reference[-1] < reference[0]


def test_ddp_and_fsdp2_on_one_and_two_dimensions(ranks):
    found = ranks.run("training_program.py", 4)
    check(found, ["ddp fabric", "fsdp2 gloo", "fsdp2 fabric", "hsdp fabric"])


def test_deepspeed_zero_3(ranks):
    found = ranks.run("training_program.py", 2, "zero3", seconds=300)
    check(found, ["zero3 fabric"])
