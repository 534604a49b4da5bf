"""Building samplers from options and predictors, and errors for invalid options."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from denoisers.cards import cards
from plans.plan import Jump, Solve
from restart.candidates import candidates
from restart.intervals import interval_json
from restart.tables import configurations
from runtime.errors import UserError
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.options import CLASSIC, SAMPLERS, SamplerOptions
from samplers.sampler import Sampler
from solvers.dpmpp import DPMpp
from solvers.grids import get_grid
from solvers.rules import FixedRatio
from tests.sampler_models import RESTART, make_card, trained

INFO = json.dumps(RESTART)


def sampler(name: str, **options: object) -> Sampler:
    card = make_card()
    if name == "pds":  # there are masks for it
        card = dataclasses.replace(card, name="cifar10-small", resolution=32)
    return build(SamplerOptions(sampler=name, **options), card)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "nfe"),
    [
        ("euler", {"num_steps": 6}, 5),
        ("euler", {"num_steps": 7, "afs": True}, 5),
        ("ipndm", {"num_steps": 6}, 5),
        ("dpmpp", {"num_steps": 6}, 5),
        ("dpmpp3c", {"num_steps": 7, "afs": True}, 5),
        ("unipc", {"num_steps": 7, "afs": True}, 5),
        ("deis", {"num_steps": 6}, 5),
        ("ipndm_v", {"num_steps": 6}, 5),
        ("heun", {"num_steps": 4}, 6),
        ("dpm", {"num_steps": 4, "afs": True}, 5),
        ("dpm", {"num_steps": 4, "guidance_rate": 7.5}, 12),
        ("dpm3", {"num_steps": 4, "afs": True}, 8),
        ("ddpm", {"num_steps": 18}, 18),
        ("ddpm", {"num_steps": 18, "guidance_rate": 3.0, "schedule_type": "logsnr"}, 36),
        ("edm", {"num_steps": 18}, 35),
        ("edm", {"num_steps": 18, "S_churn": 40.0}, 35),
        ("restart", {"num_steps": 18, "restart_info": INFO}, 43),
        ("restart", {"num_steps": 18, "restart_info": INFO, "main_solver": "euler"}, 26),
        ("restart", {"num_steps": 18, "restart_info": INFO, "restart_solver": "ipndm"}, 39),
        ("pds", {"num_steps": 20}, 40),
        ("pds", {"num_steps": 20, "n_steps": 0, "freq_mask_path": "none"}, 20),
        ("pds", {"num_steps": 20, "n_steps": 2, "guidance_rate": 2.0}, 120),
        ("pds", {"num_steps": 20, "n_steps": 2, "pds_predictor": False}, 40),
        ("restart", {"num_steps": 18, "restart_info": INFO, "main_solver": "dpm3"}, 60),
        ("restart", {"num_steps": 18, "restart_info": INFO, "restart_solver": "dpm3"}, 47),
    ],
)
def test_lengths_and_budgets_are_inverse(name: str, options: dict, nfe: int) -> None:
    by_length = sampler(name, **options)
    assert by_length.nfe == nfe
    budget = {key: value for key, value in options.items() if key != "num_steps"}
    by_budget = sampler(name, nfe=nfe, **budget)
    assert by_budget.describe() == by_length.describe()


@pytest.mark.parametrize(
    ("name", "options", "near"),
    [
        ("heun", {"nfe": 5}, "4 or 6"),
        ("dpm", {"nfe": 6, "afs": True}, "5 or 7"),
        ("edm", {"nfe": 1}, "3"),
        ("restart", {"nfe": 42}, "41 or 43"),
        ("restart", {"nfe": 45, "restart_info": f"18 {INFO}"}, "43"),
        ("euler", {"nfe": 5, "guidance_rate": 2.0}, "4 or 6"),
        ("pds", {"nfe": 45}, "44 or 46"),
        ("pds", {"nfe": 3, "n_steps": 2}, "6"),
    ],
)
def test_a_budget_that_does_not_fit_names_its_neighbours(
    name: str, options: dict, near: str
) -> None:
    with pytest.raises(UserError, match=f"exactly {options['nfe']} NFE: give {near}$"):
        sampler(name, **options)


def test_published_configurations_keep_their_published_nfe() -> None:
    for config in configurations().values():
        card = cards()["ms_coco" if config.model == "ms_coco" else "cifar10"]
        options = SamplerOptions(sampler="restart", restart_config=config.name, guidance_rate=1.0)
        built = build(options, card)
        assert built.nfe == config.nfe
        assert built.options.num_steps == config.n_main
        assert built.options.main_solver == config.main_solver
        options = dataclasses.replace(options, main_solver="dpm3")
        assert build(options, card).options.main_solver == "dpm3"


def test_defaults() -> None:
    for name in CLASSIC:
        (walk,) = sampler(name).plan
        assert isinstance(walk, Solve) and len(walk.ts) == 6 and not walk.afs
        rho7 = (80 ** (1 / 7) + torch.arange(6) / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert torch.allclose(walk.ts, rho7.double(), rtol=1e-5)
    for name in ("ddpm", "edm", "restart"):
        assert sampler(name).options.num_steps == 18
        assert sampler(name).plan[-1].times[-1] == 0
    assert sampler("restart").describe()["restart_info"] == RESTART
    assert sampler("restart", restart_info=f"7 {INFO}").options.num_steps == 7


def test_a_line_of_a_published_file_is_a_whole_configuration(tmp_path: Path) -> None:
    row = configurations()["imagenet64-39"]
    info = json.dumps({i: dataclasses.astuple(v) for i, v in enumerate(row.intervals)})
    (tmp_path / "params.txt").write_text(f"18 {INFO}\n{row.n_main} {info}\n")
    options = {"restart_info": f"{tmp_path / 'params.txt'}:2"}
    noise = {"S_noise": 1.003, "S_min": 0.01, "S_max": 1.0, "restart_gamma": 0.05}
    built, named = (
        sampler("restart", **options, **noise),
        sampler("restart", restart_config=row.name),
    )
    assert (built.nfe, built.options.num_steps) == (39, 14)
    assert built.describe()["parts"] == named.describe()["parts"]
    assert built.describe()["times"] == named.describe()["times"]
    with pytest.raises(UserError, match="the 14 main nodes"):
        sampler("restart", **options, num_steps=18)


@pytest.mark.parametrize(("budget", "most"), [(5, 1), (8, 2)])
def test_options_reach_every_plan_of_a_budget(budget: int, most: int) -> None:
    for candidate in candidates(budget, 0.002, 80.0, most=most):
        walks = candidate.walks
        built = sampler(
            "restart",
            num_steps=candidate.num_steps,
            restart_info=interval_json(candidate.intervals),
            main_solver=walks.main.name,
            restart_solver=walks.descent.name,
            afs=walks.main.afs,
            final_zero=walks.final_zero,
        )
        assert built.nfe == budget
        assert [str(part) for part in built.plan] == [str(part) for part in candidate.plan]
        assert built.describe()["times"] == Sampler("", candidate.plan).describe()["times"]
        solvers = [[p.solver for p in plan if isinstance(p, Solve)]
                   for plan in (built.plan, candidate.plan)]  # fmt: skip
        assert solvers[0] == solvers[1]


def test_options_reach_the_plan() -> None:
    (walk,) = sampler("dpmpp", max_order=2, predict_x0=False, lower_order_final=False).plan
    assert isinstance(walk, Solve) and isinstance(walk.solver, DPMpp)
    solver = walk.solver
    assert (solver.max_order, solver.predict_x0, solver.lower_order_final) == (2, False, False)
    (walk,) = sampler("dpm", r=0.25).plan
    assert isinstance(walk, Solve) and walk.solver.guide == FixedRatio(0.25)
    times = sampler(
        "euler", schedule_type="logsnr", sigma_min=0.1, sigma_max=10.0, num_steps=3
    ).describe()["times"]
    assert times == pytest.approx([10, 1, 0.1], rel=1e-9)
    jumps = [p for p in sampler("edm", S_churn=40.0, S_min=0.05, S_max=50.0, S_noise=1.003).plan
             if isinstance(p, Jump)]  # fmt: skip
    assert jumps and all(0.05 <= jump.t_from <= 50 and jump.scale == 1.003 for jump in jumps)
    gamma = math.sqrt(2) - 1  # 40 / 18 is above the bound
    assert all(math.isclose(j.t_to, j.t_from * (1 + gamma)) for j in jumps)
    heun = sampler("restart", restart_gamma=0.1)
    assert sum(isinstance(p, Jump) for p in heun.plan) > 2  # churn inside the descents


STOCHASTIC = {"edm", "restart"}
DPMPP = {"dpmpp", "dpmpp3c"}
#: The samplers that accept an option, as in docs/sampling.md, and a valid value.
USERS: dict[str, tuple[object, set[str]]] = {
    "num_steps": (20, set(SAMPLERS)),
    "nfe": (45, set(SAMPLERS) - {"heun", "dpm", "pds"}),  # their NFE is even
    "schedule_rho": (6.0, set(SAMPLERS) - {"pds"}),
    "sigma_min": (0.01, set(SAMPLERS)),
    "sigma_max": (70.0, set(SAMPLERS)),
    "times": ((80.0, 5.0, 1.0, 0.3, 0.05, 0.002), set(SAMPLERS) - {"pds"}),
    "guidance_rate": (1.0, set(SAMPLERS)),
    "afs": (True, {*CLASSIC, "restart"}),
    "schedule_type": ("logsnr", {*CLASSIC, "ddpm", "restart"}),
    "max_order": (2, {"dpmpp", "ipndm", "ipndm_v", "deis", "unipc"}),
    "predict_x0": (False, DPMPP),
    "lower_order_final": (False, DPMPP | {"unipc"}),
    "thresholding": (True, DPMPP),
    "r": (0.25, {"dpm"}),
    "variant": ("bh1", {"unipc"}),
    "eta": (0.5, {"ddpm"}),
    "restart_info": ('{"0": [3, 1, 0.1, 2]}', {"restart"}),
    "restart_config": ("cifar10-vp-43", {"restart"}),
    "main_solver": ("euler", {"restart"}),
    "restart_solver": ("euler", {"restart"}),
    "restart_gamma": (0.1, {"restart"}),
    "final_zero": (False, {"restart"}),
    "learned": ("main", set()),
    "S_churn": (1.0, STOCHASTIC),
    "S_min": (0.5, STOCHASTIC),
    "S_max": (1.0, STOCHASTIC),
    "S_noise": (1.1, STOCHASTIC),
    "speed_up": (20, {"pds"}),
    "freq_mask_path": ("none", {"pds"}),
    "space_mask_path": ("bundled", {"pds"}),
    "alpha": (3.0, {"pds"}),
    "snr": (0.1, {"pds"}),
    "n_steps": (2, {"pds"}),
    "pds_predictor": (False, {"pds"}),
    "batch_coupled": (True, {"pds"}),
}


def test_the_table_of_options_is_complete() -> None:
    assert USERS.keys() == {f.name for f in dataclasses.fields(SamplerOptions)} - {"sampler"}


@pytest.mark.parametrize("option", USERS)
def test_an_option_is_used_or_refused_but_never_ignored(option: str) -> None:
    value, users = USERS[option]
    for name in SAMPLERS:
        if name in users:
            assert sampler(name, **{option: value}).describe() != sampler(name).describe()
        elif option != "nfe":
            with pytest.raises(
                UserError, match=f"^--{option} .* is not an option of sampler '{name}'"
            ):
                sampler(name, **{option: value})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sampler": "magic"}, "unknown sampler 'magic'"),
        ({"sampler": "amed"}, "a trained predictor"),
        ({"sampler": "euler", "num_steps": 1}, "num_steps >= 2"),
        ({"sampler": "euler", "num_steps": 2, "afs": True}, "--num_steps 3"),
        ({"sampler": "euler", "num_steps": 6, "nfe": 5}, "--num_steps 6 and --nfe 5"),
        ({"sampler": "ipndm", "max_order": 5}, "max_order = 5"),
        ({"sampler": "dpmpp", "max_order": 4}, "max_order = 4"),
        ({"sampler": "unipc", "max_order": 4}, "UniPC has orders 1 to 3"),
        ({"sampler": "unipc", "variant": "bh3"}, "no variant 'bh3'"),
        ({"sampler": "euler", "sigma_min": 90.0}, "sigma_min = 90"),
        ({"sampler": "euler", "sigma_max": math.nan}, "--sigma_max nan"),
        ({"sampler": "euler", "schedule_type": "cosine"}, "'cosine'"),
        ({"sampler": "euler", "schedule_type": "discrete"}, "'discrete' needs"),
        ({"sampler": "edm", "afs": True}, "--afs True is not an option of sampler 'edm'"),
        ({"sampler": "restart", "restart_info": "{0: 1"}, "not valid JSON"),
        ({"sampler": "restart", "restart_info": '{"0": [3, 1, 2, 1]}'}, "below t_max = 1"),
        ({"sampler": "restart", "num_steps": 9, "restart_info": f"18 {INFO}"}, "--num_steps 9"),
        ({"sampler": "restart", "restart_config": "magic-1"}, "'magic-1'"),
        ({"sampler": "pds", "pds_predictor": False, "n_steps": 0}, "leave no step: give --n_steps"),
        ({"sampler": "restart", "restart_config": "cifar10-vp-43", "nfe": 43},
         "--nfe 43 is not an option of restart configuration 'cifar10-vp-43'"),
        ({"sampler": "restart", "nfe": 5, "restart_info": '{"0": [2, 1, 90, 95]}'},
         "outside the grid"),
        ({"sampler": "restart", "main_solver": "amed"}, "solver 'amed'"),
        ({"sampler": "pds"}, "'tiny' has no bundled masks"),
        ({"sampler": "pds", "freq_mask_path": "none", "alpha": 4.0}, "--alpha 4 "),
        ({"sampler": "pds", "speed_up": 600}, "give 500 or less"),
        ({"sampler": "pds", "speed_up": 2, "nfe": 50}, "--speed_up 2 and --nfe 50"),
        ({"sampler": "pds", "schedule_rho": 7.0}, "--schedule_rho 7.0 is not an option of"),
        ({"sampler": "pds", "sigma_min": 90.0}, "sigma_min = 90"),
    ],
)  # fmt: skip
def test_invalid_options_raise(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as caught:
        build(SamplerOptions(**options), make_card())
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_chain_of_pds_has_the_settings_of_its_card() -> None:
    """Those published for CIFAR-10, where a card has none; the published speed-ups round down."""
    options = SamplerOptions(sampler="pds", freq_mask_path="none")
    built = build(options, make_card())
    assert built.nfe == 2000 and built.options.snr == 0.16 and built.label == "pds-plain"
    langevin = {"N": 2000, "n_steps": 1, "snr": 0.075}
    card = dataclasses.replace(make_card(), langevin=langevin)
    fast = build(dataclasses.replace(options, speed_up=30), card)
    assert fast.nfe == 2 * 66 and fast.options.snr == 0.075
    with pytest.raises(UserError, match="PFGM"):
        build(options, dataclasses.replace(make_card(), pfgmpp=128))


@pytest.mark.parametrize(("afs", "nfe"), [(False, 4), (True, 3)])
def test_a_predictor_has_its_own_grid_and_solver(afs: bool, nfe: int) -> None:
    student = replace(trained(num_steps=3, afs=afs), name="00007-tiny-3")
    built = build_learned(SamplerOptions(), student, make_card())
    (walk,) = built.plan
    assert isinstance(walk, Solve) and walk.guide is student.predictor
    assert torch.equal(walk.ts, student.settings.grid.nodes()) and walk.afs == afs
    assert built.nfe == nfe == student.settings.nfe()
    assert built.label == "amed-00007"
    text = json.dumps(built.describe())
    other = replace(student, predictor=trained(num_steps=3, afs=afs).predictor)
    same = build_learned(SamplerOptions(), other, make_card())
    assert json.dumps(same.describe()) == text  # equal weights, equal record
    with torch.no_grad():
        other.predictor.fc_r.bias.add_(1e-3)
    changed = build_learned(SamplerOptions(), other, make_card())
    assert json.dumps(changed.describe()) != text


@pytest.mark.parametrize(
    ("options", "dataset", "sentence"),
    [
        ({"sampler": "euler"}, None, "--sampler euler cannot"),
        ({"num_steps": 5}, None, "--num_steps 5 is not an option of a predictor"),
        ({"afs": False}, None, "--afs False is not an option of a predictor"),
        ({}, "cifar10", "'tiny', not for 'cifar10'"),
    ],
)
def test_options_that_contradict_the_predictor_raise(
    options: dict, dataset: str | None, sentence: str
) -> None:
    card = dataclasses.replace(make_card(), name=dataset or "tiny")
    with pytest.raises(UserError, match=sentence):
        build_learned(SamplerOptions(**options), trained(), card)


def test_a_snapshot_has_a_label_of_its_own() -> None:
    labels = [
        build_learned(SamplerOptions(), replace(trained(), name=name), make_card()).label
        for name in ("00012-tiny", "00012-tiny/predictor-000100", "mine")
    ]
    assert labels == ["amed-00012", "amed-00012-predictor-000100", "amed-mine"]


def test_descents_have_the_exponent_of_a_polynomial_main_walk() -> None:
    """With another schedule they have the default, 7."""
    for asked, rho in (
        ({"schedule_rho": 3.0}, 3.0),
        ({}, 7.0),
        ({"schedule_type": "time_uniform", "schedule_rho": 2.0}, 7.0),
        ({"schedule_type": "logsnr"}, 7.0),
    ):
        plan = sampler("restart", restart_info='{"0": [5, 1, 0.5, 5]}', **asked).plan
        (at,) = [i for i, segment in enumerate(plan) if isinstance(segment, Jump)]
        descent = plan[at + 1]
        assert isinstance(descent, Solve)
        nodes = get_grid("polynomial", 5, float(descent.ts[-1]), 5.0, rho)
        assert torch.allclose(descent.ts, nodes, rtol=1e-12, atol=0)
