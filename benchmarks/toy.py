"""The Restart paper's synthetic experiment (arXiv:2306.14878, section 4.1, figure 2).

A small network learns 2,000 points of a mixture in 20 dimensions; ODE, SDE and Restart sample
with it at equal NFE, and W1 by exact matching says what each adds and what each contracts.
toy/errors.py defines the three errors, docs/toy.md explains the result.

    python -m benchmarks.toy                          exps/toy: table, figure and all points
    python -m benchmarks.toy --budgets 23,31 --dry-run

A killed run goes on where it stopped.  Exit code 1 if an inequality of the paper fails.
"""

from __future__ import annotations

from pathlib import Path

import click

from commands.options import dry_run_option
from runtime import cli
from runtime.errors import UserError
from toy.experiment import Settings, outline, plans, run
from toy.report import claims, table, write_report

USUAL = Settings()


def numbers(text: str) -> tuple[int, ...]:
    """``23,31`` -> (23, 31); UserError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--budgets {text}: write numbers of evaluations, 23,31") from None


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--budgets", metavar="LIST", default=",".join(map(str, USUAL.budgets)), help="NFE")
@click.option("--points", type=click.IntRange(2), default=USUAL.points, help="in data and clouds")
@click.option(
    "--choosing", type=click.IntRange(2), default=USUAL.choosing, help="others, to choose on"
)
@click.option("--blocks", type=click.IntRange(2), default=USUAL.blocks, help="clouds to report on")
@click.option("--kimg", type=float, default=USUAL.kimg, help="thousands of points of training")
@click.option("--batch", type=click.IntRange(1), default=USUAL.batch, help="of training")
@click.option("--width", type=click.IntRange(4), default=USUAL.width, help="of the network")
@click.option("--seed", type=click.IntRange(0), default=USUAL.seed, help="of the network")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("exps/toy"))
@dry_run_option
def main(budgets: str, outdir: Path, dry_run: bool, **options: float) -> int:
    settings = Settings(budgets=numbers(budgets), **options)  # type: ignore[arg-type]
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
