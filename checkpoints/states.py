"""Training states: what a run saved with ``torch.save`` to continue from, read as data.

A state is a dict of numbers and of the ``state_dict()`` of modules, optimizers and schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpoints.pickles.files import read
from checkpoints.pickles.records import shown
from runtime.errors import UserError, reason

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


def restore(parts: Mapping[str, Stateful], state: Mapping[str, Any], path: Path) -> None:
    """Load every part from the entry of its name in ``state``, as `read_state` returned it.

    Raises UserError for an entry that does not fit its part: other names, shapes or types.
    """
    for name, part in parts.items():
        try:
            if isinstance(part, torch.optim.Optimizer):
                _check_optimizer(part, state[name])
            elif not isinstance(part, torch.nn.Module):  # which checks names and shapes itself
                _check_like(state[name], part.state_dict(), name)
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


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raise ValueError unless moments have the shapes of their parameters.

    PyTorch itself finds that out in the next step, in an error without a name.
    """
    groups = optimizer.state_dict()["param_groups"]
    _check_like(saved["param_groups"], groups, "param_groups")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():
        for name, value in entries.items():
            if type(value) is not Tensor or value.shape not in ((), parameters[number].shape):
                raise ValueError(f"{name} of parameter {number} is of another shape")


def _check_like(saved: Any, own: Any, name: str) -> None:
    """Raise ValueError unless two trees of plain values have the same names and types."""
    if type(saved) is not type(own) and {type(saved), type(own)} != {int, float}:
        raise ValueError(f"{name} is of type {type(saved).__name__}, not {type(own).__name__}")
    if isinstance(own, dict):
        if set(saved) != set(own):
            raise ValueError(f"{name} has other entries")
        for key, value in own.items():
            _check_like(saved[key], value, str(key))
    elif isinstance(own, (list, tuple)):
        if len(saved) != len(own):
            raise ValueError(f"{name} has {len(saved)} entries, not {len(own)}")
        for one, other in zip(saved, own, strict=True):
            _check_like(one, other, name)
