"""Small checkpoints made of bytes, without torch."""

import random
from math import prod

import pytest

from checkpoints.boxes import Box
from checkpoints.dtypes import tensor_bytes
from checkpoints.parts import bytes_source
from checkpoints.writer import CheckpointWriter


def content(name, dtype, shape):
    """The bytes of a tensor, a function of its name."""
    return random.Random(name).randbytes(tensor_bytes(dtype, shape))


def cut(data, shape, box, item):
    """The bytes of one box, the slow and obvious way: element by element."""
    out = bytearray()
    for flat in range(prod(box.sizes)):
        at, rest = 0, flat
        index = []
        for size in reversed(box.sizes):
            rest, here = divmod(rest, size)
            index.append(here)
        for offset, here, extent in zip(
            box.offsets, reversed(index), shape, strict=True
        ):
            at = at * extent + offset + here
        out += data[at * item : (at + 1) * item]
    return bytes(out)


def save(directory, step=1, **more):
    """Save one step of 2 MiB: rows over two writers, a whole, an empty, a scalar."""
    rows = content("model/rows", "F32", (512, 1024))
    half = len(rows) // 2
    with CheckpointWriter(directory, step) as writer:
        first = writer.write(
            "rank0",
            [
                bytes_source(
                    "model/rows",
                    "F32",
                    (512, 1024),
                    rows[:half],
                    Box((0, 0), (256, 1024)),
                ),
                bytes_source("model/bias", "BF16", (3,), content("b", "BF16", (3,))),
                bytes_source("model/none", "I64", (0, 4), b""),
                bytes_source("outer/count", "U8", (), b"\x07"),
            ],
        )
        second = writer.write(
            "rank1",
            [
                bytes_source(
                    "model/rows",
                    "F32",
                    (512, 1024),
                    rows[half:],
                    Box((256, 0), (256, 1024)),
                )
            ],
        )
        return writer.commit(
            [first, second],
            state={"round": step, "lr": 0.7, "note": "\u00e9", **more},
            aliases={"model/tied": "model/rows"},
            layout={"writers": 2},
        )


@pytest.fixture(scope="session")
def lab():
    """The functions above, for tests."""

    class Lab:
        content = staticmethod(content)
        cut = staticmethod(cut)
        save = staticmethod(save)

    return Lab
