"""What a pickle says, without unpickling it.

Megatron-core's checkpoints are described by pickles, which are programs: to run one is to run what its writer chose.
Here the instructions are disassembled and followed on paper: a call becomes a record of what would be called and with
what, and nothing that a pickle names is imported, let alone called. (The instructions, and what they mean: the source
of Python's pickletools, PEP 307 and PEP 3154.)
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from harness.config import HarnessError

KNOWN = ("torch", "megatron.core", "collections", "pathlib")
"""Packages whose names stand in checkpoints."""


@dataclass(frozen=True, eq=False)
class Named:
    """A class or function, by its name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """What a call would give: of what, with which arguments; and what the object would be told of its state."""

    of: Named
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Persistent:
    """Something that lies outside the pickle."""

    key: Any


def read_pickle(content: bytes, label: str) -> Any:
    """The value that the pickle builds, of plain values, `Named`, `Made` and `Persistent`; sets are lists.

    Raises HarnessError where it is no pickle, is damaged, or names something that no checkpoint has a use for.
    """
    reader = _Reader(label)
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "STOP":
                return reader.stack.pop()
            reader.follow(instruction.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise HarnessError(f"{label}: is damaged: {error or type(error).__name__}") from None
    raise HarnessError(f"{label}: is damaged: it ends in the midst")


class _Reader:
    def __init__(self, label: str) -> None:
        self.label = label
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def follow(self, instruction: str, argument: Any) -> None:
        if instruction in _LITERALS:
            self.stack.append(argument)
        elif instruction in _CONSTANTS:
            self.stack.append(_CONSTANTS[instruction]())
        elif instruction in _ACTIONS:
            _ACTIONS[instruction](self, argument)
        elif instruction not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {instruction} stands in no checkpoint's pickle")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else number] = self.stack[-1]

    def recall(self, number: int) -> None:
        self.stack.append(self.memo[number])

    def make_tuple(self, size: int) -> None:
        cut = len(self.stack) - size
        if cut < 0:
            raise IndexError("a tuple of more than there is")
        self.stack[cut:] = [tuple(self.stack[cut:])]

    def make_dict(self, pairs: list[Any]) -> None:
        self.stack.append({})
        self.set_items(pairs)

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        if not any(module == known or module.startswith(f"{known}.") for known in KNOWN):
            said = f"{module}.{name}"[:80]
            raise HarnessError(
                f"{self.label}: names {said!a}, for which no checkpoint has a use: a pickle that is meant to do harm "
                f"looks like that; nothing of it was run"
            )
        self.stack.append(Named(module, name))

    def name_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(module, name)

    def call(self, arguments: Any, of: Any) -> None:
        if not isinstance(of, Named) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no name")
        self.stack.append(Made(of, arguments))

    def call_with_keywords(self) -> None:
        keywords, arguments, of = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call((*arguments, keywords), of)

    def build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Made):
            raise TypeError("a state for what has none")
        self.stack[-1].state = state

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Made) else target
        if not isinstance(items, dict):
            raise TypeError("items for what has none")
        items.update(zip(pairs[::2], pairs[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("elements for what is no list")
        self.stack[-1].extend(values)

    def pop_two(self) -> list[Any]:
        second = self.stack.pop()
        return [self.stack.pop(), second]


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_ACTIONS: dict[str, Callable[[_Reader, Any], object]] = {
    "MARK": _Reader.mark,
    "POP": lambda reader, _: reader.stack.pop(),
    "POP_MARK": lambda reader, _: reader.since_mark(),
    "MEMOIZE": _Reader.memoize,
    "PUT": _Reader.memoize,
    "BINPUT": _Reader.memoize,
    "LONG_BINPUT": _Reader.memoize,
    "GET": _Reader.recall,
    "BINGET": _Reader.recall,
    "LONG_BINGET": _Reader.recall,
    "TUPLE1": lambda reader, _: reader.make_tuple(1),
    "TUPLE2": lambda reader, _: reader.make_tuple(2),
    "TUPLE3": lambda reader, _: reader.make_tuple(3),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "DICT": lambda reader, _: reader.make_dict(reader.since_mark()),
    "LIST": lambda reader, _: reader.push(reader.since_mark()),
    "FROZENSET": lambda reader, _: reader.push(tuple(reader.since_mark())),
    "APPEND": lambda reader, _: reader.extend([reader.stack.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.since_mark()),
    "ADDITEMS": lambda reader, _: reader.extend(reader.since_mark()),
    "SETITEM": lambda reader, _: reader.set_items(reader.pop_two()),
    "SETITEMS": lambda reader, _: reader.set_items(reader.since_mark()),
    "GLOBAL": lambda reader, argument: reader.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda reader, _: reader.name_from_stack(),
    "REDUCE": lambda reader, _: reader.call(reader.stack.pop(), reader.stack.pop()),
    "NEWOBJ": lambda reader, _: reader.call(reader.stack.pop(), reader.stack.pop()),
    "NEWOBJ_EX": lambda reader, _: reader.call_with_keywords(),
    "BUILD": lambda reader, _: reader.build(),
    "BINPERSID": lambda reader, _: reader.push(Persistent(reader.stack.pop())),
}
