"""Students, teachers and an optimizer that only watches, for the tests of the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from amed.step import (
    IntervalResult,
    MicroBatch,
    Student,
    train_batch,
)
from restart.intervals import parse_restart_info
from solvers.driver import Meter
from teachers.build import RestartSupervision, build_teacher
from teachers.supervision import Teacher
from tests.training_problems import mixture, normals, starts

HISTORY = ("ipndm", "dpmpp")
#: Reaches student times that an interval starts from, so flow targets do not form one walk.
RESTART = '{"0": [3, 2, 0.4, 12.0]}'


class Keep:
    """An optimizer that keeps the gradients of every step and changes nothing."""

    def __init__(self, predictor: nn.Module) -> None:
        self.predictor = predictor
        self.steps: list[dict[str, Tensor]] = []

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.predictor.zero_grad(set_to_none)

    def step(self) -> None:
        self.steps.append(
            {k: p.grad.clone() for k, p in self.predictor.named_parameters() if p.grad is not None}
        )


def settings_of(name: str, **options: Any) -> StudentSettings:
    defaults = {"num_steps": 4, "afs": True, "scale_dir": 0.05, "scale_time": 0.2, "M": 1}
    options = {**defaults, **options}
    return StudentSettings("tiny", name, sigma_min=0.002, sigma_max=80.0, **options)


def student_of(settings: StudentSettings) -> Student:
    return Student(settings.solver(), settings.grid.nodes(), settings.afs)


def teacher_of(settings: StudentSettings, flow: bool) -> Teacher:
    fine, stride = settings.grid.refined(settings.M)
    if flow:
        restart = RestartSupervision(parse_restart_info(RESTART))
        return build_teacher("restart", fine, stride, restart=restart)
    return build_teacher("heun", fine, stride, solver=settings.teacher_solver())


def predictor_of(settings: StudentSettings) -> AMEDPredictor:
    return AMEDPredictor(settings.scale_dir, settings.scale_time, seed=7).double()


def micro_of(settings: StudentSettings, numbers: Sequence[int], flow: bool = False) -> MicroBatch:
    meter = Meter(mixture())
    teacher = teacher_of(settings, flow)
    return MicroBatch.begin(meter, teacher.supervise(meter, starts(numbers), normals(numbers)))


def nothing(flat: Tensor) -> None:
    """The sum over one rank."""


def update(
    settings: StudentSettings,
    portions: Sequence[Sequence[int]],
    batch: int,
    flow: bool,
    reduce: Callable[[Tensor], object] = nothing,
) -> tuple[dict[str, Tensor], list[IntervalResult]]:
    """Parameters after one batch, cut into portions, and its results."""
    predictor = predictor_of(settings)
    optimizer = torch.optim.SGD(predictor.parameters(), lr=1e-3)
    micros = [micro_of(settings, numbers, flow) for numbers in portions]
    results = train_batch(predictor, optimizer, student_of(settings), micros, batch, reduce)
    return {k: v.detach() for k, v in predictor.named_parameters()}, results
