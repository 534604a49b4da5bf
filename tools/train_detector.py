"""Train a CIFAR-10 feature detector, a small classifier.

SGD with Nesterov momentum, a one-cycle learning rate, label smoothing, flips, shifts and cutout;
about half an hour on two cores.  The order of images and their augmentation are functions of
(seed, epoch), and the state is saved after each epoch, so an interrupted run continues with the
same result.  Progress goes to TensorBoard.  Under torchrun each process takes its share of every
batch, and batch normalisation then uses the statistics of the share: the only difference from a
single process.
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoints.states import read_state, restore
from commands.help import SETTINGS
from commands.numbers import FRACTION, NOT_NEGATIVE, PART, RATE, SEED, WIDTH, updates
from commands.options import PATH, device_option, threads_option
from image_data.sources import ImageSource
from metrics.classifiers import NETWORKS, load_classifier, save_classifier
from metrics.cnn import RESOLUTION, CNNConfig, FeatureClassifier
from runtime import cli, files
from runtime.bounds import MOST_BATCH
from runtime.dist import World, world
from runtime.errors import UserError
from runtime.images import image_grid
from runtime.log import tensorboard
from runtime.outputs import check_file

_SHOWN = 64  #: images in TensorBoard's grid
EXAMPLES = """\b
Example:
  python -m tools.train_detector --data cifar10-32x32-train.zip --test cifar10-32x32-test.zip \\
      --dest metrics/bundled/cifar10-small-detector.safetensors --channels 64 192 256 --epochs 18
"""


@dataclass(frozen=True)
class DetectorRecipe:
    """All settings of a training run; a saved state continues only under an equal recipe."""

    epochs: int
    batch: int
    lr: float
    momentum: float
    weight_decay: float
    smoothing: float
    warmup: float
    seed: int
    bf16: bool
    shift: int
    cutout: int
    init: str | None  #: SHA-256 of the initial weights


def load_labelled(path: Path) -> tuple[Tensor, Tensor]:
    """All images as uint8 (N, 3, 32, 32) and labels (N,)."""
    with ImageSource(path) as source:
        images = torch.empty(len(source), 3, RESOLUTION, RESOLUTION, dtype=torch.uint8)
        for i in tqdm(range(len(source)), desc=path.name, leave=False):
            image = source.read(i)
            if image.shape != images.shape[1:]:
                raise ValueError(f"{source.names[i]} in {path} is not 32x32: resize the images")
            images[i] = torch.from_numpy(image.copy())
        return images, torch.from_numpy(source.labels())


def augment(images: Tensor, plan: DetectorRecipe, generator: torch.Generator) -> Tensor:
    """Flip and shift uint8 images (N, 3, H, H) at random, and cover a square of each in grey.

    Shifts reflect the image at its border.  The square has ``cutout`` pixels per side (DeVries and
    Taylor 2017, arXiv:1708.04552) and lies inside the image.
    """
    count, side, most = len(images), images.shape[-1], plan.shift
    offset = torch.randint(-most, most + 1, (2, count, 1), generator=generator)
    mirror = torch.rand(count, 1, generator=generator) < 0.5
    base = torch.arange(side)
    rows, columns = base + offset[0], base + offset[1]
    columns = torch.where(mirror, side - 1 - columns, columns)
    rows, columns = ((side - 1) - ((side - 1) - i.abs()).abs() for i in (rows, columns))
    at = torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None]
    images = images[(*at, rows[:, None, :, None], columns[:, None, None, :])]
    if plan.cutout:
        corner = torch.randint(side - plan.cutout + 1, (2, count, 1), generator=generator)
        down, across = (base >= corner) & (base < corner + plan.cutout)
        images = images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 128)
    return images


def learning_rate(plan: DetectorRecipe, progress: float) -> float:
    """Linear rise over the first ``warmup`` of the run, then a half cosine down to zero."""
    if progress < plan.warmup:
        return plan.lr * progress / plan.warmup
    return plan.lr * 0.5 * (1 + math.cos(math.pi * (progress - plan.warmup) / (1 - plan.warmup)))


def make_optimizer(model: nn.Module, plan: DetectorRecipe) -> torch.optim.Optimizer:
    """SGD without weight decay on normalisation parameters and biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=plan.lr, momentum=plan.momentum, nesterov=True)


def first_model(
    init: Path | None, network: str | None, channels: tuple[int, int, int], seed: int,
    train: tuple[Tensor, Tensor],
) -> tuple[FeatureClassifier, dict]:  # fmt: skip
    """The network to train, and the record of its earlier training, if any.

    Raises UserError for a ``network`` beside ``init``, whose file says which it is.
    """
    if init is not None:
        if network is not None:
            raise UserError(f"--network {network} is for a new detector: leave it out with --init")
        model, record = load_classifier(init)
        return model.trainable_(), record
    torch.manual_seed(seed)
    model = NETWORKS[network or "cnn"](CNNConfig(channels, int(train[1].max()) + 1))
    model.prepare_(train[0][:: max(1, len(train[0]) // 5000)])
    return model, {}


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor],
    plan: DetectorRecipe, epoch: int, here: World,
) -> tuple[float, Tensor]:  # fmt: skip
    """One pass over the data; returns the mean loss and the first augmented images."""
    images, labels = data
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + epoch)
    batches = torch.randperm(len(images), generator=generator).split(plan.batch)
    model.train()
    total = torch.zeros((), dtype=torch.float64, device=here.device)
    shown = torch.empty(0)
    bar = tqdm(batches, desc=f"epoch {epoch + 1}", leave=False, disable=not here.is_main)
    for step, index in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, (epoch + step / len(batches)) / plan.epochs)
        batch = augment(images[index], plan, generator)
        shown = batch[:_SHOWN] if step == 0 else shown
        mine = slice(here.rank, None, here.size)
        x, y = batch[mine].to(here.device), labels[index][mine].to(here.device)
        with torch.autocast(here.device.type, torch.bfloat16, enabled=plan.bf16):
            logits = model(x).logits
        loss = nn.functional.cross_entropy(
            logits.float(), y, label_smoothing=plan.smoothing, reduction="sum"
        )
        optimizer.zero_grad()
        (loss * (here.size / len(index))).backward()  # the mean over all processes is taken
        optimizer.step()
        total += loss.detach()
    return float(here.sum_(total)) / len(images), shown


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], here: World) -> float:
    """Fraction of correctly classified images, computed in float32."""
    model.eval()
    hits = torch.zeros((), dtype=torch.int64, device=here.device)
    mine = (part[here.rank :: here.size].split(500) for part in data)
    for x, y in zip(*mine, strict=True):
        hits += (model(x.to(here.device)).logits.argmax(1) == y.to(here.device)).sum()
    return int(here.sum_(hits)) / len(data[0])


def resume(
    state: Path, plan: DetectorRecipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the saved state if it exists; returns the number of finished epochs.

    Raises ValueError for the state of a run with other settings.
    """
    if not state.is_file():
        return 0
    kinds = {"plan": dict, "model": dict, "optimizer": dict, "epochs": int}
    saved = read_state(state, kinds)
    if saved["plan"] != vars(plan):
        raise ValueError(
            f"{state} belongs to a run with other settings ({saved['plan']}): remove it, or "
            "give that run's options"
        )
    restore({"model": model, "optimizer": optimizer}, saved, state)
    return int(saved["epochs"])


def save(
    state: Path, plan: DetectorRecipe, model: nn.Module, optimizer: torch.optim.Optimizer,
    epochs: int,
) -> None:  # fmt: skip
    """Write everything that :func:`resume` needs."""
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with files.atomic_write(state) as temporary:
        torch.save({"plan": vars(plan), **parts, "epochs": epochs}, temporary)


def fit(
    model: FeatureClassifier, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor],
    plan: DetectorRecipe, state: Path, here: World, compiled: bool = False,
) -> None:  # fmt: skip
    """Train for all epochs; saves the state, and figures for TensorBoard, after each of them.

    Raises UserError after an epoch with a loss or weights that are not finite, before it is saved.
    """
    optimizer = make_optimizer(model, plan)
    first = resume(state, plan, model, optimizer)
    here.barrier()  # every rank has read the state before it is overwritten
    network: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    if here.size > 1:
        network = DistributedDataParallel(network)
    board = tensorboard(state.with_name(state.name + ".logs"), first, here.is_main)
    for epoch in range(first, plan.epochs):
        start = time.monotonic()
        loss, shown = train_epoch(network, optimizer, train, plan, epoch, here)
        if not (math.isfinite(loss) and all(bool(p.isfinite().all()) for p in model.parameters())):
            raise UserError(
                f"the training diverged in epoch {epoch + 1}, its loss is {loss:.3g}: run again "
                f"with a smaller --lr than {plan.lr:g} and without {state}, if there is one"
            )
        speed = len(train[0]) / (time.monotonic() - start)
        score = accuracy(model, test, here)
        if board is None:
            continue
        figures = {"loss": loss, "test_accuracy": score, "images_per_second": speed}
        for name, value in figures.items():
            board.add_scalar(name, value, epoch + 1)
        grid = image_grid(list(shown.permute(0, 2, 3, 1).numpy()), columns=8)
        board.add_image("augmented", grid, epoch + 1, dataformats="HWC")
        board.flush()
        save(state, plan, model, optimizer, epoch + 1)
        click.echo(
            f"epoch {epoch + 1}/{plan.epochs}  loss {loss:.4f}  test accuracy {100 * score:.2f} %"
            f"  {speed:.0f} images/s"
        )
    if board is not None:
        board.close()


def write(dest: Path, model: FeatureClassifier, test: tuple[Tensor, Tensor], record: dict) -> float:
    """Write the detector; returns the test accuracy of the file, whose kernels are float16."""
    with files.atomic_write(dest) as temporary:
        save_classifier(model, temporary, record)
        stored, _ = load_classifier(Path(temporary))
        score = accuracy(stored, test, World(0, 1, torch.device("cpu")))
        save_classifier(stored, temporary, {**record, "test_accuracy": score})
    return score


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--data", type=PATH, required=True, help="training images")
@click.option("--test", type=PATH, required=True, help="test images")
@click.option("--dest", type=PATH, required=True, help="write the detector here")
@click.option("--state", type=PATH, help="training state  [default: DEST.state]")
@click.option(
    "--network", type=click.Choice(list(NETWORKS)), help="of a new detector  [default: cnn]"
)
@click.option("--channels", type=(WIDTH, WIDTH, WIDTH), default=(64, 192, 256), help="stage widths")
@click.option("--epochs", type=updates(1), default=18, help="passes over the data")
@click.option(
    "--batch", type=click.IntRange(2, MOST_BATCH), default=256, help="images, over all processes"
)
@click.option("--lr", type=RATE, default=0.2, help="peak learning rate")
@click.option("--momentum", type=FRACTION, default=0.9, help="of SGD")
@click.option("--weight_decay", type=NOT_NEGATIVE, default=5e-4, help="of weight matrices")
@click.option("--smoothing", type=FRACTION, default=0.2, help="of labels")
@click.option("--warmup", type=PART, default=0.2, help="fraction of the run before the peak")
@click.option("--seed", type=SEED, default=0, help="of initial weights and every draw")
@click.option("--shift", type=click.IntRange(0, RESOLUTION // 2), default=2, help="most, in pixels")
@click.option("--cutout", type=click.IntRange(0, RESOLUTION), default=0, help="side, in pixels")
@click.option("--init", type=PATH, help="start from this detector")
@click.option("--bf16/--no-bf16", default=True, help="bfloat16 autocast")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the network")
@threads_option
@device_option
def main(
    data: Path, test: Path, dest: Path, state: Path | None, network: str | None,
    channels: tuple[int, int, int], init: Path | None, compiled: bool, device: str | None,
    threads: int | None, **settings: float,
) -> None:  # fmt: skip
    """Train a CIFAR-10 feature detector, a small classifier.

    Run the same command again to continue after an interruption.
    """
    if threads:
        torch.set_num_threads(threads)
    plan = DetectorRecipe(**settings, init=init and files.sha256_file(init))  # type: ignore[arg-type]
    with world(device) as here:
        check_file(dest, "--dest", here)
        train_set, test_set = load_labelled(data), load_labelled(test)
        model, before = first_model(init, network, channels, plan.seed, train_set)
        model.to(here.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fit(model, train_set, test_set, plan, state or dest.with_name(dest.name + ".state"), here,
            compiled)  # fmt: skip
        if here.is_main:
            record = {
                "command": " ".join(["python -m tools.train_detector", *sys.argv[1:]]),
                "training": vars(plan),
                "images_seen": plan.epochs * len(train_set[0]) + before.get("images_seen", 0),
                "feature_width": model.dim,
                "before": before,
            }
            score = write(dest, model, test_set, record)
            click.echo(f"wrote {dest}: test accuracy {100 * score:.2f} %")


if __name__ == "__main__":
    cli.run(main)
