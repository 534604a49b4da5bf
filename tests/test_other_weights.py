"""Every way to use a student says so once if it was trained on weights other than the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import samplers.in_diffusers
from amed.experiments import TrainedStudent
from commands import sample, solver_error, visualize
from comparison.measure import measure
from comparison.students import learned_rows
from denoisers.registry import ModelSource
from ns.experiments import AnyStudent, TrainedTable
from plans.table import tabulate
from runtime.errors import UserError
from runtime.log import note_once
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.generate import generate
from samplers.in_diffusers import use_predictor
from samplers.options import SamplerOptions
from tests.comparison_problems import CARD, make_harness, save_students, small_student
from tests.sampler_models import GaussianModel
from tests.scripts import Script

TRAINED = "ab" * 32
SEEDS = [3, 4, 5]


@pytest.fixture(autouse=True)
def nothing_said_before() -> Iterator[None]:
    note_once.cache_clear()
    yield
    note_once.cache_clear()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GaussianModel:
    """In the place of the bundled network; its hash is all zeros."""
    made = GaussianModel(CARD)
    monkeypatch.setattr(ModelSource, "load", lambda *_: made)
    return made


def predictor(sha256: str = TRAINED) -> TrainedStudent:
    student = small_student("00001", nodes=3)
    model = {"name": CARD.name, "sha256": sha256}
    return replace(student, record=replace(student.record, model=model))


def table(sha256: str = TRAINED) -> TrainedTable:
    plan = build(SamplerOptions(sampler="euler", num_steps=3), CARD).plan
    return TrainedTable(tabulate(plan), predictor(sha256).record, "00002")


def notes(text: str) -> int:
    return text.count("on weights with the SHA-256 abababababab..., but these have 000000000000...")


@pytest.mark.parametrize("make", [predictor, table])
def test_programs(
    make: Callable[[str], AnyStudent], capsys: pytest.CaptureFixture[str], model: GaussianModel
) -> None:
    for sha256, said in ((model.sha256, 0), (TRAINED, 1), (TRAINED, 0)):
        sampler = build_learned(SamplerOptions(), make(sha256), CARD)
        for _ in range(2):
            list(generate(sampler, model, SEEDS, batch=2, device="cpu"))
        assert notes(capsys.readouterr().err) == said


@pytest.mark.parametrize(
    "command",
    [
        (sample.main, "--predictor_path=1", "--seeds=0-2", "--batch=1"),
        (visualize.main, "--row=--predictor_path=1", "--row=euler --nfe=3", "--seeds=0-1"),
        (
            solver_error.main, "--predictors=1", "--budgets=3", "--seeds=0-1", "--detector=none",
            "--ceilings=False", "--tol=1e-3",
        ),
    ],
    ids=["sample", "visualize", "solver_error"],
)  # fmt: skip
def test_commands(
    command: tuple[Any, ...], model: GaussianModel, tmp_path: Path, monkeypatch: Any, script: Script
) -> None:
    monkeypatch.chdir(tmp_path)
    save_students(Path("exps"), predictor())
    code, _, err = script(*command, "--device=cpu", "--outdir=out")
    assert code == 0, err
    assert notes(err) == 1


def test_rows_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = learned_rows([predictor()], CARD)
    measure(row, make_harness(), tmp_path, lambda _: None)
    assert notes(capsys.readouterr().err) == 1


@dataclass
class Installed:
    """The place of the scheduler: what is tested is said before it is made."""

    pipe: object

    @classmethod
    def install(cls, pipe: object, walk: object) -> Installed:
        return cls(pipe)


def test_a_pipeline_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    scheduler = SimpleNamespace(
        config={**betas, "beta_schedule": "linear", "prediction_type": "epsilon"}
    )
    monkeypatch.setattr(samplers.in_diffusers, "load_student", lambda *_: predictor())
    monkeypatch.setattr(samplers.in_diffusers, "WalkScheduler", Installed)
    (tmp_path / "model_index.json").write_text("{}")

    def use(path: str | None) -> int:
        use_predictor(SimpleNamespace(scheduler=scheduler, name_or_path=path), 1)
        return notes(capsys.readouterr().err)

    monkeypatch.setattr(samplers.in_diffusers, "sha256_pipeline", lambda _: "00" * 32)
    assert [use(None), use("owner/name"), use(str(tmp_path)), use(str(tmp_path))] == [0, 0, 1, 0]

    def variant(_: Path) -> str:
        raise UserError("no weights")

    note_once.cache_clear()
    monkeypatch.setattr(samplers.in_diffusers, "sha256_pipeline", variant)
    assert use(str(tmp_path)) == 0
