"""Plan a conversion: what of the target comes from where; reads indexes only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from checkpoints.conversion_bundle import Meter, ReaderPool, make_bundle
from checkpoints.cuts import Cut, check_cut
from checkpoints.dtypes import DTYPE_BYTES
from checkpoints.formats.sink import MAX_SHARD_BYTES, Bundle, Plan, Sink, SinkOptions
from checkpoints.formats.source import MODEL, Source
from checkpoints.manifest import Json
from checkpoints.map_route import HUGGINGFACE, route
from checkpoints.mapping import Mapped, apply_map, unmapped
from checkpoints.model_config import MODEL_CONFIG_KEY, read_json_untrusted
from checkpoints.name_maps import load_map
from checkpoints.parts import WINDOW_BYTES
from checkpoints.progress import Progress
from checkpoints.renamed_state import rename_parameters
from fabric.core.errors import ConfigError, IntegrityError

MAX_WORKERS = 16
MAX_TURNED_WORKERS = 2
MAX_MEMORY_BYTES = 64 << 20
"""Of all buffers; with it a conversion stays below its base + 128 MiB."""
MIN_WINDOW_BYTES = 64 << 10
BUFFERS = 3
"""Windows that a thread may hold: one read, one turned or strided, one cast."""


class ConvertOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to convert.

    Attributes:
        to: Name of the format to write.
        from_format: Name of the source's, or empty to find out.
        root: Root id that a canonical source must have, or empty.
        maps: Name maps to apply, in order; empty: what ``form`` needs.
        form: Form of the names wanted; empty: "huggingface" if ``to`` is, else as they
            are.
        config: config.json of the model, for a source that has none.
        dtype: Element type for the model's floats, or empty.
        max_shard_bytes: Tensor bytes per file.
        step: Number of the step, for formats that have one; None: the source's.
        cut: How tensors are dealt to ranks' files, or None.
        workers: Files written at the same time; 0: one for each core.
        max_memory: Bytes of all buffers.
        dry_run: Say what would be done.
    """

    to: str
    from_format: str = ""
    root: str = ""
    maps: tuple[str, ...] = ()
    form: str = ""
    config: Path | None = None
    dtype: str = ""
    max_shard_bytes: int = MAX_SHARD_BYTES
    step: int | None = None
    cut: Cut | None = None
    workers: int = 0
    max_memory: int = MAX_MEMORY_BYTES
    dry_run: bool = False


class Limits(msgspec.Struct, frozen=True):
    """How many threads, and how much memory each takes.

    Attributes:
        workers: Threads.
        window_bytes: Of one buffer.
        turned_bytes: Of one buffer of a turned tensor: each reads across the whole
            source, so few large ones read it less often.
    """

    workers: int
    window_bytes: int
    turned_bytes: int


def limits_of(options: ConvertOptions, *, turned: bool) -> Limits:
    """Return the limits of a conversion.

    Args:
        options: Memory and threads asked for.
        turned: Tensors are turned: threads would not be faster, their buffers smaller.
    """
    workers = options.workers or min(os.cpu_count() or 1, MAX_WORKERS)
    if turned:
        workers = min(workers, MAX_TURNED_WORKERS)
    share = options.max_memory // workers
    return Limits(
        workers,
        max(MIN_WINDOW_BYTES, min(WINDOW_BYTES, share // BUFFERS)),
        max(MIN_WINDOW_BYTES, share // 2),
    )


class Prepared(msgspec.Struct, frozen=True):
    """A conversion that can begin.

    Attributes:
        mapped: The target's tensors as views of the source's.
        bundle: The same, readable.
        plan: The files.
        pool: Reads the source in all threads; to be closed.
        meter: Counts and hashes.
        limits: Threads and memory.
        final: What appears at the end.
    """

    mapped: Mapped
    bundle: Bundle
    plan: Plan
    pool: ReaderPool
    meter: Meter
    limits: Limits
    final: Path


def prepare(
    source: Source,
    sink: Sink,
    target: Path,
    options: ConvertOptions,
    on_progress: Progress,
) -> Prepared:
    """Return the plan of a conversion.

    Raises:
        ConfigError: no such map, or the format cannot hold the tensors.
        IntegrityError: the source is not the one with ``options.root``.
    """
    _check(source, sink, options)
    state = _state(source, options.config)
    mapped = _mapped(source, options, state.get(MODEL_CONFIG_KEY))
    if mapped.maps:
        state = rename_parameters(state, mapped)
    meter = Meter(on_progress)
    turned = any(view.turned for view in mapped.views.values())
    limits = limits_of(options, turned=turned)
    pool = ReaderPool(source)
    bundle = make_bundle(
        source,
        mapped,
        state,
        pool,
        meter,
        window_bytes=limits.window_bytes,
        turned_bytes=limits.turned_bytes,
        dtype=options.dtype,
    )
    sink_options = SinkOptions(
        max_shard_bytes=options.max_shard_bytes,
        step=_step(source, state, options),
        cut=options.cut,
    )
    plan = sink.plan(bundle, sink_options)
    final = target / plan.subdirectory if plan.subdirectory else target
    return Prepared(mapped, bundle, plan, pool, meter, limits, final)


def _check(source: Source, sink: Sink, options: ConvertOptions) -> None:
    if options.dtype and options.dtype not in DTYPE_BYTES:
        raise ConfigError(
            f"no element type {options.dtype!r}",
            code="E_DTYPE",
            next_step="one of F64, F32, F16, BF16",
        )
    if options.cut is not None:
        check_cut(options.cut)
        if not getattr(sink, "takes_cut", False):
            raise ConfigError(
                f"{options.to} is not cut for ranks here",
                code="E_LAYOUT",
                next_step="leave --world and --layout out, or use --to canonical",
            )
    root = getattr(source, "root", "")
    if options.root and options.root != root:
        raise IntegrityError(
            f"{source.path}: root {root or 'none'}, wanted {options.root}",
            code="E_ROOT",
            next_step="the checkpoint was changed, or is another one",
        )


def _state(source: Source, config: Path | None) -> dict[str, Json]:
    state = dict(source.state)
    if config is not None:
        state[MODEL_CONFIG_KEY] = read_json_untrusted(config)
    return state


def _mapped(source: Source, options: ConvertOptions, config: Json) -> Mapped:
    mapped = unmapped(source)
    form = options.form or (HUGGINGFACE if options.to == HUGGINGFACE else "")
    maps = list(options.maps)
    if form and not maps:
        names = [n.removeprefix(MODEL) for n in mapped.views if n.startswith(MODEL)]
        maps = route(source, names, config, form)
    for name in maps:
        apply_map(mapped, name, load_map(name), source, config)
    return mapped


def _step(source: Source, state: Mapping[str, Json], options: ConvertOptions) -> int:
    if options.step is not None:
        return options.step
    manifest = getattr(source, "manifest", None)
    step = manifest.step if manifest is not None else state.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        return 0
    return max(step, 0)
