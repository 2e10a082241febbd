"""Compare a canonical checkpoint with its Hugging Face export, and generate from it.

``python -m training.worker.compare CANONICAL EXPORT --prompt TEXT --tokens N`` prints
one JSON object: ``logits_equal`` (bit for bit), ``max_difference``, and ``tokens``, the
greedy continuation that ``transformers.generate`` makes of the exported weights: what
serving must reproduce.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.tensors import load_tensors
from fabric.core.errors import FabricError, IntegrityError


def load_canonical(path: Path) -> LlamaForCausalLM:
    """Return the model of a canonical checkpoint, built from its recorded config.

    Raises:
        IntegrityError: the checkpoint holds no Llama model.
    """
    with CheckpointReader(path) as reader:
        config = reader.manifest.state.get("model_config")
        names = [name for name in reader.names() if name.startswith("model/")]
    if not isinstance(config, dict) or not names:
        raise IntegrityError(f"{path} holds no model", code="E_NO_MODEL")
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    tensors = load_tensors(path, names)
    model.load_state_dict(
        {name.removeprefix("model/"): tensor for name, tensor in tensors.items()}
    )
    return model.eval()


@torch.inference_mode()
def compare(
    canonical: Path, export: Path, prompt: bytes, tokens: int
) -> dict[str, object]:
    """Return the facts of the comparison.

    Args:
        canonical: Directory of a canonical checkpoint.
        export: Directory of its Hugging Face form.
        prompt: One token per byte.
        tokens: Length of the greedy continuation.
    """
    ours = load_canonical(canonical)
    theirs = LlamaForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    ids = torch.tensor([list(prompt)])
    mine, other = ours(ids).logits, theirs(ids).logits
    generated = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    return {
        "logits_equal": bool(torch.equal(mine, other)),
        "max_difference": float((mine - other).abs().max()),
        "tokens": generated[0, ids.shape[1] :].tolist(),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("canonical", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--prompt", default="def main():\n")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        facts = compare(
            arguments.canonical,
            arguments.export,
            arguments.prompt.encode(),
            arguments.tokens,
        )
    except FabricError as error:
        sys.stderr.write(f"error {error.code}: {error.reason}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
