"""The bundled rows, measured again: of the bundled model, the rows of the default run.

Comparisons take its classic rows and Restart at five evaluations, and Heun-35 and Restart-43, from
``comparison/bundled`` instead of measuring them, which takes 190,000 evaluations.  This command
measures them anew and prints how far they are from those kept; ``--write`` puts the new ones in
their place, with the record of this run.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from commands.help import SETTINGS
from commands.options import device_option, dtype_option
from comparison.job import CompareOptions, prepare
from comparison.kept_rows import BUNDLED, keep, place
from comparison.report.write import RESULTS
from comparison.results import ComparisonResults, MeasuredRow
from denoisers.registry import ModelSource
from evaluation.detectors import DetectorOptions
from evaluation.harness import HarnessOptions
from plan_search import halving
from runtime import cli
from runtime.dist import world
from runtime.files import atomic_write
from runtime.record import RECORD
from runtime.typed import read_earlier, read_result, write_result

#: As in the default run: evaluations, images a row, and per candidate for Restart's plan.
BUDGET, IMAGES, SELECT = 5, 1500, "32,128"
DETECTORS = DetectorOptions("cifar10-small,cifar10-small-resnet")
#: Of the bundled arrays.  Moments in float32 change an FID by less than 1e-6 of it; features are
#: used for standard errors alone.
STORED = {"sigma": np.float32, "features": np.float16}
EXAMPLES = """\b
Example:
  torchrun --standalone --nproc_per_node=2 -m benchmarks.kept_rows    (20 minutes on two cores)
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
        HarnessOptions(source, detector=DETECTORS), budgets=str(BUDGET), num=num_images,
        select=SELECT, no_cache=True, outdir=outdir,
    )  # fmt: skip
    with world(device) as here:
        prepare(options).run(here)
        if here.is_main:
            _tell(outdir)
            if write:
                bundle(outdir, BUDGET, BUNDLED)


def _tell(folder: Path) -> None:
    for row in _results(folder).rows:
        kept = read_earlier(MeasuredRow, place(row.identity, BUNDLED))
        known = f"kept: {kept.fid:.4f}" if kept else "none kept"
        click.echo(f"{row.method}: {row.fid:.4f}, {known}")


def bundle(folder: Path, budget: int, dest: Path) -> None:
    """Put the rows and the choice of Restart's plan in ``folder`` into ``dest``, and the record."""
    results = _results(folder)
    for row in results.rows:
        keep(row, folder, dest)
        shrink(place(row.identity, dest).with_suffix(".npz"))
    trace = read_result(halving.SearchTrace, folder / f"selection-{budget}.json")
    assert trace is not None, "the comparison chose a plan"
    write_result(halving.place(trace.identity, dest), trace)
    results.record.write(dest / RECORD)


def shrink(file: Path) -> None:
    """Store the statistics of a row in the dtypes `STORED`."""
    with np.load(file) as arrays:
        content = {name: arrays[name] for name in arrays}
    content |= {name: content[name].astype(dtype) for name, dtype in STORED.items()}
    with atomic_write(file) as temporary, open(temporary, "wb") as opened:
        np.savez_compressed(opened, **content)


def _results(folder: Path) -> ComparisonResults:
    results = read_result(ComparisonResults, folder / RESULTS)
    assert results is not None, "the comparison wrote its results"
    return results


if __name__ == "__main__":
    cli.run(main)
