"""Values as bytes on the wire: fp32, bf16, or blocks of int8 or int4 with one scale.

Layout of a quantised message: the fp32 scales of all blocks, then the codes; int4 has
two codes in a byte, the first in the low half. Blockwise as in ZeRO++
(arXiv:2306.10209). What is not finite stays so: the scale of its block is NaN or inf,
and the whole block decodes to NaN; so divergence is seen where the norm is taken.
"""

from __future__ import annotations

import torch

from training.sharding_bytes import Form, encoded_bytes

QUANTISED = ("int8", "int4")
_LEVELS = {"int8": 127, "int4": 7}
"""Largest magnitude of a code: symmetric, so the lowest code stays unused."""
_TINY = 1e-30
"""A block whose scale is below counts as zero."""


def encode(values: torch.Tensor, form: Form, block: int) -> torch.Tensor:
    """Return fp32 ``values``, (N,), as (bytes,) uint8."""
    if form == "fp32":
        return values.contiguous().view(torch.uint8)
    if form == "bf16":
        return values.to(torch.bfloat16).view(torch.uint8)
    missing = -values.numel() % block
    padded = torch.nn.functional.pad(values, (0, missing)).view(-1, block)
    levels = _LEVELS[form]
    scales = padded.abs().amax(dim=1, keepdim=True).div_(levels)
    scales[scales < _TINY] = 0.0
    codes = (padded / scales.clamp_min(_TINY)).round_().clamp_(-levels, levels)
    codes = codes.view(-1)[: values.numel()]
    packed = codes.to(torch.int8).view(torch.uint8) if form == "int8" else _pack(codes)
    return torch.cat([scales.view(-1).view(torch.uint8), packed])


def decode(data: torch.Tensor, numel: int, form: Form, block: int) -> torch.Tensor:
    """Return the (N,) fp32 values in ``data``; for fp32 perhaps a view of it."""
    assert data.numel() == encoded_bytes(numel, form, block)
    if form == "fp32":
        return _typed(data, torch.float32)
    if form == "bf16":
        return _typed(data, torch.bfloat16).float()
    blocks = -(-numel // block)
    scales = _typed(data[: 4 * blocks], torch.float32)
    packed = data[4 * blocks :]
    codes = packed.view(torch.int8) if form == "int8" else _unpack(packed, numel)
    missing = -numel % block
    padded = torch.nn.functional.pad(codes.float(), (0, missing)).view(-1, block)
    return padded.mul_(scales.view(-1, 1)).view(-1)[:numel]


def _typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    shifted = (codes + 8).to(torch.uint8)
    low, high = shifted[0::2], shifted[1::2]
    packed = low.clone()
    packed[: high.numel()] |= high << 4
    return packed


def _unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    codes = torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:numel]
    return codes.to(torch.int8) - 8
