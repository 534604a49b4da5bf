"""FID against the number of network evaluations (NFE): ODE, EDM's SDE and Restart in one figure."""

from __future__ import annotations

from typing import Any

import click

from commands.harness_options import detectors_option, harness_options, image_options
from commands.help import SETTINGS
from comparison.series import CHURN, NfeSweepOptions, prepare
from restart.tables import configurations
from runtime import cli
from runtime.job import execute
from runtime.options import parse_options
from solvers.registry import CLASSIC

EXAMPLES = """\b
Examples:
  python -m tools.nfe_sweep --num 10000
  python -m tools.nfe_sweep --dataset_name imagenet64 --restart imagenet64 --churn imagenet64-edm
  python -m tools.nfe_sweep --restart params.txt --restart '18 {"0": [3, 2, 0.06, 0.3]}' --sde none
  torchrun --standalone --nproc_per_node=2 -m tools.nfe_sweep --num 10000
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option(
    "--restart",
    multiple=True,
    default=["cifar10-vp-43", "cifar10-vp-55", "cifar10-vp-75", "cifar10-vp-115"],
    metavar="SPEC",
    help="Restart plans: a published configuration, or the name of a model for all of its "
    "configurations; a file with lines 'N {json}', or FILE:LINE; or 'N {json}' itself.  May be "
    f"repeated.  Published configurations: {', '.join(configurations())}",
)
@click.option("--ode", default="15,23,35,63", metavar="LIST", help="NFE of Heun, or 'none'")
@click.option("--sde", default="35,63,115", metavar="LIST", help="NFE of EDM's SDE, or 'none'")
@click.option(
    "--churn",
    multiple=True,
    default=["cifar10-vp"],
    metavar="SPEC",
    help=f"noise settings of the SDE: {', '.join(CHURN)}, or S_churn,S_min,S_max,S_noise.  May be "
    "repeated",
)
@click.option(
    "--main_solver", type=click.Choice(CLASSIC), help="Restart's main walk  [default: heun]"
)
@click.option(
    "--restart_solver", type=click.Choice(CLASSIC), help="Restart's intervals  [default: heun]"
)
@image_options
@harness_options("samples/sweep", detectors_option)
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Measure FID against NFE for the ODE, the SDE and Restart on the same seeds.

    Writes a table, a figure and JSON.  Run the same command again to continue after an
    interruption; series can be added to an existing folder.
    """
    execute(prepare, parse_options(NfeSweepOptions, flags), dry_run, device)


if __name__ == "__main__":
    cli.run(main)
