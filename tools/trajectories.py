"""Compute a teacher's trajectories once, for every student that reads them."""

from __future__ import annotations

from typing import Any

import click

from commands.help import SETTINGS
from commands.numbers import POSITIVE, SEED, TOLERANCE, images, nodes
from commands.options import (
    batch_option,
    condition_options,
    dataset_option,
    device_option,
    dry_run_option,
    dtype_option,
    model_options,
)
from runtime import cli
from runtime.job import execute
from runtime.options import parse_options
from solvers.grids import SCHEDULES
from teachers.build import TEACHERS
from teachers.trajectories import STORED, TrajectoryOptions, prepare

EXAMPLES = """\b
Examples:
  python -m tools.trajectories --number 2048
  python -m tools.trajectories --teacher ipndm --num_steps 36 --keep all
  torchrun --standalone --nproc_per_node=2 -m tools.trajectories --number 50000 --store float16
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@dataset_option
@model_options
@condition_options
@click.option("--teacher", type=click.Choice(TEACHERS), default="heun")
@click.option("--num_steps", type=nodes(2), default=18, help="nodes, sigma_max to sigma_min")
@click.option("--schedule_type", type=click.Choice(SCHEDULES), default="polynomial")
@click.option(
    "--schedule_rho",
    type=POSITIVE,
    help="[default: 7 for polynomial, else 1]",
)
@click.option("--restart_info", metavar="JSON", help="restart: intervals  [default: the model's]")
@click.option(
    "--tol",
    type=TOLERANCE,
    help="dopri5: relative and absolute tolerance  [default: 1e-5]",
)
@click.option("--number", type=images(1), default=512, help="latents")
@click.option("--seed", type=SEED, default=0, help="of the latents")
@click.option(
    "--keep", metavar="ends|all|K", default="ends", help="states at both ends or every K-th node"
)
@click.option(
    "--store", type=click.Choice(list(STORED)), default="float32", help="dtype of states on disk"
)
@batch_option(64)
@dtype_option
@device_option
@dry_run_option
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Compute a teacher's trajectories once, for every student that reads them.

    They are kept in the cache under a hash of the model, the teacher, the seed and the conditions.
    Run the same command again to continue after an interruption, or with a larger --number to add
    latents; what is there is not computed again.
    """
    execute(prepare, parse_options(TrajectoryOptions, flags), dry_run, device)


if __name__ == "__main__":
    cli.run(main)
