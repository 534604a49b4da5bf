"""Searches for a Restart plan: the plan that is found can be sampled."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from commands import sample
from evaluation.harness import Harness
from plan_search import job as search
from plan_search import objectives as choose
from plan_search.objectives import SELECTION_START, Dopri5Error, Space
from plans.plan import Jump, run_plan
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from samplers.sampler import Sampler
from solvers.driver import Meter
from solvers.oracle import dopri5
from tests.comparison_problems import CARD, MixtureModel, make_harness
from tools import plan_search


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


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


def _invoke(*flags: str):
    return CliRunner().invoke(plan_search.main, [*flags, "--device=cpu"])


def test_dry_runs_touch_nothing(tmp_path):
    out = f"--outdir={tmp_path / 'out'}"
    done = _invoke("-n", out, "--nfe=5", "--select=4,8", "--intervals=0.06:0.3")
    assert done.exit_code == 0, done.output
    assert "5 NFE: 13 plans, 76 images of 5 NFE" in done.output
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--nfe=1",), "no Restart plan spends exactly 1 NFE"),
        (("--nfe=5", "--walks=amed/heun"), "the walk 'amed/heun' is not of the form"),
        (("--nfe=5", "--intervals=1"), "the interval '1' is not of the form"),
        (("--nfe=5", "--select=1"), "--select '1' is no list of whole numbers of 2"),
    ],
)
def test_nonsense_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path):
    done = _invoke(*flags, f"--outdir={tmp_path / 'out'}")
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
