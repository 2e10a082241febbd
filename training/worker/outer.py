"""The outer step of DiLoCo: one averaged pseudo-gradient, one Nesterov step.

Every participant gets every contribution *whole* (an all-gather of int8, not a
reduce-scatter). That costs (P - 1) payloads of traffic per peer instead of about two,
and buys two things: the mean over the decided contributors is computed from the same
bytes in the same order everywhere, so it is equal bit for bit, and a peer that vanishes
at any moment costs nothing but its own contribution: no half-reduced sum has to be
taken back. Participants are sites, so P is small.

Source: Douillard et al. 2023, "DiLoCo", arXiv:2311.08105, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fabric.core.digest import block_digests, digest
from fabric.jobs.spec import OuterSpec
from training.worker.quantise import dequantise, quantise


@dataclass(frozen=True)
class OuterState:
    """The start state of a round, equal on every participant; never changed in place.

    Attributes:
        round: The round it starts.
        theta: (N,) float32 parameters.
        momentum: (N,) float32 outer momentum.
    """

    round: int
    theta: torch.Tensor
    momentum: torch.Tensor

    def to_bytes(self) -> memoryview:
        """Return theta then momentum, little endian, as they are hashed and sent."""
        joined = torch.cat([self.theta, self.momentum]).numpy()
        return memoryview(joined.view("u1"))  # type: ignore[arg-type]  # has a buffer


def initial_state(theta: torch.Tensor) -> OuterState:
    """Return round 0's state: ``theta`` and no momentum."""
    return OuterState(0, theta.clone(), torch.zeros_like(theta))


def state_from_bytes(round_number: int, data: bytearray) -> OuterState:
    """Return the state whose :meth:`OuterState.to_bytes` is ``data``."""
    theta, momentum = torch.frombuffer(data, dtype=torch.float32).chunk(2)
    return OuterState(round_number, theta.clone(), momentum.clone())


def state_digest(blocks: Sequence[bytes]) -> str:
    """Return the hex digest that names a state: BLAKE3 of its blocks' BLAKE3s.

    So the list of block digests is checked against the name, and each 1 MiB block
    against the list, whoever sent them.
    """
    return digest(b"".join(blocks)).hex()


def state_blocks(data: memoryview) -> tuple[bytes, ...]:
    """Return the digests of the 1 MiB blocks of a state's bytes."""
    return tuple(block_digests(data))


@dataclass(frozen=True)
class Encoded:
    """A pseudo-gradient ready to send, and the error its encoding left behind."""

    payload: bytearray
    residual: torch.Tensor


def encode_delta(
    start: torch.Tensor, local: torch.Tensor, residual: torch.Tensor, spec: OuterSpec
) -> Encoded:
    """Return theta_r - theta_local plus the old residual, encoded.

    Error feedback: what quantisation dropped is added to the next round's
    pseudo-gradient (Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847).
    """
    delta = start - local + residual
    payload = quantise(delta, spec.block, spec.quantise)
    sent = dequantise(payload, delta.numel(), spec.block, spec.quantise)
    return Encoded(payload, delta - sent)


def weighted_mean(
    payloads: Sequence[bytearray],
    weights: Sequence[int],
    numel: int,
    spec: OuterSpec,
) -> torch.Tensor:
    """Return the mean of the decoded payloads, weighted by tokens.

    Args:
        payloads: Contributions in PeerId order.
        weights: Tokens each contributor trained on; > 0.
        numel: N.
        spec: Encoding.

    Returns:
        (N,) float32. Multiplication and addition are separate operations: a fused
        multiply-add rounds once and would differ between CPUs with and without it.

    Raises:
        ValueError: no contributor, or no tokens.
        IntegrityError: a payload is malformed.
    """
    total = sum(weights)
    if not payloads or len(payloads) != len(weights) or total <= 0:
        raise ValueError(f"{len(payloads)} payloads of {total} tokens")
    mean = torch.zeros(numel)
    for payload, tokens in zip(payloads, weights, strict=True):
        part = dequantise(payload, numel, spec.block, spec.quantise)
        mean.add_(part.mul(tokens / total))
    return mean


def outer_step(state: OuterState, mean: torch.Tensor, spec: OuterSpec) -> OuterState:
    """Return the next round's start state: SGD with Nesterov momentum on ``mean``."""
    momentum = state.momentum.mul(spec.momentum).add_(mean)
    update = momentum.mul(spec.momentum).add_(mean)
    theta = state.theta.sub(update.mul_(spec.learning_rate))
    return OuterState(state.round + 1, theta, momentum)
