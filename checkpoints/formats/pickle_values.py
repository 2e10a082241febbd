"""The inert values that a foreign pickle is read into.

A name in a pickle is text (:class:`Global`), what would have been an object is a
:class:`Record`, a tensor is a :class:`TensorRef` to bytes that are elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from typing_extensions import override

from checkpoints.dtypes import item_bytes
from fabric.core.errors import IntegrityError

UNREADABLE = (
    "export the checkpoint as safetensors with the program that wrote it: what is "
    "not data is not read here"
)


class Global(NamedTuple):
    """A name in a pickle, as text."""

    module: str
    name: str

    @override
    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """What would have been an object: its class's name, and what it would be made of.

    Two records are the same only if they are one, so that they can be dictionary keys
    before their state is known.

    Attributes:
        kind: The class, or the function that would have made it.
        args: What it would have been called with.
        state: What would have become its attributes; None if nothing.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: Global, args: tuple[object, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: object = None

    def field(self, name: str) -> object:
        """Return an attribute; None if there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class OrderedRecord(dict[object, object]):
    """An OrderedDict; torch puts the versions of modules into its attributes."""

    attributes: object = None


class StorageRef(msgspec.Struct, frozen=True):
    """A tensor's storage in the archive.

    Attributes:
        dtype: Element type, or empty if it is bytes.
        key: Name of the entry.
        size: Its bytes.
    """

    dtype: str
    key: str
    size: int


class TensorRef(msgspec.Struct, frozen=True):
    """A tensor: a view of a storage; ``offset`` and ``strides`` count elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""torch's names of element types -> ours."""

TORCH_NAMES: Mapping[str, str] = {ours: name for name, ours in DTYPES.items()}

STORAGES: Mapping[str, str] = {
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "ComplexFloatStorage": "C64",
}
"""torch's typed storages -> the type of their elements."""

UNTYPED = Global("torch.storage", "UntypedStorage")


def refuse(reason: str, next_step: str = UNREADABLE) -> IntegrityError:
    """Return the error of a pickle that is not read."""
    return IntegrityError(f"pickle: {reason}", code="E_PICKLE", next_step=next_step)


def dtype_of(value: object) -> str:
    """Return the element type that ``torch.<name>`` names.

    Raises:
        IntegrityError: it names none that is read here.
    """
    if isinstance(value, Global) and value.module == "torch":
        ours = DTYPES.get(value.name)
        if ours:
            return ours
        raise IntegrityError(f"element type {value}", code="E_DTYPE")
    raise refuse("no element type where one belongs")


def storage_of(identity: object) -> StorageRef:
    """Return the storage that a persistent id names."""
    match identity:
        case ("storage", Global() as kind, str(key), str(), int(count)) if count >= 0:
            pass
        case _:
            raise refuse("a reference to something that is no tensor storage")
    if kind == UNTYPED:
        return StorageRef("", key, count)
    dtype = STORAGES.get(kind.name) if kind.module == "torch" else None
    if dtype is None:
        raise IntegrityError(f"tensor storage {kind}", code="E_DTYPE")
    return StorageRef(dtype, key, count * item_bytes(dtype))


def integers(value: object) -> tuple[int, ...]:
    """Return ``value`` if it is a tuple or list of integers >= 0."""
    if isinstance(value, tuple | list) and all(
        type(each) is int and 0 <= each < 2**53 for each in value
    ):
        return tuple(value)
    raise refuse("no list of sizes where one belongs")


def key_of(value: object, depth: int = 0) -> object:
    """Return ``value`` if it can be a dictionary's key.

    Raises:
        IntegrityError: it cannot, or only its hash would be too much work.
    """
    if isinstance(value, tuple) and not isinstance(value, Global):
        if depth > 4:
            raise refuse("a key nested too deep")
        for each in value:
            key_of(each, depth + 1)
    elif not (
        value is None
        or isinstance(value, str | int | float | bytes | Record | Global | frozenset)
    ):
        raise refuse(f"a {type(value).__name__} as a key")
    return value
