"""The folder of a run: a new one, or that of the run to continue."""

from __future__ import annotations

from pathlib import Path

from amed.experiments import create_run, find_run, list_runs
from runtime.dist import World
from runtime.errors import UserError
from runtime.record import RECORD, RunRecord

#: Options that may differ between the start of a run and its continuation.
IGNORED = ("outdir", "batch_gpu", "bench", "desc", "cache_dir", "checkpoint", "report")


def open_run(root: str, resume: str | None, name: str, record: RunRecord, here: World) -> Path:
    """The folder of a run, on every process: a new one, or that of the run to continue."""
    found = str(_open_run(root, resume, name, record)) if here.is_main else ""
    return Path(here.broadcast_object(found))


def _open_run(root: str, resume: str | None, name: str, record: RunRecord) -> Path:
    folder: Path | None = None
    if resume == "auto":
        folder = find_resumable(root, record)
    elif resume is not None:
        if not resume:
            raise UserError("--resume is empty: give auto, or the number or folder of a run")
        folder = find_run(resume, root)
        earlier = RunRecord.read(folder / RECORD)
        ignored = (*IGNORED, "total_kimg") if is_longer(record, earlier) else IGNORED
        differences = earlier.differences(record, ignored)
        if differences:
            raise UserError(
                f"{folder} was started with other options ({'; '.join(differences)}); "
                "give the same ones, or leave --resume out to start a new run"
            )
    if folder is None:
        folder = create_run(root, name)
        record.write(folder / RECORD)
    return folder


def is_longer(record: RunRecord, earlier: RunRecord) -> bool:
    """Whether a training is longer than an earlier one.

    Then it may continue that one: the learning rate is constant, and the number of a trajectory
    decides what it is.
    """
    new, old = (one.options.get("total_kimg") for one in (record, earlier))
    return isinstance(new, float) and isinstance(old, (int, float)) and new > old


def find_resumable(root: str | Path, record: RunRecord) -> Path | None:
    """The newest run below ``root`` that was started with the same options, model and plan."""
    for _, folder in sorted(list_runs(root).items(), reverse=True):
        path = folder / RECORD
        if not path.is_file():
            continue
        try:
            earlier = RunRecord.read(path)
        except UserError:
            continue  # a record of another program or version: not this run
        if not earlier.differences(record, IGNORED):
            return folder
    return None
