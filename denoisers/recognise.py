"""Cards of models that are not published ones: built from the content of a file or folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from checkpoints.snapshots import read_weights
from checkpoints.weights import under
from denoisers.cards import Card, cards
from denoisers.families.adm import resolved
from denoisers.families.diffusers.files import describe_diffusers, is_diffusers
from denoisers.families.edm import describe_edm, is_edm
from denoisers.families.ldm import NETWORK
from denoisers.families.ncsnpp import describe_ncsnpp, is_ncsnpp
from denoisers.nets.openai import is_openai, untold
from denoisers.settings import completed
from runtime.errors import UserError
from runtime.log import note_once

#: The published model whose conventions (time, noise levels, preconditioning) a family follows.
EXAMPLES = {"adm": "imagenet256", "cm": "lsun_bedroom", "ldm": "lsun_bedroom_ldm"}
#: These conventions in words, as far as no file tells them.
CONVENTIONS = {
    "adm": "by a linear VP process (beta 0.1 to 20) on images in [-1, 1]",
    "cm": "with EDM's preconditioning for sigma_data 0.5, from sigma 0.002 to 80",
    "ldm": "on 1000 steps of scaled linear betas (0.0015 to 0.0195)",
}
Describe = Callable[[str, Path, Mapping[str, Any]], Card]


def describe(
    name: str,
    path: Path,
    family: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Card:
    """The card, called ``name``, of the model at ``path``; the family is recognised by default.

    ``given`` are those settings of its network that the file does not hold.  Raises UserError for
    an unknown family, for a file that holds no model of it, and for settings that contradict the
    file or that neither has.
    """
    family = family or recognise(path)
    if family not in DESCRIBE:
        raise UserError(f"--model_family {family} is unknown; choose one of {', '.join(DESCRIBE)}")
    return DESCRIBE[family](name, path, given or {})


def recognise(path: Path) -> str:
    """The family of a folder or file, from its content.

    Raises UserError if the names of its tensors are of no known family.
    """
    if path.is_dir() or is_diffusers(path):
        return "diffusers"
    if is_edm(path):
        return "edm"
    tensors, _ = read_weights(path)
    if is_ncsnpp(tensors):
        return "ncsnpp"
    if is_openai(under(NETWORK, tensors)):
        return "ldm"
    if is_openai(tensors):
        # Published consistency models have two-dimensional convolutions in their attention.
        return "cm" if tensors["middle_block.1.qkv.weight"].ndim == 4 else "adm"
    raise UserError(
        f"nothing in {path} tells its family (it holds '{next(iter(tensors))}', ...); give "
        f"--model_family, one of {', '.join(DESCRIBE)}"
    )


def _openai(family: str, prefix: str = "") -> Describe:
    """How to describe a U-Net of guided diffusion, whose weights have names with ``prefix``."""

    def describe_unet(name: str, path: Path, given: Mapping[str, Any]) -> Card:
        entries, config = read_weights(path)
        tensors = under(prefix, entries)
        if not is_openai(tensors):
            raise UserError(f"{path} holds no network of the family '{family}'")
        told = completed(config, given, path)
        example = cards()[EXAMPLES[family]]
        _require(path, untold(tensors, told), example)
        if "alphas_cumprod" not in entries:  # which is compared when the weights are loaded
            note_once(
                f"note: {path.name} does not tell how it was trained: taken as {example.name} was, "
                f"{CONVENTIONS[family]}"
            )
        base = replace(
            example, name=name, file=path.name, url=None, sha256=None, image_resolution=None,
            config={}, settings=given,
        )  # fmt: skip
        card = resolved(base, tensors, told)
        completed(card.config, given, path)  # what the weights show cannot be given otherwise
        return card

    return describe_unet


def _require(path: Path, missing: Sequence[str], example: Card) -> None:
    """Raise UserError, with the values of ``example``, if settings are ``missing``."""
    known = {**example.config, "image_size": example.resolution}
    if missing:
        raise UserError(
            f"{path} does not tell {' and '.join(missing)} of its network, and another value gives "
            f"other images: give --model_settings '{json.dumps({k: known[k] for k in missing})}' "
            f"with the values of its training (these are those of {example.name})"
        )


def _without_settings(describe_file: Callable[[str, Path], Card]) -> Describe:
    """How to describe a file that holds all settings."""

    def describe_whole(name: str, path: Path, given: Mapping[str, Any]) -> Card:
        if given:
            raise UserError(f"{path} holds all settings of its network: leave --model_settings out")
        return describe_file(name, path)

    return describe_whole


DESCRIBE: dict[str, Describe] = {
    "edm": describe_edm,
    "adm": _openai("adm"),
    "cm": _openai("cm"),
    "ldm": _openai("ldm", NETWORK),
    "ncsnpp": _without_settings(describe_ncsnpp),
    "diffusers": describe_diffusers,
}
