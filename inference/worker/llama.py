"""A range of Llama layers with a KV slab: the lean forward of one stage, in fp32.

Each row of a step is consecutive tokens of one sequence. Linear layers see all tokens
at once; attention treats rows of one token together, padded to the longest context,
and longer rows one by one. Greedy tokens equal ``transformers.generate``.

Legend: T tokens of the step, B rows, S slots, C context tokens, D hidden size,
H query heads, K key-value heads, E head size.
"""

# ruff: noqa: N803, N806 - shape suffixes are capitals (legend in llama.py)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from inference.worker.weights import LlamaShape, Weights
from inference.worker_messages import Row


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; q, k, v and gate, up are fused by rows."""

    attention_norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


class LlamaStage:
    """Layers ``layers`` of a model; the first also embeds, the last also picks.

    Args:
        weights: Where tensors are read from; only this stage's are.
        layers: Contiguous layers.
        slots: Sequences held at once.
    """

    def __init__(self, weights: Weights, layers: range, slots: int) -> None:
        shape = self.shape = weights.shape
        self.layers = [_load_layer(weights, index) for index in layers]
        self.first = layers.start == 0
        self.last = layers.stop == shape.num_layers
        embedding = "model.embed_tokens.weight"
        self._embedding = weights.tensor(embedding) if self.first else None
        self._norm = weights.tensor("model.norm.weight") if self.last else None
        head = embedding if shape.tied else "lm_head.weight"
        self._head = weights.tensor(head) if self.last else None
        angles = _rope_angles(shape)
        self._cos, self._sin = angles.cos(), angles.sin()
        size = (len(layers), slots, shape.num_kv_heads, shape.context, shape.head_size)
        self._keys, self._values = torch.zeros(size), torch.zeros(size)

    @property
    def parameters(self) -> int:
        """Number of weights in memory."""
        tensors = [t for layer in self.layers for t in vars(layer).values()]
        tensors += [self._embedding, self._norm, self._head]
        return sum(t.numel() for t in tensors if t is not None)

    @torch.inference_mode()
    def embed(self, tokens: Sequence[int]) -> Tensor:
        """Return (T, D) input rows of ``tokens``; first stage only."""
        assert self._embedding is not None
        return self._embedding[torch.tensor(tokens)]

    @torch.inference_mode()
    def forward(self, x_TD: Tensor, rows: Sequence[Row]) -> Tensor:
        """Return the (T, D) output of the last layer held, and remember K and V.

        Args:
            x_TD: Hidden states, the rows' tokens one after another.
            rows: At most one per slot.
        """
        positions = torch.cat(
            [torch.arange(r.position, r.position + r.length) for r in rows]
        )
        step = _Step(rows, positions, self._cos[positions], self._sin[positions])
        for index, layer in enumerate(self.layers):
            h = self._rms(x_TD, layer.attention_norm)
            attended = self._attend(index, functional.linear(h, layer.qkv), step)
            x_TD = x_TD + functional.linear(attended, layer.output)
            h = self._rms(x_TD, layer.mlp_norm)
            gate, up = functional.linear(h, layer.gate_up).chunk(2, -1)
            x_TD = x_TD + functional.linear(functional.silu(gate) * up, layer.down)
        return x_TD

    @torch.inference_mode()
    def logits(self, x_BD: Tensor) -> Tensor:
        """Return (B, vocabulary) logits of final hidden states; last stage only."""
        assert self._norm is not None
        assert self._head is not None
        return functional.linear(self._rms(x_BD, self._norm), self._head)

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.shape.norm_epsilon)

    def _attend(self, index: int, qkv: Tensor, step: _Step) -> Tensor:
        s = self.shape
        tokens = qkv.shape[0]
        q, k, v = qkv.split(
            [n * s.head_size for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads)], -1
        )
        q_THE = step.rotate(q.view(tokens, s.num_heads, s.head_size))
        k_TKE = step.rotate(k.view(tokens, s.num_kv_heads, s.head_size))
        keys, values = self._keys[index], self._values[index]
        slots = step.slots_T
        keys[slots, :, step.positions] = k_TKE
        values[slots, :, step.positions] = v.view(tokens, s.num_kv_heads, s.head_size)
        out = torch.empty_like(q_THE)
        if step.single:
            out[step.single_T] = _attend_single(
                q_THE[step.single_T], keys, values, step
            )
        for row, at in step.long:
            out[at] = _attend_long(q_THE[at], keys[row.slot], values[row.slot], row)
        return out.reshape(tokens, -1)


class _Step:
    """What every layer of a step needs about its rows."""

    def __init__(
        self, rows: Sequence[Row], positions: Tensor, cos: Tensor, sin: Tensor
    ) -> None:
        self.positions = positions
        self._cos, self._sin = cos.unsqueeze(1), sin.unsqueeze(1)
        self.single: list[Row] = []
        self.long: list[tuple[Row, slice]] = []
        at, single_at = 0, []
        for row in rows:
            if row.length == 1:
                self.single.append(row)
                single_at.append(at)
            else:
                self.long.append((row, slice(at, at + row.length)))
            at += row.length
        self.slots_T = torch.tensor([r.slot for r in rows for _ in range(r.length)])
        self.single_T = torch.tensor(single_at, dtype=torch.long)
        self.slots_B = torch.tensor([r.slot for r in self.single], dtype=torch.long)
        totals = torch.tensor([r.position + 1 for r in self.single], dtype=torch.long)
        self.longest = int(totals.max()) if self.single else 0
        ragged = bool(self.single) and int(totals.min()) != self.longest
        self.mask: Tensor | None = None
        if ragged:
            seen = torch.arange(self.longest)[None, :] < totals[:, None]
            self.mask = seen[:, None, None, :]

    def rotate(self, x: Tensor) -> Tensor:
        """Apply rotary embeddings (RoFormer, arXiv:2104.09864), halves convention."""
        left, right = x.chunk(2, -1)
        return x * self._cos + torch.cat((-right, left), -1) * self._sin


def _attend_single(q_BHE: Tensor, keys: Tensor, values: Tensor, step: _Step) -> Tensor:
    return functional.scaled_dot_product_attention(
        q_BHE.unsqueeze(2),
        keys[step.slots_B, :, : step.longest],
        values[step.slots_B, :, : step.longest],
        attn_mask=step.mask,
        enable_gqa=True,
    ).squeeze(2)


def _attend_long(q_THE: Tensor, keys: Tensor, values: Tensor, row: Row) -> Tensor:
    total = row.position + row.length
    mask = None
    if row.position:
        mask = torch.ones(row.length, total, dtype=torch.bool).tril(row.position)
    return functional.scaled_dot_product_attention(
        q_THE.transpose(0, 1)[None],
        keys[None, :, :total],
        values[None, :, :total],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )[0].transpose(0, 1)


def _rope_angles(shape: LlamaShape) -> Tensor:
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.int64).float()
    inverse = 1.0 / (shape.rope_theta ** (exponents / shape.head_size))
    angles = torch.arange(shape.context).float()[:, None] * inverse[None]
    return torch.cat((angles, angles), -1)


def _load_layer(weights: Weights, index: int) -> Layer:
    def get(*names: str) -> Tensor:
        tensors = [weights.tensor(f"model.layers.{index}.{n}.weight") for n in names]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return Layer(
        attention_norm=get("input_layernorm"),
        qkv=get("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output=get("self_attn.o_proj"),
        mlp_norm=get("post_attention_layernorm"),
        gate_up=get("mlp.gate_proj", "mlp.up_proj"),
        down=get("mlp.down_proj"),
    )
