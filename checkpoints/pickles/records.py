"""What stands in the place of a class, a function or an object that a pickle names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SHOWN = 80  #: characters of a name that a message repeats


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
    text = str(value)[: SHOWN + 1].encode("ascii", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_scalar(value: object) -> bool:
    """Whether a value is a plain one: None, a truth value, a number or text."""
    return type(value) in (type(None), bool, int, float, str)


def checked_key(value: Any) -> Any:
    """``value``, if its hash takes no time: a tuple of tuples of tuples ... may take a year."""
    flat = type(value) is tuple and len(value) <= 16 and all(is_scalar(v) for v in value)
    if not (flat or is_scalar(value) or type(value) in (bytes, Reference)):
        raise Refusal(f"uses a {type(value).__name__} as a key or as an element of a set")
    return value
