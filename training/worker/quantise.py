"""Pseudo-gradients as bytes: int8 in blocks with one fp32 scale each, or plain fp32.

Layout of an int8 payload: all scales (fp32, little endian), then all values (int8). Its
size is a closed form of the parameter count, so a receiver knows it before a byte
arrives. Only single IEEE multiplications and divisions are used: no fused kernels, so
the dequantised values are equal bit for bit on every CPU.
"""

from __future__ import annotations

from typing import Literal

import torch

from fabric.core.errors import IntegrityError, LocalProtocolError

Format = Literal["int8", "none"]

LEVELS = 127
"""Largest quantised magnitude; -128 stays unused, so the code is symmetric."""
_SMALLEST_SCALE = 1e-30
"""Below it a block counts as zero: 1 / scale would leave fp32."""


def payload_bytes(numel: int, block: int, form: Format = "int8") -> int:
    """Return the encoded size of ``numel`` values: N + 4 ceil(N / block), or 4 N."""
    return numel + 4 * -(-numel // block) if form == "int8" else 4 * numel


def quantise(values: torch.Tensor, block: int, form: Format) -> bytearray:
    """Return ``values``, (N,) float32, encoded; |error| <= its block's max / 254.

    A block whose max is below 127 * 1e-30 is encoded as zeros.

    Raises:
        LocalProtocolError: a value is not finite: the inner steps diverged.
    """
    if not bool(torch.isfinite(values).all()):
        raise LocalProtocolError("pseudo-gradient is not finite", code="E_DIVERGED")
    if form == "none":
        return bytearray(values.numpy().tobytes())
    rows = _rows(values, block)
    scales = rows.abs().amax(dim=1, keepdim=True) / LEVELS
    scales[scales < _SMALLEST_SCALE] = 0.0
    steps = torch.round(rows / scales.clamp_min(_SMALLEST_SCALE))
    codes = steps.clamp_(-LEVELS, LEVELS).to(torch.int8).view(-1)[: values.numel()]
    return bytearray(scales.numpy().tobytes() + codes.numpy().tobytes())


def check_payload(payload: bytearray, numel: int, block: int, form: Format) -> None:
    """Accept what :func:`dequantise` can take without spoiling a mean.

    Raises:
        IntegrityError: the size is not :func:`payload_bytes`, or a scale or value is
            negative or not finite.
    """
    if len(payload) != payload_bytes(numel, block, form):
        raise IntegrityError(f"pseudo-gradient of {len(payload)} B for {numel} values")
    head = _floats(payload, numel, block, form)
    fine = torch.isfinite(head)
    if form == "int8":
        fine &= head >= 0
    if not bool(fine.all()):
        raise IntegrityError("pseudo-gradient holds numbers that are not finite")


def dequantise(
    payload: bytearray, numel: int, block: int, form: Format
) -> torch.Tensor:
    """Return the (N,) float32 values in ``payload``.

    Raises:
        IntegrityError: see :func:`check_payload`.
    """
    check_payload(payload, numel, block, form)
    head = _floats(payload, numel, block, form)
    if form == "none":
        return head.clone()
    codes = torch.frombuffer(payload, dtype=torch.int8, offset=4 * len(head))
    return (_rows(codes.to(torch.float32), block) * head.view(-1, 1)).view(-1)[:numel]


def _floats(payload: bytearray, numel: int, block: int, form: Format) -> torch.Tensor:
    """Return the fp32 part as a view: the scales, or all values. Never written to."""
    count = -(-numel // block) if form == "int8" else numel
    return torch.frombuffer(payload, dtype=torch.float32, count=count)


def _rows(values: torch.Tensor, block: int) -> torch.Tensor:
    missing = -values.numel() % block
    return torch.nn.functional.pad(values, (0, missing)).view(-1, block)
