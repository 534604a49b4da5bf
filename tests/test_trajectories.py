"""tools.trajectories: a teacher's states on disk are those of the solver, computed once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from denoisers.conditions import ConditionOptions
from denoisers.registry import ModelSource
from plans.plan import run_plan
from runtime.dist import World
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.driver import integrate
from solvers.registry import make_solver
from teachers.trajectories import TrajectoryJob, TrajectoryOptions, prepare
from teachers.trajectory_files import SHARD, Shard
from teachers.walks import TeacherWalk
from tests.processes import run_command, together
from tests.sampler_models import MEAN, VAR, ClassModel, GaussianModel, MixtureModel
from tests.scripts import Script
from tests.trajectory_problems import HERE, NUMBER, options, shard_bytes, use_mixture
from tools import trajectories as tool

GRID = ("heun", "dpm", "dpmpp", "euler", "ipndm")


@pytest.fixture(autouse=True)
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mixture(tmp_path, monkeypatch)


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of all latents that a teacher has walked."""
    numbers: list[int] = []
    inner = TrajectoryJob.states

    def states(job: TrajectoryJob, model: Any, some: Any, here: World) -> Any:
        numbers.extend(some)
        return inner(job, model, some, here)

    monkeypatch.setattr(TrajectoryJob, "states", states)
    return numbers


@pytest.mark.parametrize("keep", ["all", "ends"])
@pytest.mark.parametrize("teacher", GRID)
def test_states_are_those_of_the_solver(teacher: str, keep: str) -> None:
    job, model = prepare(options(teacher, keep=keep)), GaussianModel()
    found = job.run(HERE, model)
    (batch,) = found.batches(100)
    assert batch.numbers == tuple(range(7)) and batch.x.dtype == torch.float32
    stride = 1 if keep == "all" else 4
    start = SeedNoise(range(7)).normal(("trajectories", 0, "latent"), (3, 4, 4), torch.float64)
    denoiser = GaussianModel().bind()
    walk = integrate(make_solver(teacher), denoiser, 80 * start, job.walk.nodes)
    assert torch.equal(batch.x, walk.x[::stride].float())
    assert torch.equal(found.times, walk.t[::stride]) and found.times[-1] == 0.002
    x0 = [denoiser(x, t).x0 for x, t in zip(walk.x, walk.t, strict=True)]
    assert torch.equal(batch.x0, torch.stack(x0)[::stride].float())
    assert found.nfe == walk.nfe + 1 == sum(model.calls) == job.nfe


def test_heun_on_18_nodes_is_the_ceiling_of_tables() -> None:
    """EDM's deterministic sampler, 35 evaluations: the denoised state at sigma_min ends it."""
    job, model = prepare(options(num_steps=18, keep="ends")), MixtureModel()
    found = job.run(HERE, model)
    edm = build(SamplerOptions(sampler="edm", num_steps=18), model.card)
    drawn = job.draw(model, range(7), HERE)
    walk = run_plan(edm.plan, drawn.meter, drawn.start(80.0), drawn.process)
    batch = found.read(range(7))
    assert torch.equal(batch.x0[-1], walk.x[-1].float())
    assert torch.equal(batch.x[-1], walk.x[-2].float())
    assert found.nfe == walk.nfe == edm.nfe == 35


def test_restart_ends_where_its_sampler_does() -> None:
    info = '{"0": [3, 2, 0.06, 4]}'
    asked = options("restart", num_steps=8, keep="ends", restart_info=info)
    job, model = prepare(asked), MixtureModel()
    found = job.run(HERE, model)
    sampler = build(SamplerOptions(sampler="restart", num_steps=8, restart_info=info), model.card)
    drawn = job.draw(model, range(7), HERE)
    walk = run_plan(sampler.plan, drawn.meter, drawn.start(80.0), drawn.process)
    assert torch.equal(found.read(range(7)).x0[-1], walk.x[-1].float())
    assert found.nfe == walk.nfe + 1  # at sigma_max
    assert prepare(replace(asked, seed=1)).run(HERE, model).nfe == found.nfe
    every = prepare(replace(asked, keep="all")).run(HERE, model)
    batch, drawn = every.read(range(7)), job.draw(model, range(7), HERE)
    assert batch.x.shape == batch.x0.shape == (8, 7, 3, 4, 4)
    x0 = [drawn.meter(x.double(), t).x0 for x, t in zip(batch.x, every.times, strict=True)]
    assert (torch.stack(x0) - batch.x0).abs().max() < 1e-4  # of states in float32


@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_dopri5_solves_the_ode(tol: float) -> None:
    job, model = prepare(options("dopri5", tol=tol)), GaussianModel()
    found = job.run(HERE, model)
    batch, var = found.read(range(7)), VAR + found.times.reshape(-1, 1, 1, 1, 1) ** 2
    exact = MEAN + (batch.x[0].double() - MEAN) * (var / var[0]).sqrt()
    level = 1 + found.times.reshape(-1, 1, 1, 1, 1)
    assert ((batch.x - exact) / level).abs().max() < max(20 * tol, 1e-5)  # stored in float32
    shrunk = MEAN + (batch.x - MEAN) * VAR / var
    assert (batch.x0 - shrunk).abs().max() < 1e-5
    assert found.nfe is None
    assert Shard(found.folder, 0).rows([3])[3].nfe == sum(model.calls) > 30


def test_half_precision_is_a_matter_of_the_disk(walked: list[int]) -> None:
    asked = options(keep="ends")
    whole, half = (
        prepare(replace(asked, store=store)).run(HERE) for store in ("float32", "float16")
    )
    a, b = whole.read(range(7)), half.read(range(7))
    assert b.x.dtype == b.x0.dtype == torch.float16
    assert torch.equal(a.x.half(), b.x) and torch.equal(a.x0.half(), b.x0)
    size = sum(map(len, shard_bytes(half.folder).values()))
    each = prepare(replace(asked, store="float16")).bytes_per_latent
    assert 0 <= size - 7 * each < 1000  # header and times


@pytest.mark.parametrize("teacher", ["heun", "restart"])
def test_batches_do_not_matter(teacher: str) -> None:
    found = []
    for batch in (1, 48, 1000):
        asked = options(teacher, f"batch-{batch}", number=SHARD + 9, batch=batch)
        found.append(shard_bytes(prepare(asked).run(HERE).folder))
    assert [*found[0]] == ["000000000.safetensors", f"{SHARD:09d}.safetensors"]
    assert found[0] == found[1] == found[2]


FLAGS = ("--dtype=float64", "--device=cpu", "--num_steps=4", f"--number={NUMBER}", "--batch=48")


def test_processes_do_not_matter(tmp_path: Path, script: Script) -> None:
    done = together(lambda: run_command(tool.main, "--cache_dir=two", *FLAGS), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    assert [rank.out.count(f"{NUMBER} trajectories, 7 NFE each") for rank in done] == [1, 0]
    alone = script(tool.main, "--cache_dir=one", *FLAGS)
    assert alone.code == 0 and f"{NUMBER} trajectories, 7 NFE each" in alone.out
    (one,), (two,) = Path("one/trajectories").iterdir(), Path("two/trajectories").iterdir()
    assert one.name == two.name and len(shard_bytes(one)) == 3
    assert shard_bytes(one) == shard_bytes(two)


def test_a_killed_run_goes_on_and_is_the_same(
    walked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(number=NUMBER, batch=24)
    whole = prepare(replace(asked, model=ModelSource("tiny", "elsewhere", dtype="float64",
                                                     cache_dir="whole"))).run(HERE)  # fmt: skip
    job, inner = prepare(asked), TeacherWalk.run
    walked.clear()

    def mortal(*arguments: Any) -> Any:
        if len(walked) > SHARD + 24:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(TeacherWalk, "run", mortal)
        job.run(HERE)
    (folder,) = Path("cache/trajectories").iterdir()
    assert [*shard_bytes(folder)] == ["000000000.safetensors"]
    assert RunRecord.read(folder / "run.json").plan["nfe"] == 9
    walked.clear()
    found = job.run(HERE)
    assert walked == list(range(SHARD, NUMBER))
    assert found.folder.name == whole.folder.name  # the same weights, from another path
    assert shard_bytes(found.folder) == shard_bytes(whole.folder)


def test_more_latents_are_added_to_what_is_there(walked: list[int]) -> None:
    parts = [(SHARD - 4, range(SHARD - 4)), (SHARD + 9, range(SHARD - 4, SHARD + 9)),
             (NUMBER, range(SHARD + 9, NUMBER)), (SHARD, range(0))]  # fmt: skip
    for number, new in parts:
        walked.clear()
        found = prepare(options(number=number)).run(HERE)
        assert walked == list(new) and len(found) == found.number == number
    assert len(list(Path("cache/trajectories").iterdir())) == 1
    at_once = prepare(options(cache="at-once", number=NUMBER)).run(HERE)
    assert shard_bytes(at_once.folder) == shard_bytes(found.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": "ipndm"},
        {"num_steps": 6},
        {"schedule_type": "logsnr"},
        {"schedule_rho": 5.0},
        {"seed": 1},
        {"keep": "ends"},
        {"store": "float16"},
        {"model": ModelSource("tiny", dtype="float32")},
        {"conditions": ConditionOptions(guidance_rate=2.0)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_trajectories_lie_elsewhere(change: dict[str, Any]) -> None:
    def folder(asked: TrajectoryOptions, sha256: str = "1") -> Path:
        job = prepare(asked)
        return job.folder(job.record(sha256))

    asked = options()
    assert folder(replace(asked, **change)) != folder(asked)
    assert folder(asked, "2") != folder(asked)
    assert folder(replace(asked, number=100, batch=1)) == folder(asked)
    assert not Path("cache").exists()


def test_own_options_of_a_teacher_and_prompts_tell_folders_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = replace(MixtureModel().card, text=True, label_dim=4)
    monkeypatch.setattr(ModelSource, "card", lambda *_: card)
    given = [
        options("dopri5", conditions=conditions, tol=tol)
        for conditions in (
            ConditionOptions(),
            ConditionOptions(label=1),
            ConditionOptions(label=2),
            ConditionOptions(prompt="a cat"),
            ConditionOptions(prompt="a dog"),
        )
        for tol in (1e-3, 1e-4)
    ]
    infos = ('{"0": [3, 2, 0.06, 4]}', '{"0": [3, 2, 0.06, 5]}', '{"0": [3, 3, 0.06, 4]}')
    given += [options("restart", num_steps=8, restart_info=info) for info in infos]
    jobs = [prepare(one) for one in given]
    assert len({job.folder(job.record("1")) for job in jobs}) == len(jobs) == 13


def test_classes_belong_to_numbers() -> None:
    model = ClassModel()
    job = replace(prepare(options(number=9)), card=model.card)
    found = job.run(HERE, model)
    batch = found.read([8, 2, 5])
    drawn = job.draw(model, batch.numbers, HERE)
    labels = SeedNoise(batch.numbers).integers((*found.stream, "class"), 4)
    assert found.stream == ("trajectories", 0) and len(labels.unique()) > 1
    assert torch.allclose(batch.x0[-1].mean((1, 2, 3)), labels / 4, atol=1e-5)
    x0 = drawn.meter(batch.x[0].double(), found.times[0]).x0
    assert torch.equal(x0.float(), batch.x0[0])
    assert torch.equal(drawn.start(80.0).float(), batch.x[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"number": 0}, "--number 0 is too small: give --number 1 or more"),
        ({"batch": 0}, "--batch 0 is too small"),
        ({"seed": -1}, "--seed -1 is too small: give --seed 0 or more"),
        (
            {"keep": "some"},
            "--keep some does not lead to the last of 5 nodes: give ends, all, or a divisor of 4",
        ),
        ({"store": "int8"}, "--store int8 is unknown: choose float32 or float16"),
        ({"teacher": "rk4"}, "unknown teacher 'rk4'; choose one of heun"),
        ({"num_steps": 1}, "a grid of 1 node"),
        ({"tol": 1e-3}, "--tol 0.001 is not an option of the teacher heun: leave it out, or give"),
        ({"teacher": "dopri5", "tol": 0.0}, "--tol 0.0 is no tolerance: give a positive number"),
        ({"restart_info": "{}"}, "is not an option of the teacher heun: .*--teacher restart"),
        (
            {"teacher": "restart", "restart_info": '9 {"0": [3, 2, 0.06, 4]}'},
            "--num_steps 5 contradicts the 9 main nodes in --restart_info: give --num_steps 9",
        ),
    ],
)
def test_nonsense_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        prepare(replace(options(), **change))
    assert "\n" not in str(raised.value)
    assert not Path("cache").exists()


def test_a_wrong_plan_of_evaluations_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TeacherWalk, "nfe", lambda *_: 8)
    with pytest.raises(RuntimeError, match="heun used 9 NFE instead of the planned 8"):
        prepare(options()).run(HERE)


def test_a_dry_run_touches_nothing(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSource, "load", None)
    done = script(tool.main, "-n", *FLAGS, "--store=float16")
    record, end = done.out.rsplit("}", 1)
    assert json.loads(record + "}")["plan"]["nfe"] == 7
    each = 2 * 2 * 48 * 2 + 8  # x and x0 at both ends, and the NFE
    size = f"{each} bytes each, {NUMBER * each / 1e6:.1f} MB in all"
    assert end.strip() == f"{NUMBER} trajectories, 7 NFE each, {size}"
    assert done.code == 0 and not Path("cache").exists()
