"""The tensors of one run: inner steps, our contribution, the outer step, the state."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fabric.core.digest import BLOCK_BYTES, hex_digest
from fabric.core.errors import IntegrityError
from fabric.jobs.messages import Setting
from fabric.jobs.spec import JobSpec
from fabric.jobs.steering import steer
from training.data import Corpus, order_key, unigram_entropy, windows
from training.worker.corpus import load_corpus
from training.worker.engine import NativeEngine
from training.worker.engines.interface import Engine
from training.worker.outer import (
    Encoded,
    OuterState,
    encode_delta,
    initial_state,
    outer_step,
    state_blocks,
    state_digest,
    state_from_bytes,
    weighted_mean,
)
from training.worker.quantise import check_payload, payload_bytes
from training.worker.resume import resumed_state
from training.worker.rounds import Payload, Piece, StepReady

VALIDATION_WINDOWS = 32
"""Held-out sequences per evaluation: always the same, so that losses compare."""
KEPT_STATES = 2
"""States served to others: a newcomer may still fetch the one before the newest."""


@dataclass(frozen=True)
class ServedState:
    """A state as others fetch it: its bytes and the digests of its blocks."""

    data: memoryview
    blocks: tuple[bytes, ...]

    @property
    def listing(self) -> bytes:
        """The digests of all blocks, joined."""
        return b"".join(self.blocks)

    def block(self, index: int) -> memoryview:
        """Return block ``index``; empty when there is no such block."""
        return self.data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]


def validation_windows(corpus: Corpus, window_bytes: int) -> list[bytes]:
    """Return the held-out windows every loss is measured on."""
    return windows(corpus.validation, "validation", VALIDATION_WINDOWS, window_bytes)


class Trainer:
    """One model in one run, on one peer's share of the data.

    Args:
        spec: The job's.
        peer: Names this peer's share of the data order.
        resume: Directory of the checkpoint to go on from, if the spec names one.
        engine: Of a site; None = one process.
    """

    def __init__(
        self,
        spec: JobSpec,
        peer: str,
        resume: Path | None = None,
        engine: Engine | None = None,
    ) -> None:
        self._given = self._spec = spec
        self._outer = spec.train.outer
        self._peer = peer
        self.engine: Engine = engine or NativeEngine(spec.model, spec.train)
        self._corpus = load_corpus(spec.data)
        self._window_bytes = spec.model.context_tokens + 1
        self._validation = validation_windows(self._corpus, self._window_bytes)
        shapes = self.engine.shapes.values()
        self._numel = numel = sum(math.prod(shape) for shape in shapes)
        self._fresh = (
            initial_state(self.engine.flat)
            if resume is None
            else resumed_state(resume, spec.resume_round, self.engine)
        )
        self.state: OuterState | None = None
        self._states: dict[str, OuterState] = {}
        self._served: dict[str, ServedState] = {}
        self._residual = torch.zeros(numel)
        self._encoded: Encoded | None = None
        self._losses: list[float] = []
        self._seconds = 0.0
        self.contribution_bytes = payload_bytes(
            numel, self._outer.block, self._outer.quantise
        )
        self.state_bytes = 2 * 4 * numel

    @property
    def unigram_entropy(self) -> float:
        """Entropy of the held-out bytes, nats per byte."""
        return unigram_entropy(self._corpus.validation)

    @property
    def round_tokens(self) -> int:
        """Tokens of the inner steps done in this round."""
        per_step = self._spec.train.batch_size * self._spec.model.context_tokens
        return per_step * len(self._losses)

    @property
    def tokens_per_second(self) -> float:
        """Speed of this round's inner steps, waiting left out."""
        return self.round_tokens / self._seconds if self._seconds else 0.0

    @property
    def first_round(self) -> int:
        """The round that the initial state starts."""
        return self._fresh.round

    def initial_digest(self) -> str:
        """Return the digest of the initial state, for people."""
        return state_digest(state_blocks(self._fresh.to_bytes()))

    def hold_initial(self) -> str:
        """Start from the initial state; return its name, which is empty."""
        self._hold(self._fresh)
        return ""

    def hold_received(self, round_number: int, data: bytearray) -> str:
        """Start from a state that was fetched; return its name."""
        return self._hold(state_from_bytes(round_number, data))

    def keep(self, round_number: int, name: str, data: bytearray) -> None:
        """Keep a state without starting from it.

        Raises:
            IntegrityError: ``data`` is not the state that ``name`` stands for.
        """
        blocks = state_blocks(memoryview(data))
        if len(data) != self.state_bytes or state_digest(blocks) != name:
            raise IntegrityError(f"state {name[:12]} is not what was kept under it")
        state = state_from_bytes(round_number, data)
        self._keep(name, state, ServedState(memoryview(data), blocks))

    def state_of(self, round_number: int) -> OuterState | None:
        """Return the start state of a round, if it is still kept."""
        known = [self.state, self._fresh, *self._states.values()]
        return next((s for s in known if s and s.round == round_number), None)

    def hold_kept(self, name: str) -> bool:
        """Go back to a state that is still kept; return whether there is one."""
        kept = self._states.get(name)
        if kept is not None:
            self._hold(kept)
        return kept is not None

    def inner_step(self) -> bool:
        """Take one inner step; return whether it was the round's last."""
        assert self.state is not None
        started = time.perf_counter()
        step = len(self._losses)
        train, outer = self._spec.train, self._outer
        key = order_key(train.seed, self.state.round, self._peer, step)
        batch = windows(self._corpus.train, key, train.batch_size, self._window_bytes)
        done = self.state.round * outer.inner_steps + step
        progress = done / (outer.rounds * outer.inner_steps)
        self._losses.append(self.engine.step(batch, progress))
        self._seconds += time.perf_counter() - started
        return len(self._losses) == outer.inner_steps

    def contribution(self) -> tuple[Piece, float]:
        """Return our pseudo-gradient and the mean loss of the inner steps.

        Raises:
            LocalProtocolError: the inner steps diverged.
        """
        assert self.state is not None
        self._encoded = encode_delta(
            self.state.theta, self.engine.flat, self._residual, self._outer
        )
        loss = sum(self._losses) / len(self._losses)
        payload = self._encoded.payload
        return Piece(self.round_tokens, payload, hex_digest(payload)), loss

    def check(self, payload: Payload) -> None:
        """Accept another's contribution before it is kept.

        Raises:
            IntegrityError: averaging it would spoil the parameters.
        """
        check_payload(payload, self._numel, self._outer.block, self._outer.quantise)

    def outer_step(self, ready: StepReady) -> str:
        """Take the decided outer step and hold its result; return the state's name.

        When our contribution was left out, what its encoding dropped is forgotten and
        the residual of the round before stays: it belongs to what others did apply.
        """
        assert self.state is not None
        self.steer(ready.settings)
        if self._peer in ready.contributors and self._encoded is not None:
            self._residual = self._encoded.residual
        mean = weighted_mean(ready.payloads, ready.tokens, self._numel, self._outer)
        return self._hold(outer_step(self.state, mean, self._outer))

    def steer(self, settings: tuple[Setting, ...]) -> None:
        """Train with ``settings`` in place of the spec's from now on."""
        spec = steer(self._given, settings)
        if spec != self._spec:
            self._spec, self._outer = spec, spec.train.outer
            self.engine.steer(spec.train)

    def evaluate(self) -> float:
        """Return the held state's loss on the held-out windows, nats per byte."""
        assert self.state is not None
        local = self.engine.flat.clone()
        self.engine.load(self.state.theta)
        loss = self.engine.evaluate(self._validation)
        self.engine.load(local)
        return loss

    def parameter_digest(self) -> str:
        """Return the BLAKE3 of the held parameters, in the order of their names."""
        assert self.state is not None
        return hex_digest(self.state.theta.numpy().tobytes())

    def served(self, name: str) -> ServedState | None:
        """Return the state called ``name`` if it is kept."""
        return self._served.get(name)

    def _hold(self, state: OuterState) -> str:
        self.state = state
        self.engine.load(state.theta)
        self._losses, self._seconds, self._encoded = [], 0.0, None
        if state is self._fresh:
            return ""
        data = state.to_bytes()
        blocks = state_blocks(data)
        name = state_digest(blocks)
        self._keep(name, state, ServedState(data, blocks))
        return name

    def _keep(self, name: str, state: OuterState, served: ServedState) -> None:
        self._states[name] = state
        self._served[name] = served
        while len(self._states) > KEPT_STATES:
            oldest = min(self._states, key=lambda kept: self._states[kept].round)
            del self._states[oldest], self._served[oldest]
