"""A model's own converged samples as a second reference: the error of the model set aside.

A FID to the data is what solver *and* model get wrong.  Held against samples of the same model
without a solver's error (`python -m tools.converged`), on seeds that no table reports on, only the
solver's part is left, and the bias of a small N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from denoisers.protocol import Model
from metrics.detectors import REFERENCES, Detector
from metrics.statistics import Statistics, read_arrays
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.record import RunRecord
from runtime.seeds import parse_seeds

NONE = "none"
COMMAND = "converged"  #: of the record
RECORD = "record"  #: its key in the file


@dataclass(frozen=True)
class Converged:
    """Statistics of a model's converged samples, and the record of how they were made."""

    statistics: Statistics
    record: RunRecord

    def describe(self) -> dict[str, Any]:
        """What two figures must share to be compared; JSON values."""
        stats = self.statistics
        return {
            "reference": stats.source,
            "n": stats.n,
            "seeds": self.record.options["seeds"],
            "solver": self.record.plan["solver"],
            "tol": self.record.plan["tol"],
            "sha256": stats.source_sha256,
        }

    def save(self, path: str | Path) -> None:
        """Write an .npz that ``load`` reads, and any reader of statistics too."""
        arrays = {**self.statistics.arrays(), RECORD: self.record.to_json()}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Converged:
        """Read what ``save`` wrote; a ValueError or FileNotFoundError for anything else."""
        content = read_arrays(path)
        statistics = Statistics.of_arrays(path, content)
        text = str(content.get(RECORD, ""))
        record = RunRecord.from_json(text, f"the record in {path}") if text else None
        if record is None or record.command != COMMAND:
            raise UserError(
                f"statistics {path} do not say which model made their images, and how: a reference "
                "of converged samples is made by python -m tools.converged --dest"
            )
        return cls(statistics, record)

    def misfit(self, model: Model, detector: Detector, seeds: Sequence[int]) -> str | None:
        """Why images of ``seeds`` by ``model`` cannot be held against these; None if they can."""
        made, stats = self.record.model, self.statistics
        if made.get("sha256") != model.sha256:
            return f"are of the model {made.get('name')} (SHA-256 {str(made.get('sha256'))[:12]})"
        if stats.detector != detector.id:
            return f"were made with detector {stats.detector}"
        shared = set(seeds).intersection(parse_seeds(self.record.options["seeds"]))
        return f"are of the same seeds, {min(shared)} for one" if shared else None


def open_converged(
    text: str | None, model: Model, detector: Detector, seeds: Sequence[int]
) -> Converged | None:
    """The reference of ``--ref_model``: a name, an .npz or ``none``; or the one that comes along.

    Left out (None), it is the one bundled for a model of this name, where there is one that fits
    the weights and the detector.

    Raises UserError for one that was asked for and cannot be used.
    """
    if text is None:
        path = REFERENCES.get(f"{model.card.name}-converged")
        if path is None or not path.is_file():
            return None
        known = Converged.load(path)
        return known if known.misfit(model, detector, seeds) is None else None
    if text == NONE:
        return None
    path = REFERENCES.get(text, Path(text))
    if not path.is_file():
        raise UserError(
            f"--ref_model {text} is no file of statistics ({path} does not exist): make it with "
            "python -m tools.converged --dest, or give --ref_model none"
        )
    asked = Converged.load(path)
    why = asked.misfit(model, detector, seeds)
    if why is not None:
        raise UserError(
            f"the samples of --ref_model {text} {why}, which does not fit this run (model "
            f"{model.card.name}, SHA-256 {model.sha256[:12]}; detector {detector.id}): make "
            "others with python -m tools.converged --dest, or give --ref_model none"
        )
    return asked
