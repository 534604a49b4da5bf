"""Trained tables: their files, and trained students of any kind by run number, folder or file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from amed.experiments import (
    TrainedStudent,
    find_run,
    load_predictor,
    open_safetensors,
    other_weights,
    read_safetensors,
    student_label,
    student_name,
)
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.options import Json
from runtime.record import RunRecord
from runtime.typed import SCHEMA, from_plain, parse_json, pick, read_result, to_plain, write_result
from solvers.table import Table

TABLE = "table.json"


@dataclass(frozen=True)
class TableFile:
    """A table on disk: numbers that anybody can read, and the record of their training."""

    start: float  #: noise level of the initial state
    end: float  #: of the image
    times: tuple[float, ...]  #: network times s_1 .. s_K
    rows: tuple[tuple[float, ...], ...]  #: weights of x_T, D_1, .. : 1 to K + 1 numbers
    record: dict[str, object]  #: a `RunRecord`
    schema: int = SCHEMA

    def table(self) -> Table:
        """Raises ValueError for numbers that are no table."""
        return Table.of(self.start, self.end, self.times, self.rows)


@dataclass(frozen=True)
class _TableOptions:
    """What is read of the options in a table's record."""

    dataset_name: str
    guidance_rate: float | None = None


@dataclass(frozen=True)
class _TablePlan:
    """What is read of the plan in a table's record."""

    latents: int


@dataclass(frozen=True, eq=False)
class TrainedTable:
    """A trained NS solver: its table, and the record of its training."""

    table: Table
    record: RunRecord
    name: str  #: name of its folder, followed by the file's stem for another file

    @property
    def dataset_name(self) -> str:
        return str(self.record.options["dataset_name"])

    @property
    def latents(self) -> int:
        """How many latents it was fitted and judged on; their numbers count from 0."""
        return int(self.record.plan["latents"])

    @property
    def guidance_rate(self) -> float | None:
        return self.record.options.get("guidance_rate")

    @property
    def label(self) -> str:
        """``ns-00001`` for a numbered run, ``ns-<name>`` otherwise."""
        return student_label("ns", self.name)

    @property
    def sha256(self) -> str:
        """SHA-256 of the numbers, independent of the file."""
        numbers = json.dumps(
            [self.table.start, self.table.end, self.table.times.tolist(), self.table.ragged]
        )
        return hashlib.sha256(numbers.encode()).hexdigest()

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        """Nothing to move: a table is a few float64 numbers."""

    def describe(self, sampler: str | None = None) -> dict[str, Json]:
        """The table's part of a sampler's record."""
        return {
            "predictor": self.name,
            "predictor_sha256": self.sha256,
            "predictor_record": {"created": self.record.created, "model": self.record.model},
            "table": {"times": self.table.times.tolist(), "rows": self.table.ragged},
        }

    def note_on(self, weights_sha256: str) -> str | None:
        """A warning if the table was trained on weights other than these."""
        return other_weights(self.record, self.label, weights_sha256)


AnyStudent = TrainedStudent | TrainedTable


def save_table(path: str | Path, table: Table, record: RunRecord) -> None:
    """Write a table with its record: JSON, or safetensors if ``path`` ends so."""
    content = TableFile(
        table.start,
        table.end,
        tuple(table.times.tolist()),
        tuple(map(tuple, table.ragged)),
        to_plain(record),
    )
    if Path(path).suffix != ".safetensors":
        write_result(path, content)
        return
    plain = to_plain(content)
    tensors = {"times": table.times.contiguous(), "rows": table.rows.contiguous()}
    rest = {key: json.dumps(plain[key]) for key in ("start", "end", "record", "schema")}
    with atomic_write(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata=rest)


def read_table(path: Path) -> tuple[Table, RunRecord]:
    """What `save_table` wrote.  Raises UserError for a file that is no table."""
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        plain = _plain_table(path, tensors, metadata)
        content = from_plain(TableFile, plain, str(path))
    else:
        found = read_result(TableFile, path)
        if found is None:
            raise UserError(f"there is no table at {path}; train one with train.py")
        content = found
    try:
        table = content.table()
    except ValueError as error:
        raise UserError(f"{path}: {error}; train again or copy it again") from None
    record = from_plain(RunRecord, content.record, f"the record of {path}")
    pick(_TableOptions, record.options, f"the options in the record of {path}")
    pick(_TablePlan, record.plan, f"the plan in the record of {path}")
    return table, record


def _plain_table(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> dict[str, object]:
    try:
        keys = ("start", "end", "record", "schema")
        plain = {key: parse_json(metadata[key], f"{key} in {path}") for key in keys}
        rows = tensors["rows"].to(torch.float64)
        plain["times"] = tensors["times"].tolist()
        plain["rows"] = [row[: k + 1].tolist() for k, row in enumerate(rows)]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is not a table of this toolkit ({type(error).__name__}: {error}); give a "
            "table.json of train.py"
        ) from None
    return plain


def load_student(spec: str, root: str | Path) -> AnyStudent:
    """A trained predictor or table, by run number, run folder or file.

    Raises UserError if there is none, or if the file is neither.
    """
    path = find_run(spec, root)
    file = path / TABLE if path.is_dir() else path
    if file.is_file() and (file.suffix == ".json" or _holds_table(file)):
        return _trained(file)
    return load_predictor(spec, root)


def _holds_table(file: Path) -> bool:
    """Whether a safetensors file is one of `save_table`; its tensors are not read."""
    if file.suffix != ".safetensors":
        return False
    with open_safetensors(file) as content:
        return "rows" in content.keys()  # noqa: SIM118


def _trained(file: Path) -> TrainedTable:
    return TrainedTable(*read_table(file), student_name(file, TABLE))
