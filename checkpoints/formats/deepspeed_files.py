"""The files of a DeepSpeed checkpoint, and what can be checked before they are used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from checkpoints.formats.deepspeed_layout import Flat
from checkpoints.formats.pickle_values import Record, TensorRef
from checkpoints.formats.torch_zip import Archive, read_archive
from fabric.core.errors import IntegrityError

Tree = Mapping[object, object]
_Key = TypeVar("_Key")

MAX_FILES = 1 << 16
MAX_NAME_BYTES = 200
MODULES = ("deepspeed",)
"""Objects of DeepSpeed become records of their attributes."""

WHOLE = (
    "save it again without tensor, pipeline or sequence parallelism, or convert it "
    "with DeepSpeed's ds_to_universal.py where you trust it and read the result"
)
REPAIR = "the checkpoint is damaged: fetch it again, or use another copy"
NAMELESS = "optimizer states of experts: without ZeRO the files do not say of which"
SAME_SAVE = "files of two saves are mixed: use another copy"

_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_?optim_states\.pt"
)
_WEIGHTS = re.compile(r"zero_pp_rank_(\d{1,6})_mp_rank_(\d{1,6})_model_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d{1,6})_model_states\.pt")
_EXPERT = re.compile(
    r"layer_(\d{1,6})_expert_(\d{1,6})_mp_rank_(\d{1,6})_model_states\.pt"
)
_EXPERT_OPTIMIZER = re.compile(r"expp_rank_(\d{1,6})_mp_rank_\d{1,6}_optim_states\.pt")
_PIPELINE = re.compile(r"layer_(\d{1,6})-model_(\d{1,6})-model_states\.pt")


class TagFiles(NamedTuple):
    """The files of one tag, by what they are.

    Attributes:
        optimizer: Rank -> file of optimizer states (any stage but 0).
        weights: Rank -> file of model states of stage 3.
        model: File of model states of the other stages, or empty.
        experts: (MoE layer, expert) -> file.
        rest: Files that are not read -> why.
    """

    optimizer: Mapping[int, str]
    weights: Mapping[int, str]
    model: str
    experts: Mapping[tuple[int, int], str]
    rest: Mapping[str, str]


class Loaded(msgspec.Struct, frozen=True):
    """One file's content: a dict, and where its tensors lie."""

    archive: Archive
    tree: Tree

    @property
    def file(self) -> str:
        """Its name."""
        return self.archive.file

    def refuse(self, reason: str, code: str = "E_LAYOUT") -> IntegrityError:
        """Return the error of a file that is not what it should be."""
        return IntegrityError(f"{self.file}: {reason}", code=code, next_step=REPAIR)

    def mapping(self, value: object, what: str) -> Tree:
        """Return ``value`` if it is a dict."""
        if not isinstance(value, dict):
            raise self.refuse(f"no {what} in it")
        return value

    def flat(self, value: object, what: str) -> Flat:
        """Return where a vector lies."""
        if not isinstance(value, TensorRef) or len(value.shape) != 1:
            raise self.refuse(f"{what} is no vector")
        stored = self.archive.stored(value)
        if not stored.extents:
            return Flat(value.dtype, self.file, 0, 0)
        (extent,) = stored.extents
        if extent.strides not in (None, (1,)):
            raise self.refuse(f"{what} is stored with strides {extent.strides}")
        return Flat(value.dtype, self.file, extent.begin, value.shape[0])


def resolve_tag(path: Path, pointer: str) -> Path | None:
    """Return the directory of the tag that ``path``/``pointer`` names, if it does.

    Raises:
        IntegrityError: the name leaves ``path`` (``E_PATH``).
    """
    latest = path / pointer
    if not latest.is_file() or latest.stat().st_size > MAX_NAME_BYTES:
        return None
    name = latest.read_bytes().decode("utf-8", "replace").strip()
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise IntegrityError(
            f"{latest} names {name!r}",
            code="E_PATH",
            next_step="name the directory of the tag itself",
        )
    return path / name


def looks_like_tag(path: Path) -> bool:
    """Return whether a directory has files of DeepSpeed's ZeRO."""
    return any(
        pattern.fullmatch(name)
        for name in list_names(path)
        for pattern in (_OPTIMIZER, _WEIGHTS, _MODEL)
    )


def find_files(tag: Path) -> TagFiles:
    """Sort a tag's files.

    Raises:
        IntegrityError: tensor or pipeline parallel (``E_LAYOUT``), or two files of one
            rank (``E_MIXED``).
    """
    optimizer: dict[int, str] = {}
    weights: dict[int, str] = {}
    model: dict[int, str] = {}
    experts: dict[tuple[int, int], str] = {}
    rest: dict[str, str] = {}
    for name in list_names(tag):
        if match := _OPTIMIZER.fullmatch(name):
            _add(optimizer, int(match[1]), name, int(match[2]))
        elif match := _WEIGHTS.fullmatch(name):
            _add(weights, int(match[1]), name, int(match[2]))
        elif match := _MODEL.fullmatch(name):
            _add(model, 0, name, int(match[1]))
        elif match := _EXPERT.fullmatch(name):
            _add(experts, (int(match[1]), int(match[2])), name, int(match[3]))
        elif _PIPELINE.fullmatch(name):
            raise parallel(f"{name}: a stage of a pipeline")
        else:
            nameless = _EXPERT_OPTIMIZER.fullmatch(name)
            rest[name] = NAMELESS if nameless else "no file of DeepSpeed's checkpoints"
    for ranks, what in ((optimizer, "optimizer"), (weights, "model")):
        missing = sorted(set(range(len(ranks))) - set(ranks))
        if missing:
            raise IntegrityError(
                f"{tag}: no {what} states of rank {missing[0]}",
                code="E_MISSING_FILE",
                next_step="the checkpoint is not whole: fetch the file",
            )
    return TagFiles(optimizer, weights, model.get(0, ""), experts, rest)


def model_files(tag: Path) -> tuple[dict[int, str], dict[str, str], bool]:
    """Return the files of model states of a universal tag.

    Returns:
        Those to read by rank, those not to read with the reason, and whether the model
        was cut by tensor or pipeline parallelism.
    """
    model: dict[int, str] = {}
    weights: dict[int, str] = {}
    unread: dict[str, str] = {}
    cut = False
    for name in list_names(tag):
        if match := _MODEL.fullmatch(name):
            found, rank, part = model, int(match[1]), int(match[1])
        elif match := _WEIGHTS.fullmatch(name):
            found, rank, part = weights, int(match[1]), int(match[2])
        else:
            cut = cut or _PIPELINE.fullmatch(name) is not None
            continue
        cut = cut or part > 0
        if part:
            unread[name] = "a part of a model of which the whole tensors are read"
        else:
            found[rank] = name
    if model:
        unread |= dict.fromkeys(weights.values(), f"the same as {model[0]}")
    return model or weights, unread, cut


def parallel(what: str) -> IntegrityError:
    """Return the error of a layout that is not merged here."""
    return IntegrityError(
        f"{what}: how its tensors were cut is not in the file",
        code="E_LAYOUT",
        next_step=WHOLE,
    )


def load(tag: Path, file: str) -> Loaded:
    """Return a file's content.

    Raises:
        IntegrityError: missing, damaged, hostile, or no dict.
    """
    archive = read_archive(tag, file, modules=MODULES)
    if not isinstance(archive.value, dict):
        raise IntegrityError(f"{file}: no dict", code="E_LAYOUT", next_step=REPAIR)
    return Loaded(archive, archive.value)


def same(what: str, values: Mapping[str, object]) -> None:
    """Pass if all files have the same value.

    Args:
        what: For the message.
        values: By file.

    Raises:
        IntegrityError: they do not (``E_MIXED``).
    """
    (first, *rest) = [(file, plain(value)) for file, value in values.items()]
    for file, value in rest:
        if value != first[1]:
            raise IntegrityError(
                f"{what} is {str(first[1])[:60]} in {first[0]} and "
                f"{str(value)[:60]} in {file}",
                code="E_MIXED",
                next_step=SAME_SAVE,
            )


def plain(value: object) -> object:
    """Return ``value`` in a form that compares by content; tensors by their shape."""
    if isinstance(value, Record):
        return (str(value.kind), plain(value.args), plain(value.state))
    if isinstance(value, TensorRef):
        return (value.dtype, value.shape)
    if isinstance(value, dict):
        return [(plain(key), plain(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def _add(found: dict[_Key, str], key: _Key, name: str, model_rank: int) -> None:
    if model_rank:
        raise parallel(f"{name}: a part of a tensor-parallel model")
    if key in found:
        raise IntegrityError(
            f"{found[key]} and {name} are both there",
            code="E_MIXED",
            next_step=SAME_SAVE,
        )
    found[key] = name


def list_names(path: Path) -> Iterator[str]:
    """Yield the names in a directory, sorted."""
    if not path.is_dir():
        return
    for count, each in enumerate(sorted(path.iterdir())):
        if count >= MAX_FILES:
            raise IntegrityError(
                f"{path}: more than {MAX_FILES} files", code="E_LAYOUT", next_step=WHOLE
            )
        yield each.name
