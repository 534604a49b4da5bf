"""The options of ``train.py`` for AMED's students."""

from __future__ import annotations

from dataclasses import dataclass, field

from denoisers.conditions import ConditionOptions
from denoisers.registry import ModelSource
from runtime.errors import UserError
from solvers.grids import check_exponent
from solvers.registry import SOLVERS


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``train.py``, named like its flags."""

    model: ModelSource
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    outdir: str = "exps"
    total_kimg: float = 10.0  #: thousands of trajectories
    batch: int = 128  #: trajectories per update, over all processes
    batch_gpu: int | None = None  #: trajectories at a time per process; None means its whole share
    lr: float = 5e-3
    seed: int = 0
    tick: float = 0.5  #: thousands of trajectories between reports
    snap: int = 0  #: ticks between kept predictors; 0 keeps only the last one
    desc: str | None = None
    bench: bool = True
    resume: str | None = None  #: ``auto``, or the number or folder of a run
    sampler_stu: str = "amed"
    sampler_tea: str = "heun"
    trajectories: int | None = None  #: to read from disk; None: the teacher walks along
    num_steps: int = 4
    M: int = 1
    afs: bool = False
    scale_dir: float = 0.0
    scale_time: float = 0.0
    schedule_type: str | None = None
    schedule_rho: float | None = None
    max_order: int | None = None
    predict_x0: bool | None = None
    lower_order_final: bool | None = None
    thresholding: bool | None = None
    restart_info: str | None = None
    restart_target: str | None = None  #: None means that of `RestartSupervision`, as in S_noise
    S_noise: float | None = None


def check_options(options: TrainOptions) -> None:
    """Raise UserError for an option that neither the student nor the teacher has."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    student, teacher = options.sampler_stu, options.sampler_tea
    has = {name for kind in (student, teacher) if kind in SOLVERS for name in SOLVERS[kind].options}
    for name in ("max_order", "predict_x0", "lower_order_final", "thresholding"):
        if name in given and name not in has:
            raise UserError(
                f"--{name} {given[name]} is an option neither of the student {student} nor of the "
                f"teacher {teacher}: leave it out"
            )
    for name in ("restart_info", "restart_target", "S_noise"):
        if name in given and teacher != "restart":
            raise UserError(
                f"--{name} {given[name]} was given, but the teacher is {teacher}: add "
                "--sampler_tea=restart or leave it out"
            )
    if teacher == "dopri5" and options.M != TrainOptions.M:
        raise UserError(
            f"--M {options.M} is not an option of the teacher dopri5, which chooses its own nodes: "
            "leave it out"
        )
    if options.trajectories is not None:
        _check_trajectories(options)
    check_exponent(options.schedule_type or "polynomial", options.schedule_rho)


def _check_trajectories(options: TrainOptions) -> None:
    number = options.trajectories
    if options.sampler_tea == "restart":
        if options.restart_target != "trajectory":
            raise UserError(
                f"--trajectories {number} keeps Restart's states, from which "
                "--restart_target=flow would have to walk on: give --restart_target=trajectory, "
                "or leave one of them out"
            )
        if options.S_noise not in (None, 1.0):
            raise UserError(
                f"--S_noise {options.S_noise:g} scales the noise of a teacher that walks along, "
                f"but --trajectories {number} keeps Restart's own: leave one of them out"
            )
    elif options.M != TrainOptions.M:
        raise UserError(
            f"--M {options.M} refines the student's grid for the teacher, but --trajectories "
            f"{number} have a grid of their own: leave one of them out"
        )
