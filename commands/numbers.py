"""The types of options that are numbers."""

from __future__ import annotations

import math
from typing import Any

import click

from runtime.bounds import (
    MOST_BATCH,
    MOST_BLOCKS,
    MOST_IMAGES,
    MOST_SEED,
    MOST_THREADS,
    MOST_UPDATES,
    MOST_WIDTH,
)
from solvers.grids import MOST_NODES


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
PART = Number(0, 1, min_open=True, max_open=True)  #: of a whole, neither nothing nor all
RATE = Number(0, 10, min_open=True)  #: of learning; larger ones only ever diverge
LIMIT = Limit(0)
TOLERANCE = Number(1e-14, 1)  #: of dopri5, relative and absolute; float64 resolves no smaller one


# Whole numbers: how much work there may be


def nodes(least: int) -> click.IntRange:
    """Nodes of a grid, and evaluations of a network."""
    return click.IntRange(least, MOST_NODES)


def images(least: int) -> click.IntRange:
    """Images, latents, points, prompts."""
    return click.IntRange(least, MOST_IMAGES)


def updates(least: int) -> click.IntRange:
    """Steps of a training, and counts of them."""
    return click.IntRange(least, MOST_UPDATES)


def blocks(least: int) -> click.IntRange:
    """Parts that results are reported of."""
    return click.IntRange(least, MOST_BLOCKS)


SEED = click.IntRange(0, MOST_SEED)
WIDTH = click.IntRange(4, MOST_WIDTH)
BATCH = click.IntRange(1, MOST_BATCH)
THREADS = click.IntRange(1, MOST_THREADS)
