"""Experiment folders: creating numbered folders, and saving and loading predictors."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from amed.predictor import AMEDPredictor
from amed.published import latest_snapshot, read_published
from amed.settings import StudentSettings
from runtime.errors import UserError
from runtime.files import atomic_write, require_readable
from runtime.options import Json
from runtime.record import RunRecord
from runtime.typed import pick

PREDICTOR = "predictor.safetensors"
_NUMBERED = re.compile(r"(\d{5,})(-.*)?")


@dataclass(frozen=True, eq=False)
class TrainedStudent:
    """A trained student: its predictor, its settings, and the record of its training."""

    predictor: AMEDPredictor
    settings: StudentSettings
    record: RunRecord
    name: str  #: name of its folder, followed by the file's stem for a snapshot

    @property
    def label(self) -> str:
        """``amed-00001`` for a numbered run, ``amed-<name>`` otherwise."""
        return student_label(self.settings.sampler_stu, self.name)

    @property
    def dataset_name(self) -> str:
        return self.settings.dataset_name

    @property
    def guidance_rate(self) -> float | None:
        return self.settings.guidance_rate

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights, independent of the name of the file and of the dtype."""
        digest = hashlib.sha256()
        for key, value in sorted(self.predictor.state_dict().items()):
            digest.update(key.encode() + value.detach().cpu().to(torch.float32).numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Move the predictor to ``device`` and ``dtype``, where given."""
        self.predictor.to(device=device, dtype=dtype)

    def describe(self, sampler: str | None = None) -> dict[str, Json]:
        """The student's part of a sampler's record; ``sampler`` is None for its own solver."""
        settings: dict[str, Json] = self.settings.to_options()
        settings.pop("guidance_rate")  # the record has that of the sampler
        training: Json = {"created": self.record.created, "model": self.record.model}
        return {
            "predictor": self.name,
            "predictor_sha256": self.sha256,
            "predictor_record": training,
            **(settings if sampler is None else {"student": settings}),
        }

    def note_on(self, weights_sha256: str) -> str | None:
        """A warning if the student was trained on weights other than these."""
        return other_weights(self.record, self.label, weights_sha256)


def student_label(kind: str, name: str) -> str:
    """``<kind>-00001`` for the name of a numbered run, ``<kind>-<name>`` otherwise."""
    folder, _, snapshot = name.partition("/")
    short = folder.split("-")[0] if folder[:5].isdigit() else folder
    return "-".join(part for part in (kind, short, snapshot) if part)


def other_weights(record: RunRecord, label: str, weights_sha256: str) -> str | None:
    """A warning if a student with this record was trained on weights other than these.

    It is not an error, because the same network in another file also has another hash.
    """
    trained = record.model.get("sha256")
    if not weights_sha256 or trained in (None, weights_sha256):  # "": of a pipeline in memory
        return None
    return (
        f"note: {label} was trained on weights with the SHA-256 {str(trained)[:12]}..., but "
        f"these have {weights_sha256[:12]}...: unless they are the same network, train a "
        "student for them"
    )


def list_runs(root: str | Path) -> dict[int, Path]:
    """Run folders below ``root`` by number."""
    root = Path(root)
    if not root.is_dir():
        return {}
    matches = ((p, _NUMBERED.fullmatch(p.name)) for p in sorted(root.iterdir()) if p.is_dir())
    return {int(match[1]): path for path, match in matches if match}


def create_run(root: str | Path, name: str) -> Path:
    """Create ``root/<next number>-<name>``; safe if several runs start at the same time."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    while True:
        number = max(list_runs(root), default=0) + 1
        claim = root / f"{number:05d}"
        try:
            os.mkdir(claim)  # exclusive: only one process gets a number
        except FileExistsError:
            continue
        if list(root.glob(f"{number:05d}-*")):  # created and already renamed by another process
            claim.rmdir()
            continue
        try:
            return claim.rename(root / f"{number:05d}-{name}")
        except OSError:
            claim.rmdir()
            raise


def find_run(spec: str, root: str | Path) -> Path:
    """The run folder ``spec``: a number below ``root`` or a path."""
    if spec.isdecimal():
        runs = list_runs(root)
        if int(spec) not in runs:
            numbers = ", ".join(map(str, runs)) or "none"
            raise UserError(f"no run {spec} in {root} (runs: {numbers}); train one with train.py")
        return runs[int(spec)]
    return Path(spec)


def save_predictor(path: str | Path, predictor: AMEDPredictor, record: RunRecord) -> None:
    """Write weights and record into one safetensors file, atomically."""
    weights = {k: v.detach().cpu().contiguous() for k, v in predictor.state_dict().items()}
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"record": record.to_json()})


def load_predictor(spec: str, root: str | Path) -> TrainedStudent:
    """Load a predictor by run number, run folder or file (safetensors or a published pickle).

    Raises UserError if there is none, or if the file is not a predictor.
    """
    path = find_run(spec, root)
    name = student_name(path, PREDICTOR)
    if path.is_dir():
        file = path / PREDICTOR
        path = file if file.exists() else latest_snapshot(path) or file
    if not path.is_file():
        raise UserError(
            f"there is no predictor at {path}; train one with train.py, or wait until it is saved"
        )
    weights, record = read_published(path) if path.suffix == ".pkl" else _read(path)
    settings = pick(StudentSettings, record.options, f"the options in the record of {path}")
    try:
        predictor = AMEDPredictor(settings.scale_dir, settings.scale_time)
    except ValueError as error:
        raise UserError(f"the options in the record of {path}: {error}; train again") from None
    if all(w.dtype == torch.float64 for w in weights.values()):
        predictor.double()  # keep the precision of a float64 run
    try:
        predictor.load_state_dict(weights)
    except RuntimeError:
        raise UserError(
            f"the weights in {path} do not fit a predictor with scale_dir = "
            f"{settings.scale_dir:g} and scale_time = {settings.scale_time:g}; train again"
        ) from None
    return TrainedStudent(predictor.requires_grad_(False).eval(), settings, record, name)


def student_name(path: Path, main: str) -> str:
    """The name of a run's folder, also for its ``main`` file; of another file with its stem."""
    path = path.resolve()
    if path.name == main:
        path = path.parent
    return path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"


def _read(path: Path) -> tuple[dict[str, Tensor], RunRecord]:
    """Weights and record of a file written by :func:`save_predictor`."""
    weights, metadata = read_safetensors(path)
    if "record" not in metadata:
        raise UserError(
            f"{path} has no run record, so it is not a predictor of this toolkit; "
            "give a predictor.safetensors of train.py"
        )
    record = RunRecord.from_json(metadata["record"], source=str(path))
    if record.command != "train":
        raise UserError(
            f"{path} was written by {record.command}.py; give a predictor.safetensors of train.py"
        )
    return weights, record


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file; UserError for one that cannot be read."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file; UserError for one that cannot be read."""
    require_readable(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({error}); train again or copy it again"
        ) from None
