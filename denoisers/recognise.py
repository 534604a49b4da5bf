"""Cards of models that are not published ones: built from the content of a file or folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoints.snapshots import read_weights
from checkpoints.weights import under
from denoisers.cards import Card, cards
from denoisers.families.adm import resolved
from denoisers.families.diffusers.files import describe_diffusers, is_diffusers
from denoisers.families.edm import describe_edm, is_edm
from denoisers.families.ldm import NETWORK
from denoisers.families.ncsnpp import describe_ncsnpp, is_ncsnpp
from denoisers.nets.openai import is_openai
from runtime.errors import UserError

#: The published model whose conventions (time, noise levels, preconditioning) a family follows.
EXAMPLES = {"adm": "imagenet256", "cm": "lsun_bedroom", "ldm": "lsun_bedroom_ldm"}


def describe(name: str, path: Path, family: str | None = None) -> Card:
    """The card, called ``name``, of the model at ``path``; the family is recognised by default.

    Raises UserError for an unknown family, and for a file that holds no model of it.
    """
    family = family or recognise(path)
    if family not in DESCRIBE:
        raise UserError(f"--model_family {family} is unknown; choose one of {', '.join(DESCRIBE)}")
    return DESCRIBE[family](name, path)


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


def _openai(family: str, prefix: str = "") -> Callable[[str, Path], Card]:
    """How to describe a U-Net of guided diffusion, whose weights have names with ``prefix``."""

    def describe_unet(name: str, path: Path) -> Card:
        entries, config = read_weights(path)
        tensors = under(prefix, entries)
        if not is_openai(tensors):
            raise UserError(f"{path} holds no network of the family '{family}'")
        example = cards()[EXAMPLES[family]]
        base = replace(
            example, name=name, file=path.name, url=None, sha256=None, image_resolution=None
        )
        return resolved(base, tensors, config)

    return describe_unet


DESCRIBE: dict[str, Callable[[str, Path], Card]] = {
    "edm": describe_edm,
    "adm": _openai("adm"),
    "cm": _openai("cm"),
    "ldm": _openai("ldm", NETWORK),
    "ncsnpp": describe_ncsnpp,
    "diffusers": describe_diffusers,
}
