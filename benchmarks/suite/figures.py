"""One number of the suite of benchmarks, and the measurements that no other module has."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from benchmarks import sampling
from benchmarks.sampling import Stopwatch, interleaved, open_bundled, raw_forward
from denoisers.families.edm import EDMModel
from ns.calibrate import Latents, calibrate
from ns.search import polynomial_times, prior_table
from ns.spectrum import SpectralNorm
from plans.plan import run_plan
from runtime.noise import SeedNoise
from samplers.build import build
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from samplers.schedulers import diffusers_samplers
from solvers.driver import Meter
from solvers.grids import get_grid
from teachers.curves import Curves

CALLS = 5  #: of samplers and tables
BATCHES = (1, 64)  #: of the comparison with `diffusers`
REPEATS = 20  #: forwards of a process in the comparison of one process with two


@dataclass(frozen=True)
class Figure:
    """What was measured."""

    benchmark: str
    what: str
    value: float  #: a median over rounds; a ratio unless ``what`` says otherwise
    wanted: str = ""  #: where there is a limit

    @property
    def row(self) -> str:
        return f"| {self.benchmark} | {self.what} | {self.value:.4g} | {self.wanted} |"


def median_ratio(
    watch: Stopwatch, action: Callable[[], object], other: Callable[[], object], rounds: int
) -> float:
    """Seconds of ``action`` over those of ``other``."""
    watch(action), watch(other)  # the first calls prepare kernels
    return interleaved(watch, action, other, rounds).ratio


@torch.inference_mode()
def over_calls(model: EDMModel, batch: int, rounds: int, watch: Stopwatch) -> Iterator[Figure]:
    """Every row of `sampling.measure` over its network calls, and the speed of those."""
    rows = list(sampling.measure(model, batch, rounds, watch))
    for name, nfe, *_, ratio in rows:
        what = f"{name}, {nfe} NFE, {batch} images: over the calls"
        yield Figure("sampling", what, ratio, f"at most {sampling.LIMIT}")
    rate = batch / statistics.median(row[2] for row in rows)
    yield Figure("sampling", f"network evaluations per second, {batch} images", rate)


@torch.no_grad()
def calibration(model: EDMModel, batch: int, rounds: int, watch: Stopwatch) -> Figure:
    """The closed form of a table over the network calls that it makes."""
    card = model.card
    levels = get_grid("polynomial", 18, card.sigma_min, card.sigma_max)
    x = levels.reshape(-1, 1, 1, 1, 1).float() * torch.randn(18, batch, *card.shape)
    curves = Curves(levels, x, torch.randn_like(x), watch.device)
    latents = Latents([curves], [Meter(model.bind())])
    norm = SpectralNorm.of([curves.images], 0.6)
    prior = prior_table(
        polynomial_times(CALLS, card.sigma_min, card.sigma_max), card.sigma_max, card.sigma_min
    )
    forward = raw_forward(model, batch, watch.device)
    ratio = median_ratio(watch, lambda: calibrate(prior, latents, norm), forward, rounds)
    return Figure("calibration", f"{CALLS} calls, {batch} latents: over the calls", ratio / CALLS,
                  "at most 3")  # fmt: skip


def peers(
    model: EDMModel, rounds: int, watch: Stopwatch, batches: Sequence[int] = BATCHES
) -> Iterator[Figure]:
    """Schedulers of `diffusers` around the same network, over our sampler of as many calls."""
    own = build(SamplerOptions(sampler="dpmpp", nfe=CALLS, max_order=2), model.card)
    others = diffusers_samplers(CALLS, model.card)
    for batch in batches:
        noise = 80.0 * torch.randn(batch, *model.card.shape, device=watch.device)

        def run(sampler: Sampler, noise: torch.Tensor = noise) -> object:
            draws = SeedNoise(range(len(noise)))
            normal = lambda name: draws.normal(name, model.card.shape)  # noqa: E731
            with torch.no_grad():
                return run_plan(sampler.plan, model.bind(), noise, normal)

        for title, sampler in others.items():
            ratio = median_ratio(watch, lambda: run(sampler), lambda: run(own), rounds)  # noqa: B023
            yield Figure("peers", f"{title} of diffusers over ours, {batch} images", ratio)


def processes(batch: int, rounds: int, dtype: str) -> Figure:
    """Images per second of two processes of one thread over those of one."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        ratios = []
        for _ in range(rounds):
            alone = pool.submit(_rate, batch, dtype).result()
            both = [pool.submit(_rate, batch, dtype) for _ in range(2)]
            ratios.append(sum(part.result() for part in both) / alone)
    return Figure("processes", f"two over one, batches of {batch}", statistics.median(ratios),
                  "at least 1.9")  # fmt: skip


def _rate(batch: int, dtype: str) -> float:
    model, watch = open_bundled(1, "wall", dtype, "cpu")
    forward = raw_forward(model, batch, watch.device)
    with torch.inference_mode():
        forward()
        began = time.perf_counter()
        for _ in range(REPEATS):
            forward()
    return batch * REPEATS / (time.perf_counter() - began)
