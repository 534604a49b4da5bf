"""What stands in the place of a class, a function or an object that a pickle names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class Refusal(ValueError):
    """What a file asks for and does not get: the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Reference:
    """The name of a class or a function; the thing itself is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Record:
    """An object as data: whose it was, what it was made from, and its attributes.

    Equality is identity and ``repr`` leaves the contents out, so that a file in which objects
    hold each other can start no endless walk.
    """

    module: str
    name: str  #: of the class
    args: tuple[Any, ...] = field(default=(), repr=False)
    state: dict[str, Any] = field(default_factory=dict, repr=False)  #: its attributes


def shown(value: object) -> str:
    """A name from a file as one short line of printable characters."""
    text = str(value)[:81].encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:80]}..."


def is_scalar(value: object) -> bool:
    """Whether a value is a plain one: None, a truth value, a number or text."""
    return type(value) in (type(None), bool, int, float, str)


def is_key(value: object) -> bool:
    """Whether a value may be hashed: at once, and with a hash that few others can share.

    A tuple of tuples of tuples ... takes a year or the whole C stack, and a dict is as slow as a
    list where all hashes are equal, as large whole numbers and tuples of numbers can be chosen to.
    """
    if type(value) is tuple:
        return len(value) <= 16 and all(type(v) is str for v in value)
    if type(value) is int:
        return abs(value) < 2**60
    return is_scalar(value) or type(value) in (bytes, Reference)
