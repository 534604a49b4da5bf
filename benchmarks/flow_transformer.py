"""Tables for a small flow transformer: trained here on CIFAR-10, then sampled in 4 and 6 calls.

The transformer predicts the velocity of a rectified flow on 32 x 32 pixels, from patches and a
token of the time, and is trained on the plain loss of flow matching (arXiv:2209.03003).  It is
small and trained for minutes: what counts is the order of samplers at equal calls.  Rows: classic
solvers on equal steps in the time of the flow, which for Euler are the levels of flow pipelines,
and NS solvers.  The distance is that from the images of Heun's method in 35 calls, on latents that
no table is fitted on.  A killed run goes on where it stopped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.ns_ablation import distance
from checkpoints.states import Stateful, read_state, restore
from commands.help import SETTINGS
from commands.options import device_option
from comparison.job import row_seeds
from comparison.measure import measure
from comparison.rows import CEILING_STEPS, Row, classic_rows, heun_ceiling_row
from comparison.students import learned_rows
from denoisers.cards import Card
from denoisers.families.common import LoadedModel
from denoisers.registry import ModelSource
from denoisers.velocity import VelocityDenoiser
from evaluation.harness import HarnessOptions, open_harness
from image_data.sources import image_batches
from ns.experiments import TrainedTable, load_student
from ns.job import NsJob, prepare
from ns.options import NsOptions
from runtime import cli
from runtime.dist import World, world
from runtime.files import atomic_write, sha256_file
from runtime.log import note, progress

NAME, SIDE, PATCH, WIDTH, DEPTH, HEADS = "flow-transformer", 32, 4, 192, 6, 4
BATCH, LR, DECAY = 64, 1e-3, 0.999
KEPT = 200  #: updates after which the state is saved
SAVED = {"net": dict, "average": dict, "optimizer": dict, "spent": float, "updates": int}
EXAMPLES = """\b
Example:
  torchrun --standalone --nproc_per_node=2 -m benchmarks.flow_transformer \\
      --data cifar10-32x32-train.zip --minutes 30      (an hour on two cores)
"""


class FlowTransformer(nn.Module):
    """The velocity (B, 3, 32, 32) at states of this shape and times (B,)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2, WIDTH))
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.pixels = nn.ConvTranspose2d(WIDTH, 3, PATCH, PATCH)

    def forward(self, y: Tensor, s: Tensor) -> Tensor:
        waves = s[:, None] * torch.logspace(0, 2, 32, device=s.device, dtype=s.dtype)
        time = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))[:, None]
        tokens = self.patches(y).flatten(2).transpose(1, 2) + self.places + time
        tokens = self.norm(self.blocks(torch.cat([time, tokens], dim=1))[:, 1:])
        grid = tokens.transpose(1, 2).unflatten(2, (SIDE // PATCH,) * 2)
        velocity: Tensor = self.pixels(grid.contiguous())
        return velocity


CARD = Card(
    NAME, "own", SIDE, 3, 0, sigma_min=1e-3 / (1 - 1e-3), sigma_max=999.0,
    noise_schedule={"kind": "flow", "shift": 1.0},
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class FlowModel(LoadedModel):
    """The trained transformer as a model of the toolkit."""

    net: FlowTransformer

    def _denoiser(self, *conditions: object) -> VelocityDenoiser:
        return VelocityDenoiser(lambda y, s: self.net(y, s.reshape(-1).expand(len(y))))


@dataclass(frozen=True)
class FlowSource(ModelSource):
    """Where it lies, in the place of a path on the command line."""

    weights: Path = field(default=Path("flow.safetensors"))

    def card(self) -> Card:
        return CARD

    @cached_property
    def known_sha256(self) -> str:
        return sha256_file(self.weights)

    def load(self, here: World) -> FlowModel:
        net = FlowTransformer()
        net.load_state_dict(load_file(self.weights))
        net = net.to(here.device).eval().requires_grad_(False)
        return FlowModel(CARD, self.known_sha256, net)


class FlowTraining:
    """The network, the moving average of its weights, and its optimizer."""

    def __init__(self, state: Path) -> None:
        self.state, self.spent, self.updates = state, 0.0, 0
        self.net = FlowTransformer()
        mean = torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
        self.average = torch.optim.swa_utils.AveragedModel(self.net, multi_avg_fn=mean)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=LR)
        kept = read_state(state, SAVED)
        if kept:
            restore(self.parts, kept, state)
            self.spent, self.updates = kept["spent"], kept["updates"]

    @property
    def parts(self) -> dict[str, Stateful]:
        return {"net": self.net, "average": self.average, "optimizer": self.optimizer}

    def update(self, images: Tensor, here: World) -> None:
        """One step on images (N, 3, 32, 32) drawn at random, on every process its own."""
        x0 = images[torch.randint(len(images), (BATCH,))].float() / 127.5 - 1
        x0 = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x0, x0.flip(3))
        s, noise = torch.rand(BATCH), torch.randn_like(x0)
        y = x0 + s[:, None, None, None] * (noise - x0)
        self.optimizer.zero_grad()
        (self.net(y, s) - (noise - x0)).square().mean().backward()
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            here.sum_(parameter.grad)
            parameter.grad /= here.size
        self.optimizer.step()
        self.average.update_parameters(self.net)
        self.updates += 1

    def save(self) -> None:
        saved = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_write(self.state) as temporary:
            torch.save({**saved, "spent": self.spent, "updates": self.updates}, temporary)


def fit(data: Path, weights: Path, seconds: float, here: World) -> None:
    """Train for so long in all; the moving average of the weights is kept."""
    images = torch.cat(list(image_batches(data, 500, (0, 1), None, 0)))
    torch.manual_seed(0)  # the same weights in every process
    run = FlowTraining(weights.with_suffix(".state"))
    torch.manual_seed(1000 * run.updates + here.rank)  # and other images
    began = time.monotonic() - run.spent
    with progress(round(seconds), "training", "s", round(run.spent), here.is_main) as bar:
        while run.spent < seconds:
            run.update(images, here)
            run.spent = here.broadcast_object(time.monotonic() - began)
            bar.update(max(0, round(run.spent) - bar.n))
            if here.is_main and (run.updates % KEPT == 0 or run.spent >= seconds):
                run.save()
    if here.is_main:
        with atomic_write(weights) as temporary:
            save_file(run.average.module.state_dict(), temporary)
        note(f"{run.updates} updates of {BATCH * here.size} images")
    here.barrier()


def samplers(source: FlowSource, calls: int, outdir: Path, here: World) -> tuple[list[Row], NsJob]:
    """All rows of a budget, and the job that trained the table."""
    options = NsOptions(source, outdir=str(outdir / "exps"), resume="auto", nfe=calls)
    options = replace(options, trajectories=256, refine=40, batch=32)
    job = prepare(options)
    student = load_student(str(job.run(here)), job.options.outdir)
    assert isinstance(student, TrainedTable)
    classic = classic_rows(calls, CARD, solvers="euler,unipc,dpmpp,ipndm")
    return [*classic, *learned_rows([student], CARD)], job


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--data", type=click.Path(path_type=Path), required=True, help="folder or zip")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=30.0, help="training")
@click.option("--num_images", "num", type=click.IntRange(4), default=1500, help="per row")
@click.option("--outdir", type=click.Path(path_type=Path), default=Path("samples/flow"))
@device_option
def main(data: Path, minutes: float, num: int, outdir: Path, device: str | None) -> None:
    """Train a small flow transformer, then tables for it; compare samplers at 4 and 6 calls."""
    weights = outdir / "flow.safetensors"
    outdir.mkdir(parents=True, exist_ok=True)
    with world(device) as here:
        if not weights.exists():
            fit(data, weights, 60 * minutes, here)
        source = FlowSource(NAME, weights=weights)
        harness = open_harness(HarnessOptions(source), row_seeds(num, 4), 4, here)
        model = source.load(here)
        lines = ["| calls | sampler | grid | RMSE to Heun-35 | FID |", "|---:|---|---|---:|---:|"]
        for calls in (4, 6):
            rows, job = samplers(source, calls, outdir, here)
            far = [distance(row, job, model, here) for row in rows]
            with progress(len(rows) * num, f"{calls} calls", "img", enabled=here.is_main) as bar:
                fids = [measure(row, harness, outdir, bar.update).fid for row in rows]
            ranked = sorted(zip(far, fids, rows, strict=True), key=lambda found: found[0])
            lines += [f"| {calls} | {r.method} | {r.detail} | {d:.4f} | {f:.2f} |"
                      for d, f, r in ranked]  # fmt: skip
        heun = heun_ceiling_row(CEILING_STEPS, CARD, None)
        with progress(num, heun.method, "img", enabled=here.is_main) as bar:
            fid = measure(heun, harness, outdir, bar.update).fid
        lines.append(f"| {heun.sampler.nfe} | Heun | {heun.detail} | 0 | {fid:.2f} |")
        if here.is_main:
            click.echo("\n".join(lines))


if __name__ == "__main__":
    cli.run(main)
