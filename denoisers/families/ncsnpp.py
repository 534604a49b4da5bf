"""NCSN++ of score-SDE's PyTorch code (Song et al. 2021, arXiv:2011.13456), the networks of PDS.

Its data are in [0, 1].  With ``y`` and ``s`` for our state and noise level, ``y = 2 x - 1`` and
``s = 2 sigma``.  The network takes ``2 x - 1 = y`` and ``ln sigma = ln(s / 2)``, and its output
``F`` is ``sigma score(x)``, so ``D(y; s) = 2 (x + sigma^2 score(x)) - 1 = y + s F``.  That is
:class:`precond.VEPrecond` around a :class:`nets.song.SongUNet`: a model of the EDM family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.snapshots import read_weights
from checkpoints.weights import check_entries
from denoisers.cards import Card
from denoisers.families.common import check_samples
from denoisers.families.edm import EDMModel, card_of, finished, make_network
from denoisers.families.precond_base import Precond
from denoisers.nets.ncsnpp import published, settings_from
from denoisers.nets.song import SongUNet
from denoisers.protocol import Files
from runtime.errors import UserError
from runtime.files import sha256_file

LEVELS = "sigmas"  #: the noise levels of training in their units, decreasing


@dataclass(frozen=True, eq=False)
class NCSNppCheckpoint:
    """What a file of this family holds, and a network for it that is not filled yet."""

    net: Precond
    config: dict[str, Any]  #: settings for :func:`precond.build`
    tensors: Mapping[str, Tensor]  #: the weights, under the names of :func:`published`

    def card(self, name: str, path: Path, digest: str) -> Card:
        """The card of a model with the weights in ``path``."""
        return card_of(self.net, self.config, name, "ncsnpp", path, digest)


def is_ncsnpp(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of score-SDE's code, which names all modules ``all_modules.<i>``."""
    return any(name.startswith("all_modules.") for name in tensors)


def load_ncsnpp(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> EDMModel:
    """Load ``files.main``; see :func:`registry.load_model`.

    Settings are read off the file; the noise levels are those of ``card``.  Raises UserError for
    a file that cannot be read, holds another network, or is for other samples.
    """
    checkpoint = read_checkpoint(files.main)
    digest = sha256_file(files.main)
    check_samples(checkpoint.card(card.name, files.main, digest), card, files.main)
    for name, view in _weights(checkpoint.net).items():
        view.copy_(checkpoint.tensors[name])
    return finished(checkpoint.net, checkpoint.config, card, digest, device, dtype)


def describe_ncsnpp(name: str, path: Path) -> Card:
    """The card of a file that belongs to no published card; UserError as :func:`load_ncsnpp`."""
    return read_checkpoint(path).card(name, path, sha256_file(path))


def read_checkpoint(path: Path) -> NCSNppCheckpoint:
    """A published checkpoint, of which the average is taken, or its weights as safetensors.

    The bottleneck is the end of the middle.  Raises UserError for anything else.
    """
    entries, base = read_weights(path)
    tensors = {name: tensor for name, tensor in entries.items() if name != LEVELS}
    if not is_ncsnpp(tensors):
        raise UserError(f"{path} holds no network of the family 'ncsnpp'")
    low, high = _range(entries.get(LEVELS), path)
    config = settings_from(tensors, base, str(path)) | {"sigma_min": low, "sigma_max": high}
    side = config["img_resolution"] >> (len(config["channel_mult"]) - 1)
    net = make_network(config, f"{side}x{side}_in1", path)
    check_entries(_weights(net), tensors, str(path))
    return NCSNppCheckpoint(net, config, tensors)


def _weights(net: Precond) -> dict[str, Tensor]:
    assert isinstance(net.model, SongUNet)  # by the settings of settings_from()
    return published(net.model)


def _range(levels: Tensor | None, path: Path) -> tuple[float, float]:
    """The lowest and the highest noise level in our units; six digits, as some files are float32.

    Raises UserError if a file lacks them.
    """
    if levels is None or levels.ndim != 1 or not (len(levels) and bool((levels > 0).all())):
        raise UserError(f"{path} lacks the noise levels ('{LEVELS}') that NCSN++ was trained on")
    return float(f"{2 * float(levels.min()):.6g}"), float(f"{2 * float(levels.max()):.6g}")
