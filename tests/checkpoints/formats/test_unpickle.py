"""The machine agrees with pickle about data, and builds nothing else."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import random
import resource
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.formats.pickle_values import DTYPES, Global, Record, TensorRef
from checkpoints.formats.unpickle import Limits, unpickle_untrusted
from fabric.core.errors import IntegrityError

FACTOR = int(os.environ.get("SOAK_FACTOR", "1"))

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
KEYS = st.text(max_size=5) | st.integers() | st.tuples(st.text(max_size=3), st.none())
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.frozensets(SCALARS, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=20,
)


def refusal(data: bytes, code: str = "E_PICKLE", **limits: int) -> str:
    with pytest.raises(IntegrityError) as caught:
        unpickle_untrusted(data, limits=Limits(**limits))
    assert caught.value.code == code
    return caught.value.reason


def outcome(data: bytes) -> str:
    """The code of the refusal; empty for a value."""
    try:
        unpickle_untrusted(data)
    except IntegrityError as error:
        return error.code
    return ""


def data_pkl(value: object, **how: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **how)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


@pytest.mark.slow
@given(VALUES, st.sampled_from([2, 3, 4, 5]))
def test_agrees_with_pickle_about_data(value, protocol) -> None:
    assert unpickle_untrusted(pickle.dumps(value, protocol)) == value


@pytest.mark.slow
@given(VALUES, st.sampled_from([2, 4]), st.randoms(use_true_random=False))
def test_damaged_pickles_are_values_or_refused(value, protocol, rng) -> None:
    good = pickle.dumps(value, protocol)
    for _ in range(10):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        cut = rng.randint(0, len(data)) if rng.random() < 0.3 else len(data)
        assert outcome(bytes(data[:cut])) in ("", "E_PICKLE")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_refused(data) -> None:
    assert outcome(data) in ("", "E_PICKLE")


class Calls:
    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_is_executed(tmp_path, protocol) -> None:
    victim = tmp_path / "pwned"
    for attack in (
        Calls(os.system, (f"touch {victim}",)),
        Calls(eval, (f"open({str(victim)!r}, 'w')",)),
        Calls(getattr, (os, "system")),
        Calls(pathlib.Path.touch, (victim,)),
        Calls(torch.load, (str(victim),)),
        {"fine": 1, "bad": Calls(open, (str(victim), "w"))},
    ):
        try:
            data = pickle.dumps(attack, protocol)
        except TypeError:  # a module has no pickle
            continue
        assert "not on the list" in refusal(data)
    assert not victim.exists()


def test_the_name_refused_is_told() -> None:
    reason = refusal(pickle.dumps(Calls(os.system, ("true",)), 2))
    assert "posix.system" in reason
    assert refusal(b"\x80\x02cfoo\n" + b"x" * 499 + b"\n.").count("x") < 250


def test_what_is_on_the_list_stays_inert(tmp_path) -> None:
    """Names that are allowed make records, whatever they are called with."""
    value = unpickle_untrusted(
        pickle.dumps(
            {
                "args": argparse.Namespace(lr=0.1, dtype=torch.bfloat16),
                "path": pathlib.PurePosixPath("/tmp/x"),
                "device": torch.device("cpu"),
                "size": torch.Size([2, 3]),
            },
            2,
        )
    )
    assert isinstance(value, dict)
    assert type(value["args"]) is Record
    assert value["args"].kind == Global("argparse", "Namespace")
    assert value["args"].field("lr") == 0.1
    assert value["args"].field("dtype") == Global("torch", "bfloat16")
    assert value["path"].kind.name == "PurePosixPath"
    assert value["device"].args == ("cpu",)
    assert value["size"] == (2, 3)


def test_a_module_can_be_allowed_by_the_caller() -> None:
    data = b"\x80\x02cmegatron.core.enums\nAttn\nK\x05\x85R."
    refusal(data)
    value = unpickle_untrusted(data, modules=("megatron",))
    assert isinstance(value, Record)
    assert value.args == (5,)
    refusal(data.replace(b"megatron.core", b"megatronXcore"))


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.int64, np.bool_, np.uint8]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_scalars_are_numbers(dtype, protocol) -> None:
    value = unpickle_untrusted(pickle.dumps(dtype(1.0), protocol))
    assert value == 1
    assert isinstance(value, bool | int | float)


def test_numpy_arrays_are_records() -> None:
    value = unpickle_untrusted(pickle.dumps(np.arange(3), 2))
    assert isinstance(value, Record)
    assert isinstance(value.state, tuple)


@pytest.mark.parametrize(
    "name",
    DTYPES,
)
def test_tensors_of_every_type(name) -> None:
    dtype = getattr(torch, name)
    tensor = torch.zeros(4, 6, dtype=torch.uint8).to(dtype)
    value = unpickle_untrusted(data_pkl({"t": tensor, "v": tensor[1:, ::2].T}))
    assert isinstance(value, dict)
    whole, view = value["t"], value["v"]
    assert isinstance(whole, TensorRef)
    assert isinstance(view, TensorRef)
    assert whole.storage == view.storage
    assert whole.storage.size == tensor.nbytes
    assert (view.offset, view.shape, view.strides) == (6, (3, 3), (2, 6))


def test_parameters_are_tensors() -> None:
    plain, with_state = (
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(2)),
    )
    with_state.extra = 1
    value = unpickle_untrusted(data_pkl([plain, with_state]))
    assert isinstance(value, list)
    assert [each.shape for each in value] == [(2,), (2,)]


def test_tensors_that_are_not_read_are_refused() -> None:
    with warnings.catch_warnings():  # torch will drop these types
        warnings.simplefilter("ignore")
        quantised = data_pkl(
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        )
    assert "_rebuild_qtensor" in refusal(quantised)
    assert "_rebuild_sparse_tensor" in refusal(data_pkl(torch.eye(2).to_sparse()))
    lazy = torch.ones(2, dtype=torch.complex64).conj()
    assert "lazy" in refusal(data_pkl(lazy))
    refusal(data_pkl(torch.ones(2, dtype=torch.complex128)), "E_DTYPE")


def test_lying_tensors_are_refused() -> None:
    good = data_pkl(torch.arange(10.0))
    # storage offset 0 -> 1: one element beyond the storage
    at = good.index(b"QK\x00K\x0a") + 2
    refusal(good[:at] + b"\x01" + good[at + 1 :], "E_SIZE")
    refusal(good.replace(b"QK\x00", b"QJ\xff\xff\xff\xff"))
    # 9 dimensions: the tiling check would be exponential in them
    deep = data_pkl(torch.zeros([1] * 9))
    refusal(deep, "E_BOUNDS")


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(b"\x80\x02" + b"(" * 1000 + b".", id="marks"),
        pytest.param(b"\x80\x02" + b"]" + b"]\x85" * 1000 + b".", id="many results"),
        pytest.param(b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".", id="deep"),
        pytest.param(b"\x80\x02N" + b"\x85" * 20_000 + b".", id="deep tuple"),
        pytest.param(b"\x80\x02}N" + b"\x85" * 100 + b"Ns.", id="deep key"),
        pytest.param(b"\x80\x02]q\x00h\x00a.", id="cycle"),
        pytest.param(b"\x80\x02}q\x00Nh\x00s.", id="cycle in dict"),
        pytest.param(b"\x80\x02]" + b"q\x000]h\x00ah\x00a" * 60 + b".", id="doubling"),
        pytest.param(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"1" * 99 + b".", id="long4"),
        pytest.param(b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", id="integer"),
        pytest.param(b"\x80\x02X\xff\xff\xff\xffabc.", id="text beyond the end"),
        pytest.param(b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.", id="text of 2^64"),
        pytest.param(b"\x80\x02r\xff\xff\xff\xff.", id="memo of nothing"),
        pytest.param(b"\x80\x02}(NNNN" + b"u.", id="same key twice"),
        pytest.param(b"\x80\x02}]Ns.", id="list as key"),
        pytest.param(b"\x80\x02(I1\nt.", id="protocol 0"),
        pytest.param(b"\x80\x02\x82\x01.", id="extension registry"),
        pytest.param(b"\x80\x02NN.", id="two results"),
        pytest.param(b"\x80\x02N.N", id="bytes after the end"),
        pytest.param(b"\x80\x02N", id="no end"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x80\x06N.", id="protocol 6"),
        pytest.param(b"\x80\x02}Nb.", id="attributes of a dict"),
        pytest.param(b"\x80\x02ctorch\nfloat32\n}b.", id="attributes of a name"),
        pytest.param(b"\x80\x02ctorch\nSize\n(NNtR.", id="arity"),
        pytest.param(b"\x80\x02X\x02\x00\x00\x00\xed\xa0.", id="surrogate"),
    ],
)
def test_bombs_are_refused(bomb) -> None:
    refusal(bomb)


@pytest.mark.slow
def test_memory_is_charged_before_it_is_taken() -> None:
    """A megabyte of empty sets would be 200 MB; copies of a copy would be more."""
    refusal(b"\x80\x04(" + b"\x8f" * (1 << 20) + b"t.", memory_factor=64)
    copies = b"h\x00h\x01\x85R" * 100_000
    data = (
        b"\x80\x02cbuiltins\nset\nq\x000]q\x01("
        + b"".join(b"M" + struct.pack("<H", n) for n in range(5000))
        + b"e0("
        + copies
        + b"t."
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(data)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 400 << 10  # KiB


def test_limits_hold() -> None:
    refusal(pickle.dumps([1] * 100), max_bytes=50)
    refusal(pickle.dumps([[1]] * 100), max_nodes=50)
    refusal(pickle.dumps([[[1]]]), max_depth=2)
    unpickle_untrusted(pickle.dumps([[[1]]]), limits=Limits(max_depth=3))


def test_a_real_index_of_random_bytes_swapped_is_a_value_or_refused(tmp_path) -> None:
    good = data_pkl({f"layer{i}": torch.ones(3, 2)[1:] for i in range(5)})
    rng = random.Random(1)
    for _ in range(300 * FACTOR):
        data = bytearray(good)
        a, b = rng.randrange(len(data)), rng.randrange(len(data))
        data[a], data[b] = data[b], data[a]
        code = outcome(bytes(data))
        assert code in ("", "E_PICKLE", "E_SIZE", "E_DTYPE", "E_BOUNDS")
