"""The options that comparisons share: what a figure stands on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from denoisers.cards import cards
from denoisers.precision import DTYPES
from metrics.detectors import DETECTORS
from metrics.measures import METRICS
from runtime import cli
from runtime.seeds import SELECTION_START

F = TypeVar("F", bound=Callable[..., Any])


def work_options(outdir: str, detectors: Iterable[str] = DETECTORS) -> Callable[[F], F]:
    """Model, detector, and how to compute; results go to ``outdir`` by default."""

    def add(function: F) -> F:
        for option in (
            cli.dry_run_option,
            cli.device_option,
            click.option(
                "--dtype", type=click.Choice(list(DTYPES)), default="float32", help="of the network"
            ),
            click.option("--outdir", type=click.Path(path_type=Path), default=Path(outdir)),
            click.option("--detector-path", "detector_path", type=click.Path(path_type=Path)),
            click.option("--detector", type=click.Choice(list(detectors)), default="cifar10-small"),
            cli.model_options,
            click.option(
                "--dataset_name", default="cifar10-small", help=f"model: {', '.join(cards())}"
            ),
        ):
            function = option(function)
        return function

    return add


def harness_options(outdir: str) -> Callable[[F], F]:
    """As `work_options`, with the reference of a FID."""

    def add(function: F) -> F:
        for option in (
            click.option(
                "--ref", default="cifar10-small", help="reference statistics: a name or an .npz"
            ),
            cli.batch_option(128),
        ):
            function = option(function)
        return work_options(outdir)(function)

    return add


def image_options(function: F) -> F:
    """How many images a row has, in how many blocks, and what else they are held against."""
    function = click.option(
        "--ref_model",
        metavar="NAME",
        help="statistics of the model's own converged samples, for a second FID: a name, an .npz "
        "or 'none'  [default: NAME-converged of the model NAME, if bundled]",
    )(function)
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


def detector_options(function: F) -> F:
    """What ``fid.py`` measures, and by which detectors: ``open_detectors`` takes several."""
    for option in (
        click.option("--seed", type=int, default=0, help="draws the N images, and subsets"),
        click.option(
            "--features", type=click.IntRange(min=2), metavar="N",
            help="of at most N images, for fid_inf, kid, pr and dc  [default: 10000]",
        ),
        click.option(
            "--metrics", default="fid", metavar="LIST", help=f"of {', '.join(METRICS)}, by comma"
        ),
        click.option(
            "--detector-path", type=click.Path(path_type=Path),
            help="file of a detector that is not bundled",
        ),
        click.option(
            "--detector", default="cifar10-small", metavar="LIST",
            help=f"{', '.join(DETECTORS)}, a TorchScript file, or name=path; by comma",
        ),
    ):  # fmt: skip
        function = option(function)
    return function
