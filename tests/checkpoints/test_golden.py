"""Checkpoints written by released versions load for ever, byte for byte.

``golden/v1`` was written once by :func:`save_golden` and is never regenerated: a change
that makes these tests fail needs a new format version.
"""

import struct
from pathlib import Path

import pytest

from checkpoints.boxes import Box
from checkpoints.dtypes import DTYPE_BYTES
from checkpoints.manifest_checks import load_manifest_untrusted
from checkpoints.parts import bytes_source
from checkpoints.reader import CheckpointReader
from checkpoints.verification import verify_checkpoint
from checkpoints.writer import CheckpointWriter

GOLDEN = Path(__file__).parent / "golden/v1"
ROOT = "516fb1620f720e09238e5ed4a933dbcb1d30ea736834651faf75f2550c413305"
STATE = {
    "model_config": {"model_type": "llama", "rope_theta": 10000.0},
    "numbers": [0, -1, 2**63 - 1, -(2**63), 0.1, 1e20, -0.0, 5e-324],
    "text": '\u00e9\u4e16\U0001f600 "\\/\n\x7f',
    "nothing": None,
    "yes": True,
}
SPLIT = struct.pack("<12f", *range(12))


def raw(dtype):
    """Three elements of a type; a BOOL is 0 or 1."""
    count = 3 * DTYPE_BYTES[dtype]
    return bytes([1, 0, 1]) if dtype == "BOOL" else bytes(range(count))


def save_golden(directory):
    """Write the golden step: every type, a tensor in three boxes, an empty one."""
    rows = [SPLIT[:16], SPLIT[16:]]
    left = b"".join(rows[1][k : k + 8] for k in (0, 16))
    right = b"".join(rows[1][k : k + 8] for k in (8, 24))
    boxes = [
        (Box((0, 0), (1, 4)), rows[0]),
        (Box((1, 0), (2, 2)), left),
        (Box((1, 2), (2, 2)), right),
    ]
    split = [bytes_source("model/w", "F32", (3, 4), data, box) for box, data in boxes]
    each = [
        bytes_source(f"types/{dtype}", dtype, (3,), raw(dtype)) for dtype in DTYPE_BYTES
    ]
    scalar = bytes_source("outer/scalar", "I64", (), struct.pack("<q", -2))
    empty = bytes_source("outer/empty", "BF16", (2, 0), b"")
    with CheckpointWriter(directory, 7) as writer:
        parts = [
            writer.write("rank0", [*each, split[0], scalar]),
            writer.write("rank1", [split[2], split[1], empty]),
        ]
        return writer.commit(
            parts,
            state=STATE,
            aliases={"model/tied": "model/w"},
            layout={"world_size": 2},
            parent="0" * 63 + "1",
        )


def test_version_1_verifies():
    report = verify_checkpoint(GOLDEN, root=ROOT)
    assert report.findings == []
    assert report.tensors == 3 + len(DTYPE_BYTES)


def test_version_1_loads():
    with CheckpointReader(GOLDEN / "step-7", root=ROOT) as reader:
        assert reader.read_tensor("model/w") == SPLIT
        assert reader.read_tensor("model/tied") == SPLIT
        assert reader.read_tensor("outer/scalar") == struct.pack("<q", -2)
        assert reader.entry("outer/empty").shape == (2, 0)
        for dtype in DTYPE_BYTES:
            assert reader.read_tensor(f"types/{dtype}") == raw(dtype)
        assert repr(reader.manifest.state) == repr(dict(sorted(STATE.items())))
        assert reader.manifest.layout == {"world_size": 2}
        assert reader.manifest.parent == "0" * 63 + "1"


def test_version_1_is_still_written_the_same(tmp_path):
    assert save_golden(tmp_path) == ROOT
    for path in sorted((GOLDEN / "step-7").iterdir()):
        assert (tmp_path / "step-7" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_safetensors_opens_the_files():
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    first = library.load_file(GOLDEN / "step-7/rank0-0.safetensors")
    assert torch.equal(first["model/w@0,0"], torch.arange(4.0)[None])
    assert first["types/F8_E4M3"].dtype == torch.float8_e4m3fn
    second = library.load_file(GOLDEN / "step-7/rank1-0.safetensors")
    assert second["model/w@1,2"].tolist() == [[6.0, 7.0], [10.0, 11.0]]
    data = (GOLDEN / "step-7/manifest.json").read_bytes()
    assert load_manifest_untrusted(data).step == 7
