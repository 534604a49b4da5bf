"""Lists as they are written on a command line: values separated by commas."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from runtime.errors import UserError


def parse_whole_numbers(flag: str, text: str, least: int, most: int) -> list[int]:
    """``"7,5,5"`` -> [5, 7]: each number once, in increasing order.

    Raises UserError, naming ``flag``, for an empty list and for anything but whole numbers
    from ``least`` to ``most``.
    """
    parts = parse_words(text)
    bad = [part for part in parts if not _between(part, least, most)]
    if bad or not parts:
        raise UserError(
            f"{flag} {text!r} is not a list of whole numbers from {least} to {most}; "
            f"give {flag} 5,7"
        )
    return sorted({int(part) for part in parts})


def parse_numbers(flag: str, text: str) -> tuple[float, ...]:
    """``"80,9.5,0.002"`` -> the numbers in the order written.

    Raises UserError, naming ``flag``, for an empty list and for anything but numbers.
    """
    try:
        numbers = tuple(float(part) for part in parse_words(text))
    except ValueError:
        numbers = ()
    if not numbers:
        raise UserError(f"{flag} {text!r} is not a list of numbers; give {flag} 80,9.5,0.002")
    return numbers


def _between(part: str, least: int, most: int) -> bool:
    """Whether a text is a whole number in decimal digits from ``least`` to ``most``."""
    return part.isascii() and part.isdigit() and len(part) < 20 and least <= int(part) <= most


def parse_words(text: str) -> list[str]:
    """``"a, b"`` -> ["a", "b"]; empty parts are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_sources(texts: Iterable[str]) -> tuple[str, ...]:
    """Names and paths that exist, from an option that may be repeated: ``("1,2", "a,b/x")``.

    A text that is the path of something is one value, commas and all; any other is a list.
    """
    return tuple(
        value
        for text in texts
        for value in ([text] if text and Path(text).exists() else parse_words(text))
    )


def parse_files(texts: Iterable[str], suffix: str) -> tuple[str, ...]:
    """Files to write, all with ``suffix``, from an option that may be repeated.

    A list is separated by the commas that follow the suffix, so others may be part of a path.
    """
    between = rf"(?<={re.escape(suffix)})\s*,"
    return tuple(part.strip() for text in texts for part in re.split(between, text))
