"""Peak memory of refining a table on latents of the size of large models.

The pipeline is Stable Diffusion 3 in kind with latents of 16 x 64 x 64 and a small transformer of
random weights, so what is held for gradients outweighs the weights.  Every row runs in a process
of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from commands.help import SETTINGS
from denoisers.families.diffusers.kinds import transformer_card
from denoisers.families.diffusers.one_step import TransformerModel, from_transformer_pipeline
from ns.coordinates import WhitenedTable
from ns.losses import spectral
from ns.refine import Pair, RefineLoop, refine
from ns.search import prior_table
from ns.spectrum import SpectralNorm
from runtime import cli
from runtime.dist import World
from solvers.grids import get_grid
from tests import tiny_transformers as tiny

SIDE, CHANNELS = 64, 16


@dataclass(frozen=True)
class MemoryCase:
    """One refinement."""

    calls: int
    prompts: int  #: all different
    checkpoint: bool

    @property
    def row(self) -> str:
        return f"| {self.calls} | {self.prompts} | {'yes' if self.checkpoint else 'no'} |"


CASES = (
    *(MemoryCase(calls, 2, checkpoint) for checkpoint in (False, True) for calls in (2, 4, 8)),
    *(MemoryCase(1, prompts, True) for prompts in (2, 32)),
)


def pipeline() -> Any:
    """SD3 with a transformer of six blocks on 1024 image tokens."""
    pipe = tiny.sd3()
    pipe.transformer = tiny.network(
        "SD3Transformer2DModel", sample_size=SIDE, patch_size=2, in_channels=CHANNELS,
        num_layers=6, attention_head_dim=32, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=128, pooled_projection_dim=32, out_channels=CHANNELS,
        pos_embed_max_size=SIDE,
    )  # fmt: skip
    return pipe


def loaded() -> TransformerModel:
    pipe = pipeline()
    settings = pipe.transformer.config, pipe.scheduler.config, pipe.vae.config
    card = transformer_card("memory", "StableDiffusion3Pipeline", *settings, {}, "memory")
    return from_transformer_pipeline(pipe, card)


def measure(case: MemoryCase) -> tuple[float, float]:
    """MB of the process before the first update, and at its peak."""
    torch.set_num_threads(1)
    model = loaded()
    card = model.card
    grid = get_grid("polynomial", case.calls + 2, card.sigma_min, card.sigma_max)
    table = prior_table(grid[1:-1].tolist(), card.sigma_max, card.sigma_min)
    still = torch.zeros((case.calls + 1,) * 3, dtype=torch.float64)  # no step changes the table
    start = WhitenedTable(table, still, True)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *card.shape, generator=generator)
    loss = spectral(SpectralNorm.of([images], 0.6))

    def pairs(numbers: Sequence[int]) -> Iterator[Pair]:
        for number in numbers:
            latents = (1 + card.sigma_max) * torch.randn(1, *card.shape, generator=generator)
            denoiser = model.bind(None, 3.0, [f"prompt {number}"])
            yield Pair(latents, images, denoiser)

    updates = case.prompts  # of one pair
    loop = RefineLoop(updates, 1, updates, 1e-9, case.checkpoint)
    with torch.no_grad():
        model.bind(None, 3.0, ["a"])(images, torch.tensor(1.0))
    before = _peak()
    nothing: Callable[[object], float] = lambda _: 0.0  # noqa: E731
    with TemporaryDirectory() as folder, contextlib.redirect_stdout(StringIO()):
        here = World(0, 1, torch.device("cpu"))
        refine(start, pairs, range(case.prompts), nothing, loss, loop, Path(folder), here, nothing)
    return before, _peak()


def measured_alone(case: MemoryCase) -> tuple[float, float]:
    """As `measure`, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        return alone.submit(measure, case).result()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


@click.command(context_settings=SETTINGS)
def main() -> None:
    """Peak memory over calls and prompts, with and without --checkpoint."""
    click.echo("| calls | prompts | --checkpoint | MB before | MB for the updates |")
    click.echo("|---:|---:|---|---:|---:|")
    for case in CASES:
        before, peak = measured_alone(case)
        click.echo(f"{case.row} {before:.0f} | {peak - before:.0f} |")


if __name__ == "__main__":
    cli.run(main)
