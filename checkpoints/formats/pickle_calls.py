"""What a foreign pickle may name, and what calling a name gives.

A pickle is a program: it names classes and functions and says which to call. Here a
call runs a function of this file if there is one for the name, and makes a record of
its arguments if the name is on the list; any other name ends the reading. Nothing is
imported, nothing of torch's, numpy's or a training framework's is built.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from checkpoints.dtypes import item_bytes
from checkpoints.formats.pickle_values import (
    DTYPES,
    STORAGES,
    Global,
    OrderedRecord,
    Record,
    StorageRef,
    TensorRef,
    dtype_of,
    integers,
    key_of,
    refuse,
)
from checkpoints.manifest import MAX_DIMS
from fabric.core.errors import IntegrityError


class _View(NamedTuple):
    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def typed(self, dtype: str) -> TensorRef:
        steps = zip(self.shape, self.strides, strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        empty = 0 in self.shape
        if not empty and (self.offset + span) * item_bytes(dtype) > self.storage.size:
            raise IntegrityError(
                f"a tensor of {list(self.shape)} {dtype} in a storage of "
                f"{self.storage.size} B",
                code="E_SIZE",
            )
        return TensorRef(self.storage, dtype, self.offset, self.shape, self.strides)


def _tensor(storage: object, offset: object, shape: object, strides: object) -> _View:
    if not isinstance(storage, StorageRef):
        raise refuse("a tensor without storage")
    (begin,) = integers((offset,))
    view = _View(storage, begin, integers(shape), integers(strides))
    if len(view.shape) != len(view.strides) or len(view.shape) > MAX_DIMS:
        raise IntegrityError(
            f"tensor of {len(view.shape)} dimensions, {len(view.strides)} strides",
            code="E_BOUNDS",
        )
    return view


def _tensor_v2(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object = None,
    _hooks: object = None,
    bits: object = None,
) -> TensorRef:
    if bits:  # a lazy conjugation or negation: the stored elements are not the tensor's
        raise refuse(
            "a tensor with lazy operations", "resolve_conj() it and save again"
        )
    view = _tensor(storage, offset, shape, strides)
    return view.typed(view.storage.dtype)


def _tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _grad: object,
    _hooks: object,
    dtype: object,
    bits: object = None,
) -> TensorRef:
    if bits:
        raise refuse(
            "a tensor with lazy operations", "resolve_conj() it and save again"
        )
    return _tensor(storage, offset, shape, strides).typed(dtype_of(dtype))


def _parameter(data: object, *_rest: object) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise refuse("a parameter that is no tensor")
    return data


def _typed_tensor(make: object, kind: object, args: object, *_rest: object) -> object:
    plain = Global("torch", "Tensor"), Global("torch.nn.parameter", "Parameter")
    if kind not in plain or not isinstance(make, Global) or make.module != _TENSORS:
        raise refuse(f"a tensor of class {kind}")
    call = CALLS.get(make)
    if call is None or not isinstance(args, tuple):
        raise refuse("a tensor made of something else")
    return call(*args)


def _ordered(pairs: object = ()) -> OrderedRecord:
    if not isinstance(pairs, list | tuple):
        raise refuse("an OrderedDict of something else than pairs")
    result = OrderedRecord()
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise refuse("an OrderedDict of something else than pairs")
        result[key_of(pair[0])] = pair[1]
    return result


def _dict(_factory: object = None) -> dict[object, object]:
    return {}


def _counter(counts: object = None) -> dict[object, object]:
    return dict(counts) if isinstance(counts, dict) else {}


def _set(members: object = ()) -> frozenset[object]:
    if not isinstance(members, list | tuple):
        raise refuse("a set of something else than a list")
    return frozenset(key_of(member) for member in members)


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Protocol 2 stores bytes as the text of their code points."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise refuse("bytes in an unknown encoding")
    return text.encode("latin-1")


def _bytes(value: object = b"", encoding: object = "latin1") -> bytes:
    return value if isinstance(value, bytes) else _encode(value, encoding)


_NUMPY_CODES = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
    "b1": "?",
}


def _scalar(dtype: object, data: object = b"") -> object:
    """Return the number that a numpy scalar is."""
    if not isinstance(dtype, Record) or dtype.kind != Global("numpy", "dtype"):
        raise refuse("a numpy scalar without a type")
    code = _NUMPY_CODES.get(str(dtype.args[0])) if dtype.args else None
    order = dtype.state[1] if isinstance(dtype.state, tuple) and dtype.state[1:] else ""
    if code is None or order not in ("<", "|") or not isinstance(data, bytes):
        return Record(Global("numpy", "generic"), (dtype, data))
    if len(data) != struct.calcsize(code):
        raise refuse("a numpy scalar of another size")
    return struct.unpack(f"<{code}", data)[0]


def _size(sizes: object = ()) -> tuple[int, ...]:
    return integers(sizes)


_TENSORS = "torch._utils"
_DCP = "torch.distributed.checkpoint"

CALLS: Mapping[Global, Callable[..., object]] = {
    Global(_TENSORS, "_rebuild_tensor"): _tensor_v2,
    Global(_TENSORS, "_rebuild_tensor_v2"): _tensor_v2,
    Global(_TENSORS, "_rebuild_tensor_v3"): _tensor_v3,
    Global(_TENSORS, "_rebuild_parameter"): _parameter,
    Global(_TENSORS, "_rebuild_parameter_with_state"): _parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): _typed_tensor,
    Global("torch", "Size"): _size,
    Global("collections", "OrderedDict"): _ordered,
    Global("collections", "defaultdict"): _dict,
    Global("collections", "Counter"): _counter,
    Global("_codecs", "encode"): _encode,
    Global("numpy.core.multiarray", "scalar"): _scalar,
    Global("numpy._core.multiarray", "scalar"): _scalar,
    **{
        Global(builtins, name): make
        for builtins in ("builtins", "__builtin__")
        for name, make in (
            ("dict", _dict),
            ("set", _set),
            ("frozenset", _set),
            ("bytes", _bytes),
            ("bytearray", _bytes),
        )
    },
}
"""What calling a name gives: each function makes data of its arguments."""

RECORDS = frozenset(
    Global(module, name)
    for module, names in {
        f"{_DCP}.metadata": "Metadata TensorStorageMetadata BytesStorageMetadata "
        "ChunkStorageMetadata TensorProperties MetadataIndex StorageMeta "
        "_MEM_FORMAT_ENCODING",
        "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties "
        "MEM_FORMAT_ENCODING",
        f"{_DCP}.filesystem": "_StorageInfo _StoragePrefix",
        "torch.serialization": "_get_layout",
        "torch.nn.parameter": "Parameter",
        "torch": f"Tensor device {' '.join(DTYPES)} {' '.join(STORAGES)} "
        "complex32 complex128 ComplexDoubleStorage",
        "torch.storage": "UntypedStorage",
        "pathlib": "Path PosixPath PurePath PurePosixPath WindowsPath PureWindowsPath",
        "pathlib._local": "Path PosixPath PurePath PurePosixPath WindowsPath "
        "PureWindowsPath",
        "argparse": "Namespace",
        "builtins": "complex int float bool str list tuple slice range",
        "__builtin__": "complex int long float bool str unicode list tuple",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct",
        "numpy._core.multiarray": "_reconstruct",
        "deepspeed.runtime.zero.config": "ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler": "LossScaler DynamicLossScaler "
        "LossScalerBase",
    }.items()
    for name in names.split()
)
"""Names that stay names, or become records when they are called."""
