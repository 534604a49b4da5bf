"""The allow-list: every name that a checkpoint may hold, and what is made of it.

A name is one of three things.  It may have a constructor here, which makes plain data of checked
arguments; it may be a type that is only ever mentioned; or it may belong to a package whose objects
published checkpoints contain, which become a :class:`Record`.  Every other name is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checkpoints.pickles.records import Record, Reference, Refusal, is_key, shown

STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Storage:
    """The flat bytes that tensors are views of."""

    data: Tensor  #: 1-d

    def view(self, offset: int, size: Any, stride: Any, *_unused: Any) -> Tensor:
        """A tensor inside this storage; Refusal if it would reach beyond or repeat elements."""
        naturals((offset, *naturals(size), *naturals(stride)))
        count, have = math.prod(size), self.data.numel()
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=False)) * (count > 0)
        if not len(size) == len(stride) <= 16 or count > have or last + (count > 0) > have:
            raise Refusal(f"holds a tensor that does not fit in the {have} elements it has stored")
        return self.data.as_strided(size, stride, offset)


def naturals(values: Any) -> tuple[int, ...]:
    """``values``, if they can be a size."""
    if type(values) is not tuple or not all(type(v) is int and 0 <= v < 2**48 for v in values):
        raise Refusal("holds a tensor whose size is no tuple of natural numbers")
    return values


def elements(values: Any = ()) -> set[Any]:
    """A set; Refusal for what may not be hashed."""
    for value in values:
        if not is_key(value):
            raise Refusal(f"uses a {type(value).__name__} as a key or as an element of a set")
    return set(values)


def pairs(values: list[Any]) -> dict[Any, Any]:
    """A dict of keys and values in turn."""
    elements(values[::2])
    return dict(zip(values[::2], values[1::2], strict=True))


def _dict(given: Any = ()) -> dict[Any, Any]:
    """``OrderedDict(pairs)``, ``Counter(counts)``: order is kept by any dict."""
    return dict(given) if type(given) is dict else pairs([x for k, v in given for x in (k, v)])


def _persistent(meta: dict[Any, Any]) -> Record:
    """An object of ``torch_utils.persistence``; its source code (``module_src``) is dropped."""
    record = Record("torch_utils.persistence", meta["class_name"])
    if meta["type"] != "class" or type(record.name) is not str:
        raise Refusal("holds a persistent object without a class name")
    set_state(record, meta["state"])
    return record


def _device(kind: str, index: Any = None) -> str:
    return f"{kind}:{index}" if type(index) is int else kind


def _bytes(data: Any = b"", encoding: Any = "latin1") -> bytes:
    """``_codecs.encode(text, "latin1")`` is how protocol 2 writes bytes."""
    if type(data) not in (str, bytes) or encoding not in ("latin1", "latin-1"):
        raise Refusal("makes bytes of something else than bytes or text in latin1")
    return data.encode("latin1") if type(data) is str else data


def _np_dtype(kind: str, *_flags: Any) -> np.dtype[Any]:
    if len(kind) > 8 or np.dtype(kind).kind not in "biufc":
        raise Refusal(f"holds numbers of the numpy type '{shown(kind)}'")
    return np.dtype(kind)


def _np_array(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray[Any, Any]:
    if type(data) is str:  # bytes that Python 2 wrote, as CIFAR-10's, are read as latin1
        data = data.encode("latin1")
    if type(data) not in (bytes, bytearray) or not isinstance(kind, np.dtype):
        raise Refusal("holds numpy numbers without a type or without bytes")
    values = np.frombuffer(data, kind).copy()
    return values.reshape(naturals(shape), order="F" if order == "F" else "C")


def set_state(target: Any, state: Any) -> None:
    """What BUILD does: give an object its attributes, and an array of numpy its contents."""
    match target, state:
        case np.ndarray(), (_, shape, kind, fortran, data):
            values = _np_array(data, kind, shape, "F" if fortran else "C")
            contents: Any = (1, values.shape, values.dtype, False, values.tobytes())
            target.__setstate__(contents)
        case np.dtype(), (_, str(order), *_) if order in "<|=":
            pass
        case Record() | dict(), (dict() | None, dict() | None) | dict() | None:
            for part in state if isinstance(state, list | tuple) else (state,):
                wrong = [key for key in part or () if type(key) is not str or key[:2] == "__"]
                if wrong:
                    raise Refusal(f"sets the attribute '{shown(wrong[0])}'")
                if type(target) is Record:  # what a dict has is metadata that nobody needs
                    target.state.update(part or {})
        case _:
            raise Refusal(f"sets attributes of a {type(target).__name__} in an unknown way")


#: What calls make, and the types that their first arguments must have.
CONSTRUCTORS: dict[str, tuple[Any, ...]] = {
    "torch._utils._rebuild_tensor": (Storage.view, Storage, int, tuple, tuple),
    "torch._utils._rebuild_tensor_v2": (Storage.view, Storage, int, tuple, tuple),
    "torch._utils._rebuild_parameter": (lambda data, *_: data, Tensor),
    "torch._utils._rebuild_parameter_with_state": (lambda data, *_: data, Tensor),
    "torch_utils.persistence._reconstruct_persistent_obj": (_persistent, dict),
    "torch.Size": (lambda sizes=(): naturals(tuple(sizes)),),
    "torch.device": (_device, str),
    "collections.OrderedDict": (_dict,),
    "collections.Counter": (_dict,),
    "collections.defaultdict": (lambda *_: {},),
    "dnnlib.util.EasyDict": (_dict,),
    "pytorch_lightning.utilities.parsing.AttributeDict": (_dict,),
    "builtins.set": (elements,),
    "builtins.frozenset": (elements,),
    "builtins.bytes": (_bytes,),
    "builtins.bytearray": (_bytes,),
    "_codecs.encode": (_bytes,),
    "numpy.dtype": (_np_dtype, str),
    "numpy._core.multiarray.scalar": (lambda kind, data: _np_array(data, kind, ()).item(),),
    "numpy._core.multiarray._reconstruct": (lambda *_: np.empty(0),),  # BUILD fills it
    "numpy._core.numeric._frombuffer": (_np_array,),
}
#: Types that are mentioned and never called.
MENTIONED = {
    *(f"builtins.{kind}" for kind in ("bool", "dict", "float", "int", "list", "str", "tuple")),
    *(f"torch.{name}" for name in STORAGES), *map(str, STORAGES.values()),
    "torch.complex64", "torch.complex128", "torch.storage.UntypedStorage",
    "torch.storage._load_from_bytes", "numpy.ndarray", "typing.Any",
}  # fmt: skip
#: What else published checkpoints contain, most of it in these packages: layers, settings, ...
INERT = (
    "torch.nn.modules.", "torch.nn.functional.", "torch_utils.", "training.", "solvers_amed.",
    "solvers.", "solver_utils.", "pytorch_lightning.", "lightning.", "lightning_fabric.",
    "omegaconf.", "builtins.complex.", "builtins.slice.",
)  # fmt: skip


def find(module: str, name: str) -> Reference:
    """The inert stand-in for a name; Refusal, saying it, for one that is not on the list."""
    module = "builtins" if module == "__builtin__" else module  # as Python 2 called it
    module = re.sub(r"^numpy\.core\.", "numpy._core.", module)  # as numpy 1 called it
    full = f"{module}.{name}"
    known = full in CONSTRUCTORS or full in MENTIONED or f"{full}.".startswith(INERT)
    if not known or "." in name or len(full) > 200:
        raise Refusal(f"asks for '{shown(full)}'")
    return Reference(module, name)
