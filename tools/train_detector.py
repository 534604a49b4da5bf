"""Train the bundled CIFAR-10 feature detector: a small classifier, about half an hour on two cores.

SGD with Nesterov momentum, a one-cycle learning rate, label smoothing, flips and shifts by two
pixels. The order of images and their augmentation are functions of (seed, epoch), and the state
is saved after each epoch, so a killed run continues as if nothing had happened.

Example:

    python tools/train_detector.py --data cifar10-32x32-train.zip --test cifar10-32x32-test.zip \\
        --dest metrics/bundled/cifar10-small-detector.safetensors
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from metrics.cnn import RESOLUTION, CNNConfig, SmallCNN, load_cnn, save_cnn  # noqa: E402
from metrics.sources import ImageSource  # noqa: E402
from runtime import cli, dist, files  # noqa: E402

_SHIFT = 2


@dataclass(frozen=True)
class Plan:
    """What a training run depends on; a saved state continues only under an equal plan."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    smoothing: float
    warmup: float
    seed: int
    bf16: bool


def load_labelled(path: Path) -> tuple[Tensor, Tensor]:
    """All images as uint8 (N, 3, 32, 32) and labels (N,)."""
    with ImageSource(path) as source:
        images = torch.empty(len(source), 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
        for i in tqdm(range(len(source)), desc=path.name, leave=False):
            image = source.read(i)
            if image.shape != images.shape[1:]:
                raise ValueError(f"{source.names[i]} in {path} is not 32x32: resize the images.")
            images[i] = torch.from_numpy(image.copy())
        return images, torch.from_numpy(source.labels())


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random mirror images and shifts by up to two pixels (reflected at the border)."""
    count, side = len(images), images.shape[-1]
    offset = torch.randint(-_SHIFT, _SHIFT + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    base = torch.arange(side)
    rows, columns = base + offset[0], base + offset[1]
    columns = torch.where(mirror, side - 1 - columns, columns)
    rows, columns = ((side - 1) - ((side - 1) - i.abs()).abs() for i in (rows, columns))
    at = torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None]
    return images[(*at, rows[:, None, :, None], columns[:, None, None, :])]


def learning_rate(plan: Plan, progress: float) -> float:
    """Linear rise over the first ``warmup`` of the run, then a half cosine down to zero."""
    if progress < plan.warmup:
        return plan.lr * progress / plan.warmup
    return plan.lr * 0.5 * (1 + math.cos(math.pi * (progress - plan.warmup) / (1 - plan.warmup)))


def make_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """SGD; norms and biases are not decayed."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, nesterov=True)


def train_epoch(
    model: SmallCNN,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    plan: Plan,
    epoch: int,
    device: torch.device,
) -> float:
    """One pass over the data; returns the mean loss."""
    images, labels = data
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(images), generator=generator).split(plan.batch)
    model.train()
    total = 0.0
    for step, index in enumerate(tqdm(batches, desc=f"epoch {epoch + 1}", leave=False)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, (epoch + step / len(batches)) / plan.epochs)
        x = augment(images[index], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16):
            logits = model(x).logits
        loss = nn.functional.cross_entropy(
            logits.float(), labels[index].to(device), label_smoothing=plan.smoothing
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(index)
    return total / len(images)


@torch.no_grad()
def accuracy(model: SmallCNN, data: tuple[Tensor, Tensor], device: torch.device) -> float:
    """Share of images whose class is named rightly, in float32."""
    model.eval()
    hits = 0
    for x, y in zip(data[0].split(500), data[1].split(500), strict=True):
        hits += int((model(x.to(device)).logits.argmax(1).cpu() == y).sum())
    return hits / len(data[0])


def resume(state: Path, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load a saved state, if there is one; returns the number of finished epochs."""
    if not state.is_file():
        return 0
    saved = torch.load(state, weights_only=True, map_location="cpu")
    if saved["plan"] != vars(plan):
        raise ValueError(
            f"{state} belongs to a run with other settings ({saved['plan']}): remove it, or "
            "repeat that run's options."
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["epochs"])


def fit(
    model: SmallCNN, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], plan: Plan,
    state: Path, device: torch.device,
) -> None:  # fmt: skip
    """Train to the end of the plan, saving the state after each epoch."""
    optimizer = make_optimizer(model, plan)
    for epoch in range(resume(state, plan, model, optimizer), plan.epochs):
        start = time.monotonic()
        loss = train_epoch(model, optimizer, train, plan, epoch, device)
        speed = len(train[0]) / (time.monotonic() - start)
        with files.atomic_write(state) as temporary:
            torch.save(
                {
                    "plan": vars(plan),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "epochs": epoch + 1,
                },
                temporary,
            )
        score = accuracy(model, test, device)
        click.echo(
            f"epoch {epoch + 1}/{plan.epochs}  loss {loss:.4f}  test accuracy {100 * score:.2f} %"
            f"  {speed:.0f} images/s"
        )


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="training zip")
@click.option("--test", type=click.Path(path_type=Path), required=True, help="test zip")
@click.option("--dest", type=click.Path(path_type=Path), required=True, help="file to write")
@click.option("--state", type=click.Path(path_type=Path), help="resumable state [DEST.state]")
@click.option("--channels", type=(int, int, int), default=(48, 128, 192), help="stage widths")
@click.option("--epochs", type=click.IntRange(min=1), default=30)
@click.option("--batch", type=click.IntRange(min=2), default=256)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=0.2, help="peak")
@click.option("--momentum", type=click.FloatRange(0, 1, max_open=True), default=0.9)
@click.option("--weight_decay", type=click.FloatRange(min=0), default=5e-4)
@click.option("--smoothing", type=click.FloatRange(0, 1, max_open=True), default=0.1)
@click.option("--warmup", type=click.FloatRange(0, 1, True, True), default=0.2, help="share")
@click.option("--seed", type=int, default=0)
@click.option("--bf16/--no-bf16", default=True, help="bfloat16 autocast")
@click.option("--device", default=None, help="cuda, mps or cpu [automatic]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [torch's choice]")
def main(
    data: Path, test: Path, dest: Path, state: Path | None, channels: tuple[int, int, int],
    device: str | None, threads: int | None, **settings: float,
) -> None:  # fmt: skip
    """Train the CIFAR-10 feature detector and write it with its record."""
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(**settings)  # type: ignore[arg-type]
    where = torch.device(dist.choose_device(device))
    train_set, test_set = load_labelled(data), load_labelled(test)
    torch.manual_seed(plan.seed)
    model = SmallCNN(CNNConfig(channels, int(train_set[1].max()) + 1))
    model.whiten_(train_set[0][:: max(1, len(train_set[0]) // 5000)])
    model = model.to(where).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = state or dest.with_name(dest.name + ".state")
    fit(model, train_set, test_set, plan, state, where)
    record = {
        "command": " ".join(["python", "tools/train_detector.py", *sys.argv[1:]]),
        "training": vars(plan),
        "images_seen": plan.epochs * len(train_set[0]),
        "feature_width": model.dim,
    }
    with files.atomic_write(dest) as temporary:
        save_cnn(model, temporary, record)
        # the figure that counts is that of the file, whose kernels are rounded to float16
        stored, _ = load_cnn(Path(temporary))
        score = accuracy(stored, test_set, torch.device("cpu"))
        save_cnn(stored, temporary, {**record, "test_accuracy": score})
    click.echo(f"wrote {dest}: test accuracy {100 * score:.2f} %")


if __name__ == "__main__":
    cli.run(main)
