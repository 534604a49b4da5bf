"""One table at matched budgets: learned students, classic solvers, Restart, and the ceilings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from comparison.job import prepare, run
from denoisers.cards import cards
from denoisers.registry import DTYPES
from fid import open_detector
from metrics.detectors import DETECTORS
from runtime import cli
from runtime.dist import world
from solvers.grids import SCHEDULES

EXAMPLES = """\b
Examples:
  python compare.py --predictors 1,2,3 --budgets 5 --num 2000 --outdir samples/compare
  python compare.py --predictors exps/00001-... --budgets 3,5,7,9 --num 50000 --dtype float32
  python compare.py --budgets none --ceilings False --with pds --iterations 1000,200,100,50,30
  torchrun --standalone --nproc_per_node=2 compare.py --budgets 5 --num 2000
"""


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
@click.option("--dataset_name", default="cifar10-small", help=f"model: {', '.join(cards())}")
@cli.model_options
@click.option(
    "--predictors", default="", metavar="RUNS", help="numbers, folders or files, by comma"
)
@click.option("--budgets", default="3,5,7,9", metavar="LIST", help="NFE, by comma, or 'none'")
@click.option(  # torchrun takes --num for an abbreviation of its own option
    "--num_images", "--num", "num", type=click.IntRange(4), default=2000, help="images per row"
)
@click.option("--blocks", type=click.IntRange(2), default=4, help="disjoint seed blocks")
@click.option(
    "--select", default="64,256", metavar="LIST", help="images per candidate, Restart's choice"
)
@click.option("--ceilings", type=bool, default=True, help="also Heun-35 and Restart-43")
@click.option(
    "--with",
    "extra",
    type=click.Choice(["pds"]),
    multiple=True,
    help="rows at budgets of their own",
)
@click.option("--iterations", metavar="LIST", help="of --with pds, by comma  [default: 50]")
@cli.mask_options
@click.option(
    "--schedule_type", type=click.Choice(SCHEDULES), help="of all classic rows  [default: own]"
)
@click.option("--detector", type=click.Choice(list(DETECTORS)), default="cifar10-small")
@click.option("--detector-path", "detector_path", type=click.Path(path_type=Path))
@click.option("--ref", default="cifar10-small", help="reference statistics: a name or an .npz")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("samples/compare"))
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", help="of the network")
@cli.batch_option(128)
@cli.device_option
@cli.dry_run_option
def main(dry_run: bool, device: str | None, **options: Any) -> None:
    """Compare samplers at matched budgets, on the same seeds, through one FID harness.

    Students are trained predictors; Restart's plan for each budget is chosen on other seeds.  A
    killed comparison goes on with the rows that are missing.
    """
    with world(device) as here:
        detector = open_detector(options, here)
        job = prepare(options, here, detector)
        text = job.outline() if dry_run else run(job, here)
        if here.is_main:
            click.echo(text)


if __name__ == "__main__":
    cli.run(main)
