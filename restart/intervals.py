"""Restart intervals: parsing, validation and JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from runtime.errors import UserError
from runtime.typed import parse_json
from solvers.grids import MOST_NODES

_LINE = re.compile(r"(\d+)?\s*(\{.*)", re.DOTALL)
MOST_INTERVALS = 100  #: ten times the published ones
_FORM = '{"0": [N_restart, K, t_min, t_max], ...}'


@dataclass(frozen=True)
class Interval:
    """``[N_restart, K, t_min, t_max]``: K jumps to t_max with descents of N_restart nodes."""

    n_restart: int  #: nodes of one descent, including both ends
    k: int  #: number of restarts
    t_min: float  #: noise level; replaced by the nearest node of the main walk
    t_max: float  #: noise level

    def __str__(self) -> str:
        return f"[{self.n_restart}, {self.k}, {self.t_min:g}, {self.t_max:g}]"


def interval_values(intervals: Sequence[Interval]) -> dict[str, list[float]]:
    """The intervals as JSON values: ``{"0": [N_restart, K, t_min, t_max], ...}``."""
    return {str(n): [i.n_restart, i.k, i.t_min, i.t_max] for n, i in enumerate(intervals)}


def interval_json(intervals: Sequence[Interval]) -> str:
    """The intervals as JSON text, the inverse of `parse_restart_info`."""
    return json.dumps(interval_values(intervals))


#: A published configuration: the number of main nodes, if given, and the intervals.
Line = tuple[int | None, tuple[Interval, ...]]


class IntervalDefaults(Protocol):
    """The part of a model's card that Restart needs."""

    @property
    def name(self) -> str: ...

    @property
    def sigma_min(self) -> float: ...

    @property
    def sigma_max(self) -> float: ...

    @property
    def restart_info(self) -> Mapping[str, list[float]]: ...


def resolve_intervals(text: str | None, card: IntervalDefaults) -> Line:
    """The configuration in ``text`` (``--restart_info``), by default the intervals of ``card``.

    Raises UserError if there are none, and as `parse_restart_line` does.
    """
    if text is not None:
        return parse_restart_line(text)
    if not card.restart_info:
        raise UserError(
            f"{card.name!r} has no default restart intervals: give --restart_info "
            "'{\"0\": [N_restart, K, t_min, t_max]}' between its noise levels "
            f"{card.sigma_min:.3g} and {card.sigma_max:.3g}"
        )
    return None, _parse_json(json.dumps(dict(card.restart_info)))


def check_interval(i: int, interval: Interval) -> None:
    """Raise UserError, naming interval ``i``, if one of its numbers is out of range."""
    what = f"restart interval {i} {interval}"
    for name, count, least in (("N_restart", interval.n_restart, 2), ("K", interval.k, 1)):
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise UserError(f"{what}: {name} = {count} must be an integer of at least {least}")
    for name, value in (("t_min", interval.t_min), ("t_max", interval.t_max)):
        if not 0 < value < math.inf:
            raise UserError(f"{what}: {name} = {value:g} must be a positive, finite noise level")
    if interval.n_restart * interval.k > MOST_NODES:
        raise UserError(f"{what}: its descents have more than {MOST_NODES} nodes; give fewer")
    if interval.t_min >= interval.t_max:
        raise UserError(
            f"{what}: t_min = {interval.t_min:g} must be below t_max = {interval.t_max:g}"
        )


def parse_restart_info(text: str) -> tuple[Interval, ...]:
    """Intervals from JSON, from a published ``N {json}`` line, or from a file of such lines.

    JSON is ``{"0": [N_restart, K, t_min, t_max], "1": ...}``, in the order of the numbers.
    ``FILE:LINE`` selects a line of a file with several configurations.  Raises UserError, naming
    the interval, file and line where there is one, for anything else.
    """
    return parse_restart_line(text)[1]


def parse_restart_line(text: str) -> Line:
    """As `parse_restart_info`, together with the number of main nodes, None if not given."""
    parsed = _parse_line(text)
    if parsed is not None:
        return parsed
    path, line = text.strip(), None
    with_line = re.fullmatch(r"(.+):(\d+)", path)
    if with_line and not Path(path).is_file():
        path, line = with_line[1], int(with_line[2])
    lines = read_configurations(path)
    if line is None and len(lines) == 1:
        return next(iter(lines.values()))
    if line not in lines:
        missing = "" if line is None else f", not in line {line}"
        raise UserError(
            f"restart_info file {path} has configurations in the lines "
            f"{', '.join(map(str, lines))}{missing}: select one, such as {path}:{next(iter(lines))}"
        )
    return lines[line]


def read_configurations(path: str | Path) -> dict[int, Line]:
    """The configurations of a file by line number, from 1: published ``N {json}`` lines.

    A file may also hold one JSON text over several lines.  Raises UserError, naming file and line.
    """
    if not str(path) or not Path(path).is_file():
        raise UserError(
            f"restart_info {str(path)!r} is neither a file nor of the form {_FORM} or 'N {{json}}'"
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"restart_info file {path} is not a text file") from None
    lines = {n: line for n, line in enumerate(text.splitlines(), 1) if line.strip()}
    if not lines:
        raise UserError(f"restart_info file {path} is empty; write 'N {{json}}' lines into it")
    first, *others = lines.values()
    if not first.rstrip().endswith("}") and not any(map(_LINE.fullmatch, map(str.strip, others))):
        lines = {next(iter(lines)): text}
    return {n: _read_line(path, n, line) for n, line in lines.items()}


def _read_line(path: str | Path, n: int, text: str) -> Line:
    try:
        parsed = _parse_line(text)
    except UserError as error:
        raise UserError(f"{path}, line {n}: {error}") from None
    if parsed is None:
        raise UserError(f"{path}, line {n} is not of the form {_FORM} or 'N {{json}}'")
    return parsed


def _parse_line(text: str) -> Line | None:
    """The configuration in ``text``, or None if it has neither of the two forms."""
    line = _LINE.fullmatch(text.strip())
    if line is None:
        return None
    n_main = int(line[1][:20]) if line[1] else None  # Python refuses to read 5000 digits
    if n_main is not None and not 2 <= n_main <= MOST_NODES:
        raise UserError(
            f"restart_info has {n_main} main node(s); give at least 2, and at most {MOST_NODES}"
        )
    return n_main, _parse_json(line[2])


def _parse_json(text: str) -> tuple[Interval, ...]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        info = dict(pairs)
        if len(info) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise UserError(f'restart_info has interval "{key}" twice; number them 0, 1, ...')
        return info

    info = parse_json(text, f"restart_info {text!r}", f"write {_FORM}", unique)
    if len(info) > MOST_INTERVALS:
        raise UserError(f"restart_info has {len(info)} intervals; give {MOST_INTERVALS} or fewer")
    if not info:
        raise UserError(f"restart_info has no interval; write {_FORM}")
    for key in info:
        if not re.fullmatch(r"\d+", key):
            raise UserError(f'restart_info interval "{key}" is not a number; write {_FORM}')
    ordered = sorted(info.items(), key=lambda item: int(item[0]))
    return tuple(_parse_interval(i, key, row) for i, (key, row) in enumerate(ordered))


def _parse_interval(i: int, key: str, row: Any) -> Interval:
    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    if not isinstance(row, list) or len(row) != 4 or not all(number(value) for value in row):
        raise UserError(
            f'restart_info interval "{key}" is {json.dumps(row)}; '
            "write the four numbers [N_restart, K, t_min, t_max]"
        )
    counts = [int(v) if float(v).is_integer() else v for v in row[:2]]
    interval = Interval(counts[0], counts[1], float(row[2]), float(row[3]))
    check_interval(int(key), interval)
    return interval
