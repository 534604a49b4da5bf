"""Our own files after somebody's edit: read as they are, or refused in one sentence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from amed.experiments import load_predictor, save_predictor
from amed.resume import find_resumable, open_run
from checkpoints.states import read_state, restore
from comparison.report.html import write_page
from comparison.results import MeasuredRow
from denoisers.training.report import loss_curve
from evaluation.image_prompts import PromptSource, _read, _sampling_record
from evaluation.passes import UnfinishedPass
from metrics.summary import Collector, Requirements
from ns.experiments import load_student, save_table
from runtime.errors import UserError
from runtime.log import JsonLines, read_json_lines
from runtime.record import RunRecord
from runtime.typed import read_earlier, write_result
from samplers.builders.learned import build_learned
from samplers.folder import Folder
from samplers.options import SamplerOptions
from solvers.table import Table
from teachers.trajectories import prepare
from teachers.trajectory_files import TrajectorySet
from tests.attacks import attack_bytes, attack_json, edited, survives
from tests.comparison_problems import HERE, measured_row
from tests.sampler_models import make_card, trained
from tests.test_report import RECORD, ROWS, completed, solver_errors
from tests.test_states import KINDS, Parts
from tests.toy_detector import images, toy
from tests.trajectory_problems import options, use_mixture

CARD = make_card()


@pytest.mark.parametrize("name", ["results.json", "errors.json"])
def test_results(name: str, tmp_path: Path) -> None:
    write_result(tmp_path / "results.json", completed(RECORD, ROWS[:2]))
    write_result(tmp_path / "errors.json", solver_errors("0" * 64))
    attack_json(tmp_path / name, lambda: write_page(tmp_path), 300)


def test_rows(tmp_path: Path) -> None:
    """A row that cannot be read is measured again."""
    write_result(tmp_path / "row.json", measured_row("Euler", 5, 30.0))
    attack_json(tmp_path / "row.json", lambda: read_earlier(MeasuredRow, tmp_path / "row.json"))


def sampled(**plan: Any) -> RunRecord:
    given = {"seeds": "0-3", "prompt": "a cat", "prompt_path": None, "prompts": None}
    return RunRecord.make("sample", given, {"name": "tiny", "sha256": "0" * 64}, plan)


def test_records_of_images(tmp_path: Path) -> None:
    record = sampled(nfe=5, nfe_metered=5)
    record.write(tmp_path / "run.json")
    good = (tmp_path / "run.json").read_bytes()

    def use() -> None:
        text = (tmp_path / "run.json").read_bytes()
        try:
            Folder(tmp_path).open(record, range(6))
        finally:
            (tmp_path / "run.json").write_bytes(text)  # as `open` would complete it
        _read(PromptSource(), _sampling_record(tmp_path), tmp_path)

    attack_json(tmp_path / "run.json", use, 300)
    assert (tmp_path / "run.json").read_bytes() == good


def test_records_of_training(tmp_path: Path) -> None:
    record = RunRecord.make("train", {"num_steps": 4}, {"name": "tiny"}, {"nfe": 5})
    folder = open_run(str(tmp_path), None, "x", record, HERE)

    def use() -> None:
        assert find_resumable(tmp_path, record) in (folder, None)
        open_run(str(tmp_path), "1", "x", record, HERE)

    attack_json(folder / "run.json", use)


def test_records_of_trajectories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mixture(tmp_path, monkeypatch)
    folder = prepare(options(number=2)).run(HERE).folder

    def use() -> None:
        found = TrajectorySet.open(folder, 2)
        assert str(found) and found.key and found.stream
        found.read([0, 1])

    attack_json(folder / "run.json", use)
    attack_bytes(next(folder.glob("*.safetensors")), use)


def learned(path: Path) -> None:
    """What sampling does with a student before it samples."""
    student = load_student(str(path), path.parent)
    sampler = build_learned(SamplerOptions(), student, CARD)
    assert sampler.nfe and student.note_on("0" * 64) != "" and student.label
    json.dumps(sampler.describe())


def test_predictors(tmp_path: Path) -> None:
    path, student = tmp_path / "predictor.safetensors", trained()
    save_predictor(path, student.predictor, student.record)
    good = path.read_bytes()
    weights = safetensors.torch.load(good)
    record = json.loads(student.record.to_json())
    for number in range(120):
        options = edited(record["options"], number) if number % 2 else record["options"]
        changed = {**record, "options": options} if number % 2 else edited(record, number)
        safetensors.torch.save_file(weights, path, {"record": json.dumps(changed)})
        survives(lambda: learned(path), f"edit {number}")
    path.write_bytes(good)
    attack_bytes(path, lambda: learned(path))
    for wrong in ({}, {"a": torch.ones(2)}, {k: v[:0] for k, v in weights.items()}):
        safetensors.torch.save_file(wrong, path, {"record": student.record.to_json()})
        with pytest.raises(UserError, match="do not fit a predictor"):
            load_predictor(str(path), tmp_path)


def test_tables(tmp_path: Path) -> None:
    table = Table.of(80.0, 0.002, [80.0, 3.0], [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7]])
    record = RunRecord.make("train", {"dataset_name": "tiny"}, {"name": "tiny"}, {"latents": 24})
    save_table(tmp_path / "table.json", table, record)
    attack_json(tmp_path / "table.json", lambda: learned(tmp_path / "table.json"), 300)


def test_training_states(tmp_path: Path) -> None:
    path, state = tmp_path / "state.pt", Parts(2).state()

    def use() -> None:
        parts = Parts()
        found = read_state(path, KINDS)
        restore(parts.all, found, path)
        parts.run(1)

    for number in range(120):
        torch.save(edited(state, number), path)
        survives(use, f"edit {number}")
    torch.save(state, path)
    attack_bytes(path, use)


def test_rows_of_a_training(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    rows = [{"step": step, "loss": 1.0 / step, "r": [0.5, 0.4]} for step in (1, 2, 3)]

    def use() -> None:
        loss_curve(read_json_lines(path))
        JsonLines(path, resume_after=2).close()

    for number in range(75):
        path.write_text("".join(f"{json.dumps(row)}\n" for row in edited_rows(rows, number)))
        survives(use, f"edit {number}")
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    attack_bytes(path, use, good=path.read_bytes())


def edited_rows(rows: list[Any], number: int) -> list[Any]:
    changed = edited(rows, number)
    return changed if isinstance(changed, list) else [changed]


def kept_pass(path: Path) -> tuple[UnfinishedPass, Callable[[], UnfinishedPass]]:
    def fresh() -> UnfinishedPass:
        needs = Requirements(20, spatial=True)
        return UnfinishedPass(path, [Collector(toy(), needs, 50)], 50, HERE)

    state = fresh()
    state.collectors[0].update(images(8), range(8))
    return state, fresh


def test_kept_passes(tmp_path: Path) -> None:
    path = tmp_path / "pass.npz"
    state, fresh = kept_pass(path)
    state.save(8)
    assert fresh().load() == 8
    attack_bytes(path, lambda: fresh().load(), 150)
    with np.load(path) as content:
        good = dict(content)
    wrong = (np.float32(1), np.zeros(0), np.array("x"), np.array([1, 2]), np.array(-1), None)
    for name in good:
        for value in wrong:
            changed = {**good, name: value}
            file = io.BytesIO()
            np.savez(file, **{k: v for k, v in changed.items() if v is not None})
            path.write_bytes(file.getvalue())
            with pytest.raises(UserError, match="interrupted pass, cannot be read .*: delete it"):
                fresh().load()
    for name, number in (("0/moments", np.nan), ("0/rows", np.inf), ("done", 51)):
        changed = {**good, name: np.full_like(good[name], number)}
        np.savez(path, **changed)
        with pytest.raises(UserError, match="cannot be read"):
            fresh().load()
