"""What each part of an NS solver's training is worth: tables that differ in one thing each.

All tables start from the same noise levels, found once, unless the row says otherwise, and are
measured on the seeds of the default run.  A killed run goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from commands.help import SETTINGS
from commands.options import device_option, dtype_option
from comparison.job import row_seeds
from comparison.measure import measure
from comparison.results import MeasuredRow
from comparison.rows import Row
from comparison.significance import with_gaps
from comparison.students import learned_rows
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation.harness import HarnessOptions, open_harness
from metrics.measures import KEPT
from ns.experiments import TrainedTable, load_student
from ns.job import NsJob, prepare
from ns.options import NsOptions
from plans.plan import run_plan
from runtime import cli
from runtime.dist import World, world
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.log import note, progress
from runtime.typed import read_result
from solvers.grids import Grid
from tools.gits import GitsOptions, GitsResult
from tools.gits import prepare as prepare_gits

EXAMPLES = """\b
Examples:
  python -m benchmarks.ns_ablation                     (hours on two cores)
  torchrun --standalone --nproc_per_node=2 -m benchmarks.ns_ablation --updates=20 --num_images=200
"""


class Variant(NamedTuple):
    """A table that differs from the base in some options."""

    name: str
    changes: dict[str, Any]


class Tried(NamedTuple):
    """What a variant comes to."""

    name: str
    row: MeasuredRow
    rmse: float  #: root mean square distance from the teacher's images, latents that are kept out


@dataclass(frozen=True)
class Nodes:
    """Grids with an inner noise level for each call."""

    polynomial: tuple[float, ...]
    logsnr: tuple[float, ...]
    gits: tuple[float, ...]
    searched: tuple[float, ...]


def variants(nodes: Nodes, updates: int) -> Iterator[Variant]:
    """All tables of the ablation."""
    grids = {"polynomial": nodes.polynomial, "log-SNR": nodes.logsnr, "GITS": nodes.gits}
    for name, times in grids.items():
        yield Variant(f"{name} nodes, closed form", {"times": times, "refine": 0})
    yield Variant("searched nodes, closed form", {"refine": 0})
    for name, times in grids.items():
        yield Variant(f"{name} nodes, refined", {"times": times})
    yield Variant("searched nodes, refined: the base", {})
    for exponent in (0.3, 0.9):
        yield Variant(f"spectral loss, exponent {exponent}", {"exponent": exponent})
    for loss in ("l2", "huber", "features"):
        yield Variant(f"loss {loss}", {"loss": loss})
    for weight in (0.001, 0.01):
        yield Variant(f"Restart unpaired, weight {weight}", {"unpaired": weight})
    for count in (32, 64, 128, 1024):
        yield Variant(f"{count} trajectories", {"trajectories": count})
    yield Variant(f"{4 * updates} updates", {"refine": 4 * updates})
    for seed in (1, 2):
        yield Variant(f"seed {seed}", {"seed": seed})


def find_nodes(options: NsOptions, folder: Path, here: World) -> Nodes:
    """The grids of ``nfe`` + 2 noise levels; what took time to find is kept in ``folder``."""
    job, count = prepare(replace(options, refine=0, desc="search")), options.nfe + 2
    high, low = job.card.sigma_max, job.card.sigma_min
    table = trained(job, here).table
    file = folder / "gits.json"
    if not file.exists():
        prepare_gits(GitsOptions(options.model, num_steps=str(count), dest=file)).run(here)
        here.barrier()
    gits = read_result(GitsResult, file)
    assert gits is not None
    polynomial, logsnr = (
        tuple(Grid(name, count).resolve(job.card).nodes().tolist())
        for name in ("polynomial", "logsnr")
    )
    return Nodes(polynomial, logsnr, gits.grids[0].times, (high, *table.times.tolist(), low))


def trained(job: NsJob, here: World) -> TrainedTable:
    """The student of a run, which is trained unless there is an equal one."""
    student = load_student(str(job.run(here)), job.options.outdir)
    assert isinstance(student, TrainedTable)
    return student


def distance(row: Row, job: NsJob, model: Model, here: World) -> float:
    """RMSE to the teacher's images, on the latents that no table of ``job`` is fitted on."""
    numbers, plan = range(job.split.judged), row.sampler.plan
    images = job.curves.run(here, model).read(numbers).x0[-1]
    drawn = job.curves.draw(model, numbers, here)
    with torch.inference_mode():
        made = run_plan(plan, drawn.meter, drawn.start(plan[0].start), drawn.process).x[-1]
    return float((made.cpu() - images).square().mean().sqrt())


def table(tried: list[Tried]) -> str:
    """The rows, the best first."""
    lines = ["| table | RMSE to the teacher | FID | behind the best | FID to converged |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for name, row, rmse in sorted(tried, key=lambda t: t.row.fid):
        gap = f"{row.to_best.difference:.2f} ± {row.to_best.error:.2f}" if row.to_best else ""
        second = "" if row.fid_converged is None else f"{row.fid_converged:.2f}"
        lines.append(f"| {name} | {rmse:.4f} | {row.fid:.2f} | {gap} | {second} |")
    return "\n".join(lines)


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--nfe", type=click.IntRange(1), default=5, help="network evaluations")
@click.option("--updates", type=click.IntRange(1), default=40, help="of each refinement")
@click.option("--num_images", "num", type=click.IntRange(4, KEPT), default=1500, help="per row")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("samples/ns-ablation"))
@click.option("--only", default="", help="rows whose name contains this")
@dtype_option
@device_option
def main(
    nfe: int, updates: int, num: int, outdir: Path, only: str, dtype: str, device: str | None
) -> None:
    """Train and measure NS solvers of the bundled model that differ in one thing each."""
    source = ModelSource("cifar10-small", dtype=dtype)
    base = NsOptions(source, outdir=str(outdir / "exps"), resume="auto", nfe=nfe)
    base = replace(base, refine=updates, batch=32, trajectories=256)
    with world(device) as here:
        harness = open_harness(HarnessOptions(source), row_seeds(num, 4), 4, here)
        nodes = find_nodes(base, outdir, here)
        base = replace(base, times=nodes.searched)
        same = prepare(base)  # whose latents all rows are judged on
        chosen = [v for v in variants(nodes, updates) if only in v.name]
        if not chosen:
            raise UserError(f"--only {only!r} is in no row's name: leave it out to see all names")
        tried: list[Tried] = []
        with progress(len(chosen) * num, "ablation", "img", enabled=here.is_main) as bar:
            for variant in chosen:
                job = prepare(replace(base, **variant.changes, desc=_slug(variant.name)))
                student = trained(job, here)
                row = replace(learned_rows([student], job.card)[0], detail=variant.name)
                measured = measure(row, harness, outdir, bar.update)
                tried.append(
                    Tried(variant.name, measured, distance(row, same, harness.model, here))
                )
                note(f"{variant.name}: FID {measured.fid:.3f}, RMSE {tried[-1].rmse:.5f}")
        here.barrier()
        if here.is_main:
            rows = with_gaps([t.row for t in tried], harness, outdir)
            text = table([t._replace(row=row) for t, row in zip(tried, rows, strict=True)])
            with atomic_write(outdir / "table.md") as temporary:
                temporary.write_text(text + "\n")
            click.echo(text)


def _slug(name: str) -> str:
    """A name for a folder."""
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    cli.run(main)
