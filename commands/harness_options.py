"""The options of commands that measure several samplers in one way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import click

from commands.numbers import blocks
from commands.options import (
    PATH,
    F,
    batch_option,
    combine,
    compile_option,
    condition_options,
    dataset_option,
    detector_path_option,
    device_option,
    dry_run_option,
    dtype_option,
    model_options,
)
from metrics.detectors import DETECTORS
from runtime.seeds import SELECTION_START


def detector_option(names: Iterable[str]) -> Callable[[F], F]:
    """One detector, by name."""
    kind = click.Choice(list(names))
    return click.option("--detector", type=kind, default="cifar10-small")


one_detector_option = detector_option(DETECTORS)
#: The first detector ranks the samplers, the others add a column each.
detectors_option = click.option(
    "--detector",
    default="cifar10-small",
    metavar="LIST",
    help=f"by comma, of {', '.join(DETECTORS)}: the first one decides, each other one adds an FID",
)


def work_options(outdir: str, detector: Callable[[F], F]) -> Callable[[F], F]:
    """Model, detector, and how to compute; results go to ``outdir`` by default."""
    return combine(
        dataset_option,
        model_options,
        detector,
        detector_path_option,
        click.option("--outdir", type=PATH, default=Path(outdir)),
        dtype_option,
        device_option,
        dry_run_option,
    )


def harness_options(outdir: str, detector: Callable[[F], F]) -> Callable[[F], F]:
    """As `work_options`, with the conditions of the images and the reference of a FID."""
    return combine(
        click.option(
            "--ref",
            default="cifar10-small",
            help="reference statistics: a name or an .npz; of several detectors one name that all "
            "have, or one for each, by comma",
        ),
        batch_option(128),
        compile_option,
        condition_options,
        work_options(outdir, detector),
    )


#: How many images a row has, in how many blocks, and the second reference.
image_options: Callable[[F], F] = combine(
    click.option(  # torchrun takes --num for an abbreviation of its own option
        "--num_images",
        "--num",
        "num",
        type=click.IntRange(4, SELECTION_START),  # selections have the seeds from there on
        default=2000,
        help="images per row",
    ),
    click.option("--blocks", type=blocks(2), default=4, help="disjoint blocks of seeds"),
    click.option(
        "--ref_model",
        metavar="NAME",
        help="statistics of the model's own converged samples, for a second FID: a name, an .npz "
        "or 'none'  [default: NAME-converged of the model NAME, if bundled]",
    ),
)
