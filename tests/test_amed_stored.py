"""AMED's students: calls that repeat the teacher's, and trajectories that are read from disk."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amed.job
import amed.trainer
from amed.batches import StoredBatches
from amed.experiments import load_predictor
from amed.job import prepare
from amed.options import TrainOptions
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from amed.step import MicroBatch, Student, repeated_calls, train_batch
from commands import train
from comparison.students import learned_rows
from runtime.log import read_json_lines
from runtime.noise import shuffled
from runtime.record import RunRecord
from solvers.driver import Meter, integrate
from solvers.oracle import dopri5
from solvers.registry import make_solver
from teachers.build import build_teacher
from teachers.supervision import GridTeacher
from teachers.trajectories import TrajectoryOptions
from tests.scripts import Done, Script
from tests.test_ns_job import SHORT as NS
from tests.test_ns_job import small  # noqa: F401, a fixture that is used by itself
from tests.tiny_model import TinySource, tiny_model
from tests.training_problems import mixture, normals, starts
from tests.trajectory_problems import HERE

AMED = (
    *("--dataset_name=tiny", "--num_steps=3", "--batch=4", "--total_kimg=0.04", "--tick=0.02"),
    *("--scale_dir=0.01", "--afs=True", "--dtype=float64", "--device=cpu"),
)


# Calls that repeat the teacher's


def updated(kind: str, afs: bool, shares: bool) -> tuple[list[Tensor], list[float], int, int]:
    """Weights after a batch, its losses, the student's calls, and those that were spared."""
    settings = StudentSettings(
        "tiny", kind, 4, 0.002, 80.0, M=2, scale_dir=0.01, scale_time=0.2, afs=afs
    )
    refined = settings.grid.refined(settings.M)
    teacher = build_teacher("heun", *refined, shares=shares)
    student = Student(settings.solver(), settings.grid.nodes(), afs)
    meter, numbers = Meter(mixture()), range(6)
    supervision = teacher.supervise(meter, starts(numbers), normals(numbers))
    assert meter.nfe == supervision.nfe
    micro = MicroBatch.begin(meter, supervision)
    predictor = AMEDPredictor(0.01, 0.2, seed=3).double()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
    results = train_batch(predictor, optimizer, student, [micro], 6, lambda t: t)
    weights = [p.detach() for p in predictor.parameters()]
    spent = meter.nfe - supervision.nfe
    return weights, [r.loss for r in results], spent, repeated_calls(student, teacher)


@pytest.mark.parametrize(
    ("kind", "afs", "spared"),
    [("amed", False, 3), ("amed", True, 2), ("dpm", True, 2), ("ipndm", False, 1)]
    + [("ipndm", True, 0), ("dpmpp", False, 1)],
)
def test_shared_calls_are_not_made_again_and_change_nothing(
    kind: str, afs: bool, spared: int
) -> None:
    weights, losses, spent, none = updated(kind, afs, shares=False)
    same, others, fewer, counted = updated(kind, afs, shares=True)
    assert losses == others and all(map(torch.equal, weights, same))
    assert (spent - fewer, counted, none) == (spared, spared, 0)
    assert spent == 6 - afs


def test_the_shared_calls_are_those_at_the_students_times() -> None:
    denoiser = mixture()
    settings = StudentSettings("tiny", "amed", 4, 0.002, 80.0, M=2)
    for name in ("heun", "ipndm", "dpm"):
        teacher = build_teacher(name, *settings.grid.refined(2), shares=True)
        assert isinstance(teacher, GridTeacher)
        supervision = teacher.supervise(denoiser, starts(range(3)), normals(range(3)))
        assert len(supervision.denoised) == 3
        ts = settings.grid.nodes()
        for x, t, found in zip(supervision.start, ts[:-1], supervision.denoised, strict=True):
            assert torch.equal(found.x0, denoiser(x, t).x0)


# Trajectories on disk


@pytest.fixture
def run(script: Script) -> Any:
    def call(*arguments: str) -> Done:
        done = script(train.main, *AMED, *arguments)
        assert done.code == 0, done.err
        return done

    return call


def folder(done: Done) -> Path:
    return Path(done.out.splitlines()[-1])


def stored_batches(number: int, **more: Any) -> StoredBatches:
    options = TrainOptions(TinySource("tiny", dtype="float64"), trajectories=number, **more)
    job = prepare(options)
    assert job.stored is not None
    model = tiny_model("tiny")
    return StoredBatches(job.stored, model, job.stored.run(HERE, model), job.student.ts, HERE)


@pytest.fixture
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture is stiffer than a model of images: its teacher has more nodes."""
    monkeypatch.setattr(amed.job, "TrajectoryOptions", partial(TrajectoryOptions, num_steps=80))


def test_the_students_states_lie_on_the_teachers_trajectory(fine: None) -> None:
    """At times that are none of the teacher's, against the exact solution of the ODE."""
    batches = stored_batches(6, num_steps=5, schedule_type="logsnr")
    supervision, meter = batches.micro(range(6)).supervision, batches.micro(range(6)).meter
    assert torch.equal(supervision.start[1:], supervision.target[:-1]) and supervision.nfe == 0
    states = torch.cat([supervision.start[:1], supervision.target])
    exact = dopri5(meter.denoiser, states[0], batches.ts, rtol=1e-8, atol=1e-8).x
    own = integrate(make_solver("heun"), meter.denoiser, states[0], batches.ts).x
    errors, others = ((x[1:] - exact[1:]).flatten(1).norm(dim=1) for x in (states, own))
    assert bool((errors < 0.02 * others).all())


def test_kept_states_of_restart_are_those_of_the_teacher_that_walks_along() -> None:
    """On the student's own grid, with one evaluation more per kept node."""
    restart = {"restart_info": '{"0": [3, 2, 0.14, 2.0]}', "restart_target": "trajectory"}
    grid = {"num_steps": 4, "M": 2, "schedule_type": "polynomial"}
    options = TrainOptions(TinySource("tiny", dtype="float64"), sampler_tea="restart", **restart,
                           **grid)  # fmt: skip
    batches = stored_batches(6, sampler_tea="restart", **restart, **grid)
    numbers = shuffled(range(4), 6, 0)
    drawn = batches.job.draw(batches.model, numbers, HERE)
    teacher = prepare(options).teacher
    walked = teacher.supervise(drawn.meter, drawn.start(batches.ts[0]), drawn.process)
    kept = batches.micro(range(4)).supervision
    assert torch.allclose(kept.start, walked.start, rtol=1e-6, atol=1e-6)  # kept in float32
    assert torch.allclose(kept.target, walked.target, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(kept.start[-1], kept.target[-1])
    assert batches.job.nfe == walked.nfe + 4


def test_every_latent_is_read_once_in_a_pass() -> None:
    assert sorted(shuffled(range(20), 20, 5)) == list(range(20))
    first, second = shuffled(range(20), 20, 5), shuffled(range(20, 40), 20, 5)
    assert sorted(second) == list(range(20)) and first != second
    assert shuffled(range(15, 25), 20, 5) == [*first[15:], *second[:5]]
    assert shuffled(range(20), 20, 6) != first
    batches = stored_batches(6)
    seen = torch.cat([batches.micro([n]).state.x for n in range(6)])
    assert len({float(x.sum()) for x in seen}) == 6
    again = torch.cat([batches.micro([n]).state.x for n in range(6, 12)])
    assert {float(x.sum()) for x in seen} == {float(x.sum()) for x in again}


def test_a_student_of_kept_trajectories_learns_what_it_learns_with_the_teacher(
    fine: None, run: Any
) -> None:
    """Losses of the last reports; the latents differ, and those on disk are only 64."""
    kept = rows_of(folder(run("--trajectories=64", "--total_kimg=0.12")))
    live = rows_of(folder(run("--M=8", "--total_kimg=0.12")))
    first = sum(kept[0]["loss"])
    one, other = (sum(sum(row["loss"]) for row in rows[-5:]) / 5 for rows in (kept, live))
    assert one < 0.5 * first and one == pytest.approx(other, rel=0.3)


def test_other_students_read_the_same_trajectories(script: Script, run: Any) -> None:
    done = script(train.main, *NS)
    assert done.code == 0, done.err
    for more in ((), ("--sampler_stu=ipndm", "--scale_time=0.2"), ("--num_steps=4",)):
        assert "0 trajectories computed, 24 were there already" in run(
            "--trajectories=24", *more
        ).err  # fmt: skip


def test_the_record_and_the_row_name_them(run: Any, tmp_path: Path) -> None:
    path = folder(run("--trajectories=8"))
    record = RunRecord.read(path / "run.json")
    assert record.plan["teacher_nfe"] == 35 and record.options["trajectories"] == 8
    student = load_predictor(str(path), tmp_path)
    (row,) = learned_rows([student], tiny_model("tiny").card)
    assert row.detail == "heun teacher, 8 kept trajectories, 35 NFE; 40 trajectories"


def test_a_killed_run_goes_on_bit_equal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder(run("--trajectories=8", "--outdir=whole"))
    saved = iter([amed.trainer._save])  # the second time there is none
    with monkeypatch.context() as patch:
        patch.setattr(amed.trainer, "_save", lambda *all: next(saved)(*all))
        with pytest.raises(StopIteration):
            run("--trajectories=8", "--resume=auto")
    again = folder(run("--trajectories=8", "--resume=auto"))
    assert rows_of(whole) == rows_of(again)
    one, other = (load_predictor(str(path), ".").predictor for path in (whole, again))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return read_json_lines(path / "stats.jsonl")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--sampler_tea=restart",), "would have to walk on: give --restart_target=trajectory"),
        (
            ("--sampler_tea=restart", "--restart_target=trajectory", "--S_noise=0.9"),
            "--S_noise 0.9 .* leave one of them out",
        ),
        (("--M=3",), "--M 3 refines the student's grid .* leave one of them out"),
    ],
)
def test_what_does_not_go_together_is_refused(
    more: tuple[str, ...], sentence: str, script: Script
) -> None:
    done = script(train.main, *AMED, "--trajectories=8", *more)
    assert done.code == 1 and done.out == ""
    assert re.search(sentence, done.err)
