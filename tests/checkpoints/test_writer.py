"""Save: several writers, one commit, never a half step."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.boxes import Box
from checkpoints.directories import list_steps, locate
from checkpoints.manifest import root_of
from checkpoints.parts import PART_CODEC, bytes_source, write_part
from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import (
    ConfigError,
    FabricError,
    IntegrityError,
    LocalProtocolError,
    ResourceExhausted,
)

ROOT = Path(__file__).parents[2]


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_step_is_whole_and_latest_names_it(tmp_path, lab):
    root = lab.save(tmp_path)
    assert names_in(tmp_path) == ["latest", "step-1"]
    assert names_in(tmp_path / "step-1") == [
        "manifest.json",
        "rank0-0.safetensors",
        "rank1-0.safetensors",
    ]
    assert root_of((tmp_path / "step-1/manifest.json").read_bytes()) == root
    assert locate(tmp_path) == (tmp_path / "step-1", root)
    second = lab.save(tmp_path, step=12)
    assert list_steps(tmp_path) == [1, 12]
    assert locate(tmp_path).root == second
    assert verify_checkpoint(tmp_path / "step-1", root=root).ok


def test_the_same_content_has_the_same_root(tmp_path, lab):
    assert lab.save(tmp_path / "a") == lab.save(tmp_path / "b")


def test_a_step_is_never_overwritten(tmp_path, lab):
    root = lab.save(tmp_path)
    with pytest.raises(ConfigError) as refused:
        lab.save(tmp_path)
    assert refused.value.code == "E_STEP_EXISTS"
    assert locate(tmp_path).root == root
    with CheckpointWriter(tmp_path, 2) as writer:
        (tmp_path / "step-2").mkdir()
        (tmp_path / "step-2/other").touch()
        with pytest.raises(ConfigError):
            writer.commit([], state={})
    assert names_in(tmp_path / "step-2") == ["other"]


def test_two_savers_of_one_step_do_not_meet(tmp_path):
    with CheckpointWriter(tmp_path, 1):
        with pytest.raises(ConfigError) as refused, CheckpointWriter(tmp_path, 1):
            pass
        assert refused.value.code == "E_STEP_BUSY"
        assert (tmp_path / "step-1.tmp").is_dir()


def test_leaving_without_commit_leaves_nothing(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        writer.write("w", [bytes_source("a", "U8", (3,), b"abc")])
    assert names_in(tmp_path) == []


def test_parts_travel_as_bytes(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        source = bytes_source("a", "U8", (2, 3), b"abc", Box((0, 0), (1, 3)))
        first = write_part(writer.temporary, "w0", [source])
        source = bytes_source("a", "U8", (2, 3), b"def", Box((1, 0), (1, 3)))
        second = write_part(writer.temporary, "w1", [source])
        parts = [
            PART_CODEC.decode_untrusted(PART_CODEC.encode(p)) for p in (second, first)
        ]
        writer.commit(parts, state={})
    with CheckpointReader(tmp_path) as reader:
        assert reader.read_tensor("a") == b"abcdef"


def test_the_order_of_the_parts_does_not_matter(tmp_path):
    roots = set()
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        with CheckpointWriter(tmp_path / name, 1) as writer:
            parts = [
                writer.write(
                    f"w{row}",
                    [bytes_source("a", "U8", (2, 3), b"abc", Box((row, 0), (1, 3)))],
                )
                for row in (0, 1)
            ]
            roots.add(writer.commit([parts[k] for k in order], state={}))
    assert len(roots) == 1


def test_what_a_crashed_save_left_is_removed(tmp_path, lab):
    (tmp_path / "step-1.tmp").mkdir()
    (tmp_path / "step-1.tmp/rank0-0.safetensors").write_bytes(b"half")
    (tmp_path / "latest.tmp").write_bytes(b"half")
    lab.save(tmp_path)
    assert names_in(tmp_path) == ["latest", "step-1"]
    assert verify_checkpoint(tmp_path).findings == []


def test_large_parts_are_cut_into_files(tmp_path):
    sources = [bytes_source(f"t{k}", "U8", (10,), bytes([k] * 10)) for k in range(5)]
    with CheckpointWriter(tmp_path, 1) as writer:
        part = writer.write("w", sources, max_file_bytes=25)
        writer.commit([part], state={})
    assert sorted(part.files) == [f"w-{k}.safetensors" for k in range(3)]
    with CheckpointReader(tmp_path) as reader:
        assert all(reader.read_tensor(f"t{k}") == bytes([k] * 10) for k in range(5))


half = [bytes_source("a", "U8", (2, 3), b"abc", Box((0, 0), (1, 3)))]
full = [bytes_source("a", "U8", (2, 3), b"abcdef")]
other = [bytes_source("a", "I8", (2, 3), b"def", Box((1, 0), (1, 3)))]


@pytest.mark.parametrize(
    ("parts", "error", "code"),
    [
        ([half], IntegrityError, "E_TILING"),
        ([half, full], IntegrityError, "E_TILING"),
        ([half, other], LocalProtocolError, "E_BUG"),
    ],
    ids=["gap", "overlap", "types"],
)
def test_what_does_not_tile_is_not_committed(tmp_path, parts, error, code):
    with CheckpointWriter(tmp_path, 1) as writer:
        records = [writer.write(f"w{k}", part) for k, part in enumerate(parts)]
        with pytest.raises(error) as refused:
            writer.commit(records, state={})
        assert refused.value.code == code
    assert names_in(tmp_path) == []


def test_files_that_changed_before_the_commit_are_seen(tmp_path):
    with CheckpointWriter(tmp_path, 1) as writer:
        part = writer.write("w", full)
        os.truncate(writer.temporary / "w-0.safetensors", 10)
        with pytest.raises(IntegrityError) as refused:
            writer.commit([part], state={})
    assert refused.value.code == "E_PARTS"


@pytest.mark.parametrize("data", [b"abcde", b"abcdefg"])
def test_a_source_of_another_size_is_our_mistake(tmp_path, data):
    with CheckpointWriter(tmp_path, 1) as writer, pytest.raises(ValueError, match="B"):
        writer.write("w", [bytes_source("a", "U8", (6,), data)])


def test_state_that_is_not_json_commits_nothing(tmp_path):
    with (
        CheckpointWriter(tmp_path, 1) as writer,
        pytest.raises(ValueError, match="nan"),
    ):
        writer.commit([writer.write("w", full)], state={"x": float("nan")})
    assert names_in(tmp_path) == []


def test_a_full_disk_is_a_typed_error_and_no_step(tmp_path, lab):
    lab.save(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ResourceExhausted) as refused:
            lab.save(tmp_path, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.code == "E_DISK_FULL"
    assert refused.value.exit_code == 6
    assert names_in(tmp_path) == ["latest", "step-1"]
    assert lab.save(tmp_path, step=2)


def test_a_directory_that_cannot_be_written_is_the_operators(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as refused, CheckpointWriter(tmp_path / "file", 1):
        pass
    assert refused.value.code == "E_IO"


DYING = """
import os, signal, sys
from pathlib import Path
from checkpoints.parts import bytes_source
from checkpoints.writer import CheckpointWriter

directory, deadly = Path(sys.argv[1]), int(sys.argv[2])
passed = 0

def die(point):
    global passed
    passed += 1
    if passed == deadly:
        os.write(1, point.encode())
        os.kill(os.getpid(), signal.SIGKILL)

with CheckpointWriter(directory, 2, on_point=die) as writer:
    parts = [
        writer.write(name, [bytes_source(name, "U8", (1 << 20,), bytes(1 << 20))])
        for name in ("a", "b")
    ]
    writer.commit(parts, state={})
os.write(1, b"finished")
"""
POINTS = 15


@pytest.mark.slow
def test_killed_at_any_point_leaves_no_step_or_a_whole_one(tmp_path, lab):
    seen = []
    for deadly in range(1, POINTS + 2):
        directory = tmp_path / str(deadly)
        first = lab.save(directory)
        done = subprocess.run(
            [sys.executable, "-c", DYING, str(directory), str(deadly)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        point = done.stdout
        seen.append(point)
        assert done.returncode == (0 if point == "finished" else -signal.SIGKILL)
        published = point in {
            "renamed",
            "step.synced",
            "latest.renamed",
            "finished",
        }
        assert list_steps(directory) == ([1, 2] if published else [1])
        assert verify_checkpoint(directory / "step-1", root=first).ok
        moved = point in {"latest.renamed", "finished"}
        assert (locate(directory).path.name == "step-2") == moved
        assert all(
            verify_checkpoint(directory / f"step-{step}").ok
            for step in list_steps(directory)
        )
        # what the crash left does not stand in the way of the next save
        assert lab.save(directory, step=3 if published else 2)
        assert locate(directory).path.name == ("step-3" if published else "step-2")
    assert seen[-1] == "finished"
    assert len(set(seen)) >= 11  # the points of the two files have the same names


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, lab):
    """Not only at the points we thought of."""
    rng = random.Random(5)
    first = lab.save(tmp_path)
    for step in range(2, 10):
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                DYING.replace("2, on_point", f"{step}, on_point"),
                str(tmp_path),
                "0",
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + rng.uniform(0.05, 0.3)
        while time.monotonic() < deadline and process.poll() is None:
            pass
        process.kill()
        process.wait(timeout=30)
    for step in list_steps(tmp_path):
        assert verify_checkpoint(tmp_path / f"step-{step}").ok
    assert verify_checkpoint(tmp_path / "step-1", root=first).ok
    try:
        assert verify_checkpoint(tmp_path).ok
    except FabricError as error:
        pytest.fail(f"latest is not usable: {error}")
