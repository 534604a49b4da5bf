"""Train a student of about five evaluations: an AMED predictor, or a whole NS solver."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import click
from click.core import ParameterSource

import amed.job
import ns.job
from amed.options import TrainOptions
from amed.settings import STUDENTS
from commands.help import SETTINGS
from commands.numbers import (
    BATCH,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    SEED,
    Number,
    images,
    nodes,
    updates,
)
from commands.options import (
    Name,
    device_option,
    dry_run_option,
    dtype_option,
    guidance_options,
    model_options,
    prompt_options,
    times_option,
)
from denoisers.batch import SeededBatch
from denoisers.cards import cards
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from denoisers.speed import Work, told
from ns.losses import LOSSES
from ns.options import EXPONENT, SEARCH, NsOptions
from runtime.dist import World
from runtime.errors import UserError
from runtime.job import Job, execute
from runtime.options import flag_names, parse_options
from runtime.outputs import check_name
from solvers.grids import SCHEDULES
from teachers.build import TARGETS, TEACHERS

EXAMPLES = """\b
Examples:
  python train.py --dataset_name=cifar10-small --sampler_stu=amed --sampler_tea=heun \\
      --num_steps=4 --M=1 --afs=True --scale_dir=0.01 --schedule_type=time_uniform --schedule_rho=1
  torchrun --standalone --nproc_per_node=2 train.py --dataset_name=cifar10-small \\
      --sampler_stu=ipndm --sampler_tea=restart --num_steps=4 --M=2 --afs=True \\
      --scale_dir=0.01 --scale_time=0.2 --restart_target=trajectory
  python train.py --dataset_name=cifar10-small --sampler_stu=ns --nfe=5
"""
NS = "ns"  #: the student that is a table
Options = TypeVar("Options")


def _named(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None:
        check_name("--desc", text)
    return text


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
# General
@click.option("--dataset_name", required=True, metavar="NAME", help=f"model: {', '.join(cards())}")
@model_options
@prompt_options
@click.option("--outdir", type=click.Path(file_okay=False), default="exps", help="parent folder")
@click.option("--total_kimg", type=POSITIVE, default=10.0)
@click.option("--batch", type=BATCH, default=128, help="trajectories per update")
@click.option("--batch-gpu", "batch_gpu", type=BATCH, help="at once per process")
@click.option("--lr", type=RATE, default=5e-3)
@click.option("--seed", type=SEED, default=0)
@click.option("--tick", type=NOT_NEGATIVE, default=0.5, help="kimg between reports")
@click.option("--snap", type=updates(0), default=0, help="ticks between kept predictors")
@click.option("--desc", callback=_named, help="text to add to the folder's name")
@click.option("--bench", type=bool, default=True, help="let cuDNN search for fast kernels")
@click.option(
    "--resume",
    metavar="auto|RUN",
    help="go on with a run, also to a larger --total_kimg; auto finds one with equal options",
)
@dtype_option
# Solver
@click.option("--sampler_stu", type=Name("student", (*STUDENTS, NS)), default="amed")
@click.option("--sampler_tea", type=Name("teacher", TEACHERS), default="heun")
@click.option(
    "--trajectories",
    type=images(1),
    help="of the teacher, computed once and read again; without, it walks along with the student",
)
@click.option("--num_steps", type=nodes(2), default=4, help="nodes of the student's grid")
@click.option("--M", "M", type=nodes(0), default=1, help="nodes the teacher inserts per interval")
@click.option("--afs", type=bool, default=False, help="free analytical first step")
@click.option("--scale_dir", type=FRACTION, default=0.0, help="range of the direction scale")
@click.option("--scale_time", type=FRACTION, default=0.0, help="range of the network-time scale")
# Schedule
@click.option(
    "--schedule_type",
    type=Name("schedule", SCHEDULES),
    help="[default: polynomial, rho 7; of flows discrete]",
)
@click.option("--schedule_rho", type=POSITIVE)
# Additional, for multistep solvers
@click.option("--max_order", type=click.IntRange(1, 4), help="[default: ipndm 4, dpmpp 3]")
@click.option("--predict_x0", type=bool, help="dpmpp: data form  [default: True]")
@click.option("--lower_order_final", type=bool, help="dpmpp: taper the order  [default: True]")
@click.option("--thresholding", type=bool, help="dpmpp: dynamic thresholding  [default: False]")
# Guidance
@guidance_options
# Restart as a teacher
@click.option("--restart_info", metavar="JSON", help="intervals  [default: the model's own]")
@click.option("--restart_target", type=click.Choice(TARGETS), help="[default: flow]")
@click.option("--S_noise", "S_noise", type=NOT_NEGATIVE, help="of the jumps' noise  [default: 1]")
# NS solvers, --sampler_stu=ns
@click.option("--nfe", type=nodes(1), default=5, help="ns: network evaluations")
@click.option("--search", type=updates(0), help=f"ns: tables to try for times  [default: {SEARCH}]")
@times_option("ns: network times, between sigma_max and sigma_min, instead of a search")
@click.option("--refine", type=updates(0), default=160, help="ns: updates; 0: none")
@click.option("--loss", type=click.Choice(LOSSES), default="spectral", help="ns: of images")
@click.option(
    "--exponent",
    type=Number(0, 2),
    help=f"ns: of the spectrum in the loss  [default: {EXPONENT}]",
)
@click.option(
    "--unpaired", type=NOT_NEGATIVE, default=0.0, help="ns: weight of Restart's statistics"
)
@click.option("--report", type=updates(1), default=20, help="ns: updates between reports")
@click.option("--checkpoint", is_flag=True, help="ns: recompute calls, to save memory")
@device_option
@dry_run_option
@click.pass_context
def main(context: click.Context, dry_run: bool, device: str | None, **flags: Any) -> None:
    """Train a few-step student of a pre-trained diffusion model.

    The student is a predictor that guides a solver (amed and the plugins), or a whole solver as a
    table (ns), whose own defaults are --batch 48, --lr 0.05 and --trajectories 512.  Prints the
    run's folder at the end; losses go there and to TensorBoard.
    """
    if flags["sampler_stu"] == NS:
        execute(ns.job.prepare, _options(NsOptions, context, flags), dry_run, device, _outlook)
    else:
        execute(amed.job.prepare, _options(TrainOptions, context, flags), dry_run, device, _outlook)


class Training(Job, Protocol):
    """A training run that is planned in full."""

    @property
    def source(self) -> ModelSource: ...

    def work(self, weights_sha256: str | None, done: int = 0) -> Work:
        """What is left to spend after ``done`` updates."""
        ...

    def portion(self, model: Model, here: World) -> SeededBatch:
        """As many samples as a process takes through the network at once."""
        ...


def _outlook(job: Training, here: World) -> str:
    """The work of a training and the time that a few calls promise."""
    if not job.source.is_here:
        return f"{job.work(None)}; only the weights, which are not here, could tell the time"
    model = job.source.load(here)
    return told(job.work(model.sha256), job.portion(model, here), here)


def _options(kind: type[Options], context: click.Context, flags: dict[str, Any]) -> Options:
    """The options of one kind of student; UserError for a flag that only the other kind has."""
    given = {n for n in flags if context.get_parameter_source(n) is ParameterSource.COMMANDLINE}
    takes = {*flag_names(kind), "sampler_stu"}
    foreign = sorted(given - takes)
    if foreign:
        raise UserError(
            f"--{foreign[0]} {flags[foreign[0]]} is not an option of --sampler_stu="
            f"{flags['sampler_stu']}: leave it out"
        )
    return parse_options(kind, {name: flags[name] for name in given & {*flag_names(kind)}})
