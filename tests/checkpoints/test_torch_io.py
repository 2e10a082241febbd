"""Torch tensors in and out of the canonical format, bit for bit."""

import pytest

torch = pytest.importorskip("torch")

from checkpoints.reader import CheckpointReader  # noqa: E402
from checkpoints.torch_io.tensors import (  # noqa: E402
    DTYPES,
    byte_view,
    load_tensors,
    read_into,
    save_tensors,
)
from fabric.core.errors import ConfigError  # noqa: E402

pytestmark = pytest.mark.slow  # importing torch alone takes seconds


def same(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(byte_view(a.contiguous())) == bytes(byte_view(b.contiguous()))
    )


def random_tensor(dtype, shape):
    size = torch.empty((), dtype=dtype).element_size()
    count = 1
    for extent in shape:
        count *= extent
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (count * size,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def test_every_type_and_shape_returns_bit_equal(tmp_path):
    tensors = {
        f"{name}/{'x'.join(map(str, shape)) or 'scalar'}": random_tensor(dtype, shape)
        for name, dtype in DTYPES.items()
        for shape in [(), (1,), (0, 3), (7, 5), (2, 3, 4)]
    }
    save_tensors(tmp_path, 1, tensors, {"note": 1})
    loaded = load_tensors(tmp_path)
    assert loaded.keys() == tensors.keys()
    assert all(same(tensors[name], loaded[name]) for name in tensors)
    assert all(t.data_ptr() % 64 == 0 for t in loaded.values() if t.numel())


def test_views_and_ties(tmp_path):
    base = torch.randn(6, 4)
    tensors = {"a": base, "b": base, "t": base.T, "part": base[2:4]}
    save_tensors(tmp_path, 1, tensors, {}, aliases={"c": "a"})
    with CheckpointReader(tmp_path) as reader:
        assert reader.manifest.aliases == {"b": "a", "c": "a"}
        assert sorted(reader.manifest.tensors) == ["a", "part", "t"]
    loaded = load_tensors(tmp_path)
    assert loaded["b"] is loaded["a"] is loaded["c"]
    assert same(loaded["t"], base.T.contiguous())
    assert same(loaded["part"], base[2:4])


def test_loads_names_and_boxes_and_never_casts(tmp_path):
    tensors = {"w": torch.arange(35.0).reshape(7, 5), "v": torch.zeros(3)}
    root = save_tensors(tmp_path, 1, tensors, {})
    assert list(load_tensors(tmp_path / "step-1", ["w"], root=root)) == ["w"]
    with CheckpointReader(tmp_path) as reader:
        out = torch.empty(3, 2)
        read_into(reader, "w", out, (2, 1))
        assert torch.equal(out, tensors["w"][2:5, 1:3])
        with pytest.raises(ConfigError) as refused:
            read_into(reader, "w", torch.empty(7, 5, dtype=torch.bfloat16))
    assert refused.value.code == "E_DTYPE"
    with pytest.raises(ConfigError) as refused:
        load_tensors(tmp_path, ["missing"])
    assert refused.value.code == "E_NO_TENSOR"
