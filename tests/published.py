"""Files in the forms in which checkpoints are published, written the way their authors did."""

from __future__ import annotations

import pickle
import pickletools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: What a persistent object carries along; run, it would leave a file behind.
SOURCE = "open('module_src_was_run', 'w').close()\n"


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a persistent object was rebuilt by running its code")


class Persistent:
    """An object of a class under ``torch_utils.persistence``: its class name and its state."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE}
        meta |= {"class_name": self.class_name, "state": self.state}
        return _reconstruct_persistent_obj, (meta,)


@contextmanager
def pretended(**names: Mapping[str, Any]) -> Iterator[None]:
    """Modules that exist only while a file is written: ``solvers_amed={"heun_sampler": f}``."""
    names = {"torch_utils__persistence": {"_": _reconstruct_persistent_obj}, **names}
    before = dict(sys.modules)
    try:
        for module, things in names.items():
            module = module.replace("__", ".")
            made = sys.modules.setdefault(module.split(".")[0], ModuleType(module.split(".")[0]))
            made = sys.modules[module] = ModuleType(module) if "." in module else made
            for thing in things.values():
                thing.__module__ = module
                setattr(made, thing.__qualname__, thing)
        yield
    finally:
        for module in set(sys.modules) - set(before):
            del sys.modules[module]


def module_state(tensors: Mapping[str, Tensor], buffers: tuple[str, ...] = ()) -> dict[str, Any]:
    """The ``__dict__`` of a ``torch.nn.Module`` with these parameters, by dotted name."""
    state: dict[str, Any] = {
        "training": False,
        "_parameters": {},
        "_buffers": {},
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": {},
        "_modules": {},
    }
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = tensor
        elif name in buffers:
            state["_buffers"][name] = tensor
        else:
            state["_parameters"][name] = torch.nn.Parameter(tensor, requires_grad=False)
    for name, parts in inner.items():
        state["_modules"][name] = Persistent(
            f"Block_{name}", **module_state(parts, buffers), _init_args=(), _init_kwargs={}
        )
    return state


def network(
    class_name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *args: Any,
    **attributes: Any,
) -> Persistent:
    """A network of the EDM family, as ``persistence`` pickles it."""
    buffers = ("resample_filter", "freqs", "u")
    state = {**attributes, "_init_args": args, "_init_kwargs": dict(settings)}
    return Persistent(class_name, **module_state(tensors, buffers), **state)


def snapshot(ema: Persistent) -> dict[str, Any]:
    """What EDM writes to ``network-snapshot-*.pkl``, numbers of numpy among the settings."""
    loss = Persistent("EDMLoss", P_mean=np.float64(-1.2), P_std=1.2, _init_args=(), _init_kwargs={})
    return {
        "ema": ema,
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": {"use_labels": False, "mean": np.arange(3.0), "none": np.zeros((0, 2))},
    }


def pickled(content: Any, protocol: int = 4, numpy: int = 2) -> bytes:
    """A bare pickle as numpy 1 or 2 wrote it, without frames so that names may change length."""
    with pretended():
        data = pickle.dumps(content, protocol)
    data = without_frames(data)
    if numpy == 1:
        data = data.replace(b"cnumpy._core.", b"cnumpy.core.")
        data = data.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
        assert b"numpy._core" not in data or protocol == 5  # arrays of protocol 5 are numpy 2's
    return data


def without_frames(data: bytes) -> bytes:
    starts = [pos for code, _, pos in pickletools.genops(data) if code.name == "FRAME"]
    for start in reversed(starts):
        data = data[:start] + data[start + 9 :]
    return data


def predictor(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], protocol: int = 4
) -> bytes:
    """``network-snapshot-*.pkl`` of the AMED authors: a module, and a loss that names functions."""

    def heun_sampler() -> None: ...

    heun_sampler.__qualname__ = "heun_sampler"
    layers = {"sigmoid": torch.nn.Sigmoid()}
    state = module_state(tensors)
    state["_modules"] |= layers
    init = {k: v for k, v in settings.items() if k in ("img_resolution", "num_steps")}
    model = Persistent("AMED_predictor", **state, **settings, _init_args=(), _init_kwargs=init)
    loss = Persistent("AMED_loss", sampler_tea=heun_sampler, _init_args=(), _init_kwargs={})
    with pretended(solvers_amed={"f": heun_sampler}):
        return pickle.dumps({"model": model, "loss_fn": loss}, protocol)
