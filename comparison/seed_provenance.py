"""Whose random numbers are whose: what the record says of evaluation, selection and training.

Every draw has a generator of its own, keyed by (seed, *name). Seeds of evaluation and selection are
different numbers; training counts its own numbers from 0, but each of its names begins with a word
with which no sampler's name begins. So no key of one use is a key of another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from amed.trainer import STREAMS
from comparison.rows import TrainedStudent
from runtime.errors import UserError


def seeds_section(
    evaluation: Sequence[int], selection: Sequence[int], students: Iterable[TrainedStudent]
) -> dict[str, Any]:
    """The section ``seeds`` of a record; JSON values.

    Raises UserError where a seed of the evaluation serves the selection too.
    """
    shared = [seed for seed in selection if seed in evaluation]
    if shared:
        raise UserError(
            f"seed {shared[0]} would choose a plan and then judge it: evaluate on smaller seeds"
        )
    return {
        "evaluation": _range(evaluation),
        "selection": _range(selection),
        "training": {s.name: _training(s) for s in students},
        "keys": {
            "evaluation and selection": "(seed, *name), as in (0, 'latent')",
            "training": "(number, stream, run seed, *name), as in (0, 'train', 0, 'latent')",
            "streams": list(STREAMS),
        },
    }


def _training(student: TrainedStudent) -> dict[str, Any] | None:
    """What a student was trained on; None where its record does not say, as published ones."""
    options = student.record.options
    if any(options.get(key) is None for key in ("seed", "batch", "total_kimg")):
        return None
    batches = -(-math.ceil(options["total_kimg"] * 1000) // options["batch"])
    return {"seed": options["seed"], "numbers": _range(range(batches * options["batch"]))}


def _range(seeds: Sequence[int]) -> str | None:
    return f"{seeds[0]}-{seeds[-1]}" if seeds else None
