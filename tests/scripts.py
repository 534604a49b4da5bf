"""Running a command in this process: the types of the fixture ``script``."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Script = Callable[..., Done]
