"""Safetensors files, and weights that must match a network in every name and shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.errors import UserError, first_line
from runtime.files import require_readable
from runtime.typed import parse_json

#: Buffers determined by the settings: resampling filters, and the noise levels of iDDPM, whose
#: published values have an error of 5e-4 from a long recursion in float32.
DERIVED = ("resample_filter", "u")
TOLERANCE = 2e-3  #: relative, of derived buffers
NetworkT = TypeVar("NetworkT", bound=nn.Module)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text metadata of a safetensors file; UserError if it is something else."""
    with _opened(path) as file:
        return load_file(path), file.metadata() or {}


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata of a safetensors file alone; UserError as `read_safetensors`."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a safetensors file ({error}); give one, or another copy of it"
        ) from error


def read_config(metadata: Mapping[str, str], path: Path) -> dict[str, Any] | None:
    """Constructor settings of a network in the metadata of ``path``, or None if there are none.

    Raises UserError if they are no JSON object.
    """
    if "config" not in metadata:
        return None
    remedy = "convert the checkpoint again"
    config = parse_json(metadata["config"], f"the config in the metadata of {path}", remedy)
    if not isinstance(config, dict):
        raise UserError(
            f"the config in the metadata of {path} is {metadata['config']!r}, no JSON object; "
            f"{remedy}"
        )
    return config


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Unfilled(TorchFunctionMode):
    """A context in which networks are built without drawing their random initial weights.

    For networks that :func:`fill` is about to fill: drawing hundreds of millions of numbers takes
    seconds, and memory that is never written is not allocated.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.uniform_, Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into ``module``; UserError naming the first entry that does not fit.

    Derived buffers belong to the architecture: other values in the file are refused, since layers
    may use those of the settings in another form.
    """
    own = module.state_dict()
    check_entries(own, tensors, source)
    meta = any(tensor.is_meta for tensor in own.values())  # replaced by the tensors themselves
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in tensors.items()}, assign=meta)


def check_entries(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise UserError unless ``tensors`` has the names and shapes of ``own``, as :func:`fill`."""
    for name, tensor in own.items():
        if name not in tensors:
            raise missing_entry(source, name)
        given = tensors[name]
        if given.shape != tensor.shape:
            raise UserError(
                f"{source} has '{name}' of shape {tuple(given.shape)} where the network has "
                f"{tuple(tensor.shape)}; it holds the weights of another network"
            )
        derived = name.rpartition(".")[2] in DERIVED
        if derived and not torch.allclose(given.to(tensor), tensor, rtol=TOLERANCE):
            raise UserError(
                f"{source} has other numbers in '{name}' than its settings imply; fetch it again"
            )
    unknown = sorted(set(tensors) - set(own))
    if unknown:
        raise unknown_entry(source, unknown[0])


def axis_size(
    tensors: Mapping[str, Tensor], name: str, axis: int, source: str, network: str
) -> int:
    """The length of an axis of a tensor, 1 or more.

    Raises UserError if ``source`` has no such tensor, and is thus no ``network``.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.ndim <= axis or not tensor.shape[axis]:
        raise UserError(
            f"{source} has no '{name}' as in {network}; it holds the weights of another network"
        )
    return tensor.shape[axis]


def missing_entry(source: object, name: str) -> UserError:
    """The error of a file without a tensor that the network needs."""
    return UserError(f"{source} lacks '{name}'; it holds the weights of another network")


def unknown_entry(source: object, name: str) -> UserError:
    """The error of a file with a tensor that the network does not have."""
    return UserError(f"{source} has '{name}', which the network lacks; wrong settings?")


@contextmanager
def constructing(source: str, what: str) -> Iterator[None]:
    """Turn what a constructor raises for invalid settings into a UserError.

    ``what`` of ``source`` determined the settings, which may be anything.
    """
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{source} has {what} that make no network: {first_line(error)}") from error


def filled(make: Callable[[], NetworkT], tensors: Mapping[str, Tensor], source: str) -> NetworkT:
    """The network of ``make`` with ``tensors`` as its weights, which require no gradients.

    Memory is only allocated once names and shapes are known to fit, so ``make`` may use shapes
    that a file claims; buffers that it computes are lost.  Raises UserError if ``make`` fails, and
    as :func:`fill` does.
    """
    with constructing(source, "weights"), torch.device("meta"):
        net = make()
    fill(net, tensors, source)
    return net.eval().requires_grad_(False)


def own_storages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory with each other, as required by safetensors."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        whole = tensor.untyped_storage()
        shared = whole.data_ptr() in seen or whole.nbytes() != tensor.nbytes
        seen.add(whole.data_ptr())
        out[name] = tensor.clone().contiguous() if shared else tensor.contiguous()
    return out
