"""The door for manifests: canonical, complete, bounded; typed errors only."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_STATE_DEPTH,
    Chunk,
    FileEntry,
    Manifest,
    TensorEntry,
    encode_manifest,
    root_of,
)
from checkpoints.manifest_checks import check_manifest, load_manifest_untrusted
from fabric.core.errors import ConfigError, FabricError, IntegrityError

ZERO = "0" * 64
FILE = "w-0.safetensors"


def manifest(**changes):
    fields = {
        "format": "fabric-checkpoint",
        "version": 1,
        "step": 3,
        "tensors": {
            "a": TensorEntry(
                "F32",
                (4, 2),
                (
                    Chunk((0, 0), (2, 2), FILE, 64, 80),
                    Chunk((2, 0), (2, 2), FILE, 80, 96),
                ),
            )
        },
        "files": {FILE: FileEntry(96, ZERO, (ZERO,))},
        "aliases": {"b": "a"},
        "state": {"x": [1, 2.0, None, True, "\u00e9"]},
        "layout": {},
        "parent": "",
    }
    return Manifest(**{**fields, **changes})


def tensor(*chunks, dtype="F32", shape=(4, 2)):
    return {"a": TensorEntry(dtype, shape, chunks)}


def refused(data):
    with pytest.raises(IntegrityError) as caught:
        load_manifest_untrusted(data)
    return caught.value.code


def test_round_trip_is_canonical():
    data = encode_manifest(manifest())
    assert load_manifest_untrusted(data) == manifest()
    text = data.decode("ascii")
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert root_of(data) == root_of(encode_manifest(manifest()))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('ab\u00e9"'), inner),
    max_leaves=10,
)


@settings(max_examples=25)
@given(st.dictionaries(st.text("abc"), json_values))
def test_any_json_state_returns_with_its_types(state):
    loaded = load_manifest_untrusted(encode_manifest(manifest(state=state))).state
    assert json.dumps(loaded, sort_keys=True) == json.dumps(state, sort_keys=True)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 2**63, b"bytes", {1: 2}, {1, 2}, object(), "\ud800"],
    ids=lambda value: "object" if type(value) is object else repr(value),
)
def test_state_that_is_not_json_is_refused(value):
    with pytest.raises(ValueError, match=r"."):
        encode_manifest(manifest(state={"x": value}))


def test_deep_state_is_refused_both_ways():
    deep = []
    for _ in range(MAX_STATE_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="deeper"):
        encode_manifest(manifest(state={"x": deep}))
    text = encode_manifest(manifest(state={"x": "HERE"})).decode()
    for depth in (40, 100_000):
        assert refused(text.replace('"HERE"', "[" * depth + "]" * depth).encode())


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("E_TILING", {"tensors": tensor(Chunk((0, 0), (2, 2), FILE, 64, 80))}),
        (
            "E_TILING",
            {
                "tensors": tensor(
                    Chunk((0, 0), (4, 2), FILE, 32, 64),
                    Chunk((2, 0), (2, 2), FILE, 80, 96),
                )
            },
        ),
        ("E_TILING", {"tensors": tensor()}),
        ("E_BOUNDS", {"tensors": tensor(Chunk((0, 0), (5, 2), FILE, 0, 40))}),
        ("E_BOUNDS", {"tensors": tensor(Chunk((0, 0), (4, 2), FILE, 80, 112))}),
        ("E_BOUNDS", {"tensors": tensor(Chunk((0, 0), (4, 2), FILE, 0, 31))}),
        ("E_BOUNDS", {"tensors": tensor(Chunk((0,), (4,), FILE, 0, 16))}),
        ("E_BOUNDS", {"tensors": tensor(Chunk((0, 0), (0, 2), FILE, 0, 0))}),
        ("E_BOUNDS", {"files": {}}),
        ("E_DTYPE", {"tensors": tensor(dtype="F31")}),
        ("E_BLOCKS", {"files": {FILE: FileEntry(96, ZERO, ())}}),
        ("E_ALIAS", {"aliases": {"b": "c"}}),
        ("E_ALIAS", {"aliases": {"a": "a"}}),
        ("E_NAME", {"aliases": {"b\n": "a"}}),
        (
            "E_BYTES_SHARED",
            {
                "tensors": {
                    **tensor(Chunk((0, 0), (4, 2), FILE, 32, 64)),
                    "c": TensorEntry("U8", (2,), (Chunk((0,), (2,), FILE, 63, 65),)),
                }
            },
        ),
    ],
)
def test_inconsistent_manifests_are_refused(code, changes):
    assert refused(encode_manifest(manifest(**changes))) == code


@pytest.mark.parametrize(
    "name",
    [
        "../w.safetensors",
        "/w.safetensors",
        "a/w.safetensors",
        "a\\w.safetensors",
        ".w.safetensors",
        "w.safetensors\n",
        "w.bin",
        "",
        "..",
        "w\x00.safetensors",
    ],
)
def test_file_names_cannot_leave_the_directory(name):
    data = encode_manifest(manifest(files={name: FileEntry(0, ZERO, ())}, tensors={}))
    assert refused(data) in {"E_FILE_NAME", "E_MANIFEST"}


def edit(change):
    value = json.loads(encode_manifest(manifest()))
    change(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"{" * 100_000,
        b"[" * 1_000_000,
        encode_manifest(manifest())[:-1],
        encode_manifest(manifest()) + b"\n",
        encode_manifest(manifest()).replace(b'"step":3', b'"step":3,"step":3'),
        encode_manifest(manifest()).replace(b'"step":3', b'"step": 3'),
        encode_manifest(manifest()).replace(b'"x":[1', b'"x":[1e999'),
        encode_manifest(manifest()).replace(b'"x":[1', b'"x":[' + b"9" * 5000),
        b" " * (MAX_MANIFEST_BYTES + 1),
        edit(lambda value: value.update(extra=1)),
        edit(lambda value: value.pop("parent")),
        edit(lambda value: value.update(format="other")),
        edit(lambda value: value.update(step=-1)),
        edit(lambda value: value.update(parent="zz")),
        edit(lambda value: value["tensors"]["a"].update(shape=[1] * 9)),
        edit(lambda value: value["tensors"]["a"].update(shape=[2**60])),
    ],
    ids=range(20),
)
def test_nasty_bytes_are_refused(data):
    assert refused(data) == "E_MANIFEST"


def test_a_newer_version_says_so():
    with pytest.raises(ConfigError) as caught:
        load_manifest_untrusted(edit(lambda value: value.update(version=2)))
    assert caught.value.code == "E_VERSION"


@given(st.binary() | st.binary().map(lambda tail: b'{"format":"fabric-ch' + tail))
def test_arbitrary_bytes_give_typed_errors(data):
    with pytest.raises(FabricError):
        load_manifest_untrusted(data)


@given(st.data())
def test_one_changed_byte_is_refused_or_another_root(data):
    good = encode_manifest(manifest())
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        load_manifest_untrusted(bytes(changed))
    except FabricError:
        return
    assert root_of(bytes(changed)) != root_of(good)


def test_too_many_blocks_are_refused():
    blocks = (ZERO,) * 100_001
    big = FileEntry(len(blocks) << 20, ZERO, blocks)
    with pytest.raises(FabricError) as caught:
        check_manifest(manifest(files={FILE: big}))
    assert caught.value.code == "E_BLOCKS"
    assert caught.value.exit_code == 6


def test_the_schema_is_current():
    schema = Path(__file__).parents[2] / "docs/checkpoint-manifest.schema.json"
    assert json.loads(schema.read_text()) == msgspec.json.schema(Manifest)
