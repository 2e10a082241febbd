"""Save beside training: what is saved, shared, refused, and what a crash leaves."""

import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from checkpoints.directories import list_steps, locate  # noqa: E402
from checkpoints.reader import CheckpointReader  # noqa: E402
from checkpoints.retention import Retention, pin  # noqa: E402
from checkpoints.torch_io.exchange import LocalExchange  # noqa: E402
from checkpoints.torch_io.loader import LoadOptions, load_into  # noqa: E402
from checkpoints.torch_io.pieces import FlatShard  # noqa: E402
from checkpoints.torch_io.saver import Saver, SaverConfig  # noqa: E402
from checkpoints.torch_io.tensors import load_tensors  # noqa: E402
from checkpoints.verification import verify_checkpoint  # noqa: E402
from fabric.core.errors import (  # noqa: E402
    ConfigError,
    IntegrityError,
    ResourceExhausted,
)

pytestmark = pytest.mark.slow  # importing torch alone takes seconds
ROOT = Path(__file__).parents[3]
FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
SEED = int(os.environ.get("FABRIC_TEST_SEED", "0"))
MIB = 1 << 20


def saver_of(path, **more):
    config = SaverConfig(
        **{k: more.pop(k) for k in list(more) if k in SaverConfig.__struct_fields__}
    )
    return Saver(path, config, exchange=LocalExchange(), **more)


def links(path):
    return {p.name: p.stat().st_nlink for p in path.glob("*.safetensors")}


def held_back(gate):
    """A hook that keeps the thread from writing until the gate is open."""

    def on_point(point):
        if point == "file.create":
            assert gate.wait(30)

    return on_point


def test_what_is_saved_is_what_was_there_when_save_returned(tmp_path):
    from threading import Event

    gate = Event()
    tensor = torch.arange(1000.0)
    with saver_of(tmp_path, on_point=held_back(gate)) as saver:
        saver.save(1, {"a": tensor, "b": tensor.view(10, 100).T})
        tensor += 1
        assert list_steps(tmp_path) == []
        gate.set()
        root = saver.wait()
    assert locate(tmp_path).root == root
    loaded = load_tensors(tmp_path)
    assert torch.equal(loaded["a"], torch.arange(1000.0))
    assert torch.equal(loaded["b"], torch.arange(1000.0).view(10, 100).T)


def test_one_save_at_a_time(tmp_path):
    from threading import Event

    gate = Event()
    one = {"a": torch.zeros(3)}
    with saver_of(tmp_path, refuse_when_busy=True, on_point=held_back(gate)) as saver:
        saver.save(1, one)
        with pytest.raises(ResourceExhausted) as refused:
            saver.save(2, one)
        gate.set()
        assert saver.wait() == saver.wait()
        saver.save(2, one)
    with saver_of(tmp_path) as saver:  # the other choice: wait for it
        for step in range(3, 6):
            saver.save(step, one)
    assert refused.value.code == "E_SAVE_BUSY"
    assert list_steps(tmp_path) == [1, 2, 3, 4, 5]


def test_memory_is_used_again_and_grows_when_needed(tmp_path):
    with saver_of(tmp_path) as saver:
        sizes = []
        for step, count in enumerate([1000, 1000, 500_000, 1000]):
            saver.save(step, {"a": torch.full((count,), float(step))})
            saver.wait()
            sizes.append(saver._stager.size)
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    for step, count in enumerate([1000, 1000, 500_000, 1000]):
        found = load_tensors(tmp_path / f"step-{step}")["a"]
        assert torch.equal(found, torch.full((count,), float(step)))


def test_a_frozen_backbone_is_found_and_shared(tmp_path):
    frozen = {f"model/b{k}": torch.randn(512, 512) for k in range(3)}
    lora = {"model/lora": torch.randn(64, 64)}
    roots = []
    with saver_of(tmp_path) as saver:
        for step in range(5):
            lora["model/lora"] += 1
            saver.save(step, frozen | lora)
            roots.append(saver.wait())
    last = links(tmp_path / "step-4")
    assert last == {"rank0-0.safetensors": 1, "rank0-frozen-0.safetensors": 3}
    assert links(tmp_path / "step-1") == {"rank0-0.safetensors": 1}
    for step, root in enumerate(roots):
        assert verify_checkpoint(tmp_path / f"step-{step}", root=root).ok
    with CheckpointReader(tmp_path) as reader:
        assert reader.manifest.parent == roots[3]


def test_what_thaws_is_written_again_and_stays_with_what_changes(tmp_path):
    still, moving = torch.randn(512, 1024), torch.randn(512, 1024)
    with saver_of(tmp_path) as saver:
        for step in range(7):
            if step == 4:
                still.view(-1)[12345] = 7  # one element, far from both ends
            saver.save(step, {"still": still, "moving": moving.add_(1)})
            saver.wait()
            found = load_tensors(tmp_path / f"step-{step}")
            assert torch.equal(found["still"], still)
            assert torch.equal(found["moving"], moving)
    assert links(tmp_path / "step-3")["rank0-frozen-0.safetensors"] == 2
    assert links(tmp_path / "step-4")["rank0-frozen-0.safetensors"] == 1
    assert list(links(tmp_path / "step-6")) == ["rank0-0.safetensors"]


def test_a_hint_shares_from_the_second_save_also_after_a_restart(tmp_path):
    frozen = {"model/base": torch.randn(512, 1024)}
    for step in range(3):  # a new process each time, as far as the saver knows
        with saver_of(tmp_path, frozen=lambda name: name == "model/base") as saver:
            saver.save(step, frozen | {"model/lora": torch.full((9,), float(step))})
    assert links(tmp_path / "step-2") == {
        "rank0-0.safetensors": 1,
        "rank0-frozen-0.safetensors": 3,
    }
    frozen["model/base"] += 1
    with saver_of(tmp_path, frozen=lambda name: name == "model/base") as saver:
        saver.save(3, frozen)
    assert links(tmp_path / "step-3") == {"rank0-frozen-0.safetensors": 1}
    assert torch.equal(load_tensors(tmp_path)["model/base"], frozen["model/base"])


def test_nothing_is_shared_with_a_save_that_failed(tmp_path):
    tensors = {"a": torch.randn(512, 1024)}
    with saver_of(tmp_path) as saver:
        saver.save(0, tensors)
        saver.save(1, tensors)
        saver.wait()
        tensors["a"] += 1
        saver.save(2, tensors, {"x": float("inf")})
        with pytest.raises(ConfigError):
            saver.wait()
        saver.save(2, tensors)
        saver.wait()
    assert torch.equal(load_tensors(tmp_path)["a"], tensors["a"])
    with CheckpointReader(tmp_path) as reader:
        assert reader.manifest.parent == locate(tmp_path).root or reader.manifest.parent


def test_old_steps_go_and_shared_files_stay(tmp_path):
    frozen = {"model/base": torch.randn(512, 1024)}
    policy = Retention(keep=2, keep_every=4)
    with saver_of(tmp_path, retention=policy, frozen=lambda n: "base" in n) as saver:
        for step in range(8):
            saver.save(step, frozen | {"x": torch.tensor(step)})
            saver.wait()
            if step == 1:
                pin(tmp_path, 1)
        assert saver.retention_error is None
    assert list_steps(tmp_path) == [0, 1, 4, 6, 7]
    assert all(
        verify_checkpoint(tmp_path / f"step-{k}").ok for k in list_steps(tmp_path)
    )


def test_a_full_disk_fails_the_save_and_the_next_one_may_succeed(tmp_path):
    tensors = {"a": torch.randn(512, 1024)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saver = saver_of(tmp_path)
    saver.save(1, {"a": torch.zeros(3)})
    saver.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        saver.save(2, tensors)
        with pytest.raises(ResourceExhausted) as full:  # at the next save
            saver.save(3, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert full.value.code == "E_DISK_FULL"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]
    saver.save(3, tensors)
    saver.wait()
    assert torch.equal(load_tensors(tmp_path)["a"], tensors["a"])


@pytest.fixture
def stored(tmp_path):
    tensors = {
        "w": torch.arange(12.0).reshape(3, 4),
        "v": torch.arange(5, dtype=torch.bfloat16),
        "n": torch.tensor(4),
    }
    with saver_of(tmp_path) as saver:
        saver.save(0, tensors, {"epoch": 3})
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "options", "code"),
    [
        ({"w": (3, 4), "x": (1,)}, {"allow_unexpected": True}, "E_MISSING"),
        ({"w": (3, 4)}, {}, "E_UNEXPECTED"),
        ({"w": (4, 3)}, {"allow_unexpected": True}, "E_SHAPE"),
        ({"v": (5,)}, {"allow_unexpected": True}, "E_DTYPE"),
        ({"w": (3, 4)}, {"allow_unexpected": True, "renames": {"w": "z"}}, "E_MISSING"),
    ],
)
def test_what_differs_is_refused(stored, wanted, options, code):
    held = {name: torch.full(shape, -1.0) for name, shape in wanted.items()}
    with pytest.raises(ConfigError) as refused:
        load_into(stored, held, LoadOptions(**options))
    assert refused.value.code == code
    assert all(bool((t == -1).all()) for t in held.values())  # nothing was touched


def test_what_differs_is_allowed_when_asked_for(stored):
    held = {
        "mine": torch.zeros(3, 4),
        "v": torch.zeros(5, dtype=torch.float64),
        "new": torch.full((2,), 9.0),
    }
    options = LoadOptions(
        allow_missing=True, allow_unexpected=True, cast=True, renames={"mine": "w"}
    )
    loaded = load_into(stored, held, options)
    assert loaded.missing == ["new"]
    assert loaded.unexpected == ["n"]
    assert loaded.state["epoch"] == 3
    assert torch.equal(held["mine"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(held["v"], torch.arange(5.0, dtype=torch.float64))
    assert held["new"].tolist() == [9, 9]


def test_tied_weights_load_once_and_are_not_torn(stored):
    both = torch.zeros(3, 4)
    held = {
        "w": both,
        "head": both,
        "n": torch.tensor(0),
        "v": torch.zeros(5, dtype=torch.bfloat16),
    }
    load_into(stored, held)  # "head" is not stored, but shares the elements of "w"
    assert torch.equal(both, torch.arange(12.0).reshape(3, 4))
    one = torch.zeros(3, 4)
    with saver_of(stored) as saver:
        saver.save(1, {"w": one, "head": one + 1})
    with pytest.raises(ConfigError) as refused:
        load_into(stored, {"w": both, "head": both})
    assert refused.value.code == "E_TIED"


def test_destinations_that_bytes_cannot_be_read_into(stored):
    transposed = torch.zeros(4, 3).T
    inner = torch.zeros(6, 8)[::2, ::2]
    for held in (transposed, inner):
        load_into(stored, {"w": held}, LoadOptions(allow_unexpected=True))
        assert torch.equal(held, torch.arange(12.0).reshape(3, 4))
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    flat = FlatShard(torch.zeros(5), (3, 4), 3)
    for value in (parameter, flat):
        load_into(stored, {"w": value}, LoadOptions(allow_unexpected=True))
    assert torch.equal(parameter.detach(), torch.arange(12.0).reshape(3, 4))
    assert flat.data.tolist() == [3, 4, 5, 6, 7]


def test_large_staged_destinations_are_filled_by_pieces(tmp_path, monkeypatch):
    import checkpoints.torch_io.loader as loader

    monkeypatch.setattr(loader, "STAGE_BYTES", 1000)
    monkeypatch.setattr(loader, "BATCH_BYTES", 3000)
    big = torch.randn(70, 33)
    with saver_of(tmp_path) as saver:
        saver.save(0, {"big": big, "one": torch.randn(1, 900)})
    held = {"big": torch.zeros(33, 70).T, "one": torch.zeros(900, 1).T}
    load_into(tmp_path, held)
    assert torch.equal(held["big"], big)


def test_a_flipped_byte_is_found_in_what_is_touched_only(tmp_path):
    tensors = {f"t{k}": torch.randn(512, 1024) for k in range(4)}
    with saver_of(tmp_path) as saver:
        saver.save(0, tensors)
    with CheckpointReader(tmp_path) as reader:
        chunk = reader.entry("t2").chunks[0]
    path = tmp_path / "step-0" / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.begin + 3 * MIB // 2] ^= 4
    path.write_bytes(data)
    held = {"t0": torch.zeros(512, 1024)}
    load_into(tmp_path, held, LoadOptions(allow_unexpected=True))
    assert torch.equal(held["t0"], tensors["t0"])
    with pytest.raises(IntegrityError) as damaged:
        load_into(tmp_path, {k: torch.zeros(512, 1024) for k in tensors})
    assert damaged.value.code == "E_BLOCK"
    assert f"block {(chunk.begin + 3 * MIB // 2) // MIB} " in damaged.value.reason


DYING = """
import os
import sys
from pathlib import Path
import torch
from checkpoints.torch_io.exchange import LocalExchange
from checkpoints.torch_io.saver import Saver, SaverConfig
from checkpoints.retention import Retention

def content(step):
    return {
        "model/base": torch.arange(1 << 18, dtype=torch.float32),
        "model/w": torch.full((1 << 18,), float(step)),
        "step": torch.tensor(step),
    }

def tell(point):
    print(point, flush=True)

def save_on(directory, first):
    config = SaverConfig(retention=Retention(keep=2))
    with Saver(directory, config, exchange=LocalExchange(), on_point=tell) as saver:
        for step in range(first, first + 10_000):
            saver.save(step, content(step), {"step": step})

torch.set_num_threads(1)
for line in sys.stdin:  # torch is imported once, and each save dies in a fork
    pid = os.fork()
    if pid == 0:
        tell(os.getpid())
        save_on(Path(sys.argv[1]), int(line))
    os.waitpid(pid, 0)
    tell("dead")
"""


def test_killed_at_any_moment_the_newest_whole_step_loads(tmp_path):
    rng = random.Random(SEED)
    program = tmp_path / "dying.py"
    program.write_text(DYING)
    directory = tmp_path / "steps"
    process = subprocess.Popen(
        [sys.executable, str(program), str(directory)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        first = 0
        for _ in range(6 if FACTOR == 1 else 100):
            process.stdin.write(f"{first}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            whole = 0
            for _ in range(rng.randint(14, 70)):  # a dozen points in each save
                whole += process.stdout.readline() == "latest.renamed\n"
            os.kill(child, signal.SIGKILL)
            # what it was saying when it died may lack its end
            while not (line := process.stdout.readline()).endswith("dead\n"):
                assert line
            assert whole
            first = newest_whole(directory) + 1
    finally:
        process.kill()
        process.communicate()


def newest_whole(directory):
    """Check everything that is offered; return the newest step."""
    steps = list_steps(directory)
    loaded = load_tensors(directory)
    named = int(loaded["step"])
    assert named in steps[-2:]  # the crash may have come before ``latest`` moved
    assert bool((loaded["model/w"] == named).all())
    base = torch.arange(1 << 18, dtype=torch.float32)
    assert torch.equal(loaded["model/base"], base)
    assert all(verify_checkpoint(directory / f"step-{s}").ok for s in steps)
    return steps[-1]
