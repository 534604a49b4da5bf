"""The allow-list: every name that a checkpoint may hold, and what is made of it.

A name is one of three things.  It may have a constructor here, which makes plain data of checked
arguments; it may be a type that is only ever mentioned; or it may belong to a package whose objects
published checkpoints contain, which become a :class:`Record`.  Every other name is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.pickles.records import Record, Reference, Refusal, checked_key, is_scalar, shown

MOST_DIMENSIONS = 16
LONGEST_NAME = 200
STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPES: dict[str, torch.dtype] = {str(d).removeprefix("torch."): d for d in STORAGES.values()} | {
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
NUMPY_TYPES = (
    "b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16",
    "bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Storage:
    """The flat bytes that tensors are views of."""

    data: Tensor  #: 1-d

    def view(self, offset: Any, size: Any, stride: Any) -> Tensor:
        """A tensor inside this storage; Refusal if it would reach beyond or repeat elements."""
        whole = (offset, *_naturals(size, "size"), *_naturals(stride, "stride"))
        if len(size) != len(stride) or len(size) > MOST_DIMENSIONS:
            raise Refusal(f"holds a tensor with {len(size)} sizes and {len(stride)} strides")
        _naturals(whole, "offset")
        count, have = math.prod(size), self.data.numel()
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1
        if count > have or (count and last > have) or offset > have:
            raise Refusal(f"holds a tensor that reaches beyond the {have} elements it has stored")
        return self.data.as_strided(size, stride, offset)


def _naturals(values: Any, what: str) -> tuple[int, ...]:
    if type(values) is not tuple or not all(type(v) is int and 0 <= v < 2**48 for v in values):
        raise Refusal(f"holds a tensor whose {what} is no tuple of natural numbers")
    return values


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_unused: Any) -> Tensor:
    # Unused: requires_grad, backward hooks, metadata.
    if type(storage) is not Storage:
        raise Refusal("holds a tensor without a storage")
    return storage.view(offset, size, stride)


def _parameter(data: Any, *_unused: Any) -> Tensor:
    if type(data) is not Tensor:
        raise Refusal("holds a parameter without a tensor")
    return data


def _persistent(meta: Any) -> Record:
    """An object of ``torch_utils.persistence``; its source code (``module_src``) is dropped."""
    if type(meta) is not dict or meta.get("type") != "class" or not _is(meta, "class_name", str):
        raise Refusal("holds a persistent object without a class name")
    if not (_is(meta, "state", dict) and all(type(key) is str for key in meta["state"])):
        raise Refusal(f"holds a persistent object {shown(meta['class_name'])} without a state")
    return Record("torch_utils.persistence", meta["class_name"], (), meta["state"])


def _is(mapping: dict[Any, Any], key: str, kind: type) -> bool:
    return type(mapping.get(key)) is kind


def _dict(*args: Any) -> dict[Any, Any]:
    """``OrderedDict()``, ``OrderedDict(pairs)``, ``Counter(counts)``: order is kept by any dict."""
    if not args:
        return {}
    pairs = list(args[0].items()) if type(args[0]) is dict else _listed(args[0])
    if len(args) > 1 or not all(type(p) in (tuple, list) and len(p) == 2 for p in pairs):
        raise Refusal("holds a dict that is not made of pairs")
    return {checked_key(key): value for key, value in pairs}


def _default_dict(*_factory: Any) -> dict[Any, Any]:
    return {}


def _listed(value: Any) -> list[Any]:
    if type(value) not in (list, tuple, set, frozenset):
        raise Refusal(f"makes a collection of a {type(value).__name__}")
    return list(value)


def _set(values: Any = ()) -> set[Any]:
    return {checked_key(value) for value in _listed(values)}


def _bytes(*args: Any) -> bytes:
    if not args:
        return b""  # what protocol 2 makes of empty bytes
    if len(args) == 1 and type(args[0]) is bytes:
        return args[0]
    raise Refusal("makes bytes of something else than bytes")


def _encoded(text: Any, encoding: Any) -> bytes:
    """``_codecs.encode(text, "latin1")``: how protocol 2 writes bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise Refusal("encodes something else than text to latin1")
    return text.encode("latin1")


def _numbers(make: Callable[..., Any]) -> Callable[..., Any]:
    def made(*args: Any) -> Any:
        if not all(is_scalar(a) and type(a) is not str for a in args):
            raise Refusal(f"makes a {make.__name__} of something else than numbers")
        return make(*args)

    return made


def _size(values: Any = ()) -> tuple[int, ...]:
    return _naturals(tuple(_listed(values)), "size")


def _device(*args: Any) -> str:
    if not 0 < len(args) <= 2 or type(args[0]) is not str or type(args[-1]) not in (str, int):
        raise Refusal("names a device that is none")
    return ":".join(map(str, args))


def _np_dtype(kind: Any, *_flags: Any) -> np.dtype[Any]:
    if type(kind) is not str or kind.lstrip("<|=") not in NUMPY_TYPES:
        raise Refusal(f"holds numbers of the numpy type '{shown(kind)}'")
    return np.dtype(kind)


def _np_numbers(kind: Any, data: Any) -> np.ndarray[Any, Any]:
    if type(data) is str:  # bytes that Python 2 wrote, as CIFAR-10's, are read as latin1
        data = data.encode("latin1")
    if not isinstance(kind, np.dtype) or type(data) not in (bytes, bytearray):
        raise Refusal("holds numpy numbers without a type or without bytes")
    return np.frombuffer(data, kind)


def _np_scalar(kind: Any, data: Any) -> Any:
    values = _np_numbers(kind, data)
    if len(values) != 1:
        raise Refusal(f"holds a numpy number that is {len(values)} numbers")
    return values[0].item()


def _np_empty(*_class_shape_kind: Any) -> np.ndarray[Any, Any]:
    return np.empty(0)  # a BUILD instruction gives it its contents


def _np_array(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    values = _np_numbers(kind, data).copy()
    return values.reshape(_naturals(shape, "shape"), order="F" if order == "F" else "C")


def set_array(array: np.ndarray[Any, Any], state: Any) -> None:
    """Give an array made by ``_reconstruct`` its contents: (version, shape, dtype, order, data)."""
    if type(state) is not tuple or len(state) != 5:
        raise Refusal("holds a numpy array in an unknown form")
    _, shape, kind, fortran, data = state
    numbers = _np_numbers(kind, data)
    if numbers.size != math.prod(_naturals(shape, "shape")):
        raise Refusal("holds a numpy array with more or fewer numbers than its shape says")
    contents: Any = (1, shape, kind, bool(fortran), numbers.tobytes())
    array.__setstate__(contents)


def check_dtype(kind: np.dtype[Any], state: Any) -> None:
    """What a BUILD instruction may say about a numpy type: the version, and this byte order."""
    if type(state) is not tuple or not all(is_scalar(v) for v in state) or len(state) < 2:
        raise Refusal("holds a numpy type in an unknown form")
    if state[1] not in ("<", "|", "="):
        raise Refusal("holds numbers in big-endian order")


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "dnnlib.util.EasyDict": _dict,
    "pytorch_lightning.utilities.parsing.AttributeDict": _dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _numbers(complex),
    "builtins.slice": _numbers(slice),
    "_codecs.encode": _encoded,
    "numpy.dtype": _np_dtype,
    "numpy._core.multiarray.scalar": _np_scalar,
    "numpy._core.multiarray._reconstruct": _np_empty,
    "numpy._core.numeric._frombuffer": _np_array,
}
#: Types that are mentioned and never called.
MENTIONED = frozenset(
    [
        *(f"builtins.{kind.__name__}" for kind in (bool, dict, float, int, list, str, tuple)),
        *(f"torch.{name}" for name in STORAGES),
        "torch.storage.UntypedStorage",
        "torch.storage._load_from_bytes",  # called by the reader of the container
        "numpy.ndarray",
        "typing.Any",
    ]
)
#: Packages whose objects published checkpoints contain: layers, losses, callbacks, settings.
INERT = (
    "torch.nn.modules", "torch.nn.functional", "torch_utils", "training", "solvers_amed", "solvers",
    "solver_utils", "pytorch_lightning", "lightning", "lightning_fabric", "omegaconf",
)  # fmt: skip


def find(module: Any, name: Any) -> Reference | torch.dtype:
    """The inert stand-in for a name; Refusal, saying it, for one that is not on the list."""
    if type(module) is not str or type(name) is not str:
        raise Refusal("names something by other means than text")
    if len(module) + len(name) > LONGEST_NAME:
        raise Refusal(f"asks for '{shown(f'{module}.{name}')}'")
    if module == "__builtin__":  # as Python 2 and protocol 2 call it
        module = "builtins"
    elif module.startswith("numpy.core."):  # as numpy 1 called it
        module = "numpy._core." + module.removeprefix("numpy.core.")
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    reference = Reference(module, name)
    known = str(reference) in CONSTRUCTORS or str(reference) in MENTIONED
    if "." in name or not (known or is_inert(reference)):
        raise Refusal(f"asks for '{shown(reference)}'")
    return reference


def is_inert(reference: Reference) -> bool:
    """Whether calling this name makes a record of the call."""
    return any(f"{reference.module}.".startswith(f"{package}.") for package in INERT)
