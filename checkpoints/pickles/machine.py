"""The instructions of a pickle, carried out on plain data.

A pickle is a program for a stack machine.  This machine has no way to import, call or set anything
but what the allow-list makes.  Python's own unpickler with a restricted ``find_class`` would not
do: before any hook of ours is asked, it hashes, indexes and fills in C what a file puts on its
stack, so that 9 bytes take 16 GB, 100 bytes a year, and a deep tuple as a key ends the process.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pickletools import StackObject
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.pickles.allowed import (
    CONSTRUCTORS,
    MENTIONED,
    STORAGES,
    Storage,
    elements,
    find,
    pairs,
    set_state,
)
from checkpoints.pickles.records import Record, Reference, Refusal, shown

MOST_INSTRUCTIONS = 2_000_000  #: a training state of 10,000 tensors has half a million
MOST_BITS = 256  #: of a whole number; states of random generators have 128
REPEATS = 32  #: how often what a file holds, and the views in it, may cover its bytes

#: Of every instruction: the types of the values that it takes off the stack, whether it takes all
#: values since the last mark besides, and the type of what it leaves there.
TYPES: dict[str, tuple[list[Any], bool, Any]] = {
    code.name: (
        [kind.obtype for kind in code.stack_before if kind.obtype is not StackObject],
        pickletools.stackslice in code.stack_before,
        code.stack_after[0].obtype if code.stack_after else None,
    )
    for code in pickletools.opcodes
}
LITERALS = {int, (int, bool), bool, type(None), float, str, bytes, (bytes, str), bytearray}
#: How collections are made of values, and added to.
MAKE: dict[Any, Callable[[list[Any]], Any]] = {
    tuple: tuple, list: list, dict: pairs, set: elements, frozenset: elements,
}  # fmt: skip
ADD: dict[Any, Callable[..., None]] = {list: list.extend, dict: dict.update, set: set.update}


class Budget:
    """What is left of what a file of ``size`` bytes, with all pickles nested in it, may cost."""

    def __init__(self, size: int) -> None:
        self.storages, self.bytes, self.instructions = size, REPEATS * size, MOST_INSTRUCTIONS

    def spend(self, *values: Any) -> None:
        """Pay for what one instruction reads or makes, as it can be repeated."""
        for value in values:
            whole = type(value) in (Tensor, np.ndarray)
            self.bytes -= value.nbytes if whole else sys.getsizeof(value)
        if self.bytes < 0:
            raise Refusal("unpacks to far more than it holds")


@dataclass
class Machine:
    """Reads one pickle from the place where a file stands; ``run`` returns what it holds."""

    budget: Budget
    storages: dict[str, Storage]  #: receives those that the pickle declares, without contents
    nested: Callable[[bytes], Storage] | None  #: reads a storage that was pickled by itself
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls: dict[str, Callable[..., Any]] = {
            "STACK_GLOBAL": find, "REDUCE": self.call, "NEWOBJ": self.call, "BUILD": self.build,
            "BINPERSID": self.declare,
        }  # fmt: skip

    def run(self, file: IO[bytes]) -> Any:
        """Raises Refusal for what the list lacks, and built-in errors for a damaged file."""
        for code, arg, _ in pickletools.genops(file):
            self.budget.instructions -= 1
            if self.budget.instructions < 0:
                raise Refusal(f"has more than {MOST_INSTRUCTIONS} instructions")
            if code.name != "STOP":
                self.step(code.name, arg)
        if self.marks or len(self.stack) != 1:
            raise ValueError(f"{len(self.stack)} values are left at its end")
        return self.stack.pop()

    def step(self, name: str, arg: Any) -> None:
        takes, marked, gives = TYPES[name]
        if gives in LITERALS:
            if type(arg) is int and arg.bit_length() > MOST_BITS:
                raise Refusal(f"holds a whole number of {arg.bit_length()} bits")
            if type(arg) is str:  # halves of UTF-16 characters can be neither printed nor saved
                arg = arg.encode(errors="replace").decode()
            self.stack.append({"NEWTRUE": True, "NEWFALSE": False}.get(name, arg))
        elif gives in MAKE:
            values = self.popped(takes, marked)
            adds = takes[:1] == [gives]
            made = MAKE[gives](values[adds:])
            if adds:
                ADD[gives](values[0], made)
            self.stack.append(values[0] if adds else made)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if arg is None else arg] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[arg])
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "POP" and self.marks[-1:] == [len(self.stack)]:
            self.marks.pop()
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name == "GLOBAL":
            self.stack.append(find(*arg.split(" ", 1)))
        elif name in self.calls:
            self.stack.append(self.calls[name](*self.popped(takes, marked)))
        elif gives is None:  # POP and POP_MARK, PROTO and FRAME
            self.popped(takes, marked)
        else:
            raise Refusal(f"uses the instruction {name}")

    def popped(self, kinds: list[Any], marked: bool) -> list[Any]:
        """Values of these types, and all since the last mark, which leave the stack."""
        start = (self.marks.pop() if marked else len(self.stack)) - len(kinds)
        if start < 0:
            raise IndexError("it takes more values than there are")
        values = self.stack[start:]
        del self.stack[start:]
        for value, kind in zip(values, kinds, strict=False):
            if not isinstance(value, kind):
                raise Refusal(f"uses a {type(value).__name__} as a {kind.__name__}")
        return values

    def call(self, called: Any, args: Any) -> Any:
        """The data that stands for ``called(*args)``."""
        if type(called) is not Reference or type(args) is not tuple:
            raise Refusal(f"calls a {type(called).__name__} with a {type(args).__name__}")
        make, *kinds = CONSTRUCTORS.get(str(called), (None,))
        if str(called) == "torch.storage._load_from_bytes" and self.nested:
            make, kinds = self.nested, [bytes]
        if make is None and str(called) not in MENTIONED:
            return Record(called.module, called.name, args)
        if make is None or len(args) < len(kinds) or not all(map(isinstance, args, kinds)):
            raise Refusal(f"calls '{called}' in an unknown way")
        self.budget.spend(*args)
        value = make(*args)
        self.budget.spend(value.state if type(value) is Record else value)
        return value

    def build(self, target: Any, state: Any) -> Any:
        """``target``, with its attributes or contents set."""
        self.budget.spend(*state if type(state) in (list, tuple) and len(state) <= 5 else [state])
        set_state(target, state)
        return target

    def declare(self, value: Any) -> Storage:
        """The storage of ``("storage", type, key, location, elements[, None])``."""
        match value:
            case "storage", Reference(name=kind), str(key), _, int(count), *view if (
                kind in STORAGES and view in ([], [None])
            ):
                pass
            case _:
                raise Refusal("has a persistent id that is no storage")
        dtype = STORAGES[kind]
        if key not in self.storages:
            self.budget.storages -= abs(count) * dtype.itemsize
            if self.budget.storages < 0:
                raise EOFError("its storages are larger than the file")
            self.storages[key] = Storage(torch.empty(count, dtype=dtype))
        data = self.storages[key].data
        if (data.dtype, data.numel()) != (dtype, count):
            raise Refusal(f"declares the storage '{shown(key)}' in two ways")
        return self.storages[key]
