"""The search for a Restart plan: what it scores, what it chooses, and how to sample with that."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from commands import sample
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.prior import start
from denoisers.registry import ModelSource
from evaluation import harness as harness_module
from evaluation.harness import Harness, HarnessOptions
from metrics.detectors import load_detector
from metrics.statistics import Statistics
from plan_search import job as search_job
from plan_search.job import PlanSearchOptions, prepare
from plan_search.objectives import (
    Dopri5Error,
    Fid,
    Space,
    choose_restart,
    restart_sampler,
    selection_cost,
)
from plans.pfgmpp import spread
from plans.plan import Jump, Plan, Solve, run_plan
from plans.process import ForwardProcess
from runtime.dist import World
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.seeds import SELECTION_START
from solvers.driver import Meter
from solvers.oracle import dopri5
from solvers.types import Denoiser
from tests.comparison_problems import CARD, MixtureModel, make_harness
from tests.sampler_models import ClassModel, GaussianModel, make_card
from tools import plan_search

HERE = World(0, 1, torch.device("cpu"))
SOURCE = ModelSource("cifar10-small")


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


def small_harness(model: Any, conditions: Conditions = Conditions(), batch: int = 8) -> Harness:  # noqa: B008
    """A harness for images of any size, in float64."""
    detector = load_detector("pixels", device="cpu")
    reference = Statistics(detector.id, "random")
    reference.update(torch.rand(300, detector.dim, generator=torch.Generator().manual_seed(0)))
    return Harness(model, detector, reference, range(8), 2, batch, torch.float64, HERE, conditions)


def same_plan(one: Plan, other: Plan) -> bool:
    """Equal segments: solvers, bit-equal times, free first steps, and jumps."""

    def key(segment: Solve | Jump) -> Any:
        if isinstance(segment, Jump):
            return segment
        return segment.solver, segment.ts.tolist(), segment.guide, segment.afs

    return [key(segment) for segment in one] == [key(segment) for segment in other]


@pytest.mark.parametrize("budget", [3, 5, 9, 12])
def test_a_sampler_has_the_plan_of_its_candidate(budget: int) -> None:
    field = Space(most=2).field(budget, CARD)
    assert len({candidate.label for candidate in field}) == len(field) > 10
    for candidate in field:
        sampler = restart_sampler(candidate, CARD)
        assert same_plan(sampler.plan, candidate.plan), candidate.label
        assert sampler.label == candidate.label and sampler.nfe == budget
    other = dataclasses.replace(field[0], num_steps=field[0].num_steps + 1)
    assert not same_plan(restart_sampler(other, CARD).plan, field[0].plan)


def test_the_chosen_sampler_is_described_in_full(harness: Harness, tmp_path: Path) -> None:
    chosen = choose_restart(3, harness, [4, 8], tmp_path, lambda n: None)
    candidate = next(c for c in Space().field(3, CARD) if c.label == chosen.label)
    assert same_plan(chosen.plan, candidate.plan)
    about = chosen.describe()
    assert about["candidates"] == 12 and about["sampler"] == "restart"
    assert about["num_steps"] == candidate.num_steps == chosen.options.num_steps
    assert (about["main_solver"], about["afs"]) == (candidate.walks.main.name, chosen.options.afs)


@pytest.mark.parametrize(("kind", "rounds"), [("fid", [4, 8]), ("dopri5", [2, 4])])
def test_the_plan_that_a_search_finds_can_be_sampled(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rounds: list[int]
) -> None:
    seen: set[int] = set()
    original = harness_module.generate

    def generate(sampler: Any, model: Any, seeds: Any, **options: Any) -> Any:
        seen.update(seeds)
        return original(sampler, model, seeds, **options)

    monkeypatch.setattr(harness_module, "generate", generate)
    monkeypatch.setattr(search_job, "open_harness", lambda *_: harness)
    select = ",".join(map(str, rounds))
    job = prepare(PlanSearchOptions("3", HarnessOptions(SOURCE), kind, select, outdir=tmp_path))
    text = job.run(HERE)
    assert seen == set(range(SELECTION_START, SELECTION_START + rounds[-1]))
    trace = json.loads((tmp_path / f"search-3-{kind}.json").read_text())
    best, *_ = trace["rounds"][-1]
    assert [len(trials) for trials in trace["rounds"]] == [12, 3] and best["n"] == rounds[-1]
    assert best["score"] == min(trial["score"] for trial in trace["rounds"][-1])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["plan"]["candidates"] == {"3": 12} and record["plan"]["device"] == "cpu"
    line, command = text.splitlines()
    assert line.startswith(f"3 NFE: {best['label']}  ({kind} ")
    python, script, *flags = shlex.split(command)
    done = CliRunner().invoke(sample.main, [*flags, "-n", "--device=cpu", "--seeds=0"])
    assert (python, script, done.exit_code) == ("python", "sample.py", 0), done.output
    plan = next(c for c in job.fields[3] if c.label == best["label"]).plan
    about = json.loads(done.output)["plan"]
    assert about["parts"] == [str(segment) for segment in plan] and about["nfe_planned"] == 3


def walk_exactly(plan: Plan, meter: Meter, x: Tensor, normal: Any, D: int | None) -> Tensor:
    """By hand: every walk by dopri5, every jump with the draws of the seeds."""
    for segment in plan:
        if isinstance(segment, Solve):
            assert segment.ts[-1] > 0
            x = dopri5(meter, x, segment.ts[[0, -1]], 1e-5, 1e-5).x[-1]
        else:
            noise = segment.std * normal(segment.name)
            if D is not None:
                draw = normal((*segment.name, "spread"))
                noise = noise * spread(segment.t_from / segment.t_to, D, draw)
            x = x + noise
    return x


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def test_the_distance_to_the_exact_plan_is_that_of_its_images(harness: Harness) -> None:
    candidate = Space().field(5, CARD)[-1]
    sampler, seeds = restart_sampler(candidate, CARD), range(5, 8)
    score = Dopri5Error(harness)(sampler, seeds, lambda n: None)
    noise, meter = SeedNoise(seeds), Meter(MixtureModel().bind())

    def normal(name: Any) -> Tensor:
        return noise.normal(name, CARD.shape)

    x = 80 * normal("latent")
    exact = walk_exactly(candidate.plan, meter, x, normal, None)
    truth = root_mean_square(run_plan(candidate.plan, meter, x, normal).x[-1] - exact)
    assert truth > 0.01 and score == pytest.approx(truth, rel=1e-2)
    # in batches of one, the step control of dopri5 is another, and nothing else
    single = dataclasses.replace(harness, batch=1)
    assert Dopri5Error(single)(sampler, seeds, lambda n: None) == pytest.approx(score, rel=1e-2)


# --- PFGM++


def test_exact_plans_jump_by_the_kernel_of_pfgmpp() -> None:
    """With the Gaussian kernel in its place the distance is another one by far."""
    D, seeds = 4, range(20)
    model = GaussianModel(dataclasses.replace(make_card(), pfgmpp=D, guidance=None))
    card, meter = model.card, Meter(model.bind())
    label = "ipndm(5) afs | 1 x ipndm(7) 0.17..5"
    candidate = next(c for c in Space().field(9, card) if c.label == label)
    sampler = restart_sampler(candidate, card)
    noise = SeedNoise(seeds)

    def normal(name: Any) -> Tensor:
        return noise.normal(name, card.shape, torch.float64)

    x = start(card, noise, 80.0, torch.float64, "cpu")
    end = run_plan(sampler.plan, meter, x, ForwardProcess(normal, D)).x[-1]
    right, wrong = (
        root_mean_square(end - walk_exactly(candidate.plan, meter, x, normal, kernel))
        for kernel in (D, None)
    )
    score = Dopri5Error(small_harness(model, batch=20))(sampler, seeds, lambda n: None)
    assert score == pytest.approx(right, rel=1e-2)
    assert wrong > 2 * right


# --- guidance, classes and prompts


class Asked(GaussianModel):
    """Remembers what it was bound to."""

    def bind(self, labels: Any = None, guidance_rate: Any = None, prompts: Any = None) -> Denoiser:
        bound.append((guidance_rate, prompts))
        return super().bind(labels, guidance_rate, prompts)


bound: list[tuple[float | None, Any]] = []


def test_guided_candidates_cost_twice_and_are_sampled_with_the_rate(tmp_path: Path) -> None:
    model = Asked()
    guided = small_harness(model, Conditions(guidance_rate=3.0))
    field = Space().field(10, model.card, 3.0)
    plain = Space().field(5, model.card)
    assert [c.label for c in field] == [c.label for c in plain]  # half as many calls each
    for objective in (Fid(guided), Dopri5Error(guided)):
        bound.clear()
        score = objective(restart_sampler(field[0], model.card, 3.0), range(4), lambda n: None)
        assert score > 0 and bound and {rate for rate, _ in bound} == {3.0}
        assert objective.describe()["guidance_rate"] == 3.0
    chosen = choose_restart(10, guided, [4, 8], tmp_path, lambda n: None)
    assert (chosen.nfe, chosen.cost, chosen.guidance_rate) == (10, 2, 3.0)
    plain_cost = selection_cost(5, model.card, None, [4, 8])
    assert selection_cost(10, model.card, 3.0, [4, 8]) == plain_cost


def test_scores_of_other_conditions_are_other_scores() -> None:
    said = []
    for conditions in (Conditions(), Conditions(label=2), Conditions(label=3)):
        harness = small_harness(ClassModel(), conditions)
        said += [objective.describe() for objective in (Fid(harness), Dopri5Error(harness))]
        assert all("guidance_rate" not in about for about in said)
    text = dataclasses.replace(GaussianModel().card, text=True)
    for prompts in (("a",), ("b",)):
        harness = small_harness(GaussianModel(text), Conditions(prompts=prompts))
        said += [objective.describe() for objective in (Fid(harness), Dopri5Error(harness))]
    assert len({json.dumps(about) for about in said}) == len(said) == 10


def test_the_command_passes_conditions_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(GaussianModel().card, text=True)
    monkeypatch.setattr(ModelSource, "card", lambda *_: card)
    conditions = ConditionOptions(prompt="a cat", guidance_rate=2.0)
    options = PlanSearchOptions("10", HarnessOptions(SOURCE, conditions), outdir=tmp_path)
    job = prepare(options)
    assert job.conditions == Conditions(None, ("a cat",), 2.0)
    flags = shlex.split(job.command(job.fields[10][0]))
    assert {"--prompt=a cat", "--guidance_rate=2.0"} <= set(flags)
    record = json.loads(job.outline().partition("\n10 NFE")[0])
    assert record["options"]["guidance_rate"] == 2.0 and record["options"]["prompts"]["count"] == 1
    monkeypatch.undo()
    with pytest.raises(UserError, match="'cifar10-small' takes no text"):
        prepare(options)


def test_selections_take_the_first_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataclasses.replace(GaussianModel().card, text=True)
    monkeypatch.setattr(ModelSource, "card", lambda *_: card)
    (file := tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(8)))
    harness = HarnessOptions(SOURCE, ConditionOptions(prompt_path=str(file)))
    job = prepare(PlanSearchOptions("5", harness, select="4,8"))
    bound.clear()
    search_harness = small_harness(Asked(card), job.conditions)
    sampler = restart_sampler(job.fields[5][0], card)
    Fid(search_harness)(sampler, range(SELECTION_START, SELECTION_START + 4), lambda n: None)
    assert bound == [(None, tuple(f"prompt {i}" for i in range(4)))]
    with pytest.raises(UserError, match="seed 10000008 has no prompt.* here row 8"):
        prepare(PlanSearchOptions("5", harness, select="4,9"))


# --- the command


def invoke(*flags: str) -> Any:
    return CliRunner().invoke(plan_search.main, [*flags, "--device=cpu"])


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    out = f"--outdir={tmp_path / 'out'}"
    done = invoke("-n", out, "--nfe=5", "--select=4,8", "--intervals=0.06:0.3")
    assert done.exit_code == 0, done.output
    assert "5 NFE: 13 plans, 76 images of 5 NFE" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--nfe=1",), "no Restart plan spends exactly 1 NFE"),
        (("--nfe=5,x",), "--nfe '5,x' is not a list of whole numbers from 1 to 200"),
        (("--nfe=5", "--walks=amed/heun"), "the walk 'amed/heun' is not of the form"),
        (("--nfe=5", "--intervals=1"), "the interval '1' is not of the form"),
        (("--nfe=5", "--select=1"), "--select '1' is not a list of whole numbers from 2 to"),
        (("--nfe=5", "--guidance_rate=2"), "'cifar10-small' has no guidance"),
        (("--nfe=5", "--ref=nothing.npz"), "nothing.npz do not exist"),
    ],
)
def test_nonsense_is_one_sentence_and_leaves_nothing(
    flags: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = invoke(*flags, f"--outdir={tmp_path / 'out'}")
    assert isinstance(done.exception, ValueError | OSError), done.output
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
