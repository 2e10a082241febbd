"""The order of exchanges depends on the order of entering alone."""

import pytest
import torch

from training.sharding_bytes import encoded_bytes
from training.worker.engines.native.codec import decode, encode
from training.worker.engines.native.pipeline import Pipeline


def stages(said, name, count):
    for number in range(count):
        said.append(f"{name}{number}")
        yield
    said.append(f"{name}.")


def test_each_flow_moves_one_stage_when_another_enters():
    pipeline, said = Pipeline(), []
    pipeline.push(0, stages(said, "a", 2))
    assert said == ["a0"]
    pipeline.push(1, stages(said, "b", 2))
    assert said == ["a0", "a1", "b0"]
    pipeline.push(2, stages(said, "c", 0))
    assert said == ["a0", "a1", "b0", "a.", "b1", "c."]
    pipeline.drain()
    assert said[-1] == "b."


def test_finish_ends_one_unit_and_keeps_the_order():
    pipeline, said = Pipeline(), []
    for key, name in enumerate("abc"):
        pipeline.push(key, stages(said, name, 3))
    pipeline.finish(1)
    assert "b." in said
    assert "c." not in said
    assert said.index("a.") < said.index("b.")
    pipeline.finish(7)
    pipeline.drop()
    pipeline.drain()
    assert "c." not in said


@pytest.mark.parametrize("form", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 1001])
def test_a_message_has_the_planned_size_and_a_bounded_error(form, count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count))
    data = encode(values, form, 64)
    assert data.numel() == encoded_bytes(count, form, 64)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]  # not aligned
    seen = decode(shifted, count, form, 64)
    assert seen.shape == values.shape
    share = {"fp32": 0.0, "bf16": 2**-8, "int8": 1 / 254, "int4": 1 / 14}[form]
    bound = share * float(values.abs().max()) * 1.01 if count else 0.0
    assert not count or float((seen - values).abs().max()) <= bound
    again = encode(seen, form, 64)
    if form in ("fp32", "bf16"):
        assert torch.equal(again, data)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(form, bad):
    values = torch.ones(300)
    values[100] = bad
    values[200:264] = 1e-38
    seen = decode(encode(values, form, 64), 300, form, 64)
    assert not bool(torch.isfinite(seen[64:128]).any())
    assert bool(torch.isfinite(seen[128:]).all())
    assert not bool(seen[200:256].any())
