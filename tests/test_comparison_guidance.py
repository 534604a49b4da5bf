"""Guidance and budgets: every row of a table has one rate, and spends what the table says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from commands import compare, solver_error
from comparison.job import CompareOptions, ComparisonJob
from comparison.job import prepare as prepare_comparison
from comparison.results import ComparisonResults
from comparison.rows import Row
from comparison.solver_error.job import SolverErrorOptions
from comparison.solver_error.job import prepare as prepare_errors
from comparison.students import table_rate
from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.registry import ModelSource
from evaluation.detectors import DetectorOptions
from runtime.errors import UserError
from runtime.typed import read_result
from solvers.types import Denoiser
from tests.comparison_problems import (
    CARD,
    HERE,
    OPTIONS,
    MixtureModel,
    guided_card,
    make_harness,
    save_students,
    small_student,
)
from tests.sampler_models import Counted
from tools import nfe_sweep


@dataclass(eq=False)
class GuidedModel:
    """Counts two evaluations a call under guidance, and remembers at which rate it was bound."""

    card: Card = field(default_factory=guided_card)
    sha256: str = "0" * 64
    calls: list[int] = field(default_factory=list)
    rates: set[float | None] = field(default_factory=set)

    def decode(self, x):
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        self.rates.add(guidance_rate)
        inner = MixtureModel().bind()
        return Counted(inner, self.card.cost(guidance_rate), self.calls)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GuidedModel:
    """A model with classifier-free guidance, and two students: 5 evaluations or 10 when guided."""
    monkeypatch.chdir(tmp_path)
    model = GuidedModel()
    monkeypatch.setattr(ModelSource, "card", lambda _: model.card)
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    guided = (
        small_student("00001", guidance_rate=2.0),
        small_student("00002", "ipndm", 4, True, 2.0),
    )
    save_students(tmp_path / "exps", *guided, small_student("00003"))
    return model


def options(rate: float | None = None, **more) -> CompareOptions:
    conditions = ConditionOptions(guidance_rate=rate)
    given = {"num": 12, "blocks": 2, "select": "4", "outdir": Path("out"), **more}
    return CompareOptions(replace(OPTIONS, conditions=conditions), **given)


def every_row(job: ComparisonJob) -> list[Row]:
    return [*(row for rows in job.rows.values() for row in rows), *job.extra, *job.ceilings]


def test_a_guided_student_stands_in_the_table_of_what_it_spends(model: GuidedModel) -> None:
    job = prepare_comparison(options(predictors=("1", "2"), budgets="10", extra=("pds",)))
    rows = {budget: [row.method for row in rows] for budget, rows in job.rows.items()}
    assert "AMED-Solver" in rows[10] and "AMED plugin on iPNDM" in rows[10]
    assert {"iPNDM(4)", "iPNDM(4) + AFS", "DPM-Solver-2 + AFS"} <= set(rows[10])
    for row in every_row(job):
        assert row.sampler.cost == 2 and row.sampler.guidance_rate == 2.0
        assert row.budget in (None, row.sampler.nfe)
    assert [row.method for row in job.ceilings] == ["Heun-70", "Restart-86"]
    assert job.harness.conditions.guidance_rate == job.facts["guidance_rate"] == 2.0
    with pytest.raises(UserError, match="spends 10 NFE, which is not among --budgets"):
        prepare_comparison(options(predictors=("1",), budgets="5"))
    with pytest.raises(UserError, match="no Restart plan spends exactly 9 NFE"):  # calls cost 2
        prepare_comparison(options(predictors=("1",), budgets="9,10"))


def test_the_rate_that_was_asked_for_decides(model: GuidedModel) -> None:
    job = prepare_comparison(options(1.0, predictors=("1", "2", "3"), budgets="5"))
    assert [row.budget for row in job.rows[5] if row.group == "learned"] == [5, 5, 5]
    assert {row.sampler.guidance_rate for row in every_row(job)} == {1.0}
    assert {row.sampler.cost for row in every_row(job)} == {1}
    assert (
        prepare_comparison(options(predictors=("3",), budgets="5")).facts["guidance_rate"] is None
    )
    assert prepare_comparison(options(budgets="5")).facts["guidance_rate"] is None


def test_students_that_disagree_are_named_with_the_remedy(model: GuidedModel) -> None:
    with pytest.raises(UserError) as caught:
        prepare_comparison(options(predictors=("1", "2", "3"), budgets="5,10"))
    said = str(caught.value)
    assert "00001-small, 00002-small: 2; 00003-small: none" in said
    assert "give --guidance_rate" in said and "\n" not in said
    with pytest.raises(UserError, match="different guidance rates"):
        prepare_errors(SolverErrorOptions(ModelSource("cifar10-small"), predictors=("1", "3")))
    assert table_rate(None, []) is None and table_rate(3.0, []) == 3.0


def test_measured_rows_spend_their_budget(model: GuidedModel, tmp_path: Path) -> None:
    job = prepare_comparison(options(2.0, budgets="6", ceilings=False, outdir=tmp_path))
    conditions = Conditions(guidance_rate=2.0)
    job.run(HERE, replace(make_harness(), model=model, conditions=conditions))
    results = read_result(ComparisonResults, tmp_path / "results.json")
    assert results is not None and "Restart" in {row.method for row in results.rows}
    assert {(row.nfe_planned, row.nfe_metered) for row in results.rows} == {(6, 6)}
    assert {row.identity.sampler["guidance_rate"] for row in results.rows} == {2.0}
    assert model.rates == {2.0} and set(model.calls) == {2}
    assert results.record.plan["guidance_rate"] == 2.0


def test_solver_errors_are_those_of_guided_walks(model: GuidedModel, tmp_path: Path) -> None:
    asked = SolverErrorOptions(
        ModelSource("cifar10-small", dtype="float64"),
        detector=DetectorOptions("none"),
        predictors=("1",),
        budgets="10",
        seeds="0,1",
        ceilings=False,
        outdir=tmp_path / "out",
    )
    prepare_errors(asked).run(HERE)
    assert model.rates == {2.0} and set(model.calls) == {2}
    content = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert {(r["nfe_planned"], r["nfe_metered"]) for r in content["rows"]} == {(10, 10)}
    assert "AMED-Solver" in {r["method"] for r in content["rows"]}
    assert content["exact"]["guidance_rate"] == 2.0 and content["exact"]["nfe"] % 2 == 0


def test_a_sweep_is_guided_at_the_rate_that_was_asked_for(model: GuidedModel) -> None:
    flags = ["-n", "--guidance_rate=2", "--sde=none", "--ode=30"]
    done = CliRunner().invoke(nfe_sweep.main, flags, catch_exceptions=False)
    assert "30 NFE: ODE (Heun), 8 nodes and 0" in done.output
    assert "86 NFE: Restart, cifar10-vp-43" in done.output


def test_conditions_that_cannot_be_are_one_sentence(
    model: GuidedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    text = replace(guided_card(), text=True)
    for card, flags, sentence in (
        (CARD, ["--guidance_rate=2"], "has no guidance: leave --guidance_rate 2 out"),
        (CARD, ["--prompt=cat"], "takes no text"),
        (CARD, ["--class=3"], "leave --class 3 out"),
        (text, [f"--prompt_path={prompts}", "--num=4", "--blocks=2"], "give --num 3 or less"),
    ):
        monkeypatch.setattr(model, "card", card)
        done = CliRunner().invoke(compare.main, ["-n", *flags])
        assert sentence in str(done.exception), done.output
        if "--num=4" not in flags:
            done = CliRunner().invoke(solver_error.main, ["-n", *flags])
            assert sentence in str(done.exception), done.output
    prompts.write_text("a\nb\nc\nd\n")
    few = ["-n", f"--prompt_path={prompts}", "--num=4", "--blocks=2"]
    done = CliRunner().invoke(compare.main, [*few, "--select=2,5"])
    assert "give --select 4 or less" in str(done.exception)
    assert CliRunner().invoke(compare.main, [*few, "--select=2,4"]).exit_code == 0
