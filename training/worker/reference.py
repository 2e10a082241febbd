"""Train one process on the same number of tokens: what a run is compared with.

``python -m training.worker.reference --spec JSON --tokens N`` prints JSON lines; the
last one has ``"done": true``. Same model, initial weights, optimiser, schedule, text
and held-out windows as a worker's; no outer loop.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import torch

from fabric.core.errors import ConfigError
from fabric.jobs.spec import JobSpec
from training.data import order_key, unigram_entropy, windows
from training.worker.corpus import load_corpus
from training.worker.engine import NativeEngine
from training.worker.trainer import validation_windows

LINES = 10
"""Validation losses printed on the way."""


def train(spec: JobSpec, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield progress facts of a run of at least ``tokens`` tokens."""
    engine = NativeEngine(spec.model, spec.train)
    corpus = load_corpus(spec.data)
    train_spec, window_bytes = spec.train, spec.model.context_tokens + 1
    held_out = validation_windows(corpus, window_bytes)
    per_step = train_spec.batch_size * spec.model.context_tokens
    steps = max(1, -(-tokens // per_step))
    every = max(1, steps // LINES)
    yield _facts(0, 0, engine.evaluate(held_out), 0.0) | {
        "unigram_entropy": unigram_entropy(corpus.validation)
    }
    seconds = 0.0
    for step in range(steps):
        started = time.perf_counter()
        key = order_key(train_spec.seed, 0, "reference", step)
        batch = windows(corpus.train, key, train_spec.batch_size, window_bytes)
        engine.step(batch, step / steps)
        seconds += time.perf_counter() - started
        if (step + 1) % every == 0 or step + 1 == steps:
            facts = _facts(
                step + 1, (step + 1) * per_step, engine.evaluate(held_out), seconds
            )
            yield facts | {"done": step + 1 == steps}


def _facts(step: int, tokens: int, loss: float, seconds: float) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": tokens,
        "validation_loss": loss,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "done": False,
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True, help="the job spec as JSON")
    parser.add_argument("--tokens", required=True, type=int, help="tokens to train on")
    parser.add_argument("--threads", default=1, type=int, help="torch threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        spec = msgspec.json.decode(arguments.spec, type=JobSpec)
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"--spec: {exc}") from exc
    for facts in train(spec, arguments.tokens):
        sys.stdout.write(json.dumps(facts) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
