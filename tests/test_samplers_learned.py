"""Restart with a predictor: plans, NFE, and an identity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from amed.experiments import save_predictor
from commands import sample
from plans.plan import Jump, Solve
from runtime.errors import UserError
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.generate import generate
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.driver import planned_nfe
from solvers.rules import FixedRatio, TwoStage
from tests.sampler_models import GaussianModel, MixtureModel, make_card, trained

INFO = '{"0": [3, 2, 0.5, 5]}'
SEEDS = [3, 14, 15]


def learned(which: str | None, student=None, info: str | None = INFO, **options) -> Sampler:
    student = student or trained("tiny", "amed", 4, True)
    asked = SamplerOptions(sampler="restart", learned=which, restart_info=info, **options)
    student = replace(student, name="00007-tiny-4")
    student.predictor.to(torch.float64)
    return build_learned(asked, student, make_card())


def walks(sampler: Sampler) -> tuple[list[Solve], list[Solve]]:
    """Those of the main grid and those of descents."""
    main: list[Any] = []
    down: list[Any] = []
    for before, part in zip((None, *sampler.plan), sampler.plan, strict=False):
        if isinstance(part, Solve):
            (down if isinstance(before, Jump) else main).append(part)
    return main, down


@pytest.mark.parametrize("which", ["main", "restart", "both"])
def test_the_predictor_walks_what_it_is_asked_to(which):
    student = trained("tiny", "amed", 4, True)
    sampler = learned(which, student)
    main, down = walks(sampler)
    predictor, settings = student.predictor, student.settings
    for segments, by_student in ((main, which != "restart"), (down, which != "main")):
        for walk in segments:
            assert walk.guide is (predictor if by_student else None)
            assert walk.solver == (settings.solver() if by_student else TwoStage(FixedRatio(1.0)))
    assert len(down) == 2 and not any(walk.afs for walk in down)
    nodes = torch.cat([main[0].ts, main[1].ts[1:]])
    if which == "restart":
        assert len(nodes) == 19 and nodes[-1] == 0 and not any(walk.afs for walk in main)
        assert sampler.nfe == 35 + 8
    else:  # the student's grid and analytic first step, without a final 0
        assert torch.equal(nodes, settings.grid.nodes())
        assert [walk.afs for walk in main] == [True, False]
        assert sampler.nfe == settings.nfe() + 8 == 13
    t_lo = float(down[0].ts[-1])
    assert t_lo in nodes and down[0].ts[0] == 5.0 and len(down[0].ts) == 3
    assert t_lo == min(nodes[nodes > 0].tolist(), key=lambda t: abs(t - 0.5))


@pytest.mark.parametrize("kind", ["amed", "ipndm", "dpmpp", "dpm", "euler"])
@pytest.mark.parametrize("which", ["main", "restart", "both"])
def test_planned_nfe_is_metered_and_that_of_heun_segments(kind, which):
    student = trained("tiny", kind, 4, True)
    sampler = learned(which, student, num_steps=6 if which == "restart" else None)
    model = GaussianModel()
    (batch,) = generate(sampler, model, SEEDS, batch=3, device="cpu", dtype=torch.float64)
    assert batch.nfe == sampler.nfe == sum(model.calls)
    heun = TwoStage(FixedRatio(1.0))  # one inserted node an interval, as any guide has
    assert sampler.nfe == sum(
        planned_nfe(heun, part.ts, None, part.afs) for part in sampler.plan if part.nfe()
    )
    assert len({round(float(x), 6) for x in batch.x[:, 0, 0, 0]}) == len(SEEDS)


@pytest.mark.parametrize(("which", "main", "down"), [
    ("main", "dpm", "heun"), ("restart", "heun", "dpm"), ("both", "dpm", "dpm"),
])  # fmt: skip
@pytest.mark.parametrize("afs", [False, True])
def test_a_predictor_that_always_says_half_is_dpm_solver_2(which, main, down, afs):
    """With every weight 0: r = 1/2, c = a = 1, on every grid."""
    student = trained("tiny", "dpm", 4, afs)
    for weight in student.predictor.parameters():
        weight.zero_()
    more = {"num_steps": 5} if which == "restart" else {}
    chosen = learned(which, student, **more)
    own = {} if which == "restart" else {"afs": afs, "final_zero": False}
    options = {"num_steps": 4, **own, **more, "main_solver": main, "restart_solver": down}
    classic = build(SamplerOptions(sampler="restart", restart_info=INFO, **options), make_card())
    made = [
        next(generate(s, MixtureModel(), SEEDS, batch=3, device="cpu", dtype=torch.float64)).x
        for s in (chosen, classic)
    ]
    torch.testing.assert_close(made[0], made[1], rtol=1e-12, atol=1e-12)
    assert chosen.nfe == classic.nfe


def test_the_record_says_who_walked_what():
    student = trained("tiny", "amed", 4, True)
    built = {which: learned(which, student) for which in ("main", "restart", "both")}
    assert {which: s.label for which, s in built.items()} == {
        "main": "amed-00007-restart",
        "restart": "restart-amed-00007",
        "both": "amed-00007-restart-own",
    }
    for which, sampler in built.items():
        said = json.loads(json.dumps(sampler.describe()))
        assert said["sampler"] == "restart" and said["learned"] == which
        assert said["predictor"] == "00007-tiny-4" and said["predictor_record"]["model"]
        walkers = said["main_solver"], said["restart_solver"]
        assert walkers == tuple(
            "amed-00007" if which in (part, "both") else "heun" for part in ("main", "restart")
        )
        assert said["student"]["sampler_stu"] == "amed" and len(said["predictor_sha256"]) == 64
        assert said["final_zero"] is (which == "restart") and said["afs"] is (which != "restart")
        assert said["restart_info"] == {"0": [3, 2, 0.5, 5.0]}
    assert learned(None, student).describe() == built["main"].describe()  # the default
    assert learned("restart", restart_config="cifar10-vp-43", info=None).nfe == 43


def test_guidance_is_the_predictors_unless_given():
    student = trained("tiny", "amed", 4, True)
    guided = replace(student, settings=replace(student.settings, guidance_rate=2.0))
    for which in ("main", "restart", "both"):
        sampler = learned(which, guided)
        assert (sampler.cost, sampler.guidance_rate) == (2, 2.0)
        assert sampler.nfe == 2 * learned(which).nfe
        assert learned(which, guided, guidance_rate=1.0).cost == 1


@pytest.mark.parametrize(
    ("which", "options", "sentence"),
    [
        ("main", {"num_steps": 9}, "--num_steps 9 is not an option of --learned main,"),
        ("main", {"nfe": 9}, "--nfe 9 is not an option of --learned main"),
        ("main", {"afs": False}, "--afs False is not an option of --learned main"),
        ("main", {"final_zero": True}, "--final_zero True is not an option of --learned main"),
        ("main", {"schedule_type": "logsnr"}, "--schedule_type logsnr is not an option"),
        ("main", {"sigma_max": 70.0}, "--sigma_max 70.0 is not an option of --learned main"),
        ("main", {"S_churn": 1.0}, "--S_churn 1.0 is not an option of --learned main"),
        ("main", {"main_solver": "euler"}, "--main_solver euler is not an option of"),
        ("main", {"restart_config": "cifar10-vp-43"}, "use --learned restart"),
        ("main", {"info": f"18 {INFO}"}, "18 main nodes, but amed-00007 has 4"),
        ("main", {"info": '{"0": [3, 1, 1, 90]}'}, "t_max = 90 is above"),
        ("restart", {"restart_solver": "heun"}, "--restart_solver heun is not an option"),
        ("restart", {"num_steps": 9, "nfe": 9}, "--num_steps 9 and --nfe 9"),
        ("restart", {"restart_config": "cifar10-vp-43", "num_steps": 9}, "which is complete"),
        ("both", {"restart_solver": "heun"}, "--restart_solver heun is not an option"),
        ("both", {"num_steps": 9}, "--num_steps 9 is not an option of --learned both"),
    ],
)  # fmt: skip
def test_contradictions_are_one_sentence(which, options, sentence):
    with pytest.raises(UserError) as caught:
        learned(which, **{"info": None if "restart_config" in options else INFO, **options})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_learned_without_a_predictor_or_without_restart_raises():
    for options in (
        {"sampler": "restart", "learned": "main"},
        {"sampler": "euler", "learned": "main"},
    ):
        with pytest.raises(UserError, match="--sampler restart and --predictor_path$"):
            build(SamplerOptions(**options), make_card())
    with pytest.raises(UserError, match="--learned main is not an option"):
        build_learned(SamplerOptions(learned="main"), trained("tiny", "amed", 4, True), make_card())
    assert learned("main", info=f"4 {INFO}").nfe == 13  # its own number is no contradiction


def test_from_the_command_line(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = trained("cifar10-small", "amed", 4, True)
    save_predictor("exps/00002-small/predictor.safetensors", student.predictor, student.record)
    flags = ["-n", "--sampler=restart", "--predictor_path=2", "--device=cpu", "--seeds=0-1"]
    done = CliRunner().invoke(sample.main, [*flags, f"--restart_info={INFO}", "--learned=both"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert said["plan"]["nfe_planned"] == 13 and said["plan"]["learned"] == "both"
    assert said["options"]["outdir"] == "samples/cifar10-small/amed-00002-restart-own_nfe13"
    assert not (tmp_path / "samples").exists()
