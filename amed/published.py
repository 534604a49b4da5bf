"""Predictors published by the authors of AMED: ``network-snapshot-*.pkl``, read as data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from amed.settings import StudentSettings
from checkpoints.snapshots import PublishedPredictor, read_predictor
from denoisers.cards import cards
from runtime.errors import UserError
from runtime.record import RunRecord
from runtime.typed import SCHEMA

SNAPSHOT = re.compile(r"network-snapshot-(\d+)\.pkl")
_NUMBER = (int, float)
#: Attributes of the published module that are settings of the student, with their types.
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
#: Settings that may be missing for solvers without these options.
OPTIONAL = ("max_order", "predict_x0", "lower_order_final", "guidance_type", "guidance_rate")


def latest_snapshot(folder: Path) -> Path | None:
    """The published predictor in a run folder with the longest training, or None."""
    matches = {p: SNAPSHOT.fullmatch(p.name) for p in folder.iterdir()} if folder.is_dir() else {}
    snapshots = {int(match[1]): path for path, match in matches.items() if match}
    return snapshots[max(snapshots)] if snapshots else None


def read_published(path: Path) -> tuple[dict[str, Tensor], RunRecord]:
    """Weights with the names of `AMEDPredictor`, and a record of what is known about the run.

    Raises UserError for a file that is not such a predictor, and for settings that are missing or
    unknown to this toolkit.
    """
    published = read_predictor(path)
    settings = student_settings(published, path)
    card = cards()[settings.dataset_name]
    cost = card.cost(settings.guidance_rate)
    kimg = SNAPSHOT.fullmatch(path.name)
    record = RunRecord(
        command="train",
        options={
            **settings.to_options(),
            "total_kimg": int(kimg[1]) if kimg else None,
        },
        model={"name": settings.dataset_name, "sha256": None},
        plan={
            "times": settings.grid.resolve(card).nodes().tolist(),
            "nfe": settings.nfe(cost),
            "teacher_nfe": None,
            "parameters": sum(t.numel() for t in published.tensors.values()),
        },
        versions={},
        git_commit=None,
        created="unknown",
        schema=SCHEMA,
    )
    return published.tensors, record


def student_settings(published: PublishedPredictor, path: Path) -> StudentSettings:
    """The settings of a published student.

    The range of noise levels is not stored and is that of the card.  The published DPM-Solver++
    always uses dynamic thresholding when it predicts x0, so its students do so too.
    """
    settings: dict[str, Any] = {}
    for name, types in SETTINGS.items():
        if name not in published.settings and name in OPTIONAL:
            continue
        value = published.settings.get(name)
        if type(value) not in types:
            raise UserError(
                f"{path} has {value!r} as its setting '{name}'; give a predictor written by the "
                "published code"
            )
        if value is not None:  # None: the default
            settings[name] = value
    dataset = settings["dataset_name"]
    if dataset not in cards():
        raise UserError(
            f"{path} was trained for '{dataset}', which is unknown; known: {', '.join(cards())}"
        )
    card = cards()[dataset]
    if not card.guided:  # the published default is a rate that is not used
        settings.pop("guidance_rate", None)
    thresholding = settings["sampler_stu"] == "dpmpp" and settings.get("predict_x0", True)
    try:
        return StudentSettings(
            **settings,
            sigma_min=card.sigma_min,
            sigma_max=card.sigma_max,
            thresholding=thresholding,
        )
    except ValueError as error:
        raise UserError(f"{path} has invalid settings: {error}") from None
