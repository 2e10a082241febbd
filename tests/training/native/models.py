"""Tiny models, their batches, and one process with torch's AdamW: the oracle."""

import torch
from torch import nn

VOCABULARY = 37
SAMPLES, TOKENS, STEPS = 12, 6, 3
RATE, EPSILON, DECAY, CLIP = 1e-2, 1e-6, 0.1, 0.5


class Odd(nn.Module):
    """Sizes that nothing divides, a frozen tensor, and one that no batch uses."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 7), nn.Tanh())
            for _ in range(3)
        )
        self.fixed = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.head = nn.Linear(7, VOCABULARY, bias=False)

    def forward(self, input_ids):
        hidden = self.embed(input_ids) + self.fixed
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.head(hidden)


def build(kind):
    torch.manual_seed(5)
    if kind == "odd":
        return Odd()
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=TOKENS,
                n_embd=10,
                n_layer=2,
                n_head=2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=TOKENS,
            tie_word_embeddings=kind == "llama-tied",
            use_cache=False,
        )
    )


def on_meta(model):
    """Take the values of all parameters away; ties stay."""
    taken = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in taken:
                empty = torch.empty_like(parameter, device="meta")
                taken[parameter] = nn.Parameter(empty, parameter.requires_grad)
            setattr(module, name, taken[parameter])
    return model


def samples(step):
    made = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (SAMPLES, TOKENS + 1), generator=made)


def loss_of(model, tokens):
    out = model(input_ids=tokens[:, :-1])
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return nn.functional.cross_entropy(
        logits.float().reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
    )


def reference(kind, clip=CLIP, steps=STEPS):
    """Return the parameters after some steps, the losses and the norms."""
    model = build(kind)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.dim() > 1]},
            {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=(0.9, 0.95),
        eps=EPSILON,
        weight_decay=DECAY,
    )
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_of(model, samples(step))
        loss.backward()
        limit = clip or float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(named.values(), limit)))
        losses.append(float(loss.detach()))
        optimizer.step()
    return {n: p.detach().clone() for n, p in named.items()}, losses, norms
