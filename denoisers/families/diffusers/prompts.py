"""Prompts of pipelines: negative ones, and embeddings that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from denoisers.families.common import LoadedModel
from solvers.types import Denoiser

KEPT_BYTES = 2**30  #: of embeddings in the host's memory: some 200 prompts of SD3 with guidance


@dataclass(frozen=True, eq=False)
class PromptedModel(LoadedModel):
    """A pipeline whose guidance leads away from a prompt."""

    #: in the place of the empty one
    negative: str | None = field(default=None, kw_only=True)

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
        *,
        negative: str | None = None,
    ) -> Denoiser:
        """As `LoadedModel.bind`; ``negative`` is what guidance leads away from."""
        if negative is None:
            return super().bind(labels, guidance_rate, prompts)
        return replace(self, negative=negative).bind(labels, guidance_rate, prompts)


class RememberedPrompts:
    """A pipeline's ``encode_prompt`` that embeds equal prompts once.

    What it returned for the latest arguments is kept in the host's memory, up to `KEPT_BYTES`, so
    that the calls of a walk and the updates of a training need no text encoder again, and memory
    does not grow with the number of prompts.
    """

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._kept: dict[str, tuple[Any, int]] = {}  # in the order of use, with its bytes

    def __call__(self, *args: Any, in_dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
        """What the pipeline's method returns, its tensors in ``in_dtype`` if that is given."""
        device = kwargs.get("device")
        key = repr((args, kwargs))  # before the call, since Z-Image rewrites the list it is given
        if key in self._kept:
            self._kept[key] = self._kept.pop(key)
        else:
            with torch.inference_mode(False), torch.no_grad():
                made = _mapped(self._encode(*args, **kwargs), lambda t: t.cpu())
            self._keep(key, made)
        found = self._kept[key][0]

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, in_dtype if tensor.is_floating_point() else None)

        return _mapped(found, moved)

    def _keep(self, key: str, made: Any) -> None:
        new = _size(made)
        while self._kept and sum(size for _, size in self._kept.values()) > KEPT_BYTES - new:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = made, new


def _size(value: Any) -> int:
    """Bytes of the tensors in tuples and lists."""
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tuples and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_mapped(part, change) for part in value)
    return value
