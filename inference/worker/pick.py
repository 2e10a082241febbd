"""The last stage's choice of tokens, and when a sequence ends."""

# ruff: noqa: N803 - shape suffixes are capitals (legend in llama.py)

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fabric.core.errors import RemoteProtocolError
from fabric.core.ids import PeerId
from inference.messages import Finish, SessionToken
from inference.worker.llama import LlamaStage
from inference.worker_messages import Opening, Pick, Row

Picked = tuple[PeerId, SessionToken, Pick]


def pick_tokens(
    stage: LlamaStage,
    y_TD: Tensor,
    rows: Sequence[Row],
    openings: Mapping[int, tuple[int, Opening]],
) -> list[Picked]:
    """Return the next token of each row that asks for one, with where it goes.

    Args:
        stage: The last stage.
        y_TD: Its output, the rows' tokens one after another.
        rows: What was computed.
        openings: Slot -> (sequence, opening).

    Raises:
        RemoteProtocolError: a row of a sequence that was never opened.
    """
    ends, wanted = [], []
    at = 0
    for row in rows:
        at += row.length
        if row.sample:
            sequence, opening = openings.get(row.slot, (-1, None))
            if opening is None or sequence != row.sequence:
                raise RemoteProtocolError(f"sequence {row.sequence} was not opened")
            ends.append(at - 1)
            wanted.append((row, opening))
    if not wanted:
        return []
    logits = stage.logits(y_TD[torch.tensor(ends)])
    return [_picked(row, opening, logits[i]) for i, (row, opening) in enumerate(wanted)]


def _picked(row: Row, opening: Opening, logits: Tensor) -> Picked:
    sampling = opening.sampling
    index = row.position + row.length - opening.prompt_tokens
    token = pick_token(
        logits, sampling.temperature, sampling.top_p, sampling.seed, index
    )
    finish: Finish = ""
    if token in sampling.stop_tokens:
        token, finish = -1, "stop"
    elif index + 1 >= sampling.max_tokens:
        finish = "length"
    return (
        opening.reply_to,
        SessionToken(opening.session, index, token, finish),
        Pick(row.sequence, token, finish),
    )


@torch.inference_mode()
def pick_token(
    logits: Tensor, temperature: float, top_p: float, seed: int, index: int
) -> int:
    """Return a token: the most likely one, or one drawn from the nucleus.

    The draw depends on (seed, index) alone, so a replay picks the same.

    Source: Holtzman et al., arXiv:1904.09751 (top-p).
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.sort(
        functional.softmax(logits / temperature, -1), descending=True
    )
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= top_p] = 0  # the first token is never cut
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
