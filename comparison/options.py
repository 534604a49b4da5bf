"""The options that comparisons share: what a figure stands on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from comparison.choose import SELECTION_START
from denoisers.cards import cards
from denoisers.registry import DTYPES
from metrics.detectors import DETECTORS
from runtime import cli

F = TypeVar("F", bound=Callable[..., Any])


def harness_options(outdir: str) -> Callable[[F], F]:
    """Model, detector, reference, and how to compute; results go to ``outdir`` by default."""

    def add(function: F) -> F:
        for option in (
            cli.dry_run_option,
            cli.device_option,
            cli.batch_option(128),
            click.option(
                "--dtype", type=click.Choice(list(DTYPES)), default="float32", help="of the network"
            ),
            click.option("--outdir", type=click.Path(path_type=Path), default=Path(outdir)),
            click.option(
                "--ref", default="cifar10-small", help="reference statistics: a name or an .npz"
            ),
            click.option("--detector-path", "detector_path", type=click.Path(path_type=Path)),
            click.option("--detector", type=click.Choice(list(DETECTORS)), default="cifar10-small"),
            cli.model_options,
            click.option(
                "--dataset_name", default="cifar10-small", help=f"model: {', '.join(cards())}"
            ),
        ):
            function = option(function)
        return function

    return add


def image_options(function: F) -> F:
    """How many images a row has, and in how many blocks."""
    function = click.option(
        "--blocks", type=click.IntRange(2), default=4, help="disjoint seed blocks"
    )(function)
    return click.option(  # torchrun takes --num for an abbreviation of its own option
        "--num_images",
        "--num",
        "num",
        type=click.IntRange(4, SELECTION_START),  # selections have the seeds from there on
        default=2000,
        help="images per row",
    )(function)
