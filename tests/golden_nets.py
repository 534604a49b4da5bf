"""Weights of the recorded networks, drawn again as the recording drew them.

Source: tests/golden/README.md. A draw is an affine image of ``torch.randn``, tensor by tensor
from one generator, so a seed and a list of shapes stand for megabytes of random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def draw(name: str, entry: Mapping[str, Any], constants: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of network ``name``, float32, in the published order.

    ``entry`` holds the seed and a row per tensor: name, shape, mean, standard deviation, and its
    first and last recorded number; a row with a name alone stands for ``constants[name|tensor]``.
    """
    generator = torch.Generator().manual_seed(entry["seed"])
    state = {}
    for key, *row in entry["tensors"]:
        if not row:
            state[key] = torch.tensor(constants[f"{name}|{key}"])
            continue
        shape, mean, std, *ends = row
        state[key] = mean + std * torch.randn(shape, generator=generator)
        found = state[key].flatten()[[0, -1]]
        # else the outputs would differ for a reason that is no fault of the code under test
        assert (found - torch.tensor(ends)).abs().max() < 1e-6, (
            f"torch {torch.__version__} draws other numbers from seed {entry['seed']} than the "
            f"recording: {key} of {name} runs from {found[0]:g} to {found[1]:g}, recorded {ends}"
        )
    return state
