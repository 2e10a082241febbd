import struct

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.errors import IntegrityError, LocalProtocolError
from training.worker.quantise import check_payload, dequantise, payload_bytes, quantise

vectors = hnp.arrays(
    np.float32, st.integers(1, 700), elements=st.floats(-1e6, 1e6, width=32)
)
blocks = st.sampled_from([1, 7, 64, 256])


@settings(max_examples=40)
@given(vectors, blocks)
def test_int8_error_is_at_most_half_a_step_of_its_block(values, block):
    tensor = torch.from_numpy(values)
    payload = quantise(tensor, block, "int8")
    assert (
        len(payload)
        == payload_bytes(len(values), block)
        == len(values) + 4 * ((len(values) + block - 1) // block)
    )
    decoded = dequantise(payload, len(values), block, "int8").numpy()
    for at in range(0, len(values), block):
        part = values[at : at + block].astype(np.float64)
        bound = np.abs(part).max() / 254 * (1 + 1e-5) + 127 * 1e-30
        assert np.abs(decoded[at : at + block] - part).max() <= bound


@settings(max_examples=40)
@given(vectors, blocks)
def test_quantising_again_changes_nothing(values, block):
    once = dequantise(
        quantise(torch.from_numpy(values), block, "int8"), len(values), block, "int8"
    )
    twice = dequantise(quantise(once, block, "int8"), len(values), block, "int8")
    assert torch.allclose(once, twice, rtol=1e-6, atol=1e-30)


@settings(max_examples=40)
@given(vectors)
def test_without_quantisation_every_bit_survives(values):
    payload = quantise(torch.from_numpy(values), 256, "none")
    assert len(payload) == payload_bytes(len(values), 256, "none")
    assert dequantise(payload, len(values), 256, "none").numpy().tobytes() == (
        values.tobytes()
    )


@settings(max_examples=40)
@given(st.binary(max_size=80))
def test_any_bytes_are_accepted_whole_or_refused(data):
    payload = bytearray(data)
    try:
        check_payload(payload, 50, 16, "int8")
    except IntegrityError:
        with pytest.raises(IntegrityError):
            dequantise(payload, 50, 16, "int8")
    else:
        assert torch.isfinite(dequantise(payload, 50, 16, "int8")).all()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_a_poisoned_scale_is_refused(scale):
    payload = bytearray(struct.pack("<f", scale) + bytes(10))
    with pytest.raises(IntegrityError):
        check_payload(payload, 10, 16, "int8")


@pytest.mark.parametrize("form", ["int8", "none"])
def test_a_diverged_pseudo_gradient_is_never_sent(form):
    with pytest.raises(LocalProtocolError, match="not finite"):
        quantise(torch.tensor([1.0, float("nan")]), 256, form)
