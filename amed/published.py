"""Predictors as the AMED authors publish them: ``network-snapshot-*.pkl``, read as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from amed.settings import StudentSettings
from checkpoints.snapshots import PublishedPredictor, read_predictor
from denoisers.cards import cards
from runtime.errors import UserError
from runtime.record import SCHEMA, RunRecord

SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.pkl")
_NUMBER = (int, float)
#: Attributes of the published module that say what the student is, with their types.
SETTINGS: dict[str, tuple[type, ...]] = {
    "dataset_name": (str,),
    "sampler_stu": (str,),
    "num_steps": (int,),
    "sampler_tea": (str,),
    "M": (int,),
    "schedule_type": (str,),
    "schedule_rho": _NUMBER,
    "afs": (bool,),
    "scale_dir": _NUMBER,
    "scale_time": _NUMBER,
    "max_order": (int, type(None)),
    "predict_x0": (bool, type(None)),
    "lower_order_final": (bool, type(None)),
    "guidance_type": (str, type(None)),
    "guidance_rate": (*_NUMBER, type(None)),
}
#: What students of solvers without these options may lack.
OPTIONAL = ("max_order", "predict_x0", "lower_order_final", "guidance_type", "guidance_rate")


def latest_snapshot(folder: Path) -> Path | None:
    """The published predictor of a run folder that was trained longest, or None."""
    found = {p: SNAPSHOT.fullmatch(p.name) for p in folder.iterdir()} if folder.is_dir() else {}
    images = {int(match[1]): path for path, match in found.items() if match}
    return images[max(images)] if images else None


def read_published(path: Path) -> tuple[dict[str, Tensor], RunRecord]:
    """Weights under our names, and a record with what is known of the run.

    Raises UserError for a file that is no such predictor, and for settings that are missing or
    name something that this toolkit does not have.
    """
    found = read_predictor(path)
    settings = student_settings(found, path)
    card = cards()[settings.dataset_name]
    cost = card.cost(settings.guidance_rate)
    kimg = SNAPSHOT.fullmatch(path.name)
    record = RunRecord(
        command="train",
        options={
            **settings.to_options(),
            "total_kimg": int(kimg[1]) if kimg else None,
            "guidance_type": settings.guidance_type,
        },
        model={"name": settings.dataset_name, "sha256": None},
        plan={
            "times": settings.grid.resolve(card).nodes().tolist(),
            "nfe": settings.nfe(cost),
            "teacher_nfe": None,
            "parameters": sum(t.numel() for t in found.tensors.values()),
        },
        versions={},
        git_commit=None,
        created="unknown",
        schema=SCHEMA,
    )
    return found.tensors, record


def student_settings(found: PublishedPredictor, path: Path) -> StudentSettings:
    """The settings of a published student.

    The range of noise levels is not among them, it is that of the card.  The published
    DPM-Solver++ always thresholds dynamically when it predicts x0, so that its students do.
    """
    given: dict[str, Any] = {}
    for name, types in SETTINGS.items():
        if name not in found.settings and name in OPTIONAL:
            continue
        value = found.settings.get(name)
        if type(value) not in types:
            raise UserError(
                f"{path} has {value!r} as its setting '{name}'; give a predictor that the "
                "published code wrote"
            )
        if value is not None:  # None: the default
            given[name] = value
    if given["dataset_name"] not in cards():
        raise UserError(
            f"{path} was trained for '{given['dataset_name']}', which is unknown; known: "
            f"{', '.join(cards())}"
        )
    card = cards()[given["dataset_name"]]
    if card.guidance not in ("cg", "cfg"):  # the published default is a rate that nobody reads
        given.pop("guidance_rate", None)
    thresholding = given["sampler_stu"] == "dpmpp" and given.get("predict_x0", True)
    try:
        return StudentSettings(
            **given,
            sigma_min=card.sigma_min,
            sigma_max=card.sigma_max,
            thresholding=thresholding,
        )
    except ValueError as error:
        raise UserError(f"{path} holds a student that cannot be built: {error}") from None
