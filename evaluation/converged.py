"""A model's own converged samples as a second reference, which sets the model's error aside.

A FID to the data contains the error of the solver *and* that of the model.  A FID to samples of
the same model without solver error (`evaluation.ode_samples`), on seeds that no table reports on,
contains only the solver's error and the bias of a small N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from denoisers.conditions import Conditions
from denoisers.protocol import Model
from metrics.detectors import Detector
from metrics.references import REFERENCES
from metrics.statistics import Statistics, read_arrays
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from runtime.typed import pick

NONE = "none"
COMMAND = "converged"  #: of the record
RECORD = "record"  #: its key in the file


@dataclass(frozen=True)
class ConvergedIdentity:
    """Which converged samples: what two FIDs to such samples must share to be compared."""

    reference: str
    n: int
    seeds: str
    solver: str
    tol: float
    sha256: str  #: of the images


@dataclass(frozen=True)
class _ConvergedOptions:
    """What is read of the options in a record."""

    seeds: str


@dataclass(frozen=True)
class _ConvergedPlan:
    """What is read of the plan in a record."""

    solver: str
    tol: float


@dataclass(frozen=True)
class Converged:
    """Statistics of a model's converged samples, and the record of how they were made."""

    statistics: Statistics
    record: RunRecord

    @property
    def identity(self) -> ConvergedIdentity:
        statistics, plan = self.statistics, self.record.plan
        return ConvergedIdentity(
            reference=statistics.source,
            n=statistics.n,
            seeds=self.record.options["seeds"],
            solver=plan["solver"],
            tol=plan["tol"],
            sha256=statistics.source_sha256,
        )

    def save(self, path: str | Path) -> None:
        """Write an .npz that ``load`` reads, and any reader of statistics too."""
        arrays = {**self.statistics.arrays(), RECORD: self.record.to_json()}
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: Path) -> Converged:
        """Read what ``save`` wrote; a ValueError or FileNotFoundError for anything else."""
        content = read_arrays(path, (RECORD,))
        statistics = Statistics.of_arrays(path, content)
        text = str(content.get(RECORD, ""))
        record = RunRecord.from_json(text, f"the record in {path}") if text else None
        if record is None or record.command != COMMAND:
            raise UserError(
                f"statistics {path} do not say which model made their images, and how: a reference "
                "of converged samples is made by python -m tools.converged --dest"
            )
        pick(_ConvergedOptions, record.options, f"the options in the record in {path}")
        pick(_ConvergedPlan, record.plan, f"the plan in the record in {path}")
        return cls(statistics, record)

    def misfit(
        self,
        model: Model,
        detector: Detector,
        seeds: Sequence[int],
        conditions: Conditions | None = None,
    ) -> str | None:
        """Why images of ``seeds`` by ``model`` cannot be compared with these; None if they can."""
        recorded, options = self.record.model, self.record.options
        if recorded.get("sha256") != model.sha256:
            sha256 = str(recorded.get("sha256"))
            return f"are of the model {recorded.get('name')} (SHA-256 {sha256[:12]})"
        if self.statistics.detector != detector.id:
            return f"were made with detector {self.statistics.detector}"
        shared = set(seeds).intersection(parse_seeds(options["seeds"]))
        if shared:
            return f"are of the same seeds, such as {min(shared)}"
        asked = describe_conditions(conditions or Conditions())
        other = [key for key, value in asked.items() if options.get(key) != value]
        return f"were made with another {other[0]}" if other else None


def describe_conditions(conditions: Conditions) -> dict[str, object]:
    """What a record of converged samples says about their conditions, under these keys."""
    return {
        "class": conditions.label,
        "prompts": conditions.describe(),
        "guidance_rate": conditions.guidance_rate,
    }


def open_converged(
    text: str | None,
    model: Model,
    detector: Detector,
    seeds: Sequence[int],
    conditions: Conditions | None = None,
) -> Converged | None:
    """The reference that ``--ref_model`` names: a bundled name, an .npz, or ``none``.

    None asks for the one that is bundled for a model of this name, if it fits the weights, the
    detector and the conditions.  Raises UserError for one that was asked for and does not fit.
    """
    if text is None:
        path = REFERENCES.get((f"{model.card.name}-converged", detector.name))
        if path is None or not path.is_file():
            return None
        bundled = Converged.load(path)
        return bundled if bundled.misfit(model, detector, seeds, conditions) is None else None
    if text == NONE:
        return None
    path = REFERENCES.get((text, detector.name), Path(text))
    if not path.is_file():
        raise UserError(
            f"--ref_model {text} is not a file of statistics ({path} does not exist), nor bundled "
            f"for detector {detector.name}: make it with python -m tools.converged --dest, or give "
            "--ref_model none"
        )
    asked = Converged.load(path)
    why = asked.misfit(model, detector, seeds, conditions)
    if why is not None:
        raise UserError(
            f"the samples of --ref_model {text} {why}, which does not fit this run (model "
            f"{model.card.name}, SHA-256 {model.sha256[:12]}; detector {detector.id}): make "
            "others with python -m tools.converged --dest, or give --ref_model none"
        )
    return asked
