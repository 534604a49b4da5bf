"""Damage to files: what somebody's edit, a torn disk or malice makes of them, drawn by seed."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError

#: What an edit may put in the place of a value.
VALUES: tuple[Any, ...] = (
    None, True, "", "4", "nan", "x" * 5000, "../..", -1, 0, 3.5, 10**30, math.nan, math.inf,
    -math.inf, [], {}, [1, "2"], {"a": 1}, [[]], {"0": [3, 2, 0.1, 1]},
)  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value inside a tree of dicts and lists."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys if isinstance(value, dict | list) else ():
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def edited(content: Any, number: int) -> Any:
    """The tree with one value replaced, removed, repeated or added; ``number`` says how."""
    draw, tree = random.Random(number), copy.deepcopy({"": content})
    holder, key = draw.choice(list(places(tree)))
    change = draw.randrange(8)
    if change == 0 and holder is not tree:
        del holder[key]
    elif change == 1 and isinstance(holder[key], dict):
        holder[key]["more"] = draw.choice(VALUES)
    elif change == 1 and isinstance(holder[key], list):
        holder[key] += holder[key] or [0]
    else:
        holder[key] = draw.choice(VALUES)
    return tree[""]


def torn(data: bytes, number: int) -> bytes:
    """The bytes cut short, overwritten in one place, or something else altogether."""
    draw = random.Random(number)
    other = (b"", b"\0" * 100, b"\xff\xfe", b"[" * 10**5, b"{" + b'"a":[' * 500, b"null", b"7")
    if draw.random() < 0.3:
        return draw.choice(other)
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        return data[:at]
    return data[:at] + draw.randbytes(min(4, len(data) - at)) + data[at + 4 :]


def attack_json(path: Path, use: Callable[[], object], times: int = 150) -> None:
    """``use`` reads the JSON in ``path``, whatever happens to it, or says a sentence."""
    good = path.read_bytes()
    content = json.loads(good)
    for number in range(times):
        path.write_text(json.dumps(edited(content, number)))
        survives(use, f"edit {number} of {path.name}")
    attack_bytes(path, use, times // 3, good)


def attack_bytes(
    path: Path, use: Callable[[], object], times: int = 50, good: bytes | None = None
) -> None:
    """``use`` reads the bytes in ``path``, whatever happens to them, or says a sentence."""
    good = path.read_bytes() if good is None else good
    for number in range(times):
        path.write_bytes(torn(good, number))
        survives(use, f"tear {number} of {path.name}")
    path.write_bytes(good)
    use()


def survives(use: Callable[[], object], what: str) -> None:
    try:
        use()
    except UserError as error:
        text = str(error)
        assert "\n" not in text and 20 < len(text) < 2500, f"{what}: {text[:2000]}"
    except Exception as error:
        pytest.fail(f"{what} ends in {type(error).__name__}: {error}")
