"""Cases of whole training programs: FSDP2, its optimizer, torch's own save and load."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from checkpoints import CanonicalReader, CanonicalWriter
from checkpoints.directories import list_steps
from checkpoints.reader import CheckpointReader
from checkpoints.torch_io.exchange import TorchExchange
from checkpoints.torch_io.loader import load_into
from checkpoints.torch_io.saver import Saver
from checkpoints.torch_io.training_state import (
    decode,
    encode,
    model_tensors,
    optimizer_tensors,
    python_rng,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)

warnings.simplefilter("ignore")


def model_of(how, world):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 6, bias=False))
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif how == "fsdp_tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    return model


def program(how, world):
    model = model_of(how, world)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() < 2], "lr": 3e-3},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, first, last):
    losses = []
    for step in range(first, last):
        torch.manual_seed(step)
        loss = model(torch.randn(4, 10)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    return losses


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def case_program_save(base, world, rank, how):
    """Train two steps, save, train two more: what a resumed program must repeat."""
    model, optimizer, scheduler = program(how, world)
    train(model, optimizer, scheduler, 0, 2)
    tensors = model_tensors(get_model_state_dict(model))
    moments, groups = optimizer_tensors(get_optimizer_state_dict(model, optimizer))
    state = {
        "optimizer": groups,
        "scheduler": encode(scheduler.state_dict(), "scheduler"),
    }
    with Saver(base / f"program-{how}-{world}") as saver:
        saver.save(
            2,
            tensors | moments | rng_tensors(rank),
            state,
            rank_state={"python": python_rng()},
        )
        train(model, optimizer, scheduler, 2, 4)  # while it is written
    final = {name: whole(t) for name, t in get_model_state_dict(model).items()}
    if rank == 0:
        torch.save(final, base / f"program-{how}-{world}.pt")


def case_program_resume(base, world, rank, source, how):
    """A fresh program of another layout goes on and arrives where the first did."""
    model, optimizer, scheduler = program(how, world)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    model_dict = get_model_state_dict(model)
    optimizer_dict = get_optimizer_state_dict(model, optimizer)
    moments, _ = optimizer_tensors(optimizer_dict)
    rng = rng_tensors(rank)
    saved = int(source.split("-")[-1])
    with CheckpointReader(base / source) as reader:
        stored = {n for n in reader.names() if n.startswith("rng/")}
    wanted = {name: t for name, t in rng.items() if name in stored}
    from checkpoints.torch_io.loader import LoadOptions

    loaded = load_into(
        base / source,
        model_tensors(model_dict) | moments | wanted,
        LoadOptions(allow_unexpected=saved != world),
        exchange=TorchExchange() if world > 1 else None,
    )
    restore_optimizer(optimizer_dict, loaded.state["optimizer"])
    set_model_state_dict(model, model_dict)
    set_optimizer_state_dict(model, optimizer, optimizer_dict)
    scheduler.load_state_dict(decode(loaded.state["scheduler"]))
    if wanted:
        restore_rng(rank, wanted, loaded.state["ranks"][str(rank)]["python"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.005, 0.0015]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    train(model, optimizer, scheduler, 2, 4)
    final = torch.load(base / f"{source}.pt", weights_only=True)
    for name, tensor in get_model_state_dict(model).items():
        torch.testing.assert_close(whole(tensor), final[name], rtol=1e-5, atol=1e-6)


class Position:
    def __init__(self, at):
        self.at = at

    def state_dict(self):
        return {"at": self.at, "order": (3, 1, 2), "files": {"a": [1, 2.5, None]}}

    def load_state_dict(self, state):
        assert state["order"] == (3, 1, 2)
        assert state["files"] == {"a": [1, 2.5, None]}
        self.at = state["at"]


def nested(how, world):
    model, optimizer, scheduler = program(how, world)
    train(model, optimizer, scheduler, 0, 1)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "data": Position(world),
        "note": "text",
        "step": 3,
        "mixed": [torch.arange(3), {"deep": torch.tensor(2.0)}],
    }


def values(state):
    flat, _ = dcp._nested_dict.flatten_state_dict(
        {k: v for k, v in state.items() if k != "data"}
    )
    return {
        k: whole(v).clone() if isinstance(v, torch.Tensor) else v
        for k, v in flat.items()
    }


def spoiled(state):
    def visit(value):
        if isinstance(value, torch.Tensor):
            with torch.no_grad():
                (value.to_local() if isinstance(value, DTensor) else value).fill_(1)
        elif isinstance(value, dict):
            for each in value.values():
                visit(each)
        elif isinstance(value, list):
            for each in value:
                visit(each)

    visit(state)
    return state | {"note": "", "step": 0, "data": Position(0)}


def same_values(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def case_dcp(base, world, rank, how):
    """torch's save, async_save and load, with our storage in the place of its own."""
    directory = base / f"dcp-{how}-{world}"
    state = nested(how, world)
    expected = values(state)
    dcp.save(state, storage_writer=CanonicalWriter(directory))
    loaded = spoiled(nested(how, world))
    dcp.load(loaded, storage_reader=CanonicalReader(directory))
    same_values(values(loaded), expected)
    assert loaded["data"].at == world
    dist.barrier()
    # asynchronous: what is saved is what was there when async_save returned
    writer = CanonicalWriter(directory)
    for _ in range(2):
        expected = values(state)
        future = dcp.async_save(state, storage_writer=writer)
        spoiled(state)
        future.result()
        state = nested(how, world)
    dist.barrier()
    assert list_steps(directory) == [0, 1, 2]
    loaded = spoiled(nested(how, world))
    dcp.load(loaded, checkpoint_id=directory, storage_reader=CanonicalReader(directory))
    same_values(values(loaded), expected)


def case_dcp_reads(base, world, rank, source, how):
    """torch's load reads what another layout, or our own Saver, has saved."""
    model, optimizer, _ = program(how, world)
    state = {"model": get_model_state_dict(model)}
    spoiled(state)
    dcp.load(state, storage_reader=CanonicalReader(base / source))
    with CheckpointReader(base / source) as reader:
        for fqn, tensor in state["model"].items():
            found = reader.read_tensor(f"model/{fqn}")
            assert bytes(found) == whole(tensor).contiguous().numpy().tobytes(), fqn
    if source.startswith("program"):
        full = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(full, storage_reader=CanonicalReader(base / source))
        assert full["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.95)
        bare = get_model_state_dict(model)
        reader = CanonicalReader(base / source, section="model/")
        dcp.load(bare, storage_reader=reader)


def case_dcp_refuses(base, world, rank):
    """Values that JSON cannot hold, other types, plans of the step before."""
    directory = base / "dcp-refused"
    state = {"a": torch.zeros(3), "b": {1, 2}}
    writer = CanonicalWriter(directory)
    with pytest.raises(BaseException, match="no JSON form"):
        dcp.save(state, storage_writer=writer)
    dist.barrier()
    assert list_steps(directory) == []
    state = {"a": torch.zeros(3)}
    dcp.save(state, storage_writer=writer)
    with pytest.raises(BaseException, match="stored as F32"):
        dcp.load(
            {"a": torch.zeros(3, dtype=torch.bfloat16)},
            storage_reader=CanonicalReader(directory),
        )
    dcp.load(
        {"a": torch.zeros(3, dtype=torch.bfloat16)},
        storage_reader=CanonicalReader(directory, cast=True),
    )
    with pytest.raises(BaseException, match="Missing key"):
        dcp.load({"z": torch.zeros(3)}, storage_reader=CanonicalReader(directory))
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    dcp.save(state, storage_writer=CanonicalWriter(directory), planner=planner)
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    with pytest.raises(BaseException, match="step before"):
        dcp.save(state, storage_writer=CanonicalWriter(directory), planner=planner)


CASES = {
    n.removeprefix("case_"): f for n, f in globals().items() if n.startswith("case_")
}
