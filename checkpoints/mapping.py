"""Make the tensors of one form from those of another: plans views, reads no weight.

Every tensor of an optimizer that has the shape of its parameter goes the way of the
parameter; one value per parameter (a step count) is copied to what a parameter is split
into, and must be the same in what is merged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from checkpoints.boxes import Box, Index, tiling_fault
from checkpoints.dtypes import tensor_bytes
from checkpoints.formats.source import MODEL, OPTIMIZER, Ignored, Source
from checkpoints.manifest import Json
from checkpoints.model_numbers import ModelNumbers
from checkpoints.name_maps import STACKABLE, NameMap, Pattern, Rule
from checkpoints.rule_geometry import Link, indices, links_of, rows_of
from checkpoints.views import Piece, View, through, view_from, view_of
from fabric.core.errors import ConfigError, LocalProtocolError


class Mapped(msgspec.Struct, kw_only=True):
    """What a map made of a source.

    Attributes:
        views: Every tensor of the result, by canonical name.
        copies: Name of the source -> the one value of several parameters that is kept
            in another's place, because it equals it.
        ignored: What has no counterpart, and padding.
        maps: Names of the maps, in order.
    """

    views: dict[str, View]
    copies: dict[str, str] = {}
    ignored: list[Ignored] = []
    maps: list[str] = []


def unmapped(source: Source) -> Mapped:
    """Return every tensor and alias as it is."""
    return Mapped(
        views={name: view_of(name, source.entry(name)) for name in source.names()}
    )


def apply_map(
    mapped: Mapped, name: str, chosen: NameMap, source: Source, config: Json
) -> None:
    """Bring ``mapped`` into the other form of a map, in place.

    Args:
        mapped: What was made of ``source`` so far.
        name: The map's, for messages.
        chosen: The map.
        source: Read for single values only.
        config: The model's config.json, or None.

    Raises:
        ConfigError: ``E_MAP_*``: the tensors are not those of either form, or some are
            missing or of a shape that the map does not fit.
    """
    form = chosen.form_of({key.rpartition("/")[2] for key in mapped.views})
    if not form:
        raise ConfigError(
            f"no tensor has a name that map {name!r} knows",
            code="E_MAP_NONE",
            next_step="`fabric-ckpt inspect --tensors` lists the names",
        )
    numbers = ModelNumbers(config if isinstance(config, dict) else {}, chosen.numbers)
    sections: dict[str, dict[str, View]] = defaultdict(dict)
    for key, view in mapped.views.items():
        section, _, fqn = key.rpartition("/")
        sections[section][fqn] = view
    result: dict[str, View] = {}
    for section, views in sections.items():
        to_whole = form == chosen.parts_form
        job = _Section(chosen, section, views, numbers, source, to_whole=to_whole)
        job.run()
        result |= job.result
        mapped.copies |= job.copies
        mapped.ignored += job.ignored
    mapped.views = result
    mapped.maps.append(name)


class _Binding(NamedTuple):
    """One use of a rule.

    Attributes:
        rule: The rule.
        whole_name: Name of the whole.
        parts: Indices along the stacked axes, number of the part -> name.
        stack: Extents of the stacked axes.
    """

    rule: Rule
    whole_name: str
    parts: Mapping[tuple[Index, int], str]
    stack: Index


class _Section:
    """The tensors of one section (the model, or one slot of the optimizer)."""

    def __init__(
        self,
        chosen: NameMap,
        section: str,
        views: Mapping[str, View],
        numbers: ModelNumbers,
        source: Source,
        *,
        to_whole: bool,
    ) -> None:
        self.result: dict[str, View] = {}
        self.copies: dict[str, str] = {}
        self.ignored: list[Ignored] = []
        self._map = chosen
        self._prefix = f"{section}/" if section else ""
        self._views = views
        self._numbers = numbers
        self._source = source
        self._to_whole = to_whole
        self._used: set[str] = set()

    def run(self) -> None:
        """Fill in the result."""
        for rule in self._map.rules:
            for binding in self._bindings(rule):
                if self._to_whole:
                    self._merge(binding)
                else:
                    self._split(binding)
        for name in self._views.keys() - self._used:
            reason = self._map.ignored(name)
            if reason is not None:
                key = self._prefix + name
                self.ignored.append(Ignored(key, reason.reason))
            elif self._map.complete and self._prefix.startswith((MODEL, OPTIMIZER)):
                raise _refusal("UNKNOWN", f"{name!r} is no tensor that the map knows")
            else:
                self._put(name, self._views[name])

    def _bindings(self, rule: Rule) -> Iterator[_Binding]:
        if self._to_whole:
            yield from self._bindings_of_parts(rule)
            return
        for pattern in rule.whole_patterns():
            for name in sorted(self._views.keys() - self._used):
                values = pattern.match(name)
                if values is not None:
                    yield self._binding_of_whole(rule, pattern, name, values)

    def _bindings_of_parts(self, rule: Rule) -> Iterator[_Binding]:
        target = rule.whole_patterns()[0]
        found: dict[str, dict[tuple[Index, int], str]] = defaultdict(dict)
        for number, pattern in enumerate(rule.part_patterns()):
            holes = [hole for hole in STACKABLE if hole in pattern.holes - target.holes]
            for name in self._views.keys() - self._used:
                values = pattern.match(name)
                if values is not None:
                    index = tuple(int(values[hole]) for hole in holes)
                    found[target.name(values)][index, number] = name
        for whole_name, parts in sorted(found.items()):
            indices = [index for index, _ in parts]
            stack = tuple(max(axis) + 1 for axis in zip(*indices, strict=True))
            wanted = len(rule.parts) * Box(stack, stack).volume
            if len(parts) != wanted:
                raise _refusal(
                    "INCOMPLETE",
                    f"{whole_name!r} is made of {wanted} tensors, {len(parts)} are "
                    f"here, {min(parts.values())!r} among them",
                )
            yield _Binding(rule, whole_name, parts, stack)

    def _binding_of_whole(
        self, rule: Rule, pattern: Pattern, name: str, values: dict[str, str]
    ) -> _Binding:
        sides = rule.part_patterns()
        holes = [hole for hole in STACKABLE if hole in sides[0].holes - pattern.holes]
        stack = self._views[name].shape[: len(holes)]
        if len(stack) < len(holes):
            raise _refusal("SHAPE", f"{name!r} has no axis for {holes}")
        parts = {}
        for index in indices(stack):
            filled = values | dict(zip(holes, map(str, index), strict=True))
            for number, side in enumerate(sides):
                parts[index, number] = side.name(filled)
        return _Binding(rule, name, parts, stack)

    def _merge(self, binding: _Binding) -> None:
        views = {at: self._views[name] for at, name in binding.parts.items()}
        self._used |= set(binding.parts.values())
        single = [self._prefix + name for name in binding.parts.values()]
        if len(views) > 1 and all(self._is_value(view) for view in views.values()):
            self._merge_values(binding, single)
            return
        first = views[(0,) * len(binding.stack), 0]
        for at, view in views.items():
            twin = views[(0,) * len(binding.stack), at[1]]
            if (view.dtype, view.shape) != (first.dtype, twin.shape):
                raise _refusal(
                    "SHAPE",
                    f"{binding.parts[at]!r} is {view.dtype} {list(view.shape)}, "
                    f"others of {binding.whole_name!r} are not",
                )
        shapes = [
            views[(0,) * len(binding.stack), number].shape
            for number in range(len(binding.rule.parts))
        ]
        shape, links = links_of(
            binding.rule, shapes, binding.stack, self._groups(binding.rule)
        )
        pieces = [
            piece
            for link in links
            for piece in through(
                views[link.place, link.part], link.part_box, link.whole_box, link.axes
            )
        ]
        self._put(binding.whole_name, view_from(first.dtype, shape, pieces))

    def _merge_values(self, binding: _Binding, keys: list[str]) -> None:
        """Keep one of several single values, which must be equal."""
        names = list(binding.parts.values())
        values = [self._value(self._views[name]) for name in names]
        if any(value != values[0] for value in values):
            raise _refusal(
                "VALUES",
                f"{keys[0]!r} and others that {binding.whole_name!r} is made of have "
                "different values",
            )
        self._put(binding.whole_name, self._views[names[0]])
        target = self._prefix + binding.whole_name
        for name in names[1:]:
            for source in self._views[name].sources:
                self.copies[source] = target

    def _split(self, binding: _Binding) -> None:
        name = binding.whole_name
        view = self._views[name]
        self._used.add(name)
        if len(binding.parts) > 1 and self._is_value(view):
            for part in binding.parts.values():
                self._put(part, view)
            return
        rule = binding.rule
        inner = view.shape[len(binding.stack) :]
        if rule.turned and len(inner) == 2:
            inner = inner[::-1]
        rows = rows_of(rule, inner, self._numbers, name)
        if sum(rows) < inner[0] if inner else False:
            padding = f"rows {sum(rows)}..{inner[0]} are padding of the vocabulary"
            self.ignored.append(Ignored(self._prefix + name, padding))
        shapes = [(count, *inner[1:]) if inner else () for count in rows]
        _, links = links_of(rule, shapes, binding.stack, self._groups(rule))
        pieces: dict[tuple[Index, int], list[Piece]] = defaultdict(list)
        for link in links:
            turned = _inverse(link)
            pieces[link.place, link.part] += through(
                view, link.whole_box, link.part_box, turned
            )
        for at, part in binding.parts.items():
            shape = shapes[at[1]]
            self._put(part, view_from(view.dtype, shape, pieces[at]))

    def _groups(self, rule: Rule) -> int:
        return self._numbers.value(rule.groups)

    def _is_value(self, view: View) -> bool:
        """Return whether a tensor is one value for a whole parameter."""
        return view.shape == () or (view.shape == (1,) and self._prefix != "model/")

    def _value(self, view: View) -> bytes:
        out = bytearray(tensor_bytes(view.dtype, view.shape))
        piece = view.pieces[0]
        self._source.read_box(piece.source, piece.box.offsets, piece.box.sizes, out)
        return bytes(out)

    def _put(self, name: str, view: View) -> None:
        key = self._prefix + name
        if key in self.result:
            raise _refusal("TWICE", f"two tensors become {name!r}")
        fault = tiling_fault(
            view.shape, (p.target for p in view.pieces if p.target.volume)
        )
        if fault is not None:
            raise LocalProtocolError(f"map leaves {key!r} wrong at {fault}")
        self.result[key] = view


def _inverse(link: Link) -> tuple[int, ...]:
    """Return the axes of a link from the part's side: where each lies in the whole."""
    return tuple(link.axes.index(axis) for axis in range(len(link.part_box.sizes)))


def _refusal(what: str, reason: str) -> ConfigError:
    return ConfigError(
        reason,
        code=f"E_MAP_{what}",
        next_step="use another map, or a .toml file of your own with --map",
    )
