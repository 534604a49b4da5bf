"""The EDM family: its files, and its networks as models (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints.pickles.files import RATIO, read
from checkpoints.snapshots import find_network, read_edm
from checkpoints.weights import (
    Unfilled,
    constructing,
    fill,
    read_config,
    read_metadata,
    read_safetensors,
)
from denoisers.cards import Card
from denoisers.families.common import LoadedModel, check_batch, check_samples
from denoisers.families.precond import build
from denoisers.families.precond_base import Precond
from denoisers.protocol import Files
from denoisers.settings import completed, weights_sha256
from runtime.errors import UserError
from runtime.files import sha256_file
from solvers.types import Denoised

LOWEST, HIGHEST = 0.002, 80.0  #: the published noise levels of networks that set no bound
MICRO_BATCH = 64  #: samples evaluated at a time on a CPU: larger batches exceed its caches


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
class EDMModel(LoadedModel):
    """A loaded model of the EDM family."""

    net: Precond

    @property
    def network(self) -> nn.Module:
        return self.net.model

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> EDMDenoiser:
        """Without labels the denoiser is the unconditional one."""
        one_hot = None if labels is None else F.one_hot(labels, self.card.label_dim)
        return EDMDenoiser(self.net, one_hot)


@dataclass(frozen=True, eq=False)
class EDMCheckpoint:
    """What a file of this family holds."""

    tensors: Mapping[str, Tensor]  #: under their published names
    config: dict[str, Any] | None  #: settings for :func:`precond.build`; None if not in the file
    bottleneck: str | None = None  #: module named by the file, if any


def load_edm(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> EDMModel:
    """Load ``files.main``; see :func:`registry.load_model`.

    Settings in the file replace those of ``card``; the noise levels are those of ``card``.  Raises
    UserError for a file that cannot be read, that does not match its settings, or that is for
    other samples than ``card``.
    """
    file = files.main
    digest = weights_sha256(file, card.settings)
    if file == card.bundled and digest != card.sha256:
        raise UserError(
            f"{file} has sha256 {digest} where its card says {card.sha256}; restore the file"
        )
    checkpoint = read_checkpoint(file)
    config, bottleneck = checkpoint.config, checkpoint.bottleneck
    if config is None:
        config, bottleneck = dict(card.config), card.bottleneck
    config = completed(config, card.settings, file)
    net = make_network(config, bottleneck, file)
    check_samples(card_of(net, config, card.name, card.family, file, digest), card, file)
    fill(net, checkpoint.tensors, str(file))
    return finished(net, config, card, digest, device, dtype)


def finished(
    net: Precond,
    config: Mapping[str, Any],
    card: Card,
    digest: str,
    device: torch.device,
    dtype: torch.dtype,
) -> EDMModel:
    """The model of a network whose weights are in place, under ``card`` with its own settings."""
    net.eval().requires_grad_(False)
    card = replace(card, config=config, bottleneck=net.model.bottleneck)
    return EDMModel(card, digest, net.cast(dtype).to(device))


def describe_edm(name: str, path: Path, given: Mapping[str, Any] | None = None) -> Card:
    """The card of a file that belongs to no published card, from it and settings ``given``.

    Raises UserError for a file that cannot be read, for settings that contradict it, and if
    neither has the settings of the network.
    """
    config, bottleneck = read_settings(path)
    given = given or {}
    if config is None and "class_name" not in given:
        raise UserError(
            f"{path} does not hold the settings of its network; give --dataset_name the name of "
            "the published model that it belongs to, or all of them with --model_settings"
        )
    config = completed(config or {}, given, path)
    net = make_network(config, bottleneck, path)
    return replace(card_of(net, config, name, "edm", path, sha256_file(path)), settings=given)


def card_of(
    net: Precond, config: Mapping[str, Any], name: str, family: str, path: Path, digest: str
) -> Card:
    """The card of a network in ``path``; where it has no bound, the noise levels are EDM's."""
    return Card(
        name=name,
        family=family,
        resolution=net.img_resolution,
        channels=net.img_channels,
        label_dim=net.label_dim,
        sigma_min=net.sigma_min or LOWEST,
        sigma_max=net.sigma_max if math.isfinite(net.sigma_max) else HIGHEST,
        bottleneck=net.model.bottleneck,
        file=path.name,
        url=None,
        sha256=digest,
        config=config,
        pfgmpp=net.D,
    )


def is_edm(path: Path) -> bool:
    """Whether a file holds a network of this family.

    Raises UserError for a pickle that cannot be read safely.
    """
    if _is_pickle(path):
        content = read(path)
        try:
            find_network(content, str(path))
        except UserError:
            return False
        return True
    try:
        return "class_name" in (read_settings(path)[0] or {})
    except UserError:
        return False


def read_checkpoint(path: Path) -> EDMCheckpoint:
    """Read safetensors, or a published pickle or training state as data.

    Raises UserError for another kind of file, and for a pickle that holds no such network.
    """
    if not _is_pickle(path):
        tensors, metadata = read_safetensors(path)
        config = read_config(metadata, path)
        return EDMCheckpoint(tensors, config, metadata.get("bottleneck_module"))
    snapshot = read_edm(path)
    return EDMCheckpoint(snapshot.tensors, snapshot.config)


def read_settings(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The ``config`` and ``bottleneck`` of `read_checkpoint`; no weights of safetensors are read.

    Raises UserError as `read_checkpoint`.
    """
    if _is_pickle(path):
        return read_edm(path).config, None
    metadata = read_metadata(path)
    return read_config(metadata, path), metadata.get("bottleneck_module")


def _is_pickle(path: Path) -> bool:
    """By the first bytes: a pickle with a protocol, or the archive that ``torch.save`` writes."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def make_network(config: Mapping[str, Any], bottleneck: str | None, path: Path) -> Precond:
    """A network without weights from the settings in a file.

    Raises UserError if they are invalid, or of a network that is larger than the file.
    """
    with constructing(str(path), "settings"):
        with torch.device("meta"):
            count = sum(weight.numel() for weight in build(config, bottleneck).parameters())
        if count > RATIO * path.stat().st_size:  # a byte or more each, but for an archive's
            raise ValueError(f"it would have {count} weights, more than the file can hold")
        with Unfilled():
            return build(config, bottleneck)
