"""The state that the benchmark of checkpoints saves: a GPT of 124 M, and Adam."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from checkpoints.placements import Split, held_boxes

WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50257, 1024
SLOTS = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")

Shape = tuple[int, ...]


def shapes() -> dict[str, tuple[Shape, int]]:
    """Return each parameter's shape, and the dim that tensor parallelism cuts or -1."""
    found: dict[str, tuple[Shape, int]] = {
        "wte.weight": ((VOCABULARY, WIDTH), 0),
        "wpe.weight": ((CONTEXT, WIDTH), -1),
        "ln_f.weight": ((WIDTH,), -1),
    }
    for layer in range(LAYERS):
        head = f"h.{layer}"
        found |= {
            f"{head}.ln_1.weight": ((WIDTH,), -1),
            f"{head}.attn.c_attn.weight": ((3 * WIDTH, WIDTH), 0),
            f"{head}.attn.c_attn.bias": ((3 * WIDTH,), 0),
            f"{head}.attn.c_proj.weight": ((WIDTH, WIDTH), 1),
            f"{head}.attn.c_proj.bias": ((WIDTH,), -1),
            f"{head}.ln_2.weight": ((WIDTH,), -1),
            f"{head}.mlp.c_fc.weight": ((4 * WIDTH, WIDTH), 0),
            f"{head}.mlp.c_fc.bias": ((4 * WIDTH,), 0),
            f"{head}.mlp.c_proj.weight": ((WIDTH, 4 * WIDTH), 1),
            f"{head}.mlp.c_proj.bias": ((WIDTH,), -1),
        }
    return found


def build(layout: str, mesh: DeviceMesh | None, rank: int) -> dict[str, torch.Tensor]:
    """Return what a rank holds: fp32 parameters and moments, touched memory.

    Args:
        layout: "whole", "fsdp" or "tp".
        mesh: Of one dim; None for "whole".
        rank: Our place in it.
    """
    held: dict[str, torch.Tensor] = {}
    for number, (name, (shape, dim)) in enumerate(shapes().items()):
        for slot in SLOTS:
            held[f"{slot}/{name}"] = _value(layout, mesh, rank, shape, dim, number)
    return held


def _value(
    layout: str,
    mesh: DeviceMesh | None,
    rank: int,
    shape: Shape,
    dim: int,
    number: int,
) -> torch.Tensor:
    if mesh is None or layout == "whole":
        return torch.full(shape, float(number))
    cut = 0 if layout == "fsdp" else dim
    placement = Shard(cut) if cut >= 0 else Replicate()
    splits = [Split(cut, mesh.size(), rank)] if cut >= 0 else []
    boxes = held_boxes(shape, splits)
    sizes = boxes[0].box.sizes if boxes else (0, *shape[1:])
    return DTensor.from_local(
        torch.full(sizes, float(number)),
        mesh,
        [placement],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def local(value: torch.Tensor) -> torch.Tensor:
    """Return the elements that are held here."""
    return value.to_local() if isinstance(value, DTensor) else value


def num_bytes(held: dict[str, torch.Tensor]) -> int:
    """Return the bytes held here."""
    return sum(local(v).numel() * local(v).element_size() for v in held.values())
