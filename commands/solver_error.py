"""How far samplers are from the exact solution of the ODE, on the same latents."""

from __future__ import annotations

from typing import Any

import click

from commands.options import seeds_option, work_options
from comparison.solver_error.job import prepare
from comparison.solver_error.measure import run
from evaluation.images import open_detector
from metrics.detectors import DETECTORS
from runtime.dist import world
from solvers.grids import SCHEDULES

EXAMPLES = """\b
Examples:
  python solver_error.py --budgets 5 --predictors 1,2
  python solver_error.py --dataset_name mine --model_path FILE --detector none --seeds 0-7
  python solver_error.py --budgets 3,5,7,9 --outdir samples/compare     (goes into its report.html)
"""
NONE = "none"


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
@click.option(
    "--predictors", default="", metavar="RUNS", help="numbers, folders or files, by comma"
)
@click.option("--budgets", default="3,5,7,9", metavar="LIST", help="NFE, by comma")
@seeds_option("0-31")
@click.option("--tol", type=click.FloatRange(0, min_open=True), default=1e-4, help="rtol = atol")
@click.option(
    "--check", type=bool, default=False, help="also Heun with 200 nodes: is the solution exact?"
)
@click.option("--ceilings", type=bool, default=True, help="also Heun-35")
@click.option(
    "--schedule_type", type=click.Choice(SCHEDULES), help="of all classic rows  [default: own]"
)
@click.option("--batch", type=click.IntRange(1), default=8, help="images that are solved together")
@work_options("samples/errors", (*DETECTORS, NONE))
def main(dry_run: bool, device: str | None, **options: Any) -> None:
    """Measure solver error without a reference: the distance to the exact solution of the ODE.

    Classic solvers and trained predictors (--predictors, at their own NFE).  A killed run goes on
    with what is missing.
    """
    with world(device) as here:
        detector = None if options["detector"] == NONE else open_detector(options, here)
        job = prepare(options, here, detector)
        text = job.outline() if dry_run else run(job)
        if here.is_main:
            click.echo(text)
