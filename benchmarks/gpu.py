"""What a GPU gains: graphs, the compiler, schedulers of `diffusers`, and a whole set of images.

``python -m benchmarks.gpu --device cuda`` prints a table and writes it as JSON.  Times are compared
in turn; the same commands run on a CPU, which has no graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch

from benchmarks.sampling import (
    Stopwatch,
    clock_options,
    network_options,
    open_bundled,
)
from benchmarks.suite.figures import CALLS, Figure, median_ratio, over_calls, peers
from commands.help import SETTINGS
from denoisers.batch import SeededBatch
from denoisers.conditions import Conditions
from denoisers.families.edm import EDMModel
from denoisers.registry import ModelSource
from evaluation.samples import SampleMetricsOptions, prepare
from plans.plan import visit_plan
from runtime import cli
from runtime.dist import World, exact_float32
from runtime.log import note
from runtime.typed import write_result
from samplers.build import build
from samplers.graph import GraphedWalk, cuda_graph
from samplers.job import SampleOptions
from samplers.options import SamplerOptions

EXAMPLES = """\b
Examples:
  python -m benchmarks.gpu --device cuda                              (ten minutes)
  python -m benchmarks.gpu --only compile --dtype float32 --threads 1 --clock cpu --batch 64
  python -m benchmarks.gpu --only images --images 64 --batch 16       (a rehearsal on a CPU)
"""
SAMPLER = SamplerOptions(sampler="dpmpp", nfe=CALLS)


@dataclass(frozen=True)
class GpuSettings:
    """What every part is told."""

    batches: tuple[int, ...]
    images: int
    rounds: int
    dtype: str
    device: str


@dataclass(frozen=True)
class GpuBench:
    """The bundled model on the device, and a stopwatch."""

    asked: GpuSettings
    model: EDMModel
    watch: Stopwatch


def of_sampling(bench: GpuBench) -> Iterator[Figure]:
    for batch in bench.asked.batches:
        yield from over_calls(bench.model, batch, bench.asked.rounds, bench.watch)


def of_graphs(bench: GpuBench) -> Iterator[Figure]:
    """Walks over their replay, and whether both give the same bits."""
    device = bench.watch.device
    if device.type != "cuda":
        note(f"graphs: there are none on device '{device}'")
        return
    plan = build(SAMPLER, bench.model.card).plan
    for batch in bench.asked.batches:
        seeded = SeededBatch.open(bench.model, Conditions(), range(batch), torch.float32, device)
        x = seeded.start(plan[0].start)
        graph = GraphedWalk(plan, seeded, x, cuda_graph)

        def walk(seeded: SeededBatch = seeded, x: torch.Tensor = x) -> torch.Tensor:
            *_, final = visit_plan(plan, seeded.meter, x, seeded.process)
            return final

        def replay(
            graph: GraphedWalk = graph, seeded: SeededBatch = seeded, x: torch.Tensor = x
        ) -> torch.Tensor:
            return next(graph(seeded.meter, x))

        ratio = median_ratio(bench.watch, walk, replay, bench.asked.rounds)
        yield Figure("graphs", f"{CALLS} calls, {batch} images: walked over replayed", ratio)
        different = float((walk() - replay()).abs().max())
        yield Figure("graphs", f"largest difference, {batch} images", different, "0")


def of_peers(bench: GpuBench) -> Iterator[Figure]:
    yield from peers(bench.model, bench.asked.rounds, bench.watch, bench.asked.batches)


def of_compile(bench: GpuBench) -> Iterator[Figure]:
    """A forward over a compiled one, and what compiling takes, for every size of batch."""
    net, watch, rounds = bench.model.net, bench.watch, bench.asked.rounds
    level = torch.zeros(1, device=watch.device)
    for batch in bench.asked.batches:
        x = net.inputs(torch.randn(batch, *bench.model.card.shape, device=watch.device))
        torch.compiler.reset()  # so that none is compiled for all sizes
        compiled = torch.compile(bench.model.network)

        def run(network: Callable[..., object], x: torch.Tensor = x) -> Callable[[], object]:
            return lambda: network(x, level)

        began = time.perf_counter()
        watch(run(compiled))
        seconds = time.perf_counter() - began
        ratio = median_ratio(watch, run(bench.model.network), run(compiled), rounds)
        yield Figure("compile", f"{batch} images: a forward over a compiled one", ratio)
        yield Figure("compile", f"{batch} images: seconds of the first call", seconds)


def of_images(bench: GpuBench) -> Iterator[Figure]:
    """``fid.py gen`` from seeds to a FID, walked and, on a GPU, compiled and replayed."""
    asked, here = bench.asked, World(0, 1, bench.watch.device)
    for compiled in (False, True) if here.device.type == "cuda" else (False,):
        with TemporaryDirectory() as cache:
            source = ModelSource("cifar10-small", cache_dir=cache, dtype=asked.dtype)
            run = prepare(SampleMetricsOptions(SampleOptions(
                source, sampler=SAMPLER, seeds=f"0-{asked.images - 1}", batch=asked.batches[-1],
                compile=compiled,
            )))  # fmt: skip
            began = time.perf_counter()
            note(run.run(here))
            seconds = time.perf_counter() - began
        what = f"{asked.images} images and their FID, {CALLS} NFE{', compiled' * compiled}"
        yield Figure("images", f"{what}: seconds", seconds)
        yield Figure("images", f"{what}: images per second", asked.images / seconds)


PARTS: dict[str, Callable[[GpuBench], Iterator[Figure]]] = {
    "sampling": of_sampling,
    "graphs": of_graphs,
    "peers": of_peers,
    "compile": of_compile,
    "images": of_images,
}


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--only", type=click.Choice(list(PARTS)), multiple=True, help="may be repeated")
@click.option(
    "--batch", "batches", type=click.IntRange(1), multiple=True, default=(1, 64, 256),
    help="images at once, may be repeated; the last one makes the images",
)  # fmt: skip
@click.option("--images", type=click.IntRange(2), default=50_000, help="of the whole set")
@click.option("--rounds", type=click.IntRange(1), default=7, help="measurements")
@click.option("--dest", type=click.Path(path_type=Path), default=Path("samples/gpu.json"))
@clock_options
@network_options
def main(
    only: tuple[str, ...], batches: tuple[int, ...], images: int, rounds: int, dest: Path,
    threads: int | None, clock: str, dtype: str, device: str,
) -> None:  # fmt: skip
    """Measure what a GPU gains; see the top of this file."""
    exact_float32()
    asked = GpuSettings(batches, images, rounds, dtype, device)
    bench = GpuBench(asked, *open_bundled(threads, clock, dtype, device))
    gpu = bench.watch.device.type == "cuda"
    name = torch.cuda.get_device_name(bench.watch.device) if gpu else device
    found: list[Figure] = []
    click.echo("| benchmark | | median | wanted |\n|---|---|---:|---|")
    for part in only or PARTS:
        with torch.inference_mode():
            some = list(PARTS[part](bench))
        for figure in some:
            click.echo(figure.row)
        found += some
        content = {"settings": asked, "device": name, "torch": torch.__version__, "figures": found}
        write_result(dest, content)
    note(f"{dest}")


if __name__ == "__main__":
    cli.run(main)
