"""Seed provenance: which random numbers served evaluation, selection and training.

Every draw has a generator of its own, keyed by (seed, *name). Evaluation and selection have
different seeds; training counts its own numbers from 0, but each of its names begins with a word
that no sampler's name begins with. So the three uses never share a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from amed.batches import STREAMS
from ns.experiments import AnyStudent, TrainedTable
from runtime.errors import UserError
from runtime.options import Json
from runtime.seeds import seed_ranges


def seeds_section(
    evaluation: Sequence[int], selection: Sequence[int], students: Iterable[AnyStudent]
) -> dict[str, Json]:
    """The section ``seeds`` of a record.

    Raises UserError where a seed of the evaluation serves the selection too.
    """
    shared = [seed for seed in selection if seed in evaluation]
    if shared:
        raise UserError(
            f"seed {shared[0]} would serve both the choice of a plan and its evaluation: evaluate "
            "on smaller seeds"
        )
    training: dict[str, Json] = {student.name: _training(student) for student in students}
    keys: dict[str, Json] = {
        "evaluation and selection": "(seed, *name), as in (0, 'latent')",
        "training": "(number, stream, run seed, *name), as in (0, 'train', 0, 'latent')",
        "streams": list(STREAMS),
    }
    return {
        "evaluation": seed_ranges(evaluation),
        "selection": seed_ranges(selection) or None,
        "training": training,
        "keys": keys,
    }


def _training(student: AnyStudent) -> dict[str, Json] | None:
    """Seed and numbers of a training run; None where its record lacks them (published ones)."""
    options = student.record.options
    if isinstance(student, TrainedTable):
        return {"seed": options["seed"], "numbers": seed_ranges(range(student.latents))}
    if any(options.get(key) is None for key in ("seed", "batch", "total_kimg")):
        return None
    batches = -(-math.ceil(options["total_kimg"] * 1000) // options["batch"])
    return {"seed": options["seed"], "numbers": seed_ranges(range(batches * options["batch"]))}
