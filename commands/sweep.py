"""FID against NFE for ODE, SDE and Restart in one figure, and the search for a Restart plan."""

from __future__ import annotations

from typing import Any

import click

from commands.options import harness_options, image_options
from comparison import series
from evaluation.images import open_detector
from plan_search import job as search
from restart.candidates import INTERVALS
from restart.tables import configurations
from runtime.dist import world
from runtime.job import execute
from runtime.options import parse_options
from solvers.registry import CLASSIC

FIGURE = """\b
Examples:
  python sweep.py figure --num 10000
  python sweep.py figure --restart imagenet64 --churn imagenet64-edm --dataset_name imagenet64
  python sweep.py figure --restart params.txt --restart '18 {"0": [3, 2, 0.06, 0.3]}' --sde none
"""
SEARCH = """\b
Examples:
  python sweep.py search --nfe 5,7,9
  python sweep.py search --nfe 15 --objective dopri5 --most 2 --intervals 0.06:0.3,0.3:1.09,1.09:5
  python sweep.py search --nfe 39 --walks heun+0/heun --dataset_name mine --model_path FILE \\
      --ref mine.npz
"""


@click.group()
def main() -> None:
    """Series of configurations, and the search for new ones."""


@main.command(epilog=FIGURE, context_settings={"show_default": True})
@click.option(
    "--restart",
    multiple=True,
    default=["cifar10-vp-43", "cifar10-vp-55", "cifar10-vp-75", "cifar10-vp-115"],
    metavar="SPEC",
    help="a published configuration, or the model of several; a file of 'N {json}' lines, FILE:LINE"
    f", or 'N {{json}}'; repeat it.  Published: {', '.join(configurations())}",
)
@click.option("--ode", default="15,23,35,63", metavar="LIST", help="NFE of Heun, or 'none'")
@click.option("--sde", default="35,63,115", metavar="LIST", help="NFE of EDM's SDE, or 'none'")
@click.option(
    "--churn",
    multiple=True,
    default=["cifar10-vp"],
    metavar="SPEC",
    help=f"of the SDE: {', '.join(series.CHURN)}, or S_churn,S_min,S_max,S_noise; repeat it",
)
@click.option("--main_solver", type=click.Choice(CLASSIC), help="of Restart  [default: heun]")
@click.option("--restart_solver", type=click.Choice(CLASSIC), help="of Restart  [default: heun]")
@image_options
@harness_options("samples/sweep")
def figure(dry_run: bool, device: str | None, **flags: Any) -> None:
    """FID against NFE of ODE, SDE and Restart, on the same seeds: table, figure and JSON.

    A killed sweep continues with the rows that are missing; rows can be added to a folder.
    """
    execute(series.prepare, parse_options(series.NfeSweepOptions, flags), dry_run, device)


@main.command("search", epilog=SEARCH, context_settings={"show_default": True})
@click.option("--nfe", required=True, metavar="LIST", help="budgets by comma, each its own search")
@click.option(
    "--objective",
    type=click.Choice(list(search.OBJECTIVES)),
    default="fid",
    help="FID to --ref; or the distance to the same plan solved by dopri5, which needs no detector",
)
@click.option(
    "--select",
    metavar="LIST",
    help=f"images per plan, round by round  [default: fid {search.ROUNDS['fid']}, "
    f"dopri5 {search.ROUNDS['dopri5']}]",
)
@click.option(
    "--intervals",
    default=",".join(f"{low:g}:{high:g}" for low, high in INTERVALS),
    metavar="LIST",
    help="T_MIN:T_MAX, by comma",
)
@click.option("--most", type=click.IntRange(1), default=1, help="intervals in one plan")
@click.option(
    "--walks",
    default="heun+0/heun,heun+afs/heun,ipndm+afs/heun,ipndm+afs/ipndm",
    metavar="LIST",
    help="MAIN[+0][+afs]/RESTART, by comma; +0 ends at 0, +afs begins with a free step",
)
@harness_options("samples/search")
def search_command(**options: Any) -> None:
    """The best Restart plan of exactly --nfe evaluations on a model, and the trace of the search.

    Every split of the budget into main nodes, K and N_restart competes; the best quarter of each
    round goes on to the next, on seeds that no table reports on.  A killed search goes on.
    """
    _run(search.prepare, search.run, options)


def _run(prepare: Any, run: Any, options: dict[str, Any]) -> None:
    dry_run, device = options.pop("dry_run"), options.pop("device")
    with world(device) as here:
        made = prepare(options, here, open_detector(options, here))
        text = made.outline() if dry_run else run(made, here)
        if here.is_main:
            click.echo(text)
