"""Results of training: students beat their solvers, and the effect of Restart's noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amed.batches import Data, TaughtBatches
from amed.experiments import PREDICTOR, load_predictor
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from amed.step import Student
from amed.trainer import Loop, train
from denoisers.analytic import MixtureDenoiser
from denoisers.cards import cards
from restart.intervals import parse_restart_info
from runtime.dist import World
from runtime.log import read_json_lines
from runtime.record import RunRecord
from solvers.driver import integrate, planned_nfe
from solvers.grids import get_grid
from solvers.oracle import dopri5
from solvers.registry import make_solver
from teachers.build import RestartSupervision, build_teacher
from tests.training_problems import SHAPE, mixture, starts

CARD = replace(cards()["cifar10-small"], name="tiny", channels=SHAPE[0], resolution=SHAPE[1])
PIXELS = SHAPE[0] * SHAPE[1] * SHAPE[2]
CPU = torch.device("cpu")


@dataclass
class Trained:
    """A finished run, read back from its folder."""

    student: Student
    predictor: AMEDPredictor
    rows: list[dict[str, Any]]


def train_on(denoiser: MixtureDenoiser, folder: Path, total: int, batch: int, **kw: Any) -> Trained:
    info, target = kw.pop("restart_info", None), kw.pop("restart_target", "flow")
    restart = RestartSupervision(parse_restart_info(info), target) if info else None
    settings = StudentSettings(
        "tiny", num_steps=4, sigma_min=0.002, sigma_max=80.0, afs=True, scale_dir=0.01, **kw
    )
    student = Student(settings.solver(), settings.grid.nodes(), settings.afs)
    refined, walker = settings.grid.refined(settings.M), settings.teacher_solver()
    teacher = build_teacher(settings.sampler_tea, *refined, solver=walker, restart=restart)
    train(
        AMEDPredictor(0.01, 0.0, seed=0).double(),
        student,
        TaughtBatches(Data(lambda noise, stream: denoiser, CARD, 0, torch.float64, CPU), teacher),
        Loop(total=total, batch=batch, micro=batch, tick=total // 4, snap=0, lr=5e-3),
        World(0, 1, CPU),
        folder,
        RunRecord.make("train", settings.to_options(), {}, {}),
    )
    trained = load_predictor(str(folder / PREDICTOR), folder)
    assert trained.settings == settings
    return Trained(student, trained.predictor, read_json_lines(folder / "stats.jsonl"))


@pytest.mark.parametrize(
    ("student", "teacher", "M", "schedule", "rho", "own", "own_nodes"),
    [
        ("amed", "heun", 1, "time_uniform", 1.0, "dpm", 4),  # the AMED rule with a fixed r
        ("ipndm", "ipndm", 2, "polynomial", 7.0, "ipndm", 7),
    ],
)
def test_a_student_beats_its_own_solver(
    student, teacher, M, schedule, rho, own, own_nodes, tmp_path
):
    """Mean squared distance to the ODE's solution at 5 evaluations, on latents of no training."""
    denoiser = mixture(spread=0.3, components=6)
    run = train_on(
        denoiser,
        tmp_path,
        640,
        16,
        sampler_stu=student,
        sampler_tea=teacher,
        M=M,
        schedule_type=schedule,
        schedule_rho=rho,
    )
    x = starts(range(5000, 5064))
    truth = dopri5(denoiser, x, get_grid("logsnr", 2, 0.002, 80.0), 1e-7, 1e-7).x[-1]

    def distance(solver, ts, guide=None) -> float:
        assert planned_nfe(solver, ts, guide, afs=True) == 5
        with torch.no_grad():
            walk = integrate(solver, denoiser, x, ts, guide, afs=True)
        assert walk.nfe == 5
        return float((walk.x[-1] - truth).square().flatten(1).sum(1).mean())

    learned = distance(run.student.solver, run.student.ts, run.predictor)
    grid = get_grid(schedule, own_nodes, 0.002, 80.0, rho)
    assert learned < 0.3 * distance(make_solver(own), grid)
    untrained = AMEDPredictor(0.01, 0.0, seed=0).double()
    assert learned < 0.3 * distance(run.student.solver, run.student.ts, untrained)
    losses = [sum(row["loss"]) for row in run.rows]
    assert losses[-1] < 0.5 * losses[0]


#: Its final descent passes through the student's third time, 0.47.
AROUND = '{"0": [3, 2, 0.06, 2.0]}'


@pytest.mark.parametrize("student", ["amed", "ipndm"])
def test_trajectory_targets_have_a_floor_of_the_logged_variance_and_flow_has_not(student, tmp_path):
    """The variance of Restart's trajectories is loss that no deterministic student can remove."""
    runs = {
        target: train_on(
            mixture(spread=0.5, components=6),
            tmp_path / target,
            640,
            32,
            sampler_stu=student,
            sampler_tea="restart",
            M=2,
            restart_info=AROUND,
            restart_target=target,
        )
        for target in ("trajectory", "flow")
    }
    logged = torch.tensor([row["teacher/variance_t"] for row in runs["flow"].rows]).mean(0)
    assert logged[:2].tolist() == [0.0, 0.0] and bool((logged[2:] > 0.3).all())
    assert [row["teacher/variance_t"] for row in runs["trajectory"].rows] == [
        row["teacher/variance_t"] for row in runs["flow"].rows
    ]
    loss = {target: torch.tensor([row["loss"] for row in run.rows]) for target, run in runs.items()}
    # A student without history starts interval 2 from the restarted state: no jump, no floor.
    for n in (1, 2) if student == "ipndm" else (1,):
        floor = PIXELS * float(logged[n + 1])
        last = float(loss["trajectory"][-2:, n].mean())
        assert 0.85 * floor < last < 1.25 * floor, (n, floor, last)
        assert float(loss["trajectory"][:, n].min()) > 0.8 * floor
        assert float(loss["flow"][-1, n]) < 0.2 * floor
