"""The engine: any format to any other, every tensor accounted for, in files."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from checkpoints.boxes import tiling_fault
from checkpoints.conversion import convert
from checkpoints.conversion_journal import JOURNAL_NAME
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.cuts import Cut
from checkpoints.directories import list_steps
from checkpoints.formats.registry import open_source
from checkpoints.hashed_file import HashedFile
from checkpoints.parts import bytes_source
from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError, IntegrityError, ResourceExhausted

ROOT = Path(__file__).parents[3]
FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))
SEED = int(os.environ.get("FABRIC_TEST_SEED", "1"))


@pytest.fixture
def source(tmp_path, lab):
    """A canonical checkpoint of 2 MiB in two writers' files."""
    lab.save(tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def many(tmp_path):
    """A checkpoint of 24 tensors of 200 KiB."""
    rng = random.Random(3)
    sources = [
        bytes_source(f"model/t{n:02}", "U8", (200 << 10,), rng.randbytes(200 << 10))
        for n in range(24)
    ]
    with CheckpointWriter(tmp_path / "many", 5) as writer:
        writer.commit([writer.write("w", sources)], state={"model_config": OTHER})
    return tmp_path / "many"


OTHER = {"model_type": "other"}


def content(path):
    with open_source(path) as opened:
        return {
            name: (
                opened.entry(name).dtype,
                opened.entry(name).shape,
                b"".join(map(bytes, opened.windows(name))),
            )
            for name in opened.names()
        }


def run(source, target, to, **options):
    report = convert(source, target, ConvertOptions(to=to, **options))
    assert report.verified
    return report


def test_one_file_holds_everything(tmp_path, source):
    report = run(source, tmp_path / "all.safetensors", "safetensors")
    assert content(tmp_path / "all.safetensors") == content(source)
    with open_source(tmp_path / "all.safetensors") as opened:
        assert opened.aliases == {"model/tied": "model/rows"}
        assert opened.state["note"] == "\u00e9"
    assert {each.source for each in report.tensors} == set(content(source))
    back = run(tmp_path / "all.safetensors", tmp_path / "back", "canonical", step=1)
    assert content(tmp_path / "back") == content(source)
    assert back.root == CheckpointReader(tmp_path / "back").root
    assert verify_checkpoint(tmp_path / "back", root=back.root).ok
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["all.safetensors", "back", "c"]


@pytest.mark.parametrize(("world", "layout"), [(3, "fsdp"), (4, "fsdp"), (2, "tp")])
def test_reshard_writes_files_per_rank(tmp_path, source, world, layout):
    cut = Cut(layout, world, (("*rows", 1),))
    run(source, tmp_path / "r", "canonical", cut=cut, step=2)
    with CheckpointReader(tmp_path / "r") as reader:
        boxes = reader.boxes("model/rows")
        assert len(boxes) == world
        assert tiling_fault((512, 1024), boxes) is None
        assert reader.manifest.layout == {"layout": layout, "world": world}
        files = {chunk.file for chunk in reader.entry("model/rows").chunks}
    assert files == {f"rank{rank}-0.safetensors" for rank in range(world)}
    assert content(tmp_path / "r") == content(source)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layout"), [(3, "fsdp"), (2, "tp")])
def test_torch_loads_what_was_dealt_to_ranks(tmp_path, source, world, layout):
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    cut = Cut(layout, world, (("*rows", 1),))
    run(source, tmp_path / "r", "dcp", cut=cut)
    ranks = {path.name.split("_")[2] for path in (tmp_path / "r").glob("*.distcp")}
    assert ranks == {str(rank) for rank in range(world)}
    with open_source(tmp_path / "r") as opened:
        assert len(opened.boxes("model/rows")) == world
    found = {"model": {"rows": torch.zeros(512, 1024)}}
    with warnings.catch_warnings(action="ignore"):  # it warns that it is one process
        dcp.load(found, checkpoint_id=tmp_path / "r", no_dist=True)
    wanted = content(source)["model/rows"][2]
    assert found["model"]["rows"].numpy().tobytes() == wanted


def test_a_step_joins_the_others(tmp_path, source):
    run(source, source, "canonical", step=9)
    assert list_steps(source) == [1, 9]
    with pytest.raises(ConfigError) as refused:
        run(source, source, "canonical", step=9)
    assert refused.value.code == "E_STEP_EXISTS"


def test_dry_run_writes_nothing(tmp_path, source):
    options = ConvertOptions(to="safetensors", dry_run=True)
    report = convert(source, tmp_path / "x.safetensors", options)
    assert (report.dry_run, report.verified) == (True, False)
    assert sum(each.size_bytes for each in report.files) > 2 << 20
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_the_same_step_has_the_same_root_whatever_the_threads(tmp_path, many):
    roots = {
        run(many, tmp_path / f"w{n}", "canonical", workers=n, max_memory=n << 18).root
        for n in (1, 2, 5)
    }
    assert len(roots) == 1


def test_zeros_become_holes(tmp_path):
    size = 16 << 20
    with HashedFile(tmp_path / "holes") as file:
        file.write(b"head")
        file.write(bytes(size))
        entry = file.finish()
    found = (tmp_path / "holes").stat()
    assert (found.st_size, entry.size) == (size + 4, size + 4)
    assert found.st_blocks * 512 < 1 << 20
    assert (tmp_path / "holes").read_bytes() == b"head" + bytes(size)


@pytest.mark.parametrize(
    ("dtype", "to"),
    [("F32", "BF16"), ("F32", "F16"), ("BF16", "F32"), ("F64", "BF16"), ("F16", "F64")],
)
def test_casts_are_those_of_torch(tmp_path, dtype, to):
    torch = pytest.importorskip("torch")
    types = {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
    torch.manual_seed(1)
    values = torch.cat(
        [
            torch.randn(9000, dtype=torch.float64),
            torch.randn(9000, dtype=torch.float64) * 1e-6,
            torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45]),
            1 + torch.arange(64, dtype=torch.float64) / 2**9 + 2.0**-40,
        ]
    ).to(types[dtype])
    raw = values.view(torch.uint8).numpy().tobytes()
    moment = bytes_source("optimizer/exp_avg/w", dtype, (len(values),), raw)
    weight = bytes_source("model/w", dtype, (len(values),), raw)
    with CheckpointWriter(tmp_path / "c", 0) as writer:
        writer.commit([writer.write("w", [weight, moment])], state={})
    report = run(tmp_path / "c", tmp_path / "b", "canonical", dtype=to)
    found = content(tmp_path / "b")
    cast = torch.frombuffer(bytearray(found["model/w"][2]), dtype=types[to])
    wanted = values.to(types[to])
    same = (cast == wanted) | (cast.isnan() & wanted.isnan())
    assert same.all()
    assert found["optimizer/exp_avg/w"][2] == raw
    actions = {each.source: each.action for each in report.tensors}
    assert actions == {"model/w": "cast", "optimizer/exp_avg/w": "copied"}


def test_a_cast_that_overflows_is_refused(tmp_path):
    np = pytest.importorskip("numpy")
    raw = np.array([1.0, 70000.0], "<f4").tobytes()
    with CheckpointWriter(tmp_path / "c", 0) as writer:
        sources = [bytes_source("model/w", "F32", (2,), raw)]
        writer.commit([writer.write("w", sources)], state={})
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "c", tmp_path / "b", "canonical", dtype="F16")
    assert refused.value.code == "E_OVERFLOW"
    assert "model/w" in refused.value.reason
    assert list_steps(tmp_path / "b") == []


def test_one_flipped_byte_is_named(tmp_path, source):
    path = source / "step-1/rank1-0.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as refused:
        run(source, tmp_path / "x.safetensors", "safetensors")
    for word in ("model/rows", "rank1-0.safetensors", "byte 1048576"):
        assert word in refused.value.reason
    assert [each.name for each in tmp_path.iterdir()] == ["c"]


def test_another_root_is_refused(tmp_path, source):
    with pytest.raises(IntegrityError) as refused:
        run(source, tmp_path / "x.safetensors", "safetensors", root="0" * 64)
    assert refused.value.code == "E_ROOT"


def test_foreign_files_in_the_working_directory_are_left_alone(tmp_path, source):
    work = tmp_path / "hf.safetensors.tmp"
    work.mkdir()
    (work / "mine").touch()
    with pytest.raises(ConfigError) as refused:
        run(source, tmp_path / "hf.safetensors", "safetensors")
    assert refused.value.code == "E_EXISTS"
    assert (work / "mine").exists()


def test_two_runs_to_one_target(tmp_path, many):
    """The second is refused while the first works."""
    started, go = threading.Event(), threading.Event()

    def wait(done, total):
        started.set()
        assert go.wait(60)

    first = threading.Thread(
        target=convert,
        args=(many, tmp_path / "x.safetensors", ConvertOptions(to="safetensors")),
        kwargs={"on_progress": wait},
    )
    first.start()
    assert started.wait(60)
    with pytest.raises(ConfigError) as refused:
        run(many, tmp_path / "x.safetensors", "safetensors")
    go.set()
    first.join(60)
    assert refused.value.code == "E_BUSY"
    assert content(tmp_path / "x.safetensors") == content(many)


class CutOff(KeyboardInterrupt):
    """Ends a run as Ctrl+C does."""


def cut_off(source, target, at, **options):
    """Convert until a share of the bytes passed."""

    def stop(done, total):
        if done >= at * total:
            raise CutOff

    with pytest.raises(CutOff):
        convert(
            source,
            target,
            ConvertOptions(to="huggingface", max_shard_bytes=400 << 10, **options),
            on_progress=stop,
        )


def test_a_run_goes_on_with_the_files_that_are_whole(tmp_path, many):
    cut_off(many, tmp_path / "hf", 0.3, workers=1)
    whole = (tmp_path / "hf.tmp" / JOURNAL_NAME).read_text().count("\n") - 1
    assert whole >= 5
    inodes = {p.name: p.stat().st_ino for p in (tmp_path / "hf.tmp").iterdir()}
    report = run(many, tmp_path / "hf", "huggingface", max_shard_bytes=400 << 10)
    assert report.resumed_files == whole
    assert not any("discarded" in note for note in report.notes)
    same = [
        p for p in (tmp_path / "hf").iterdir() if p.stat().st_ino == inodes.get(p.name)
    ]
    assert len(same) >= whole
    assert content(tmp_path / "hf") == content(many)
    assert not (tmp_path / "hf" / JOURNAL_NAME).exists()


def test_a_run_of_another_source_or_options_starts_afresh(tmp_path, many):
    cut_off(many, tmp_path / "hf", 0.3, workers=1)
    report = run(many, tmp_path / "hf", "huggingface", max_shard_bytes=600 << 10)
    assert report.resumed_files == 0
    assert any("discarded" in note for note in report.notes)
    assert content(tmp_path / "hf") == content(many)


def test_a_kept_file_that_was_changed_is_noticed(tmp_path, many):
    cut_off(many, tmp_path / "hf", 0.3, workers=1)
    path = sorted((tmp_path / "hf.tmp").glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as refused:
        run(many, tmp_path / "hf", "huggingface", max_shard_bytes=400 << 10)
    assert refused.value.code == "E_VERIFY"
    assert not (tmp_path / "hf.tmp").exists()
    run(many, tmp_path / "hf", "huggingface", max_shard_bytes=400 << 10)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, many):
    run(many, tmp_path / "hf", "huggingface", max_shard_bytes=400 << 10)
    victim = sorted((tmp_path / "hf").glob("*.safetensors"))[-1]

    def touch(done, total):
        os.utime(victim, (1, 1))

    options = ConvertOptions(to="canonical")
    with pytest.raises(IntegrityError) as refused:
        convert(tmp_path / "hf", tmp_path / "c", options, on_progress=touch)
    assert refused.value.code == "E_SOURCE_CHANGED"
    assert list_steps(tmp_path / "c") == []


COMMAND = "from checkpoints.cli import main; main()"


def start(*arguments, limit=None):
    argv = [sys.executable, "-c", COMMAND, *map(str, arguments)]

    def limited():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        argv,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    )


@pytest.mark.slow
@pytest.mark.parametrize("to", ["canonical", "huggingface", "safetensors"])
def test_killed_at_random_moments(tmp_path, many, to):
    """Nothing half-written is ever offered; the last run completes and is equal."""
    rng = random.Random(SEED)
    target = tmp_path / {"safetensors": "x.safetensors"}.get(to, "out")
    final = target / "step-5" if to == "canonical" else target
    arguments = ["convert", many, target, "--to", to, "--json"]
    if to == "huggingface":
        arguments += ["--max-shard-size", "250KiB"]
    begun = 0
    for _ in range(34 if FACTOR > 1 else 3):
        process = start(*arguments)
        work = final.with_name(final.name + ".tmp")
        wait_until(lambda w=work, p=process: w.exists() or p.poll() is not None)
        try:
            process.communicate(timeout=rng.random() * 0.3)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            begun += 1
        if final.exists():
            assert content(final) == content(many)  # `latest` may not name it yet
            if final.is_dir():
                for path in final.iterdir():
                    path.unlink()
                final.rmdir()
            else:
                final.unlink()
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["verified"]
    assert content(target) == content(many)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["many", target.name])


def wait_until(condition, seconds=60):
    waiting = threading.Event()
    for _ in range(int(seconds / 0.002)):
        if condition():
            return
        waiting.wait(0.002)
    raise AssertionError("it did not happen")


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_next_run_goes_on(tmp_path, many):
    arguments = ["convert", many, tmp_path / "x.safetensors", "--to", "safetensors"]
    process = start(*arguments, limit=1 << 20)
    _, err = process.communicate(timeout=120)
    assert process.returncode == ResourceExhausted.exit_code
    assert "E_DISK_FULL" in err
    assert not (tmp_path / "x.safetensors").exists()
    process = start(*arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "equal to the source" in out


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_file_system_of_one_megabyte(tmp_path, many):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.decode()}")
    try:
        with pytest.raises(ResourceExhausted) as refused:
            run(many, small / "out", "canonical")
        assert refused.value.code == "E_DISK_FULL"
        assert list_steps(small / "out") == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
