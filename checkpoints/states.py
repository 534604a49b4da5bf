"""Training states: what a run saved with ``torch.save`` to continue from, read as data.

A state is a dict of numbers and of the ``state_dict()`` of modules, optimizers and schedules.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpoints.pickles.files import read
from checkpoints.pickles.records import shown
from runtime.errors import UserError, reason

COUNTED = ("last_epoch", "_step_count", "_last_lr")  #: what a schedule changes
REMEDY = "delete it to start that run from the beginning"


class Stateful(Protocol):
    """A module, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


def read_state(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The entries of a saved state, by name and type; empty if there is no file.

    Raises UserError for a file that is damaged, or lacks an entry of that type.
    """
    if not path.is_file():
        return {}
    try:
        content = read(path)
    except UserError as error:
        said = str(error).removeprefix(f"{path} ")
        raise UserError(f"{path} cannot be read (it {said}); {REMEDY}") from None
    for name, kind in kinds.items():
        value = content.get(name) if type(content) is dict else None
        if type(value) is not kind or not _plausible(value):
            found = "is missing" if value is None else f"is wrong: {shown(value)}"
            raise UserError(f"{path} is no training state ('{name}' {found}); {REMEDY}")
    return {name: content[name] for name in kinds}


def restore(
    parts: Mapping[str, Stateful], state: Mapping[str, Any], path: Path, begun: bool = True
) -> None:
    """Load every part from the entry of its name in ``state``, as `read_state` returned it.

    ``begun`` is False for a state from before the first step, when optimizers have no moments.
    Raises UserError for an entry that does not fit its part: other names, shapes or types.
    """
    for name, part in parts.items():
        try:
            if isinstance(part, torch.optim.Optimizer):
                _check_optimizer(part, state[name], begun)
            elif not isinstance(part, torch.nn.Module):  # which checks names and shapes itself
                _check_settings(state[name], part.state_dict(), COUNTED)
            part.load_state_dict(state[name])
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} does not fit this run ('{name}': {reason(error)[:200]}); {REMEDY}"
            ) from None


def _plausible(value: Any) -> bool:
    """Counts are not negative, and entries have names."""
    return (
        value >= 0
        if type(value) is int
        else type(value) is not dict or all(type(name) is str for name in value)
    )


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], begun: bool) -> None:
    """Raise ValueError unless all parameters have moments of their shapes, once it has ``begun``.

    PyTorch itself finds that out in the next step, in an error without a name.
    """
    groups = optimizer.state_dict()["param_groups"]
    for one, own in zip(saved["param_groups"], groups, strict=True):
        _check_settings(one, own, ("lr",))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if set(saved["state"]) != set(range(len(parameters)) if begun else ()):
        raise ValueError("some of its parameters have no moments")
    if len({tuple(entries) for entries in saved["state"].values()}) > 1:
        raise ValueError("its parameters have different moments")
    for number, entries in saved["state"].items():
        for name, value in entries.items():
            if type(value) is not Tensor or value.shape not in ((), parameters[number].shape):
                raise ValueError(f"{name} of parameter {number} is of another shape")
            if not value.isfinite().all():
                raise ValueError(f"{name} of parameter {number} is not finite")


def _check_settings(saved: dict[str, Any], own: dict[str, Any], free: Collection[str]) -> None:
    """Raise ValueError unless the settings are ``own``; those in ``free`` may be other numbers."""
    if set(saved) != set(own):
        raise ValueError("its settings have other names")
    for name, value in own.items():
        given = saved[name]
        alike = type(given) is type(value) or _is_number(given) and _is_number(value)
        if not alike or (not _are_finite(given) if name in free else given != value):
            raise ValueError(f"'{name}' is {shown(given)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _are_finite(value: Any) -> bool:
    """Whether a value is a finite number from 0 on, or a list of some."""
    parts = value if type(value) is list else [value]
    return all(_is_number(part) and 0 <= part < math.inf for part in parts)
