"""Cards of models that no registry holds: made from what is in one's own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from denoisers.cards import Card, cards
from denoisers.families.adm import read_openai, resolved
from denoisers.families.diffusers.loading import inspect_diffusers, is_diffusers
from denoisers.families.edm import describe_edm, is_edm
from denoisers.families.ldm import NETWORK, part
from denoisers.families.ncsnpp import describe_ncsnpp, is_ncsnpp
from denoisers.nets.openai import is_openai
from runtime.errors import UserError

#: The published model whose conventions (time, noise levels, preconditioning) a family follows.
EXAMPLES = {"adm": "imagenet256", "cm": "lsun_bedroom", "ldm": "lsun_bedroom_ldm"}


def describe(name: str, path: Path, family: str | None = None) -> Card:
    """The card, called ``name``, of the model at ``path``; the family is recognised or given.

    Raises UserError for a family that is unknown, or that the file does not show.
    """
    family = family or recognise(path)
    if family not in DESCRIBE:
        raise UserError(f"--model_family {family} is unknown; choose one of {', '.join(DESCRIBE)}")
    return DESCRIBE[family](name, path)


def recognise(path: Path) -> str:
    """The family of a folder or file, from its content.

    Raises UserError where nothing in it is known, or its tensors do not tell.
    """
    if path.is_dir() or is_diffusers(path):
        return "diffusers"
    if is_edm(path):
        return "edm"
    tensors, _ = read_openai(path)
    if is_ncsnpp(tensors):
        return "ncsnpp"
    if is_openai(part(tensors, NETWORK)):
        return "ldm"
    if is_openai(tensors):
        # Consistency models have attention of their own; ADM's networks all predict a variance.
        return "cm" if tensors["middle_block.1.qkv.weight"].ndim == 4 else "adm"
    raise UserError(
        f"nothing in {path} tells its family (it holds '{next(iter(tensors))}', ...); give "
        f"--model_family, one of {', '.join(DESCRIBE)}"
    )


def _pipeline(name: str, path: Path) -> Card:
    return Card(name=name, file=path.name, url=None, sha256=None, **inspect_diffusers(path))


def _openai(family: str, prefix: str = "") -> Callable[[str, Path], Card]:
    def make(name: str, path: Path) -> Card:
        example = cards()[EXAMPLES[family]]
        everything, config = read_openai(path)
        tensors = part(everything, prefix)
        if not is_openai(tensors):
            raise UserError(f"{path} holds no network of the family '{family}'")
        base = replace(
            example, name=name, file=path.name, url=None, sha256=None, image_resolution=None
        )
        return resolved(base, tensors, config)

    return make


DESCRIBE: dict[str, Callable[[str, Path], Card]] = {
    "edm": describe_edm,
    "adm": _openai("adm"),
    "cm": _openai("cm"),
    "ldm": _openai("ldm", NETWORK),
    "ncsnpp": describe_ncsnpp,
    "diffusers": _pipeline,
}
