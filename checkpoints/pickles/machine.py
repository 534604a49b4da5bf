"""The instructions of a pickle, carried out on plain data.

A pickle is a program for a stack machine.  This machine knows the instructions that published
checkpoints consist of and no way to import, call or set anything but what the allow-list makes, so
that what a file names is never run.  Nothing here depends on how deeply a file nests its contents,
and memory stays proportional to the size of the file.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np
from torch import Tensor

from checkpoints.pickles.allowed import Storage, check_dtype, find, is_inert, set_array
from checkpoints.pickles.records import Record, Reference, Refusal, checked_key, shown

MOST_INSTRUCTIONS = 5_000_000  #: a training state of 10,000 tensors has half a million
MOST_BITS = 256  #: of a whole number; states of random generators have 128
ELEMENT = 64  #: bytes that an element of a collection takes
LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
IGNORED = ("PROTO", "FRAME")

Constructors = Mapping[str, Callable[..., Any]]


class Machine:
    """Reads one pickle from the place where a file stands; ``run`` returns what it holds.

    ``constructors`` make data of the arguments of a call, by full name; ``persistent`` turns a
    persistent id into a storage; ``budget`` limits the bytes of all that calls make, as they can
    be repeated at the cost of an instruction each.
    """

    def __init__(
        self, constructors: Constructors, persistent: Callable[[Any], Any], budget: int
    ) -> None:
        self.constructors = constructors
        self.persistent = persistent
        self.budget = budget
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """Raises Refusal for what the list lacks, and built-in errors for a damaged file."""
        for count, (code, arg, _) in enumerate(pickletools.genops(file)):
            name = code.name
            if count >= MOST_INSTRUCTIONS:
                raise Refusal(f"has more than {MOST_INSTRUCTIONS} instructions")
            if name in LITERALS:
                if type(arg) is int and arg.bit_length() > MOST_BITS:
                    raise Refusal(f"holds a whole number of {arg.bit_length()} bits")
                self.stack.append(arg)
            elif name in CONSTANTS:
                self.stack.append(CONSTANTS[name])
            elif name in STEPS:
                STEPS[name](self, arg)
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                raise Refusal(f"uses the instruction {name}")
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values are left at its end")
        return self.stack.pop()

    def popped(self) -> list[Any]:
        """What has been pushed since the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        """The collection that is to be added to."""
        target = self.stack[-1]
        if type(target) is not kind:
            raise Refusal(f"adds to a {type(target).__name__} as if it were a {kind.__name__}")
        return target

    def spend(self, *values: Any) -> None:
        """Count values as made."""
        self.budget -= sum(map(_bytes_of, values))
        if self.budget < 0:
            raise Refusal("unpacks to far more than it holds")

    def call(self, called: Any, args: Any) -> Any:
        """The data that stands for ``called(*args)``."""
        if type(called) is not Reference or type(args) is not tuple:
            raise Refusal(f"calls a {type(called).__name__} with a {type(args).__name__}")
        self.spend(*args)
        if str(called) in self.constructors:
            value = self.constructors[str(called)](*args)
            self.spend(value)
            return value
        if is_inert(called):
            return Record(called.module, called.name, args)
        raise Refusal(f"calls '{shown(called)}'")

    def set_state(self, state: Any) -> None:
        """BUILD: attributes for the object on top of the stack."""
        target = self.stack[-1]
        if type(target) in (Record, dict):
            for part in state if type(state) is tuple and len(state) == 2 else (state,):
                self.spend(part)  # the attributes, and those in slots
                attributes = _attributes(part)
                if type(target) is Record:  # what a dict has is metadata that nobody needs
                    target.state.update(attributes)
        elif isinstance(target, np.dtype):
            check_dtype(target, state)
        elif type(target) is np.ndarray:
            set_array(target, state)
            self.spend(target)
        else:
            raise Refusal(f"sets attributes of a {type(target).__name__}")


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return value.nbytes
    if type(value) is Storage:
        return value.data.nbytes
    if type(value) in (list, tuple, dict, set):
        return ELEMENT * len(value)
    return len(value) if type(value) in (str, bytes, bytearray) else 1


def _attributes(state: Any) -> dict[str, Any]:
    if state is None:
        return {}
    if type(state) is not dict or not all(type(key) is str for key in state):
        raise Refusal(f"sets attributes by a {type(state).__name__}")
    special = next((key for key in state if key.startswith("__")), None)
    if special:
        raise Refusal(f"sets the attribute '{shown(special)}'")
    return state


def _pairs(values: list[Any]) -> dict[Any, Any]:
    if len(values) % 2:
        raise ValueError("a key has no value")
    return dict(zip(map(checked_key, values[::2]), values[1::2], strict=True))


def _mark(m: Machine, _: Any) -> None:
    m.marks.append(len(m.stack))


def _pop(m: Machine, _: Any) -> None:
    if m.marks and m.marks[-1] == len(m.stack):
        m.marks.pop()
    else:
        m.stack.pop()


def _last(m: Machine, count: int) -> None:
    if len(m.stack) < count:
        raise IndexError("too few values for a tuple")
    m.stack[-count:] = [tuple(m.stack[-count:])]


def _put(m: Machine, index: Any) -> None:
    m.memo[index] = m.stack[-1]


def _append(m: Machine, _: Any) -> None:
    value = m.stack.pop()
    m.top(list).append(value)


def _set_item(m: Machine, _: Any) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.top(dict)[checked_key(key)] = value


def _append_all(m: Machine, _: Any) -> None:
    values = m.popped()
    m.top(list).extend(values)


def _set_items(m: Machine, _: Any) -> None:
    values = m.popped()
    m.top(dict).update(_pairs(values))


def _add_items(m: Machine, _: Any) -> None:
    values = m.popped()
    m.top(set).update(map(checked_key, values))


def _find(m: Machine, arg: Any) -> None:
    m.stack.append(find(*arg.split(" ", 1)))


def _find_on_stack(m: Machine, _: Any) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(find(module, name))


def _call(m: Machine, _: Any) -> None:
    args, called = m.stack.pop(), m.stack.pop()
    m.stack.append(m.call(called, args))


def _build(m: Machine, _: Any) -> None:
    m.set_state(m.stack.pop())


STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda m, _: m.popped().clear(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": lambda m, _: _put(m, len(m.memo)),
    "GET": lambda m, index: m.stack.append(m.memo[index]),
    "BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "LONG_BINGET": lambda m, index: m.stack.append(m.memo[index]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE1": lambda m, _: _last(m, 1),
    "TUPLE2": lambda m, _: _last(m, 2),
    "TUPLE3": lambda m, _: _last(m, 3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.popped())),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "LIST": lambda m, _: m.stack.append(m.popped()),
    "APPEND": _append,
    "APPENDS": _append_all,
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "DICT": lambda m, _: m.stack.append(_pairs(m.popped())),
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "EMPTY_SET": lambda m, _: m.stack.append(set()),
    "FROZENSET": lambda m, _: m.stack.append(set(map(checked_key, m.popped()))),
    "ADDITEMS": _add_items,
    "GLOBAL": _find,
    "STACK_GLOBAL": _find_on_stack,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "BUILD": _build,
    "BINPERSID": lambda m, _: m.stack.append(m.persistent(m.stack.pop())),
}
