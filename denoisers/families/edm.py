"""The EDM family: its files, and its networks as models (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.snapshots import find_network, read, read_edm
from checkpoints.weights import Unfilled, fill, read_safetensors
from denoisers.cards import Card
from denoisers.conditions import check_batch, refuse_guidance
from denoisers.families.precond import EDMPrecond, Precond, build
from denoisers.files import Files
from runtime.errors import UserError
from runtime.files import sha256_file
from solvers.types import Denoised

__all__ = [
    "EDMDenoiser", "EDMModel", "EDMPrecond", "build", "describe_edm", "is_edm", "load_edm",
]  # fmt: skip

LOWEST, HIGHEST = 0.002, 80.0  #: the published noise levels of networks that set no bound
MICRO_BATCH = 64  #: samples at a time on a CPU: more only leaves the cache


@dataclass(eq=False)
class EDMDenoiser:
    """A network with its labels bound in: one evaluation per call."""

    net: Precond
    labels: Tensor | None  #: one-hot (B, K), or None
    cost: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, 0-d or (B, 1, 1, 1); ``x0`` has its dtype."""
        labels = self.labels
        check_batch(labels, x)
        if x.device.type != "cpu" or len(x) <= MICRO_BATCH:
            return self.net(x, sigma, labels)
        outs = []
        for i in range(0, len(x), MICRO_BATCH):
            part = slice(i, i + MICRO_BATCH)
            level = sigma[part] if sigma.ndim and len(sigma) > 1 else sigma
            outs.append(self.net(x[part], level, None if labels is None else labels[part]))
        return Denoised(torch.cat([o.x0 for o in outs]), torch.cat([o.feat for o in outs]))


@dataclass(frozen=True, eq=False)
class EDMModel:
    """A loaded model of the EDM family."""

    card: Card
    sha256: str  #: of the weights that were loaded
    net: Precond

    def decode(self, x: Tensor) -> Tensor:
        """Samples of these models are images."""
        return x

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> EDMDenoiser:
        """Fix the classes, (B,) int64 or None (none: unconditional).

        Raises UserError for labels out of range, labels of an unconditional model, or guidance.
        """
        refuse_guidance(self.card, guidance_rate)
        if prompts is not None:
            raise UserError(f"'{self.card.name}' takes no text; leave the prompts out")
        if labels is None:
            return EDMDenoiser(self.net, None)
        classes = self.card.label_dim
        if not classes:
            raise UserError(f"'{self.card.name}' is unconditional: it takes no class labels")
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= classes:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"class {wrong} is not one of the {classes} (0..{classes - 1})")
        return EDMDenoiser(self.net, F.one_hot(labels, classes))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file of this family holds."""

    tensors: Mapping[str, Tensor]  #: under their published names
    config: dict[str, Any] | None  #: settings as for ``build``; None where the file has none
    bottleneck: str | None = None  #: the module that the file names, if any


def load_edm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> EDMModel:
    """Load ``files.main``; see :func:`registry.load_model`.

    The file's own settings replace those of ``card``, which has the last word on the noise levels.
    Raises UserError for a file that cannot be read, is another network than its settings say, or
    is for other samples than ``card``.
    """
    file = files.main
    digest = sha256_file(file)
    if file == card.bundled and digest != card.sha256:
        raise UserError(
            f"{file} has sha256 {digest} where its card says {card.sha256}; restore the file"
        )
    found = read_checkpoint(file)
    config, bottleneck = found.config, found.bottleneck
    if config is None:
        config, bottleneck = dict(card.config), card.bottleneck
    net = make_network(config, bottleneck, file)
    check_fit(net, card, file)
    card = replace(card, config=config, bottleneck=net.model.bottleneck)
    fill(net, found.tensors, str(file))
    net.eval().requires_grad_(False)
    return EDMModel(card, digest, net.cast(dtype).to(device))


def describe_edm(name: str, path: Path) -> Card:
    """The card of one's own file, from its content alone.

    The bottleneck is the network's last encoder block unless the file names another.  The noise
    levels are the network's; where it sets no bound they are EDM's 0.002 and 80.  Raises UserError
    for a file that cannot be read or does not hold the settings of its network.
    """
    found = read_checkpoint(path)
    if found.config is None:
        raise UserError(
            f"{path} does not hold the settings of its network; give --dataset_name the name of "
            "the published model that it belongs to"
        )
    net = make_network(found.config, found.bottleneck, path)
    return Card(
        name=name,
        family="edm",
        resolution=net.img_resolution,
        channels=net.img_channels,
        label_dim=net.label_dim,
        sigma_min=net.sigma_min or LOWEST,
        sigma_max=net.sigma_max if math.isfinite(net.sigma_max) else HIGHEST,
        bottleneck=net.model.bottleneck,
        file=path.name,
        url=None,
        sha256=sha256_file(path),
        config=found.config,
        pfgmpp=net.D,
    )


def is_edm(path: Path) -> bool:
    """Whether a file holds a network of this family; one that cannot be read safely is refused."""
    if _is_pickle(path):
        content = read(path)
        try:
            find_network(content, str(path))
        except UserError:
            return False
        return True
    try:
        return "class_name" in (read_checkpoint(path).config or {})
    except UserError:
        return False


def read_checkpoint(path: Path) -> Checkpoint:
    """Read safetensors, or a published pickle or training state as data.

    Raises UserError for another kind of file, and for a pickle that holds no such network.
    """
    if not _is_pickle(path):
        tensors, metadata = read_safetensors(path)
        return Checkpoint(tensors, _settings(metadata, path), metadata.get("bottleneck_module"))
    found = read_edm(path)
    return Checkpoint(found.tensors, found.config)


def _settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    if "config" not in metadata:
        return None
    try:
        return dict(json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has settings that cannot be read ({error})") from error


def _is_pickle(path: Path) -> bool:
    """By the first bytes: a pickle with a protocol, or the archive that ``torch.save`` makes."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def make_network(config: Mapping[str, Any], bottleneck: str | None, path: Path) -> Precond:
    """To be filled, from the settings of a file, which may be anything."""
    try:
        with Unfilled():
            return build(config, bottleneck)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} has settings that make no network: {error}") from error


def check_fit(net: Precond, card: Card, path: Path) -> None:
    """Raise UserError unless ``net`` makes the samples that ``card`` promises."""

    def samples(shape: tuple[int, ...], classes: int, dimensions: int | None) -> str:
        added = "" if dimensions is None else f" and the D = {dimensions} of PFGM++"
        return f"{shape} with {classes} classes{added}"

    own = samples((net.img_channels, *[net.img_resolution] * 2), net.label_dim, net.D)
    asked = samples(card.shape, card.label_dim, card.pfgmpp)
    if own != asked:
        raise UserError(
            f"{path} is for samples {own} where '{card.name}' has {asked}; "
            "choose the dataset it belongs to"
        )
