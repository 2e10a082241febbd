"""Memory stays bounded at any size: sparse files, peak RSS of a process of its own."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOAKING = int(os.environ.get("SOAK_FACTOR", "1")) > 1
GIB = 1 << 30
EXTRA_BYTES = 128 << 20
# VmHWM, not ru_maxrss: a child inherits the peak of the process that forked it
RUN = """
import json, sys
from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from pathlib import Path
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
base = peak()
options = ConvertOptions(**json.loads(sys.argv[3]))
report = convert(Path(sys.argv[1]), Path(sys.argv[2]), options)
print(json.dumps([base, peak(), report.verified, report.copied_bytes, report.seconds]))
"""


def sparse_model(directory, num_bytes, rows_bytes):
    """A model in files of 4 GiB of which only the first bytes of each tensor exist."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "other"}))
    weight_map, number = {}, 0
    for shard in range(-(-num_bytes // (4 * GIB))):
        size = min(4 * GIB, num_bytes - shard * 4 * GIB)
        entries, at = {}, 0
        while at < size:
            name = f"layer.{number}.weight"
            length = min(rows_bytes, size - at)
            shape = [length // 4096 // 4, 4096]
            entries[name] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [at, at + length],
            }
            at += length
            number += 1
        text = json.dumps(entries).encode()
        file = f"part-{shard}.safetensors"
        weight_map |= dict.fromkeys(entries, file)
        with (directory / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            begin = opened.tell()
            for entry in entries.values():
                opened.seek(begin + entry["data_offsets"][0])
                opened.write(os.urandom(4096))
            opened.truncate(begin + size)
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def converted(source, target, **options):
    """Convert in a process of its own: [base, peak, verified, bytes, seconds]."""
    argv = [sys.executable, "-c", RUN, source, target, json.dumps(options)]
    done = subprocess.run(
        list(map(str, argv)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def on_disk(directory):
    """Bytes that the files of a directory take."""
    return sum(p.stat().st_blocks * 512 for p in directory.rglob("*") if p.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("to", ["canonical", "huggingface"])
def test_a_large_checkpoint_converts_in_bounded_memory(tmp_path, to):
    size = (40 if SOAKING else 1) * GIB
    sparse_model(tmp_path / "hf", size, 512 << 20)
    base, peak, verified, copied, _ = converted(
        tmp_path / "hf", tmp_path / "out", to=to
    )
    assert (verified, copied) == (True, size)
    assert peak - base < EXTRA_BYTES
    # the target is sparse too, so that this needs no large disk
    assert on_disk(tmp_path / "out") < size // 16


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 8])
def test_memory_is_bounded_with_many_threads_and_turned_tensors(tmp_path, workers):
    """GPT-2's matrices, each a tensor of 256 MiB that is read across its rows."""
    width = 8192 if SOAKING else 4096
    config = {"model_type": "gpt2", "n_embd": width, "n_head": 16, "vocab_size": 8}
    source = tmp_path / "c"
    subprocess.run(
        [sys.executable, "-c", TURNED, str(source), json.dumps(config), str(width)],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    base, peak, verified, _, _ = converted(
        source, tmp_path / "out", to="canonical", form="linear", workers=workers
    )
    assert verified
    assert peak - base < EXTRA_BYTES


TURNED = """
import json, sys
from pathlib import Path
from checkpoints.boxes import whole
from checkpoints.parts import ChunkSource
from checkpoints.writer import CheckpointWriter
width = int(sys.argv[3])
shape = (width, 4 * width)
def rows():
    for row in range(width):
        yield row.to_bytes(4, "little") * (4 * width)
with CheckpointWriter(Path(sys.argv[1]), 0) as writer:
    name = "model/transformer.h.0.mlp.c_fc.weight"
    chunk = ChunkSource(name, "U32", shape, whole(shape), rows)
    state = {"model_config": json.loads(sys.argv[2])}
    writer.commit([writer.write("w", [chunk])], state=state)
"""
