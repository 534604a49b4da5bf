"""Train a denoiser of the EDM family on images (Karras et al. 2022, arXiv:2206.00364).

--outdir holds the log, TensorBoard events with sample grids, and the state from which an
interrupted run continues.  From the first report on it also holds model.safetensors and card.json,
which `sample.py --model_path` and `denoisers/cards.json` take.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import torch
from torch.utils.data import DataLoader

from checkpoints.weights import constructing, fill, read_metadata
from commands.help import SETTINGS
from commands.numbers import BATCH, SEED, updates
from commands.options import PATH, device_option, threads_option
from denoisers.cards import cards
from denoisers.families.edm import read_checkpoint
from denoisers.families.precond import EDMPrecond, build
from denoisers.training.augment import LABELS
from denoisers.training.batches import TrainingBatches, shares, training_batch
from denoisers.training.report import STATE, Reporter, TrainedNetwork
from denoisers.training.trainer import Recipe, Trainer
from image_data.labelled import LabelledImages
from runtime import cli
from runtime.bounds import MOST_THREADS
from runtime.dist import world
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.log import progress
from runtime.outputs import claimed
from runtime.record import RunRecord
from runtime.typed import parse_json, to_plain

WHOLE = {"batch": BATCH, "seed": SEED}  #: options of a recipe that are whole numbers
HELD_OUT = 1024  #: images of --valid on which the loss is measured
EXAMPLES = """\b
Examples:
  python -m tools.train_denoiser --data cifar10-32x32-train.zip --valid cifar10-32x32-test.zip \\
      --outdir exps/denoiser --like cifar10-small --kimg 1000 --batch 64 --dtype bfloat16
  torchrun --standalone --nproc_per_node=8 -m tools.train_denoiser --data ffhq-64x64.zip \\
      --outdir exps/ffhq --config ffhq.json --kimg 200000 --dtype bfloat16 --compile
"""


def first_network(
    init: Path | None, config: Path | None, like: str | None, recipe: Recipe, data: str
) -> tuple[EDMPrecond, TrainedNetwork]:
    """The network to train on the data set called ``data``, and its description.

    Raises UserError unless exactly one option says what to train, and for invalid settings.
    """
    if sum(x is not None for x in (init, config, like)) != 1:
        raise UserError("choose the network to train: give one of --init, --config and --like")
    tensors = None
    seen = 0
    if init is not None:
        checkpoint = read_checkpoint(init)
        if checkpoint.config is None:
            raise UserError(f"{init} does not hold the settings of its network; give --config")
        settings, bottleneck = checkpoint.config, checkpoint.bottleneck
        tensors = checkpoint.tensors
        if init.suffix == ".safetensors":
            seen = int(read_metadata(init).get("images_seen", "0"))
    else:
        settings, bottleneck = read_settings(config) if config else settings_like(str(like))
        if recipe.augment:
            settings.setdefault("augment_dim", LABELS)
    torch.manual_seed(recipe.seed)
    with constructing(str(init or config or like), "settings"):
        net = build(settings, bottleneck)
    if not isinstance(net, EDMPrecond) or net.D is not None:
        raise UserError(
            "the loss is for networks with EDM's preconditioning and Gaussian noise, not for "
            f"{settings['class_name']}{' with D, PFGM++' if net.D else ''}: train an EDMPrecond"
        )
    if tensors is not None:
        fill(net, tensors, str(init))
    digest = None if init is None else sha256_file(init)
    return net, TrainedNetwork(settings, net.model.bottleneck, digest, seen, data)


def read_settings(path: Path) -> tuple[dict[str, Any], str | None]:
    """Constructor settings from a JSON file, and the bottleneck if it names one."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text file: give a JSON file of settings") from None
    settings = parse_json(text, str(path), "correct it")
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no JSON object of constructor settings: correct it")
    return settings, settings.pop("bottleneck", None)


def settings_like(name: str) -> tuple[dict[str, Any], str | None]:
    """Constructor settings and bottleneck of the EDM-family card ``name``."""
    known = {key: card for key, card in cards().items() if card.family == "edm"}
    if name not in known:
        raise UserError(f"--like {name} is unknown; known: {', '.join(known)}")
    return dict(known[name].config), known[name].bottleneck


def fit(
    trainer: Trainer, stream: TrainingBatches, reporter: Reporter, workers: int, tick: int
) -> None:
    """Train until the recipe's number of images has been seen; report every ``tick`` images."""
    batch, world = trainer.recipe.batch, trainer.world
    goal = round(1e3 * trainer.recipe.kimg)
    loader = DataLoader(
        stream,
        sampler=shares(trainer.images, batch, world),
        batch_size=None,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
    )
    with progress(goal, "training", "img", trainer.images, world.is_main) as bar:
        for item in loader:
            if isinstance(item, Exception):
                raise item
            loss = trainer.step(item)
            reporter.losses += torch.stack([loss, torch.ones_like(loss)])
            bar.update(batch)
            if trainer.done or trainer.images // tick > (trainer.images - batch) // tick:
                reporter.tick()
            if trainer.done:
                return


def prepare_folder(folder: Path, trainer: Trainer, network: TrainedNetwork) -> None:
    """Continue the run in ``folder``, or begin one in a new or empty folder."""
    if (folder / STATE).is_file():
        trainer.resume(folder / STATE, network.identity())
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {STATE}; choose another --outdir")
    trainer.world.barrier()  # until all ranks have checked the folder
    if trainer.world.is_main and trainer.images == 0:
        trainer.save(folder / STATE, network.identity())  # first of all: it marks the folder


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add one option for every field of Recipe, with its default."""
    types = get_type_hints(Recipe)
    for field in reversed(fields(Recipe)):
        name = field.name
        flag = f"--{name}/--no-{name}" if types[name] is bool else f"--{name}"
        default = {"required": True} if field.default is MISSING else {"default": field.default}
        help = field.metadata["help"]
        kind = WHOLE.get(name, types[name])
        command = click.option(flag, type=kind, help=help, **default)(command)
    return command


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--data", type=PATH, required=True, help="zip or folder in EDM's layout")
@click.option("--valid", type=PATH, help="held-out images for the loss")
@click.option("--outdir", type=PATH, required=True, help="folder of the run")
@click.option("--init", type=PATH, help="start from these weights")
@click.option("--config", type=PATH, help="JSON file of constructor settings")
@click.option("--like", metavar="NAME", help="use the settings of this model's card")
@click.option("--tick", type=updates(1), default=20_000, help="images between reports")
@click.option(
    "--workers", type=click.IntRange(0, MOST_THREADS), default=1, help="image-loading processes"
)
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the network")
@threads_option
@device_option
@recipe_options
def main(
    data: Path, valid: Path | None, outdir: Path, init: Path | None, config: Path | None,
    like: str | None, tick: int, workers: int, compiled: bool, threads: int | None,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Train a denoiser of the EDM family on images (Karras et al. 2022, arXiv:2206.00364).

    Run the same command again to continue after an interruption.
    """
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(**settings)
    with world(device) as here, claimed(outdir, here):
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        net, network = first_network(init, config, like, recipe, data.name)
        wanted = (net.img_channels, net.img_resolution, net.label_dim)
        images = LabelledImages(data, *wanted)
        held_out = None
        if valid is not None:
            others = LabelledImages(valid, *wanted)
            numbers = range(min(HELD_OUT, len(others)))
            held_out = training_batch(others, numbers, numbers, ("valid", recipe.seed))
        trainer = Trainer(net, recipe, here, compiled=compiled)
        prepare_folder(outdir, trainer, network)
        if trainer.done:
            if here.is_main:
                click.echo(f"already trained: {outdir}; give a larger --kimg to continue", err=True)
            return
        options = to_plain(click.get_current_context().params)
        record = RunRecord.make("train_denoiser", options, {"init": network.init}, {})
        with closing(Reporter(outdir, trainer, network, held_out, record)) as reporter:
            fit(trainer, TrainingBatches(images, recipe.seed), reporter, workers, tick)


if __name__ == "__main__":
    cli.run(main)
