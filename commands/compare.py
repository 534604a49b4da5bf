"""One table at matched budgets: learned students, classic solvers, Restart, and the ceilings."""

from __future__ import annotations

from typing import Any

import click

from commands.harness_options import detectors_option, harness_options, image_options
from commands.help import SETTINGS
from commands.options import classic_options, mask_options, predictors_option
from comparison.job import EXTRA, CompareOptions, prepare
from runtime.job import execute
from runtime.options import parse_options

EXAMPLES = """\b
Examples:
  python compare.py --predictors 1,2,3 --budgets 5 --num 2000 --outdir samples/compare
  python compare.py --predictors exps/00001-... --budgets 3,5,7,9 --num 50000 --dtype float32
  python compare.py --budgets none --ceilings False --with pds --iterations 1000,200,100,50,30
  python compare.py --predictors 1 --budgets 7 --with learned-restart \\
      --restart_info '{"0": [2, 1, 0.06, 0.3]}'
  torchrun --standalone --nproc_per_node=2 compare.py --budgets 5 --num 2000
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@predictors_option
@click.option("--budgets", default="3,5,7,9", metavar="LIST", help="NFE, by comma, or 'none'")
@image_options
@click.option(
    "--select",
    default="64,256",
    metavar="LIST",
    help="images per candidate in the choice of Restart's plan, or 'none': no Restart",
)
@click.option("--ceilings", type=bool, default=True, help="also Heun-35 and Restart-43")
@click.option(
    "--with",
    "extra",
    type=click.Choice(EXTRA),
    multiple=True,
    help="more rows: pds and learned-restart at budgets of their own",
)
@click.option(
    "--restart_info",
    metavar="JSON|FILE[:LINE]",
    help="of --with learned-restart  [default: the model's]",
)
@click.option("--iterations", metavar="LIST", help="of --with pds, by comma  [default: 50]")
@mask_options
@classic_options
@click.option(
    "--no_cache",
    type=bool,
    is_flag=False,
    flag_value="True",
    default=False,
    help="measure every row, also those that are kept from earlier runs",
)
@harness_options("samples/compare", detectors_option)
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Compare samplers at matched budgets, on the same seeds, through one FID harness.

    Students are trained predictors; Restart's plan for each budget is chosen on other seeds.  All
    rows have the same prompts, class and guidance rate.  A killed comparison continues with the
    rows that are missing.
    """
    execute(prepare, parse_options(CompareOptions, flags), dry_run, device)
