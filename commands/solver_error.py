"""How far samplers are from the exact solution of the ODE, on the same latents."""

from __future__ import annotations

from typing import Any

import click

from commands.harness_options import detector_option, work_options
from commands.help import SETTINGS
from commands.numbers import BATCH, TOLERANCE
from commands.options import classic_options, condition_options, predictors_option, seeds_option
from comparison.solver_error.job import NO_DETECTOR, SolverErrorOptions, prepare
from metrics.detectors import DETECTORS
from runtime.job import execute
from runtime.options import parse_options

EXAMPLES = """\b
Examples:
  python solver_error.py --budgets 5 --predictors 1,2
  python solver_error.py --dataset_name mine --model_path FILE --detector none --seeds 0-7
  python solver_error.py --budgets 3,5,7,9 --outdir samples/compare     # into its report.html
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@predictors_option
@click.option("--budgets", default="3,5,7,9", metavar="LIST", help="NFE, by comma")
@seeds_option("0-31")
@click.option("--tol", type=TOLERANCE, default=1e-4, help="rtol = atol")
@click.option(
    "--check", type=bool, default=False, help="also Heun with 200 nodes: is the solution exact?"
)
@click.option("--ceilings", type=bool, default=True, help="also Heun-35")
@classic_options
@click.option("--batch", type=BATCH, default=8, help="images that are solved together")
@condition_options
@work_options("samples/errors", detector_option((*DETECTORS, NO_DETECTOR)))
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Measure solver error without a reference: the distance to the exact solution of the ODE.

    Rows are classic solvers, and trained predictors (--predictors) at their own NFE; all have the
    same prompts, class and guidance rate.  A killed run continues with what is missing.
    """
    execute(prepare, parse_options(SolverErrorOptions, flags), dry_run, device)
