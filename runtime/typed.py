"""Our own result files: frozen dataclasses as JSON, and back with every type checked.

Every field is written.  The exception is a field declared as ``field(default=None,
metadata=OPTIONAL)``, which is left out where it is None.  A type with the field
``schema: int = SCHEMA`` carries its version, and a newer one is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from runtime import __version__
from runtime.errors import UserError
from runtime.files import write_text

T = TypeVar("T")
MakeObject = Callable[[Sequence[tuple[str, Any]]], dict[str, Any]]
SCHEMA = 1  #: of the files this version writes; raise it when a key changes its meaning
OPTIONAL = {"optional": True}  #: metadata of a field whose key is left out where it is None
#: Deleting a record alone would leave results of unknown origin.
REMEDY = "restore it, or delete it with the results beside it and run again"
MOST_DEPTH = 64  #: of nested JSON; our own files have 8
_TOO_DEEP: list[Any] = []
_TOO_DEEP.append(_TOO_DEEP)
_AT = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_TYPE = re.compile(r"Expected `(.*)`, got `(.*)`")


def to_json(value: object) -> str:
    """``value`` as indented JSON: dataclasses are objects, tuples arrays, paths text.

    Raises TypeError for a value that JSON cannot hold.
    """
    return json.dumps(to_plain(value), indent=1)


def to_plain(value: object) -> Any:
    """``value`` as JSON values, as `to_json` writes them."""
    if is_dataclass(value) and not isinstance(value, type):
        values = {field: getattr(value, field.name) for field in fields(value)}
        kept = {f: v for f, v in values.items() if v is not None or not f.metadata.get("optional")}
        return {field.name: to_plain(part) for field, part in kept.items()}
    if isinstance(value, Mapping):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def digest(value: object) -> str:
    """A name for what ``value`` decides in this version of the toolkit: 32 hexadecimal digits."""
    return hashlib.sha256(to_json([__version__, value]).encode()).hexdigest()[:32]


def from_plain(kind: type[T], content: object, source: str) -> T:
    """The value of type ``kind`` that JSON ``content`` describes; ``source`` names it in errors.

    Raises UserError, naming the field, for one that is missing, unknown or of another type, and
    for a newer schema.
    """
    schema = content.get("schema") if isinstance(content, Mapping) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise UserError(
            f"{source} has schema {schema}, but this version reads up to {SCHEMA}: "
            "update the toolkit to the version that wrote it"
        )
    try:
        value = msgspec.convert(content, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise UserError(f"{source}: {_sentence(str(error))}: {REMEDY}") from None
    unknown = _unknown(value, content, "")
    if unknown is not None:
        raise UserError(f"{source}: {unknown} is unknown to this version: {REMEDY}")
    return value


def pick(kind: type[T], content: Mapping[str, object], source: str) -> T:
    """As `from_plain`, from the entries of ``content`` that ``kind`` has; others are left alone."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return from_plain(kind, {k: v for k, v in content.items() if k in names}, source)


def parse_json(
    text: str | bytes, source: str, remedy: str = REMEDY, make: MakeObject | None = None
) -> Any:
    """The JSON values in ``text``; ``source`` names it in errors.

    ``make`` makes an object of its names and values; the default is a dict of the last ones.

    Raises UserError, which ends in ``remedy``, for what is no JSON or nested more than
    `MOST_DEPTH` deep: such values end Python's stack wherever they are walked.
    """
    try:
        content = json.loads(text, object_pairs_hook=make)
    except RecursionError:
        content = _TOO_DEEP
    except ValueError as error:
        raise UserError(f"{source} is not valid JSON ({error}): {remedy}") from None
    parts = [content]
    for _ in range(MOST_DEPTH):
        parts = [inner for part in parts for inner in _inside(part)]
    if parts:
        raise UserError(f"{source} is JSON nested more than {MOST_DEPTH} deep: {remedy}")
    return content


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def read_result(kind: type[T], path: str | Path) -> T | None:
    """What `write_result` wrote to ``path``; None where there is no file.

    Raises UserError as `from_plain` does, and for a file that is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: {REMEDY}") from None
    return from_plain(kind, parse_json(text, str(path)), str(path))


def read_earlier(kind: type[T], path: str | Path) -> T | None:
    """As `read_result`, but None for a file that cannot be read: its content is made again."""
    try:
        return read_result(kind, path)
    except (OSError, UserError):
        return None


def write_result(path: str | Path, value: object) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    write_text(path, to_json(value))


def _decode(kind: type, value: object) -> object:
    """Types that JSON does not know; ``object`` is any JSON value."""
    if kind is object:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def _sentence(text: str) -> str:
    """An error of msgspec, as ``rounds[0].n is missing``."""
    found = _AT.fullmatch(text)
    message, path = (found[1], found[2] or "") if found else (text, "")
    if missing := _MISSING.fullmatch(message):
        return f"{_below(path, missing[1])} is missing"
    if wrong := _TYPE.fullmatch(message):
        return f"{path or 'the content'} is of type {wrong[2]} where {wrong[1]} is expected"
    return f"{path or 'the content'} is wrong ({message})"


def _unknown(value: object, content: object, path: str) -> str | None:
    """The path of the first key of ``content`` that no dataclass in ``value`` took, or None."""
    parts: list[tuple[str, object, object]] = []
    if is_dataclass(value) and isinstance(content, Mapping):
        known = [field.name for field in fields(value)]
        for key in content:
            if key not in known:
                return _below(path, key)
        parts = [(_below(path, key), getattr(value, key), content[key]) for key in content]
    elif isinstance(value, Mapping) and isinstance(content, Mapping):
        parts = [(_below(path, str(k)), value.get(k), part) for k, part in content.items()]
    elif isinstance(value, (list, tuple)) and isinstance(content, Sequence):
        pairs = zip(value, content, strict=True)
        parts = [(f"{path}[{i}]", one, other) for i, (one, other) in enumerate(pairs)]
    return next((found for part in parts if (found := _unknown(part[1], part[2], part[0]))), None)


def _below(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
