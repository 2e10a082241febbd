"""A worker that trains one step of a Llama after it entered the sandbox."""

import sys
from pathlib import Path

from fabric.bulk.sandbox import WorkerLimits, enter

for name in ("trio", "libp2p"):
    sys.modules[name] = None
enter(WorkerLimits(scratch=Path(sys.argv[1])))

import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

torch.set_num_threads(1)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
)
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.arange(32)[None]
losses = []
for _ in range(2):
    optimizer.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
print(losses[1] < losses[0])
