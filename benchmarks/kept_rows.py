"""The bundled rows, measured again: the ceilings of the bundled model.

Comparisons take Heun-35 and Restart-43 from ``comparison/bundled`` instead of measuring them, which
takes 117,000 evaluations.  This command measures them anew and prints how far they are from those
kept; ``--write`` puts the new ones in their place, with the record of this run.
"""

from __future__ import annotations

from pathlib import Path

import click

from commands.help import SETTINGS
from commands.options import device_option, dtype_option
from comparison.job import CompareOptions, prepare
from comparison.kept_rows import BUNDLED, keep, place
from comparison.report.write import RESULTS
from comparison.results import ComparisonResults, MeasuredRow
from denoisers.registry import ModelSource
from evaluation.harness import HarnessOptions
from runtime import cli
from runtime.dist import world
from runtime.record import RECORD
from runtime.typed import read_earlier, read_result

IMAGES = 1500  #: a row, as in the default run
EXAMPLES = """\b
Example:
  torchrun --standalone --nproc_per_node=2 -m benchmarks.kept_rows    (15 minutes on two cores)
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--outdir", type=click.Path(path_type=Path), default="samples/kept-rows")
@click.option("--num_images", type=click.IntRange(8), default=IMAGES, help="a row")
@click.option("--write", is_flag=True, help="replace the bundled rows")
@dtype_option
@device_option
def main(outdir: Path, num_images: int, write: bool, dtype: str, device: str | None) -> None:
    """Measure the bundled rows again; see the top of this file."""
    source = ModelSource("cifar10-small", dtype=dtype)
    options = CompareOptions(
        HarnessOptions(source), budgets="none", num=num_images, no_cache=True, outdir=outdir
    )
    with world(device) as here:
        prepare(options).run(here)
        if here.is_main:
            _tell(outdir, write)


def _tell(folder: Path, write: bool) -> None:
    results = read_result(ComparisonResults, folder / RESULTS)
    assert results is not None, "the comparison wrote its results"
    for row in results.rows:
        kept = read_earlier(MeasuredRow, place(row.identity, BUNDLED))
        click.echo(f"{row.method}: {row.fid:.4f}, kept: {kept.fid if kept else float('nan'):.4f}")
        if write:
            keep(row, folder, BUNDLED)
    if write:
        results.record.write(BUNDLED / RECORD)


if __name__ == "__main__":
    cli.run(main)
