"""Sample a model without solver error, by dopri5 on the probability-flow ODE.

These samples are what an exact deterministic solver would make of the same seeds, so their FID is
the limit that the model sets to every such solver.
"""

from __future__ import annotations

from typing import Any

import click

from commands.help import SETTINGS
from commands.numbers import TOLERANCE
from commands.options import (
    PATH,
    batch_option,
    condition_options,
    dataset_option,
    detector_path_option,
    device_option,
    dry_run_option,
    dtype_option,
    model_options,
    seeds_option,
)
from evaluation.ode_samples import SEEDS, OdeSampleOptions, prepare
from metrics.detectors import DETECTORS
from runtime import cli
from runtime.job import execute
from runtime.options import parse_options

EXAMPLES = """\b
Examples:
  python -m tools.converged --dest mine-converged.npz --dataset_name mine --model_path FILE
  python compare.py --dataset_name mine --model_path FILE --ref mine.npz \\
      --ref_model mine-converged.npz
  python -m tools.converged --seeds 0-9999 --outdir samples/converged
  torchrun --standalone --nproc_per_node=2 -m tools.converged --dest mine-converged.npz
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@dataset_option
@model_options
@condition_options
@seeds_option(SEEDS)
@batch_option(128)
@click.option(
    "--tol",
    type=TOLERANCE,
    default=1e-4,
    help="relative and absolute tolerance of dopri5",
)
@click.option("--dest", type=PATH, help="write statistics to this .npz")
@click.option("--outdir", type=PATH, help="keep the images in this folder")
@click.option(
    "--detector", type=click.Choice(list(DETECTORS)), default="cifar10-small", help="for --dest"
)
@detector_path_option
@dtype_option
@device_option
@dry_run_option
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Sample a model without solver error, by dopri5 on the probability-flow ODE.

    --dest writes statistics of the samples, the second reference of compare.py and of
    tools.nfe_sweep, without keeping images; --outdir keeps one PNG per seed; where all of them are
    there, --dest reads them, so a second detector costs no samples.  Run the same command again to
    continue after an interruption.
    """
    execute(prepare, parse_options(OdeSampleOptions, flags), dry_run, device)


if __name__ == "__main__":
    cli.run(main)
