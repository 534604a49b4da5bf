"""Reading weights: safetensors only, and every name and shape must be as expected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from runtime.errors import UserError


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a file; UserError if it is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); give --model_path a .safetensors file"
        ) from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``; UserError naming the first entry that does not fit.

    Resampling filters are part of the architecture: a different one in the file is refused, as
    the layers may use the one they were built with in another form.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"{source} lacks '{name}'; it holds the weights of another network")
        given = tensors[name]
        if given.shape != tensor.shape:
            raise UserError(
                f"{source} has '{name}' of shape {tuple(given.shape)} where the network has "
                f"{tuple(tensor.shape)}; it holds the weights of another network"
            )
        if name.endswith("resample_filter") and not torch.allclose(given.to(tensor), tensor):
            raise UserError(f"{source} has another filter in '{name}' than its settings say")
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise UserError(f"{source} has '{unknown[0]}', which the network lacks; wrong settings?")
    module.load_state_dict(dict(tensors))
