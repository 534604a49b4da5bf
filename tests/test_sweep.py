"""Sweeps and searches: the series that were asked for, resumed, and plans that can be sampled."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from commands import sample
from comparison.job import ComparisonJob, make_record, run
from comparison.series import CHURN, churned, configurations_of, restart_rows, series
from evaluation.harness import Harness
from plan_search import job as search
from plan_search import objectives as choose
from plan_search.objectives import SELECTION_START, Dopri5Error, Space
from plans.plan import Jump, run_plan
from restart.tables import configurations
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.driver import Meter
from solvers.oracle import dopri5
from tests.comparison_problems import CARD, MixtureModel, make_harness
from tools import nfe_sweep, plan_search

INFO = '{"0": [3, 2, 0.06, 0.3]}'
PLAIN = SamplerOptions(sampler="restart")


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


def test_what_a_restart_is_asked_for_by(tmp_path):
    assert configurations_of("imagenet64-39") == {
        "imagenet64-39": {"restart_config": "imagenet64-39"}
    }
    whole = configurations_of("imagenet64")
    assert list(whole) == [n for n, row in configurations().items() if row.model == "imagenet64"]
    assert len(whole) == 8
    file = tmp_path / "params.txt"
    file.write_text(f"18 {INFO}\n\n6 {INFO}\n")
    lines = configurations_of(str(file))
    assert [build.nfe for build in _samplers(str(file))] == [43, 19]
    assert all(options["restart_info"] == line for line, options in lines.items())
    assert [build.nfe for build in _samplers(f"{file}:3")] == [19]
    assert [build.nfe for build in _samplers(f"5 {INFO}")] == [17]
    with pytest.raises(UserError, match="'cifar10-vp-44' is neither a file nor a published"):
        configurations_of("cifar10-vp-44")
    with pytest.raises(UserError, match="not valid JSON"):
        _samplers("18 {0: 1}")


def _samplers(spec: str, options: SamplerOptions = PLAIN) -> list[Sampler]:
    return [row.sampler for row in restart_rows([spec], options, CARD)]


def test_series_spend_what_was_asked_for():
    rows = restart_rows(["cifar10-vp", "cifar10-vp-43"], PLAIN, CARD)
    table = [row for row in configurations().values() if row.model == "cifar10-vp"]
    assert [(r.budget, r.detail) for r in rows] == [(row.nfe, row.name) for row in table]
    thirds = SamplerOptions(sampler="restart", main_solver="dpm3")
    assert restart_rows([INFO], thirds, CARD)[0].method == "Restart (dpm3, descents heun)"
    ode = series("ODE", "ode", SamplerOptions(sampler="edm"), [5, 35], CARD)
    assert [r.sampler.nfe for r in ode] == [5, 35] and not any(
        isinstance(part, Jump) for r in ode for part in r.sampler.plan
    )
    for spec, values in {**CHURN, "20,0.1,2,1": (20.0, 0.1, 2.0, 1.0)}.items():
        (sde,) = series("SDE", "sde", churned(spec), [35], CARD)
        jumps = [part for part in sde.sampler.plan if isinstance(part, Jump)]
        churn, low, high, noise = values
        assert sde.sampler.nfe == 35 and jumps
        assert all(low <= jump.t_from <= high and jump.scale == noise for jump in jumps)
        gamma = min(churn / 18, math.sqrt(2) - 1)
        assert all(math.isclose(jump.t_to, (1 + gamma) * jump.t_from) for jump in jumps)
    for spec in ("cifar10", "1,2,3", "1,2,3,x"):
        with pytest.raises(UserError, match="nor four numbers"):
            churned(spec)
    with pytest.raises(UserError, match="exactly 6 NFE: give 5 or 7"):
        series("ODE", "ode", SamplerOptions(sampler="edm"), [6], CARD)


def test_a_killed_sweep_goes_on_and_draws_its_figure(harness, tmp_path, monkeypatch):
    rows = series("ODE (Heun)", "ode", SamplerOptions(sampler="edm"), [5, 3], CARD)
    rows += series("SDE", "sde", churned("cifar10-vp"), [5], CARD)
    twins = ['2 {"0": [2, 1, 0.06, 0.3]}', '2 {"0": [2, 1, 0.06, 0.5]}']
    rows += restart_rows(twins, PLAIN, CARD)
    assert len({row.key for row in rows}) == 5  # two plans of one NFE keep two files
    record = make_record("nfe_sweep", {"num": 12}, harness, {})
    job = ComparisonJob(harness, {}, rows, [], [], tmp_path, record)
    original = Harness.fid
    made: list[str] = []
    most = 3

    def fid(self, sampler, *rest):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(sampler.label)
        return original(self, sampler, *rest)

    monkeypatch.setattr(Harness, "fid", fid)
    with pytest.raises(KeyboardInterrupt):
        run(job, harness.world)
    assert not (tmp_path / "table.md").exists()
    most = 9
    said_last = run(job, harness.world).splitlines()[-1]
    assert said_last == f"{tmp_path / 'report.html'}: all of it in one page, for a browser"
    assert len(made) == 5  # each row once
    points = json.loads((tmp_path / "fid-nfe.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {name: [p["nfe"] for p in line] for name, line in points.items()} == {
        "ODE (Heun)": [3, 5], "SDE": [5], "Restart": [5, 5],
    }  # fmt: skip
    said = sorted((p["nfe"], p["fid"], p["detail"]) for line in points.values() for p in line)
    assert said == sorted((r["nfe_metered"], r["fid"], r["detail"]) for r in results)
    assert {r["detail"] for r in results} >= set(twins)
    assert (tmp_path / "fid-nfe.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "python -m tools.nfe_sweep --num=12" in page
    assert all(f"<td>{r['method']}<small>" in page for r in results)


@pytest.mark.parametrize(("kind", "rounds"), [("fid", [4, 8]), ("dopri5", [2, 4])])
def test_the_plan_that_a_search_finds_can_be_sampled(harness, tmp_path, monkeypatch, kind, rounds):
    fields = {3: Space().field(3, CARD)}
    record = RunRecord.make("plan_search", {"model_path": None}, {}, {})
    seen: set[int] = set()
    original = choose.generate

    def generate(sampler, model, seeds, **options):
        seen.update(seeds)
        return original(sampler, model, seeds, **options)

    monkeypatch.setattr(choose, "generate", generate)
    job = search.PlanSearchJob(harness, fields, kind, rounds, tmp_path, record)
    text = search.run(job, harness.world)
    if kind == "dopri5":
        assert seen == set(range(SELECTION_START, SELECTION_START + 4))
    trace = json.loads((tmp_path / f"search-3-{kind}.json").read_text())
    best, *_ = trace["rounds"][-1]
    assert [len(trials) for trials in trace["rounds"]] == [12, 3] and best["n"] == rounds[-1]
    assert best["score"] == min(trial["score"] for trial in trace["rounds"][-1])
    line, command = text.splitlines()
    assert line.startswith(f"3 NFE: {best['label']}  ({kind} ")
    python, script, *flags = shlex.split(command)
    done = CliRunner().invoke(sample.main, [*flags, "-n", "--device=cpu", "--seeds=0"])
    assert (python, script, done.exit_code) == ("python", "sample.py", 0), done.output
    plan = next(c for c in fields[3] if c.label == best["label"]).plan
    said = json.loads(done.output)["plan"]
    assert said["parts"] == [str(part) for part in plan] and said["nfe_planned"] == 3


def test_the_distance_to_the_exact_plan_is_that_of_its_images(harness):
    """By hand: every walk by dopri5, every jump with the draws of the seeds."""
    candidate = Space().field(5, CARD)[-1]
    sampler, seeds = Sampler(candidate.label, candidate.plan), range(5, 8)
    score = Dopri5Error(harness)(sampler, seeds, lambda n: None)
    noise, meter = SeedNoise(seeds), Meter(MixtureModel().bind())

    def normal(name):
        return noise.normal(name, CARD.shape)

    start = exact = 80 * normal("latent")
    for part in candidate.plan:
        if isinstance(part, Jump):
            exact = exact + part.std * normal(part.name)
        else:
            ends = torch.stack([part.ts[0], part.ts[-1]])
            exact = dopri5(meter, exact, ends, 1e-5, 1e-5).x[-1]
    made = run_plan(candidate.plan, meter, start, normal).x[-1]
    truth = float((made - exact).double().square().mean().sqrt())
    assert truth > 0.01 and score == pytest.approx(truth, rel=1e-2)
    # in batches of one, the step control of dopri5 is another, and nothing else
    single = Harness(**{**harness.__dict__, "batch": 1})
    assert Dopri5Error(single)(sampler, seeds, lambda n: None) == pytest.approx(score, rel=1e-2)


TOOLS = {"figure": nfe_sweep.main, "search": plan_search.main}


def _invoke(tool: str, *flags: str):
    return CliRunner().invoke(TOOLS[tool], [*flags, "--device=cpu"])


def test_dry_runs_touch_nothing(tmp_path):
    out = f"--outdir={tmp_path / 'out'}"
    done = _invoke("figure", "-n", out, "--restart", f"18 {INFO}", "--sde=35", "--ode=none")
    assert done.exit_code == 0, done.output
    assert f"43 NFE: Restart, 18 {INFO}" in done.output
    assert "35 NFE: SDE (EDM, churn cifar10-vp), 18 nodes and 0" in done.output
    assert "ODE" not in done.output
    done = _invoke("search", "-n", out, "--nfe=5", "--select=4,8", "--intervals=0.06:0.3")
    assert done.exit_code == 0, done.output
    assert "5 NFE: 13 plans, 76 images of 5 NFE" in done.output
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("figure", "--num=10"), "give --num 8"),
        (("figure", "--restart=nothing"), "'nothing' is neither a file nor a published"),
        (("figure", "--churn=nothing"), "'nothing' is none of cifar10-vp, cifar10-ve"),
        (("figure", "--ode=4"), "exactly 4 NFE: give 3 or 5"),
        (("search", "--nfe=1"), "no Restart plan spends exactly 1 NFE"),
        (("search", "--nfe=5", "--walks=amed/heun"), "the walk 'amed/heun' is not of the form"),
        (("search", "--nfe=5", "--intervals=1"), "the interval '1' is not of the form"),
        (("search", "--nfe=5", "--select=1"), "--select '1' is no list of whole numbers of 2"),
    ],
)
def test_nonsense_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path):
    done = _invoke(*flags, f"--outdir={tmp_path / 'out'}")
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
