"""Train a denoiser of the EDM family on a zip or a folder of images (Karras et al. 2022).

Progress, TensorBoard with sample grids, and a state that a killed run continues from lie in
--outdir; at the end (and at every tick) it holds model.safetensors and card.json, which
`sample.py --model_path` and `denoisers/cards.json` take.

Examples:

    python tools/train_denoiser.py --data cifar10-32x32-train.zip --valid cifar10-32x32-test.zip \\
        --outdir exps/denoiser --like cifar10-small --kimg 1000 --batch 64 --dtype bfloat16

    torchrun --standalone --nproc_per_node=8 tools/train_denoiser.py --data ffhq-64x64.zip \\
        --outdir exps/ffhq --config ffhq.json --kimg 200000 --dtype bfloat16 --compile
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from denoisers.edm import EDMDenoiser, EDMPrecond, build  # noqa: E402
from denoisers.registry import cards  # noqa: E402
from denoisers.training import Order, Recipe, Trainer  # noqa: E402
from denoisers.weights import fill, read_safetensors  # noqa: E402
from metrics.sources import ImageSource  # noqa: E402
from runtime import cli  # noqa: E402
from runtime.dist import world  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.files import atomic_write, sha256_file  # noqa: E402
from runtime.images import image_grid, to_uint8  # noqa: E402
from runtime.log import JsonLines, TextLog, progress, tensorboard  # noqa: E402
from runtime.noise import SeedNoise  # noqa: E402
from solvers.driver import integrate  # noqa: E402
from solvers.grids import get_grid  # noqa: E402
from solvers.registry import make_solver  # noqa: E402

GRID = 8  #: rows and columns of a sample grid
HELD_OUT = 1024  #: images of --valid that the loss is measured on


class Images(Dataset[tuple[np.ndarray, int]]):
    """The images and labels of a zip or folder; each worker opens it for itself."""

    def __init__(self, path: Path, labelled: bool) -> None:
        self.path = path
        with ImageSource(path) as source:
            self.count = len(source)
            self.shape = source.read(0).shape
            self.labels = source.labels() if labelled else np.zeros(self.count, np.int64)
        self._source: ImageSource | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self._source = self._source or ImageSource(self.path)
        image = self._source.read(index)
        if image.shape != self.shape:
            raise UserError(
                f"{self._source.names[index]} in {self.path} is {image.shape} where the first "
                f"image is {self.shape}; make one size of them with tools/dataset_tool.py"
            )
        return image.copy(), int(self.labels[index])


def batch_of(
    images: Tensor, labels: Tensor, net: EDMPrecond, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """uint8 (B, C, H, W) and (B,) -> [-1, 1] float32, and one-hot classes if the net has any."""
    x = images.to(device, non_blocking=True).float() / 127.5 - 1
    return x, F.one_hot(labels, net.label_dim).to(device) if net.label_dim else None


def first_network(
    init: Path | None, config: Path | None, like: str | None, seed: int
) -> tuple[EDMPrecond, dict[str, Any]]:
    """The network to train, and what its card has to say about it."""
    if sum(x is not None for x in (init, config, like)) != 1:
        raise UserError("say what to train by one of --init, --config and --like")
    tensors = None
    if init is not None:
        tensors, metadata = read_safetensors(init)
        if "config" not in metadata:
            raise UserError(f"{init} does not hold its settings; it was not written by this tool")
        settings, bottleneck = json.loads(metadata["config"]), metadata.get("bottleneck_module")
    elif config is not None:
        settings = json.loads(config.read_text(encoding="utf-8"))
        bottleneck = settings.pop("bottleneck", None)
    else:
        known = cards()
        if like not in known:
            raise UserError(f"unknown dataset '{like}'; known: {', '.join(known)}")
        settings, bottleneck = dict(known[like].config), known[like].bottleneck
    torch.manual_seed(seed)
    try:
        net = build(settings, bottleneck)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"these are no settings of a network: {error}") from error
    if not isinstance(net, EDMPrecond):
        raise UserError(
            f"the EDM loss trains networks with EDM's preconditioning, not {settings['class_name']}; "
            "give class_name EDMPrecond"
        )
    if tensors is not None:
        fill(net, tensors, str(init))
    return net, {"config": settings, "bottleneck": net.model.bottleneck}


def write_model(folder: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """``model.safetensors`` with the averaged weights in float16, and ``card.json``."""
    settings, bottleneck = about["config"], about["bottleneck"]
    file = folder / "model.safetensors"
    metadata = {
        "config": json.dumps(settings),
        "bottleneck_module": bottleneck,
        "images_seen": str(trainer.images + about["images_before"]),
        "recipe": json.dumps(asdict(trainer.recipe)),
    }
    tensors = {k: v.half().contiguous().cpu() for k, v in trainer.ema.state_dict().items()}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata)
    card = {
        "family": "edm",
        "resolution": settings["img_resolution"],
        "channels": settings["img_channels"],
        "label_dim": settings.get("label_dim", 0),
        "sigma_min": settings.get("sigma_min", 0.002),
        "sigma_max": settings.get("sigma_max", 80.0),
        "bottleneck": bottleneck,
        "file": file.name,
        "url": None,
        "sha256": sha256_file(file),
        "config": settings,
    }
    with atomic_write(folder / "card.json") as temporary:
        temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def sample_grid(trainer: Trainer, shape: tuple[int, ...]) -> np.ndarray:
    """GRID x GRID images of the averaged weights by Heun at 23 NFE, seeds 0, 1, ..."""
    net, device = trainer.ema, trainer.world.device
    count = GRID * GRID
    ts = get_grid("polynomial", 12, 0.002, 80.0, 7.0)
    labels = None
    if net.label_dim:
        labels = F.one_hot(torch.arange(count) % net.label_dim, net.label_dim).to(device)
    x = SeedNoise(range(count)).normal("latent", shape, device=device) * ts[0].float()
    out = integrate(make_solver("heun"), EDMDenoiser(net, labels), x, ts.to(device)).x[-1]
    return image_grid(to_uint8(out), GRID)


class Reporter:
    """What a run leaves behind, at every tick: figures, pictures, the state and the model."""

    def __init__(
        self, folder: Path, trainer: Trainer, about: dict[str, Any], held_out: Any
    ) -> None:
        main = trainer.world.is_main
        self.folder, self.trainer, self.about, self.held_out = folder, trainer, about, held_out
        self.say = TextLog(folder / "log.txt", main)
        self.rows = JsonLines(folder / "stats.jsonl", trainer.images, main)
        self.board = tensorboard(folder, trainer.images, main)
        self.losses: list[float] = []
        self.since, self.seen = time.monotonic(), trainer.images

    def tick(self, shape: tuple[int, ...]) -> None:
        """Called on every rank, writes on rank 0."""
        trainer = self.trainer
        sums = torch.tensor([sum(self.losses), len(self.losses)], device=trainer.world.device)
        total, count = trainer.world.sum_(sums).tolist()
        seconds, images = time.monotonic() - self.since, trainer.images - self.seen
        row: dict[str, Any] = {
            "step": trainer.images,
            "loss": total / max(count, 1),
            "lr": trainer.recipe.learning_rate(trainer.images),
            "images_per_second": round(images / seconds, 1),
        }
        if trainer.world.is_main:
            if self.held_out is not None:
                row["valid"] = trainer.validate(*self.held_out)
            trainer.save(self.folder / "state.pt", self.about)
            write_model(self.folder, trainer, self.about)
            self.rows.append(row)
            self.say("  ".join(f"{k} {v:.5g}" for k, v in row.items()))
            assert self.board is not None
            for name, value in row.items():
                self.board.add_scalar(name, value, trainer.images)
            grid = sample_grid(trainer, shape)
            self.board.add_image("samples", grid, trainer.images, dataformats="HWC")
            self.board.flush()
        trainer.world.barrier()
        self.losses.clear()
        self.since, self.seen = time.monotonic(), trainer.images


def held_out_images(path: Path, labelled: bool, net: EDMPrecond, device: torch.device) -> Any:
    """The first HELD_OUT images of ``path`` and their classes, as the trainer takes them."""
    data = Images(path, labelled)
    rows = [data[i] for i in range(min(HELD_OUT, len(data)))]
    images = torch.from_numpy(np.stack([image for image, _ in rows]))
    return batch_of(images, torch.tensor([label for _, label in rows]), net, device)


def fit(trainer: Trainer, data: Images, reporter: Reporter, workers: int, tick: int) -> None:
    """Train to the end of the recipe."""
    recipe, world = trainer.recipe, trainer.world
    order = Order(len(data), recipe, trainer.images, world.rank, world.size)
    loader = iter(DataLoader(data, batch_sampler=order, num_workers=workers,
                             pin_memory=world.device.type == "cuda"))  # fmt: skip
    goal = round(1e3 * recipe.kimg)
    with progress(goal, "training", "img", trainer.images, world.is_main) as bar:
        while not trainer.done:
            images, labels = next(loader)
            reporter.losses.append(
                trainer.step(*batch_of(images, labels, trainer.net, world.device))
            )
            bar.update(recipe.batch)
            if trainer.done or trainer.images // tick > (trainer.images - recipe.batch) // tick:
                reporter.tick(data.shape)


def recipe_options(command: Any) -> Any:
    """One option for every field of Recipe, with its default."""
    for field in reversed(fields(Recipe)):
        kind = {"float": float, "int": int, "str": str, "bool": bool}[str(field.type)]
        flag = f"--{field.name}/--no-{field.name}" if kind is bool else f"--{field.name}"
        required = field.name == "kimg"
        default = {} if required else {"default": field.default}
        command = click.option(flag, type=kind, required=required, **default)(command)
    return command


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="EDM zip or folder")
@click.option("--valid", type=click.Path(path_type=Path), help="held-out images, for the loss")
@click.option("--outdir", type=click.Path(path_type=Path), required=True)
@click.option("--init", type=click.Path(path_type=Path), help="continue from these weights")
@click.option("--config", type=click.Path(path_type=Path), help="JSON of constructor settings")
@click.option("--like", help="settings of the card of this name")
@click.option("--tick", type=click.IntRange(min=1), default=20_000, help="images between reports")
@click.option("--workers", type=click.IntRange(min=0), default=1, help="processes that read images")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the network")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [torch's choice]")
@cli.device_option
@recipe_options
def main(
    data: Path, valid: Path | None, outdir: Path, init: Path | None, config: Path | None,
    like: str | None, tick: int, workers: int, compiled: bool, threads: int | None,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Train a denoiser; run the same command again to continue."""
    if threads:
        torch.set_num_threads(threads)
    with world(device) as here:
        recipe = Recipe(**settings)
        net, about = first_network(init, config, like, recipe.seed)
        about |= {"data": data.name, "init": init and sha256_file(init), "images_before": 0}
        if init is not None:
            about["images_before"] = int(read_safetensors(init)[1].get("images_seen", "0"))
        source = Images(data, bool(net.label_dim))
        trainer = Trainer(net, recipe, here, compiled=compiled)
        if (outdir / "state.pt").is_file():
            trainer.resume(outdir / "state.pt", about)
        outdir.mkdir(parents=True, exist_ok=True)
        held_out = valid and held_out_images(valid, bool(net.label_dim), net, here.device)
        fit(trainer, source, Reporter(outdir, trainer, about, held_out), workers, tick)


if __name__ == "__main__":
    cli.run(main)
