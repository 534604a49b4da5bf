"""NCSN++ of score-SDE's PyTorch code (Song et al. 2021, arXiv:2011.13456): what PDS was shown on.

Its data are in [0, 1].  With ``y`` and ``s`` for our state and noise level, ``y = 2 x - 1`` and
``s = 2 sigma``.  The network takes ``2 x - 1 = y`` and ``ln sigma = ln(s / 2)``, and what it finds,
``F``, is ``sigma score(x)``, whence ``D(y; s) = 2 (x + sigma^2 score(x)) - 1 = y + s F``.  That is
:class:`precond.VEPrecond` around a :class:`nets.SongUNet`, and a model as those of the EDM family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.weights import check_entries
from denoisers.cards import Card
from denoisers.families.adm import read_openai
from denoisers.families.edm import EDMModel, check_fit, make_network
from denoisers.families.precond import Precond
from denoisers.files import Files
from denoisers.nets import SongUNet
from denoisers.nets.ncsnpp import published, settings_from
from runtime.errors import UserError
from runtime.files import sha256_file

LEVELS = "sigmas"  #: the noise levels of training in their units, from the highest down


@dataclass(frozen=True, eq=False)
class Found:
    """What a file of this family holds, the network still empty."""

    net: Precond
    config: dict[str, Any]  #: settings as for :func:`precond.build`
    tensors: Mapping[str, Tensor]  #: the weights, under the names of :func:`published`


def is_ncsnpp(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of score-SDE's code, by the name that it gives all its modules."""
    return any(name.startswith("all_modules.") for name in tensors)


def load_ncsnpp(card: Card, files: Files, device: torch.device, dtype: torch.dtype) -> EDMModel:
    """Load ``files.main``; see :func:`registry.load_model`.

    Settings are read off the file; ``card`` has the last word on the noise levels.  Raises
    UserError for a file that cannot be read, holds another network, or is for other samples.
    """
    found = read(files.main)
    net = found.net
    check_fit(net, card, files.main)
    for name, view in _weights(net).items():
        view.copy_(found.tensors[name])
    net.eval().requires_grad_(False)
    card = replace(card, config=found.config, bottleneck=net.model.bottleneck)
    return EDMModel(card, sha256_file(files.main), net.cast(dtype).to(device))


def describe_ncsnpp(name: str, path: Path) -> Card:
    """The card of one's own file, from its content alone; UserError as :func:`load_ncsnpp`."""
    found = read(path)
    net = found.net
    return Card(
        name=name,
        family="ncsnpp",
        resolution=net.img_resolution,
        channels=net.img_channels,
        label_dim=0,
        sigma_min=net.sigma_min,
        sigma_max=net.sigma_max,
        bottleneck=net.model.bottleneck,
        file=path.name,
        url=None,
        sha256=sha256_file(path),
        config=found.config,
    )


def read(path: Path) -> Found:
    """A published checkpoint, of which the average is taken, or its weights as safetensors.

    The bottleneck is the end of the middle.  Raises UserError for what is no such network.
    """
    everything, base = read_openai(path)
    tensors = {name: tensor for name, tensor in everything.items() if name != LEVELS}
    if not is_ncsnpp(tensors):
        raise UserError(f"{path} holds no network of the family 'ncsnpp'")
    low, high = _range(everything.get(LEVELS), path)
    config = settings_from(tensors, base, str(path)) | {"sigma_min": low, "sigma_max": high}
    side = config["img_resolution"] >> (len(config["channel_mult"]) - 1)
    net = make_network(config, f"{side}x{side}_in1", path)
    check_entries(_weights(net), tensors, str(path))
    return Found(net, config, tensors)


def _weights(net: Precond) -> dict[str, Tensor]:
    assert isinstance(net.model, SongUNet)  # settings_from() has seen to it
    return published(net.model)


def _range(levels: Tensor | None, path: Path) -> tuple[float, float]:
    """The lowest and the highest noise level in our units; six digits, as some files have float32.

    Raises UserError where a file lacks them.
    """
    if levels is None or levels.ndim != 1 or not (len(levels) and bool((levels > 0).all())):
        raise UserError(f"{path} lacks the noise levels ('{LEVELS}') that NCSN++ was trained on")
    return float(f"{2 * float(levels.min()):.6g}"), float(f"{2 * float(levels.max()):.6g}")
