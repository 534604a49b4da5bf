"""Options as typed values: from the flags of a command line, and into a record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from runtime.typed import to_plain

T = TypeVar("T")
#: What JSON holds.
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


def parse_options(kind: type[T], flags: Mapping[str, object]) -> T:
    """The dataclass ``kind`` from flags of the names of its fields, and of their fields in turn.

    A flag may serve several parts (``guidance_rate``).  A field without a flag keeps its default.
    Raises TypeError for a flag that no field takes, which is a mistake in the command.
    """
    unknown = set(flags) - set(flag_names(kind))
    if unknown:
        raise TypeError(f"{kind.__name__} has no field for {', '.join(sorted(unknown))}")
    return _read(kind, flags)


def flag_names(kind: type[Any]) -> list[str]:
    """The names of all flags that ``parse_options(kind, ...)`` takes."""
    names: dict[str, None] = {}
    for name, nested in _parts(kind).items():
        names |= dict.fromkeys([name] if nested is None else flag_names(nested))
    return list(names)


def flat_options(options: object) -> dict[str, Any]:
    """All fields by name, those of nested dataclasses among them, for a record."""
    flat: dict[str, Any] = {}
    for name, nested in _parts(type(options)).items():
        value = getattr(options, name)
        flat |= {name: to_plain(value)} if nested is None else flat_options(value)
    return flat


def _read(kind: type[T], flags: Mapping[str, object]) -> T:
    values: dict[str, object] = {}
    for name, nested in _parts(kind).items():
        if nested is not None:
            values[name] = _read(nested, flags)
        elif name in flags:
            values[name] = flags[name]
    return kind(**values)


def _parts(kind: Any) -> Mapping[str, Any]:
    """The fields of a dataclass, with the type of those that are dataclasses themselves."""
    hints = get_type_hints(kind)
    if not is_dataclass(kind):
        raise TypeError(f"{kind} is no dataclass of options")
    return {
        field.name: hints[field.name] if is_dataclass(hints[field.name]) else None
        for field in fields(kind)
        if field.init
    }
