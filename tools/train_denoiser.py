"""Train a denoiser of the EDM family on a zip or a folder of images (Karras et al. 2022).

Progress, TensorBoard with sample grids, and a state that a killed run continues from lie in
--outdir; from the first report on it holds model.safetensors and card.json, which
`sample.py --model_path` and `denoisers/cards.json` take.

Examples:

    python -m tools.train_denoiser --data cifar10-32x32-train.zip --valid cifar10-32x32-test.zip \\
        --outdir exps/denoiser --like cifar10-small --kimg 1000 --batch 64 --dtype bfloat16

    torchrun --standalone --nproc_per_node=8 -m tools.train_denoiser --data ffhq-64x64.zip \\
        --outdir exps/ffhq --config ffhq.json --kimg 200000 --dtype bfloat16 --compile
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_type_hints

import click
import torch
from torch.utils.data import DataLoader

from checkpoints.weights import fill, read_safetensors
from commands.options import device_option
from denoisers.cards import cards
from denoisers.families.edm import EDMPrecond, build, read_checkpoint
from denoisers.training.augment import LABELS
from denoisers.training.batches import Images, TrainingBatches, shares
from denoisers.training.report import STATE, Reporter
from denoisers.training.trainer import Recipe, Trainer
from runtime import cli
from runtime.dist import world
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.log import progress
from runtime.record import RunRecord

HELD_OUT = 1024  #: images of --valid that the loss is measured on


def first_network(
    init: Path | None, config: Path | None, like: str | None, recipe: Recipe
) -> tuple[EDMPrecond, dict[str, Any]]:
    """The network to train and, in plain values, what it is.

    Raises UserError where nothing, or too much, says what to train.
    """
    if sum(x is not None for x in (init, config, like)) != 1:
        raise UserError("say what to train by one of --init, --config and --like")
    tensors = None
    seen = 0
    if init is not None:
        found = read_checkpoint(init)
        if found.config is None:
            raise UserError(f"{init} does not hold the settings of its network; give --config")
        settings, bottleneck, tensors = found.config, found.bottleneck, found.tensors
        if init.suffix == ".safetensors":
            seen = int(read_safetensors(init)[1].get("images_seen", "0"))
    else:
        settings, bottleneck = read_settings(config) if config else settings_like(str(like))
        if recipe.augment:
            settings.setdefault("augment_dim", LABELS)
    torch.manual_seed(recipe.seed)
    try:
        net = build(settings, bottleneck)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"these are no settings of a network: {error}") from error
    if not isinstance(net, EDMPrecond) or net.D is not None:
        raise UserError(
            "the loss is that of networks with EDM's preconditioning and Gaussian noise, not of "
            f"{settings['class_name']}{' with D, PFGM++' if net.D else ''}; train an EDMPrecond"
        )
    if tensors is not None:
        fill(net, tensors, str(init))
    about = {
        "config": settings,
        "bottleneck": net.model.bottleneck,
        "init": init and sha256_file(init),
        "images_before": seen,
    }
    return net, about


def read_settings(path: Path) -> tuple[dict[str, Any], str | None]:
    """Constructor settings from a JSON file, and the bottleneck if it names one."""
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no JSON object of constructor settings ({error})") from error
    return settings, settings.pop("bottleneck", None)


def settings_like(name: str) -> tuple[dict[str, Any], str | None]:
    """Those of a card of the EDM family."""
    known = {key: card for key, card in cards().items() if card.family == "edm"}
    if name not in known:
        raise UserError(f"--like {name} is unknown; known: {', '.join(known)}")
    return dict(known[name].config), known[name].bottleneck


def fit(
    trainer: Trainer, stream: TrainingBatches, reporter: Reporter, workers: int, tick: int
) -> None:
    """Train to the end of the recipe."""
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


def prepare_folder(folder: Path, trainer: Trainer, about: dict[str, Any]) -> None:
    """Continue the run in ``folder``, or begin one in a new or empty folder."""
    if (folder / STATE).is_file():
        trainer.resume(folder / STATE, about)
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no {STATE}; choose another --outdir")
    trainer.world.barrier()  # all have looked
    if trainer.world.is_main and trainer.images == 0:
        trainer.save(folder / STATE, about)  # before any other file, which marks the folder as ours


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for every field of Recipe, with its default."""
    types = get_type_hints(Recipe)
    for field in reversed(fields(Recipe)):
        name = field.name
        flag = f"--{name}/--no-{name}" if types[name] is bool else f"--{name}"
        default = {"required": True} if field.default is MISSING else {"default": field.default}
        help = field.metadata["help"]
        command = click.option(flag, type=types[name], help=help, **default)(command)
    return command


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), required=True, help="EDM zip or folder")
@click.option("--valid", type=click.Path(path_type=Path), help="held-out images, for the loss")
@click.option("--outdir", type=click.Path(path_type=Path), required=True, help="of this run alone")
@click.option("--init", type=click.Path(path_type=Path), help="continue from these weights")
@click.option("--config", type=click.Path(path_type=Path), help="JSON of constructor settings")
@click.option("--like", metavar="NAME", help="settings of the card of this name")
@click.option("--tick", type=click.IntRange(min=1), default=20_000, help="images between reports")
@click.option("--workers", type=click.IntRange(min=0), default=1, help="processes that read images")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile the network")
@click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads  [default: torch's choice]"
)
@device_option
@recipe_options
def main(
    data: Path, valid: Path | None, outdir: Path, init: Path | None, config: Path | None,
    like: str | None, tick: int, workers: int, compiled: bool, threads: int | None,
    device: str | None, **settings: Any,
) -> None:  # fmt: skip
    """Train a denoiser; run the same command again to continue."""
    if threads:
        torch.set_num_threads(threads)
    recipe = Recipe(**settings)
    with world(device) as here:
        torch.backends.cudnn.benchmark = True  # all batches have one shape
        net, about = first_network(init, config, like, recipe)
        about["data"] = data.name
        wanted = (net.img_channels, net.img_resolution, net.label_dim)
        images = Images(data, *wanted)
        held_out = None
        if valid is not None:
            others = Images(valid, *wanted)
            numbers = range(min(HELD_OUT, len(others)))
            held_out = others.batch(numbers, numbers, ("valid", recipe.seed))
        trainer = Trainer(net, recipe, here, compiled=compiled)
        prepare_folder(outdir, trainer, about)
        if trainer.done:
            if here.is_main:
                click.echo(f"already trained: {outdir}; give a larger --kimg to go on", err=True)
            return
        options = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in click.get_current_context().params.items()
        }
        record = RunRecord.make("train_denoiser", options, {"init": about["init"]}, {})
        with closing(Reporter(outdir, trainer, about, held_out, record)) as reporter:
            fit(trainer, TrainingBatches(images, recipe.seed), reporter, workers, tick)


if __name__ == "__main__":
    cli.run(main)
