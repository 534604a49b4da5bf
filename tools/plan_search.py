"""Search for the best Restart plan of a given number of network evaluations (NFE) on a model."""

from __future__ import annotations

from typing import Any

import click

from commands.harness_options import harness_options, one_detector_option
from commands.help import SETTINGS
from plan_search.job import OBJECTIVES, ROUNDS, PlanSearchOptions, prepare
from runtime import cli
from runtime.job import execute
from runtime.options import parse_options

EXAMPLES = """\b
Examples:
  python -m tools.plan_search --nfe 5,7,9
  python -m tools.plan_search --nfe 15 --objective dopri5 --most 2 \\
      --intervals 0.06:0.3,0.3:1.09,1.09:5
  python -m tools.plan_search --nfe 39 --walks heun+0/heun --dataset_name mine \\
      --model_path FILE --ref mine.npz
  torchrun --standalone --nproc_per_node=2 -m tools.plan_search --nfe 9
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--nfe", required=True, metavar="LIST", help="budgets, each searched separately")
@click.option(
    "--objective",
    type=click.Choice(list(OBJECTIVES)),
    default="fid",
    help="FID to --ref, or the distance to the same plan solved by dopri5, which needs no detector",
)
@click.option(
    "--select",
    metavar="LIST",
    help=f"images per plan in each round  [default: fid {ROUNDS['fid']}, "
    f"dopri5 {ROUNDS['dopri5']}]",
)
@click.option(
    "--intervals",
    default=PlanSearchOptions.intervals,
    metavar="LIST",
    help="candidate Restart intervals T_MIN:T_MAX",
)
@click.option("--most", type=click.IntRange(1, 3), default=1, help="most intervals in one plan")
@click.option(
    "--walks",
    default=PlanSearchOptions.walks,
    metavar="LIST",
    help="candidate solvers MAIN[+0][+afs]/RESTART: +0 ends at 0, +afs starts with the free "
    "analytical first step",
)
@harness_options("samples/search", one_detector_option)
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Find the best Restart plan of exactly --nfe evaluations on a model.

    All divisions of the budget into main nodes, K and N_restart compete.  Each round keeps the best
    quarter, measured on seeds that no table reports on.  Run the same command again to continue
    after an interruption.
    """
    execute(prepare, parse_options(PlanSearchOptions, flags), dry_run, device)


if __name__ == "__main__":
    cli.run(main)
