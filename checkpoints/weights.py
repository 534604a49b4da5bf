"""Reading weights: safetensors only, and every name and shape must be as expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.errors import UserError

#: Buffers that follow from the settings: resampling filters, and the noise levels of iDDPM, whose
#: published values carry an error of 5e-4 from a long recursion in float32.
DERIVED = ("resample_filter", "u")
TOLERANCE = 2e-3  #: relative
NetworkT = TypeVar("NetworkT", bound=nn.Module)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a file; UserError if it is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); give one, or another copy of it"
        ) from error


class Unfilled(TorchFunctionMode):
    """Within, networks are made without the random numbers that weights start from.

    For those that :func:`fill` is to fill: drawing hundreds of millions of numbers takes seconds,
    and memory that is not written to is not taken.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``; UserError naming the first entry that does not fit.

    Buffers that follow from the settings are part of the architecture: different ones in the file
    are refused, as the layers may use those they were built with in another form.
    """
    own = module.state_dict()
    check_entries(own, tensors, source)
    meta = any(tensor.is_meta for tensor in own.values())  # these take the tensors themselves
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()}, assign=meta)


def check_entries(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless ``tensors`` has the names and shapes of ``own``, as :func:`fill`."""
    for name, tensor in own.items():
        if name not in tensors:
            raise UserError(f"{source} lacks '{name}'; it holds the weights of another network")
        given = tensors[name]
        if given.shape != tensor.shape:
            raise UserError(
                f"{source} has '{name}' of shape {tuple(given.shape)} where the network has "
                f"{tuple(tensor.shape)}; it holds the weights of another network"
            )
        derived = name.rpartition(".")[2] in DERIVED
        if derived and not torch.allclose(given.to(tensor), tensor, rtol=TOLERANCE):
            raise UserError(f"{source} has other numbers in '{name}' than its settings say")
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise UserError(f"{source} has '{unknown[0]}', which the network lacks; wrong settings?")


def filled(make: Callable[[], NetworkT], tensors: Mapping[str, Tensor], source: str) -> NetworkT:
    """The network of ``make`` with ``tensors`` as its weights, which no longer need gradients.

    Memory is taken only once names and shapes are known to fit, so ``make`` may go by shapes that
    a file claims; buffers that it computes are lost.  Raises UserError where ``make`` finds that
    its settings make no network, and as :func:`fill` does.
    """
    try:
        with torch.device("meta"):
            net = make()
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{source} has weights that make no network: {error}") from error
    fill(net, tensors, source)
    return net.eval().requires_grad_(False)
