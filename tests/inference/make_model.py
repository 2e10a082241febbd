"""Save a random Llama and its greedy continuations: the oracle."""

import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

directory = Path(sys.argv[1])
prompts = json.loads(sys.argv[2])
new_tokens = int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(7)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config).float().eval()
for name, parameter in model.named_parameters():
    if parameter.ndim == 2:  # larger than the default: otherwise logits nearly tie
        std = 1.0 if "embed" in name else 0.08
        torch.nn.init.normal_(parameter, std=std)
model.save_pretrained(directory)
reference = {}
for prompt in prompts:
    ids = torch.tensor([list(prompt.encode())])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    reference[prompt] = out[0, ids.shape[1] :].tolist()
(directory / "reference.json").write_text(json.dumps(reference))
