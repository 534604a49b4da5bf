"""Turn a published checkpoint into safetensors with its settings, and a card beside it.

Families may import the functions that read checkpoints from here or from
:mod:`checkpoints.snapshots`; all of them read pickles as data and run nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.snapshots import (
    EDMSnapshot,
    PublishedPredictor,
    Record,
    find_network,
    find_tensors,
    is_network,
    is_predictor,
    read,
    read_edm,
    read_predictor,
    read_state_dict,
)
from denoisers.cards import Card, cards
from denoisers.families.precond import build
from runtime import cli
from runtime.errors import UserError
from runtime.files import sha256_file

__all__ = [
    "EDMSnapshot", "PublishedPredictor", "Record", "convert",
    "read", "read_edm", "read_predictor", "read_state_dict",
]  # fmt: skip


EXAMPLES = """\b
Examples:
  python -m denoisers.convert edm-ffhq-64x64-uncond-vp.pkl ffhq.safetensors --name ffhq
  python -m denoisers.convert training-state-010000.pt mine.safetensors
"""


def convert(source: Path, target: Path, name: str | None = None, content: Any = None) -> list[Path]:
    """Write ``target`` (``.safetensors``) and ``.card.json`` beside it; returns what was written.

    ``name`` is that of the published model whose weights these are, or one of your own; the
    default is the target's.  ``content`` is what :func:`read` gave, if it was read already.
    A file of unknown weights gets no card.  Raises UserError, with nothing written, for a target
    of another suffix, the name of a published model that the weights do not fit, and whatever the
    reader refuses.
    """
    check_target(target)
    content = read(source) if content is None else content
    name = name or target.stem
    if is_predictor(content):
        raise UserError(f"{source} is a predictor; convert it with tools/convert.py")
    if is_network(content):
        tensors, metadata = _network(find_network(content, str(source)), source)
    else:
        tensors, metadata = find_tensors(content, str(source)), _settings_of(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        weights = Path(folder, target.name)
        save_file(own_storages(tensors), weights, metadata)
        made = {target: weights}
        card = _card(name, weights, source)
        if card is not None:
            made[target.with_suffix(".card.json")] = beside = Path(folder, "card.json")
            beside.write_text(json.dumps(entry(card), indent=1) + "\n", encoding="utf-8")
        for path, temporary in made.items():
            os.replace(temporary, path)
    return list(made)


def check_target(target: Path) -> None:
    """Raise UserError for a name that would mislead."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target} would hold safetensors; give it the suffix .safetensors")


def _network(found: EDMSnapshot, source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with torch.device("meta"):
            bottleneck = build(found.config).model.bottleneck
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{source} has settings that make no network: {error}") from error
    return found.tensors, {"config": json.dumps(found.config), "bottleneck_module": bottleneck}


def _settings_of(name: str) -> dict[str, str]:
    """Metadata of plain weights, whose settings only the card of a published model knows."""
    card = cards().get(name)
    if card is None or not card.config:
        return {}
    return {"config": json.dumps(dict(card.config)), "bottleneck_module": card.bottleneck}


def _card(name: str, weights: Path, source: Path) -> Card | None:
    """The card of a file made from ``source``: a published model's, or of what the file holds."""
    from denoisers.recognise import (
        describe,  # the families read their checkpoints through this module
    )

    known = cards().get(name)
    if known is None:
        try:
            found = describe(name, weights)
        except UserError:  # of no family that we know, or its tensors do not tell
            return None
    else:
        try:
            found = describe(name, weights, known.family)
        except UserError as error:
            reason = str(error).replace(str(weights), str(source))
            raise UserError(f"'{name}' is another model: {reason}; give another --name") from None
        if (found.shape, found.label_dim) != (known.shape, known.label_dim):
            raise UserError(
                f"the weights are for samples {found.shape} with {found.label_dim} classes where "
                f"'{name}' has {known.shape} and {known.label_dim}; give another --name"
            )
        found = replace(known, config=found.config, bottleneck=found.bottleneck)
    return replace(found, file=weights.name, url=None, sha256=sha256_file(weights))


def entry(card: Card) -> dict[str, Any]:
    """A card as an entry of ``cards.json``."""
    values = asdict(card)
    return {values.pop("name"): values}


def own_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory with each other, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        whole = tensor.untyped_storage()
        shared = whole.data_ptr() in seen or whole.nbytes() != tensor.nbytes
        seen.add(whole.data_ptr())
        out[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return out


@click.command(epilog=EXAMPLES)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--name", help="a published model, or a name of your own  [default: the target's]")
def main(source: Path, target: Path, name: str | None) -> None:
    """Turn the checkpoint SOURCE into TARGET.safetensors, with its card beside it.

    Pickles are read as data; nothing in them is run.
    """
    report(convert(source, target, name))


def report(written: list[Path]) -> None:
    """Say what there is now."""
    for path in written:
        click.echo(f"wrote {path}")
    if len(written) == 1:
        click.echo("no card: say with --name which published model the weights belong to")


if __name__ == "__main__":
    cli.run(main)
