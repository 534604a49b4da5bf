"""The types of options that are numbers."""

from __future__ import annotations

import math
from typing import Any

import click


class Number(click.FloatRange):
    """A finite number within a range; click's own range lets nan through, and inf if it is open."""

    infinite = False  #: whether inf is meant by it

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Limit(Number):
    """A number that may also be inf, no limit."""

    infinite = True


POSITIVE = Number(0, min_open=True)
NOT_NEGATIVE = Number(0)
FRACTION = Number(0, 1, max_open=True)  #: of a whole that is never all of it
SHARE = Number(0, 1, min_open=True)  #: of a whole, never nothing
LIMIT = Limit(0)
SEED = click.IntRange(0, 2**32 - 1)  #: torch's generators and numpy's take no more
TOLERANCE = Number(1e-14, 1)  #: of dopri5, relative and absolute; float64 resolves no smaller one
