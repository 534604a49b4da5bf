"""The Restart paper's synthetic experiment (arXiv:2306.14878, section 4.1, figure 2).

A small network learns 2,000 points of a Gaussian mixture in 20 dimensions.  ODE, SDE and Restart
samplers use it at the same number of network evaluations (NFE).  Wasserstein-1 distances, computed
by exact matching, tell how much error each sampler adds and how much of an earlier error it leaves.
The three errors are defined in toy/distances.py; docs/restart.md explains the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.help import SETTINGS
from commands.numbers import BATCH, POSITIVE, SEED, WIDTH, blocks, images
from commands.options import PATH, dry_run_option
from runtime import cli
from runtime.bounds import MOST_SEARCHED
from runtime.lists import parse_whole_numbers
from toy.experiment import Settings, outline, plans, run
from toy.report import claims, table, write_report

DEFAULTS = Settings()
EXAMPLES = """\b
Examples:
  python -m tools.restart_toy                       # table, figure and all points in exps/toy
  python -m tools.restart_toy --budgets 23,31 --dry-run
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option(
    "--budgets",
    metavar="LIST",
    default=",".join(map(str, DEFAULTS.budgets)),
    help="numbers of evaluations",
)
@click.option(
    "--points",
    type=images(2),
    default=DEFAULTS.points,
    help="points in the data and in every cloud of samples",
)
@click.option(
    "--choosing",
    type=blocks(2),
    default=DEFAULTS.choosing,
    help="clouds on which each sampler's settings are chosen",
)
@click.option(
    "--blocks", type=blocks(2), default=DEFAULTS.blocks, help="further clouds to report on"
)
@click.option(
    "--kimg", type=POSITIVE, default=DEFAULTS.kimg, help="training length, in 1000 points"
)
@click.option("--batch", type=BATCH, default=DEFAULTS.batch, help="training batch")
@click.option("--width", type=WIDTH, default=DEFAULTS.width, help="network width")
@click.option("--seed", type=SEED, default=DEFAULTS.seed, help="seed of the network")
@click.option("--outdir", type=PATH, default=Path("exps/toy"), help="results folder")
@dry_run_option
def main(budgets: str, outdir: Path, dry_run: bool, **options: Any) -> int:
    """Run the Restart paper's synthetic experiment (arXiv:2306.14878, section 4.1, figure 2).

    Run the same command again to continue after an interruption.  The exit code is 1 if one of the
    paper's inequalities fails.
    """
    chosen = tuple(parse_whole_numbers("--budgets", budgets, 1, MOST_SEARCHED))
    settings = Settings(budgets=chosen, **options)
    if dry_run:
        click.echo(f"{settings}\nwould be measured in {outdir}:")
        for budget, labels in outline(plans(settings)).items():
            click.echo(f"{budget}: {'; '.join(labels)}")
        return 0
    results = run(settings, outdir)
    paths = write_report(outdir, results)
    click.echo(table(results) + "\n" + "\n".join(map(str, paths)))
    return int(not all(claim.holds for claim in claims(results)))


if __name__ == "__main__":
    cli.run(main)
