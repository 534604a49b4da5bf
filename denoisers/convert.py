"""Convert published checkpoints into safetensors with their settings, and a card beside them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.snapshots import EDMSnapshot, find_network, find_tensors, is_network
from checkpoints.weights import own_storages
from denoisers.cards import Card, cards
from denoisers.families.common import samples_of
from denoisers.families.edm import make_network
from denoisers.recognise import describe
from runtime.errors import UserError
from runtime.files import sha256_file


def convert(content: Any, source: Path, target: Path, name: str | None = None) -> list[Path]:
    """Write ``target`` (``.safetensors``) and ``.card.json`` beside it; returns the files written.

    ``content`` is the result of :func:`checkpoints.pickles.files.read` for ``source``.  ``name`` is
    that of the published model of these weights, or any other name; by default the target's.
    Weights of an unknown family get no card.

    Raises UserError, without writing anything, for a target of another suffix, the name of a
    published model that the weights do not fit, and content without weights.
    """
    check_target(target)
    name = name or target.stem
    if is_network(content):
        tensors, metadata = _network(find_network(content, str(source)), source)
    else:
        tensors, metadata = find_tensors(content, str(source)), _settings_of(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        weights = Path(folder, target.name)
        save_file(own_storages(tensors), weights, metadata)
        temporary = {target: weights}
        card = _card(name, weights, source)
        if card is not None:
            card_file = Path(folder, "card.json")
            card_file.write_text(json.dumps(entry(card), indent=1) + "\n", encoding="utf-8")
            temporary[target.with_suffix(".card.json")] = card_file
        for path, file in temporary.items():
            os.replace(file, path)
    return list(temporary)


def check_target(target: Path) -> None:
    """Raise UserError for a file name without the suffix of its format."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target} would hold safetensors; give it the suffix .safetensors")


def _network(snapshot: EDMSnapshot, source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with torch.device("meta"):
        bottleneck = make_network(snapshot.config, None, source).model.bottleneck
    return snapshot.tensors, _metadata(snapshot.config, bottleneck)


def _settings_of(name: str) -> dict[str, str]:
    """Metadata of plain weights, whose settings are those of a published model's card."""
    card = cards().get(name)
    return {} if card is None or not card.config else _metadata(card.config, card.bottleneck)


def _metadata(config: Mapping[str, Any], bottleneck: str) -> dict[str, str]:
    return {"config": json.dumps(dict(config)), "bottleneck_module": bottleneck}


def _card(name: str, weights: Path, source: Path) -> Card | None:
    """The card of ``weights``, converted from ``source``: a published one, or a new one."""
    known = cards().get(name)
    if known is None:
        try:
            card = describe(name, weights)
        except UserError:  # of an unknown family, or it cannot be told from the tensors
            return None
    else:
        try:
            own = describe(name, weights, known.family)
        except UserError as error:
            reason = str(error).replace(str(weights), str(source))
            raise UserError(f"'{name}' is another model: {reason}; give another --name") from None
        if samples_of(own) != samples_of(known):
            raise UserError(
                f"the weights are for samples {samples_of(own)} where '{name}' has "
                f"{samples_of(known)}; give another --name"
            )
        card = replace(known, config=own.config, bottleneck=own.bottleneck)
    return replace(card, file=weights.name, url=None, sha256=sha256_file(weights))


def entry(card: Card) -> dict[str, Any]:
    """A card as an entry of ``cards.json``."""
    values = asdict(card)
    return {values.pop("name"): values}
