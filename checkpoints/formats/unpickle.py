"""A reader of pickles that can build nothing but data.

A pickle is a program for a stack machine. This is such a machine, of our own: it knows
the instructions that protocols 2 to 5 are made of, it has no instruction that imports,
and what a program may name and call is in :mod:`checkpoints.formats.pickle_calls`.

Everything is bounded, so that no pickle, however made, costs more than its limits: the
memory of what it builds is charged before it is built; and the result is a tree of
bounded depth and bounded size when its shared parts are counted each time they are
met, so that whoever walks it needs no care.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sized
from functools import partial

import msgspec

from checkpoints.formats.pickle_calls import CALLS, RECORDS
from checkpoints.formats.pickle_tree import check_tree
from checkpoints.formats.pickle_values import (
    Global,
    OrderedRecord,
    Record,
    key_of,
    refuse,
    storage_of,
)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a pickle may cost.

    Attributes:
        max_bytes: Its length. An index of half a million chunks has 120 MB.
        max_memory: Estimate of what it builds.
        memory_factor: The same for each byte of it; indexes have 65.
        max_depth: Nesting of the result.
        max_nodes: Values in the result, each counted as often as it is met.
    """

    max_bytes: int = 128 << 20
    max_memory: int = 8 << 30
    memory_factor: int = 128
    max_depth: int = 100
    max_nodes: int = 1 << 26


LIMITS = Limits()

MAX_INTEGER_BYTES = 32
"""The largest of real checkpoints are states of random generators, of 128 bits."""
MAX_NAME_CHARS = 500

_SMALL = 40  # what a number and its place on the stack cost
_OBJECT = 250  # what an empty container or a record costs, with its place
_DAMAGED = "the file is damaged, or no pickle of protocol 2 to 5: fetch it again"


def unpickle_untrusted(
    data: bytes, *, modules: tuple[str, ...] = (), limits: Limits = LIMITS
) -> object:
    """Return what a pickle says, made of inert values.

    Args:
        data: One whole pickle.
        modules: Names in these modules and below them become records as well.
        limits: What it may cost.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict, frozenset, and the
        types of :mod:`checkpoints.formats.pickle_values`.

    Raises:
        IntegrityError: ``E_PICKLE``; ``E_DTYPE``, ``E_BOUNDS`` or ``E_SIZE`` for a
            tensor that cannot be.
    """
    if len(data) > limits.max_bytes:
        raise refuse(f"{len(data)} B > {limits.max_bytes} B")
    machine = _Machine(data, modules, limits)
    try:
        result = machine.run()
    except (IndexError, struct.error, UnicodeDecodeError, ValueError) as exc:
        raise refuse(f"damaged near byte {machine.at}", _DAMAGED) from exc
    if machine.at != len(data):
        raise refuse(f"{len(data) - machine.at} B after its end", _DAMAGED)
    check_tree(result, limits.max_depth, limits.max_nodes)
    return result


class _Machine:
    """The stack machine; each instruction is a method, see :data:`_INSTRUCTIONS`."""

    def __init__(self, data: bytes, modules: tuple[str, ...], limits: Limits) -> None:
        self.at = 0
        self._data = data
        self._modules = modules
        proportional = (16 << 20) + limits.memory_factor * len(data)
        self._room = min(limits.max_memory, proportional)
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        while True:
            code = self._data[self.at]
            self.at += 1
            if code == _STOP:
                break
            instruction = _INSTRUCTIONS.get(code)
            if instruction is None:
                raise refuse(f"instruction {code:#x} at byte {self.at - 1}", _DAMAGED)
            instruction(self)
        if len(self._stack) != 1 or self._marks:
            raise refuse("it ends in the middle", _DAMAGED)
        return self._stack[0]

    def _charge(self, cost: int) -> None:
        self._room -= cost
        if self._room < 0:
            raise refuse("it would need more memory than any index")

    def _push(self, value: object, cost: int = _SMALL) -> None:
        self._charge(cost)
        self._stack.append(value)

    def _take(self, count: int) -> bytes:
        """Return the next ``count`` bytes of the program."""
        end = self.at + count
        if count < 0 or end > len(self._data):
            raise IndexError
        taken = self._data[self.at : end]
        self.at = end
        return taken

    def _number(self, layout: struct.Struct) -> int:
        number: int = layout.unpack(self._take(layout.size))[0]
        return number

    def _pop_mark(self) -> list[object]:
        """Return and remove what was pushed since the last mark."""
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    # numbers and text

    def proto(self) -> None:
        version = self._take(1)[0]
        if not 2 <= version <= 5:
            raise refuse(f"protocol {version}", _DAMAGED)

    def frame(self) -> None:
        self._take(8)

    def none(self) -> None:
        self._push(None)

    def true(self) -> None:
        self._push(True)

    def false(self) -> None:
        self._push(False)

    def integer(self, layout: struct.Struct) -> None:
        self._push(self._number(layout))

    def long(self) -> None:
        count = self._number(_U1)
        if count > MAX_INTEGER_BYTES:
            raise refuse(f"an integer of {count} bytes")
        self._push(int.from_bytes(self._take(count), "little", signed=True), _SMALL * 2)

    def real(self) -> None:
        self._push(_F8.unpack(self._take(8))[0])

    def text(self, layout: struct.Struct) -> None:
        data = self._take(self._number(layout))
        self._push(data.decode(), 4 * len(data) + 2 * _SMALL)

    def binary(self, layout: struct.Struct) -> None:
        data = self._take(self._number(layout))
        self._push(data, len(data) + 2 * _SMALL)

    # containers

    def mark(self) -> None:
        self._charge(_SMALL)
        self._marks.append(len(self._stack))

    def pop(self) -> None:
        self._stack.pop()

    def pop_mark(self) -> None:
        self._pop_mark()

    def empty_tuple(self) -> None:
        self._push(())

    def tuple_marked(self) -> None:
        items = self._pop_mark()
        self._push(tuple(items), _OBJECT + 8 * len(items))

    def tuple_of(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._push(tuple(reversed(items)), _OBJECT)

    def empty_list(self) -> None:
        self._push([], _OBJECT)

    def append(self) -> None:
        self._extend([self._stack.pop()])

    def appends(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise refuse(f"an element added to a {type(target).__name__}")
        self._charge(16 * len(items))
        target.extend(items)

    def empty_dict(self) -> None:
        self._push({}, _OBJECT)

    def set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        self._update(self._pop_mark())

    def _update(self, pairs: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise refuse(f"an entry added to a {type(target).__name__}")
        self._charge(100 * len(pairs))
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if key_of(key) in target:
                raise refuse("a key that occurs twice")
            target[key] = value

    def empty_set(self) -> None:
        self._push(set(), _OBJECT)

    def add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise refuse(f"a member added to a {type(target).__name__}")
        self._charge(100 * len(items))
        target.update(key_of(item) for item in items)

    def frozen_set(self) -> None:
        items = self._pop_mark()
        self._push(frozenset(map(key_of, items)), _OBJECT + 100 * len(items))

    # the memo

    def put(self, layout: struct.Struct) -> None:
        self._remember(self._number(layout))

    def memoize(self) -> None:
        self._remember(len(self._memo))

    def _remember(self, index: int) -> None:
        self._charge(100)
        self._memo[index] = self._stack[-1]

    def get(self, layout: struct.Struct) -> None:
        index = self._number(layout)
        if index not in self._memo:
            raise refuse("it uses what it never made", _DAMAGED)
        self._push(self._memo[index])

    # names, and what would have been objects

    def name_lines(self) -> None:
        self._push_name(self._line(), self._line())

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at, self.at + MAX_NAME_CHARS)
        line = self._take(end - self.at).decode()
        self.at += 1
        return line

    def name_stacked(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise refuse("a name that is no text")
        self._push_name(module, name)

    def _push_name(self, module: str, name: str) -> None:
        named = Global(module, name)
        if not (named in CALLS or named in RECORDS or self._may_name(module)):
            raise refuse(
                f"{str(named)[:200]!r} is not on the list of what a checkpoint may name"
            )
        self._push(named, 2 * _SMALL)

    def _may_name(self, module: str) -> bool:
        return any(f"{module}.".startswith(f"{each}.") for each in self._modules)

    def call(self) -> None:
        args, named = self._stack.pop(), self._stack.pop()
        if not isinstance(named, Global) or type(args) is not tuple:
            raise refuse("a call of what is no name")
        make = CALLS.get(named)
        sized = [each for each in args if isinstance(each, Sized)]  # may be copied
        self._charge(_OBJECT + sum(100 * len(each) for each in sized))
        if make is None:
            self._push(Record(named, args))
            return
        try:
            result = make(*args)
        except TypeError as exc:
            raise refuse(f"{named} with {len(args)} arguments", _DAMAGED) from exc
        self._push(result)

    def new_with_keywords(self) -> None:
        keywords = self._stack.pop()
        if keywords != {}:
            raise refuse("an object made with keywords")
        self.call()

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record) and target.state is None:
            target.state = state
        elif isinstance(target, OrderedRecord) and target.attributes is None:
            target.attributes = state
        else:
            raise refuse(f"attributes for a {type(target).__name__}")

    def reference(self) -> None:
        self._push(storage_of(self._stack.pop()), _OBJECT)


_U1, _U2, _U4, _U8 = (struct.Struct(f"<{code}") for code in "BHIQ")
_I4, _F8 = struct.Struct("<i"), struct.Struct(">d")
_STOP = ord(".")

_INSTRUCTIONS: Mapping[int, Callable[[_Machine], None]] = {
    0x80: _Machine.proto,
    0x95: _Machine.frame,
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("N"): _Machine.none,
    0x88: _Machine.true,
    0x89: _Machine.false,
    ord("J"): partial(_Machine.integer, layout=_I4),
    ord("K"): partial(_Machine.integer, layout=_U1),
    ord("M"): partial(_Machine.integer, layout=_U2),
    0x8A: _Machine.long,
    ord("G"): _Machine.real,
    0x8C: partial(_Machine.text, layout=_U1),
    ord("X"): partial(_Machine.text, layout=_U4),
    0x8D: partial(_Machine.text, layout=_U8),
    ord("C"): partial(_Machine.binary, layout=_U1),
    ord("B"): partial(_Machine.binary, layout=_U4),
    0x8E: partial(_Machine.binary, layout=_U8),
    0x96: partial(_Machine.binary, layout=_U8),
    ord(")"): _Machine.empty_tuple,
    ord("t"): _Machine.tuple_marked,
    0x85: partial(_Machine.tuple_of, count=1),
    0x86: partial(_Machine.tuple_of, count=2),
    0x87: partial(_Machine.tuple_of, count=3),
    ord("]"): _Machine.empty_list,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("}"): _Machine.empty_dict,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    0x8F: _Machine.empty_set,
    0x90: _Machine.add_items,
    0x91: _Machine.frozen_set,
    ord("q"): partial(_Machine.put, layout=_U1),
    ord("r"): partial(_Machine.put, layout=_U4),
    0x94: _Machine.memoize,
    ord("h"): partial(_Machine.get, layout=_U1),
    ord("j"): partial(_Machine.get, layout=_U4),
    ord("c"): _Machine.name_lines,
    0x93: _Machine.name_stacked,
    ord("R"): _Machine.call,
    0x81: _Machine.call,
    0x92: _Machine.new_with_keywords,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.reference,
}
