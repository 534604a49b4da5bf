"""The benchmarks of ``python -m benchmarks``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import frechet, memory, metrics, training
from benchmarks.sampling import open_bundled, stopwatch
from benchmarks.suite.figures import Figure, calibration, over_calls, peers, processes
from evaluation.images import ImagePassOptions
from metrics.detectors import load_detector


@dataclass(frozen=True)
class SuiteSettings:
    """What every benchmark is told."""

    batch: int
    rounds: int
    dtype: str


def of_sampling(asked: SuiteSettings) -> Iterator[Figure]:
    model, watch = open_bundled(1, "wall", asked.dtype, "cpu")
    yield from over_calls(model, asked.batch, asked.rounds, watch)


def of_training(asked: SuiteSettings) -> Iterator[Figure]:
    model, watch = open_bundled(1, "wall", asked.dtype, "cpu")
    for student, teacher, *_, ratio in training.measure(model, asked.batch, asked.rounds, watch):
        limit = 1.1 if student == "ns" else training.LIMIT
        what = f"{student}, {teacher}: an update over its calls"
        yield Figure("training", what, ratio, f"at most {limit}")
    yield calibration(model, asked.batch, asked.rounds, watch)


def of_metrics(asked: SuiteSettings) -> Iterator[Figure]:
    watch = stopwatch(1, "cpu", torch.device("cpu"))
    network = load_detector("cifar10-small", device=watch.device)
    with TemporaryDirectory() as folder:
        source = metrics.noise(Path(folder), 2048, 32)
        options = ImagePassOptions(2048, batch=256, cache_dir=folder)
        cost = metrics.pass_cost(source, network, options, watch, asked.rounds)
    what = "a pass over PNGs over its detector, CPU time"
    yield Figure("metrics", what, cost.ratio, f"at most {metrics.RATIO}")


def of_frechet(asked: SuiteSettings) -> Iterator[Figure]:
    found = frechet.compared(2048, 1)
    yield Figure("frechet", "sqrtm of SciPy over ours, 2048 features", found.ratio, "at least 10")
    yield Figure("frechet", "relative difference", found.difference, "at most 1e-9")


def of_memory(asked: SuiteSettings) -> Iterator[Figure]:
    for case in memory.CASES:
        if case.checkpoint:
            before, peak = memory.measured_alone(case)
            what = f"MB for updates of {case.calls} calls, {case.prompts} prompts, checkpointed"
            yield Figure("memory", what, peak - before)


def of_processes(asked: SuiteSettings) -> Iterator[Figure]:
    yield processes(asked.batch, asked.rounds, asked.dtype)


def of_peers(asked: SuiteSettings) -> Iterator[Figure]:
    model, watch = open_bundled(1, "wall", asked.dtype, "cpu")
    yield from peers(model, asked.rounds, watch)


SUITE = {
    "sampling": of_sampling,
    "training": of_training,
    "metrics": of_metrics,
    "frechet": of_frechet,
    "memory": of_memory,
    "processes": of_processes,
    "peers": of_peers,
}


def figures(name: str, asked: SuiteSettings) -> list[Figure]:
    """The figures of one benchmark."""
    return list(SUITE[name](asked))
