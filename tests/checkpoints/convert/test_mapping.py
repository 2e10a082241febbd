"""Views and maps: any box of any composition, and every refusal."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.boxes import Box, whole
from checkpoints.conversion import convert
from checkpoints.conversion_plan import ConvertOptions
from checkpoints.mapping import apply_map, unmapped
from checkpoints.model_numbers import ModelNumbers
from checkpoints.name_maps import NameMap, Pattern, Rule, load_map, map_names
from checkpoints.parts import bytes_source
from checkpoints.reader import CheckpointReader
from checkpoints.views import ViewReader
from checkpoints.writer import CheckpointWriter
from fabric.core.errors import ConfigError

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 6,
}
LAYER = "model.layers.0.self_attn."


def save(directory, arrays, state=None):
    kinds = {"<f4": "F32", "<u2": "U16"}
    sources = [
        bytes_source(name, kinds[each.dtype.str], each.shape, each.tobytes())
        for name, each in arrays.items()
    ]
    with CheckpointWriter(directory, 0) as writer:
        writer.commit([writer.write("w", sources)], state=state or {})
    return directory


def rule(**more):
    return Rule(parts=["p.{E}.a", "p.{E}.b"], whole=["w"], **more)


def one_map(each):
    return NameMap("test", [], "parts", "whole", [each])


@pytest.mark.slow
@given(
    experts=st.integers(1, 3),
    groups=st.integers(1, 3),
    rows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    columns=st.integers(1, 4),
    turned=st.booleans(),
    data=st.data(),
)
def test_any_box_of_a_merged_tensor_and_back(
    tmp_path_factory, experts, groups, rows, columns, turned, data
):
    """Stacked, interleaved and turned at once, against numpy."""
    base = tmp_path_factory.mktemp("map")
    rng = np.random.default_rng(0)
    parts = {
        f"model/p.{e}.{name}": rng.integers(
            0, 60000, (groups * count, columns), dtype="<u2"
        )
        for e in range(experts)
        for name, count in zip("ab", rows, strict=True)
    }
    whole_array = np.stack(
        [
            np.concatenate(
                [
                    parts[f"model/p.{e}.{name}"].reshape(groups, -1, columns)
                    for name in "ab"
                ],
                axis=1,
            ).reshape(-1, columns)
            for e in range(experts)
        ]
    )
    if turned:
        whole_array = whole_array.transpose(0, 2, 1)
    formulas = [f"{groups * count}" for count in rows]
    chosen = one_map(rule(rows=formulas, groups=str(groups), turned=turned))
    save(base / "parts", parts)
    save(base / "whole", {"model/w": np.ascontiguousarray(whole_array)})
    with CheckpointReader(base / "parts") as source:
        mapped = unmapped(source)
        apply_map(mapped, "test", chosen, source, None)
        check_view(source, mapped.views["model/w"], whole_array, data)
        # there and back in one go: views of views
        apply_map(mapped, "test", chosen, source, None)
        for name, array in parts.items():
            check_view(source, mapped.views[name], array, data)
    with CheckpointReader(base / "whole") as source:
        mapped = unmapped(source)
        apply_map(mapped, "test", chosen, source, None)
        assert mapped.views.keys() == parts.keys()
        for name, array in parts.items():
            check_view(source, mapped.views[name], array, data)


def check_view(source, view, array, data):
    assert view.shape == array.shape
    reader = ViewReader(source)
    window = data.draw(st.integers(2, 40))
    found = b"".join(map(bytes, reader.windows(view, whole(view.shape), window)))
    assert found == array.tobytes()
    spans = [
        sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
        for n in view.shape
    ]
    box = Box(tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    cut = array[tuple(slice(a, b) for a, b in spans)]
    assert b"".join(map(bytes, reader.windows(view, box, window))) == cut.tobytes()


def refused(directory, **options):
    with pytest.raises(ConfigError) as error:
        convert(
            directory,
            directory.parent / "out",
            ConvertOptions(to="canonical", **options),
        )
    assert error.value.next_step
    assert not (directory.parent / "out/step-0").exists()
    return error.value.code


def qkv(rows=(8, 4, 4)):
    return {
        f"model/{LAYER}{name}_proj.weight": np.ones((count, 8), "<f4")
        for name, count in zip("qkv", rows, strict=True)
    }


def test_refusals(tmp_path):
    state = {"model_config": CONFIG}
    some = qkv()
    del some[f"model/{LAYER}k_proj.weight"]
    cases = [
        (some, {"maps": ("fused",)}, "E_MAP_INCOMPLETE"),
        ({"model/other": np.ones(3, "<f4")}, {"maps": ("fused",)}, "E_MAP_NONE"),
        (qkv(), {"maps": ("nothing",)}, "E_MAP"),
        (qkv(), {"maps": (str(tmp_path / "no.toml"),)}, "E_MAP"),
        (qkv(), {"form": "nothing"}, "E_MAP"),
        (
            qkv() | {f"model/{LAYER}qkv_proj.weight": np.ones((16, 8), "<f4")},
            {"maps": ("fused",)},
            "E_MAP_MIXED",
        ),
        (
            qkv() | {"model/unknown": np.ones(3, "<f4")},
            {"maps": ("megatron-llama",)},
            "E_MAP_UNKNOWN",
        ),
        (qkv((8, 4, 3)), {"maps": ("megatron-llama",)}, "E_MAP_SHAPE"),
        (
            {f"model/{LAYER}qkv_proj.weight": np.ones((15, 8), "<f4")},
            {"maps": ("fused",)},
            "E_MAP_SHAPE",
        ),
    ]
    for number, (arrays, options, code) in enumerate(cases):
        directory = save(tmp_path / str(number) / "c", arrays, state)
        assert refused(directory, **options) == code, (number, options)
    directory = save(tmp_path / "x/c", qkv(), {})
    assert refused(directory, form="megatron") == "E_MODEL_CONFIG"
    fused = {f"model/{LAYER}qkv_proj.weight": np.ones((16, 8), "<f4")}
    assert refused(save(tmp_path / "y/c", fused), maps=("fused",)) == "E_MODEL_CONFIG"


def test_values_of_merged_parameters_must_be_equal(tmp_path):
    def steps(*values):
        return {
            f"optimizer/step/{LAYER}{name}_proj.weight": np.array(value, "<f4")
            for name, value in zip("qkv", values, strict=True)
        }

    state = {"model_config": CONFIG}
    bad = save(tmp_path / "bad/c", qkv() | steps(3, 4, 3), state)
    assert refused(bad, maps=("fused",)) == "E_MAP_VALUES"
    good = save(tmp_path / "good/c", qkv() | steps(3, 3, 3), state)
    options = ConvertOptions(to="canonical", maps=("fused",))
    report = convert(good, tmp_path / "good/out", options)
    outcome = {each.source: each for each in report.tensors}
    kept = outcome[f"optimizer/step/{LAYER}k_proj.weight"]
    assert (kept.action, kept.targets) == (
        "merged",
        (f"optimizer/step/{LAYER}qkv_proj.weight",),
    )
    assert "equal" in kept.reason
    with CheckpointReader(tmp_path / "good/out") as reader:
        value = reader.read_tensor(f"optimizer/step/{LAYER}qkv_proj.weight")
    assert struct.unpack("<f", value) == (3.0,)


def test_a_config_file_stands_in(tmp_path):
    directory = save(tmp_path / "c", qkv())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    options = ConvertOptions(
        to="canonical", form="fused", config=tmp_path / "config.json"
    )
    report = convert(directory, tmp_path / "out", options)
    assert report.maps == ["fused"]
    assert {each.action for each in report.tensors} == {"merged"}


def test_a_map_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(
        'title = "t"\nmodel_types = []\nparts_form = "a"\nwhole_form = "b"\n'
        '[[rules]]\nparts = ["x.{L}.w"]\nwhole = "y.{L}.w"\n'
    )
    directory = save(tmp_path / "c", {"model/x.3.w": np.ones(2, "<f4")})
    options = ConvertOptions(to="canonical", maps=(str(tmp_path / "mine.toml"),))
    report = convert(directory, tmp_path / "out", options)
    assert report.tensors[0].targets == ("model/y.3.w",)
    (tmp_path / "mine.toml").write_text("title = 3")
    directory = save(tmp_path / "d/c", {"model/x.3.w": np.ones(2, "<f4")})
    assert refused(directory, maps=(str(tmp_path / "mine.toml"),)) == "E_MAP"


@pytest.mark.parametrize("name", map_names())
def test_patterns_of_a_map_are_unambiguous(name):
    """No name is a part of two rules, or the whole of two."""
    chosen = load_map(name)
    values = {"L": "7", "E": "3", "W": "weight"}
    for side in ("part_patterns", "whole_patterns"):
        patterns = [p for each in chosen.rules for p in getattr(each, side)()]
        for pattern in patterns:
            sample = pattern.name(values)
            assert [p.text for p in patterns if p.fits(sample)] == [pattern.text]


def test_patterns():
    pattern = Pattern("a.{L}.b{E}")
    assert pattern.match("a.10.b0") == {"L": "10", "E": "0"}
    for wrong in ("a.01.b0", "a..b0", "xa.1.b0", "a.1.b0x", "a.1000000.b0"):
        assert pattern.match(wrong) is None


def test_numbers():
    numbers = ModelNumbers({"a": 6, "b": 4, "n": None}, {"n": "a * b / 8", "x": "x"})
    assert numbers.value("2 * a + b") == 16
    assert numbers.value("n") == 3
    for wrong in ("a / b", "missing", "x", "a * 1000000 * 1000000", "a - b", "a b"):
        with pytest.raises(ConfigError):
            print(wrong, numbers.value(wrong))
