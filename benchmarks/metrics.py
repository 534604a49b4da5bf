"""The time of a pass over images relative to its detector, and the memory that it takes."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from benchmarks.sampling import (
    Interleaved,
    Stopwatch,
    clock_options,
    interleaved,
    stopwatch,
)
from commands.help import SETTINGS
from commands.options import PATH, device_option
from evaluation.images import ImagePassOptions, image_pass
from image_data.sources import image_batches
from metrics.detectors import CHUNK, Detector, load_detector
from metrics.statistics import DetectorId
from metrics.summary import Collector, Requirements
from runtime import cli
from runtime.dist import World, choose_device

THROUGHPUT = """\b
Examples:
  python -m benchmarks.metrics throughput                            (PNGs of noise, the worst case)
  python -m benchmarks.metrics throughput --threads 1 --clock cpu    (on a machine in use)
  python -m benchmarks.metrics throughput --images x.zip --detector inception-pt --path FILE
"""
RATIO, GROWTH = 1.1, 32.0  #: limits
MIB = 2**20


@click.group(context_settings=SETTINGS)
def main() -> None:
    """Measure throughput and memory of the statistics of images."""


def noise(folder: Path, count: int, size: int) -> Path:
    """Write ``count`` PNGs of noise with ``size`` pixels per side; returns the folder."""
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06}.png")
    return folder


@main.command(epilog=THROUGHPUT)
@click.option("--images", type=PATH, help="folder or zip  [default: PNGs of noise]")
@click.option("--num", type=click.IntRange(2), default=2048, help="number of images")
@click.option("--size", type=click.IntRange(1), default=32, help="pixels per side of the noise")
@click.option("--detector", default="cifar10-small", help="name of a detector")
@click.option("--path", type=PATH, help="file of the detector")
@click.option("--batch", type=click.IntRange(1), default=256, help="images per batch")
@click.option("--rounds", type=click.IntRange(1), default=5, help="measurements")
@clock_options
@device_option
def throughput(
    images: Path | None, num: int, size: int, detector: str, path: Path | None, batch: int,
    rounds: int, threads: int | None, clock: str, device: str | None,
) -> None:  # fmt: skip
    """Time a whole pass of fid.py over its detector's forward alone.

    A pass reads and decodes in threads, runs the detector and updates the statistics.  The forward
    is measured in turn with it, on images in memory; the result is the median ratio.  By the CPU
    clock the work of all threads is added up, which bounds the ratio on idle cores from above.  The
    exit code is 1 for a ratio above 1.1.
    """
    here = World(0, 1, choose_device(device))
    watch = stopwatch(threads, clock, here.device)
    network = load_detector(detector, path=path, device=here.device)
    with tempfile.TemporaryDirectory() as folder:
        source = images or noise(Path(folder), num, size)
        cost = pass_cost(source, network, ImagePassOptions(num, batch=batch, cache_dir=folder),
                         watch, rounds)  # fmt: skip
    click.echo(f"{num} images, detector {detector}, {clock} clock, median of {rounds} rounds")
    click.echo(f"forward {num / cost.base:.0f} images/s, pass {num / cost.taken:.0f}")
    click.echo(
        f"ratio {cost.ratio:.3f} ({min(cost.ratios):.3f} to {max(cost.ratios):.3f}), limit {RATIO}"
    )
    sys.exit(cost.ratio > RATIO)


def pass_cost(
    source: Path, network: Detector, options: ImagePassOptions, watch: Stopwatch, rounds: int
) -> Interleaved:
    """Time a pass and the detector's forward on images in memory, in turn."""
    ready = list(image_batches(source, options.batch, num=options.num))
    here = World(0, 1, watch.device)

    def forward() -> None:
        for part in ready:
            network.both(part)

    def whole() -> None:
        with image_pass(source, [network], Requirements(), options, here):
            pass

    watch(forward)  # the first call prepares kernels
    return interleaved(watch, whole, forward, rounds)


def peak() -> float:
    """Peak memory of this process so far, in MiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


@main.command()
@click.option("--num", type=click.IntRange(10), default=50_000, help="number of images")
@click.option("--dim", type=click.IntRange(1), default=2048, help="number of features")
@click.option(
    "--features", type=click.IntRange(0), default=10_000, help="features kept for kid, pr and dc"
)
@click.option(
    "--limit", type=float, default=GROWTH, help="MiB allowed from a fifth of the images to all"
)
def memory(num: int, dim: int, features: int, limit: float) -> None:
    """Measure the peak memory of the statistics of normal features.

    Prints the peak after a fifth of the images and after all of them, covariance included.  The
    exit code is 1 if it grows by more than --limit.
    """
    draw = torch.Generator().manual_seed(0)
    network = Detector(
        DetectorId("normal", "0" * 64, dim),
        lambda x: torch.randn(CHUNK, dim, generator=draw), torch.device("cpu"),
    )  # fmt: skip
    begin = peak()

    def gather(count: int) -> float:
        """The peak after ``count`` images; also checks their statistics."""
        collector = Collector(network, Requirements(features), max(count, features))
        for start in range(0, count, CHUNK):
            positions = range(start, min(start + CHUNK, count))
            collector.update(torch.zeros(len(positions), 3, 1, 1, dtype=torch.uint8), positions)
        moments = collector.finish().moments
        trace = float(np.trace(moments.cov)) / dim
        assert moments.n == count and abs(trace - 1) < 6 * (2 / (count * dim)) ** 0.5, trace
        return peak()

    fifth, most = gather(num // 5), gather(num)
    click.echo(f"{num} x {dim} features, {features} of them kept; all would be "
               f"{num * dim * 4 / MIB:.0f} MiB")  # fmt: skip
    click.echo(f"peak {begin:.0f} MiB at the start, {fifth:.0f} after {num // 5}, {most:.0f} after "
               f"{num}: {most - fifth:.0f} more, limit {limit:g}")  # fmt: skip
    sys.exit(most - fifth > limit)


if __name__ == "__main__":
    cli.run(main)
