"""Train an AMED predictor: teacher trajectories supervise a student of about five evaluations."""

from __future__ import annotations

from typing import Any

import click

from amed.job import TrainOptions, prepare
from amed.settings import STUDENTS
from commands.options import (
    POSITIVE,
    device_option,
    dry_run_option,
    dtype_option,
    guidance_options,
    model_options,
    prompt_options,
)
from denoisers.cards import cards
from runtime.job import execute
from runtime.options import parse_options
from solvers.grids import SCHEDULES
from teachers.build import TARGETS, TEACHERS

EXAMPLES = """\b
Examples:
  python train.py --dataset_name=cifar10-small --sampler_stu=amed --sampler_tea=heun \\
      --num_steps=4 --M=1 --afs=True --scale_dir=0.01 --schedule_type=time_uniform --schedule_rho=1
  torchrun --standalone --nproc_per_node=2 train.py --dataset_name=cifar10-small \\
      --sampler_stu=ipndm --sampler_tea=restart --num_steps=4 --M=2 --afs=True \\
      --scale_dir=0.01 --scale_time=0.2
"""
FRACTION = click.FloatRange(0, 1, max_open=True)


@click.command(epilog=EXAMPLES, context_settings={"show_default": True})
# General
@click.option("--dataset_name", required=True, metavar="NAME", help=f"model: {', '.join(cards())}")
@model_options
@prompt_options
@click.option("--outdir", type=click.Path(file_okay=False), default="exps", help="parent folder")
@click.option("--total_kimg", type=POSITIVE, default=10.0)
@click.option("--batch", type=click.IntRange(1), default=128, help="trajectories per update")
@click.option("--batch-gpu", "batch_gpu", type=click.IntRange(1), help="at once per process")
@click.option("--lr", type=POSITIVE, default=5e-3)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--tick", type=click.FloatRange(0), default=0.5, help="kimg between reports")
@click.option("--snap", type=click.IntRange(0), default=0, help="ticks between kept predictors")
@click.option("--desc", help="text to add to the folder's name")
@click.option("--bench", type=bool, default=True, help="let cuDNN search for fast kernels")
@click.option(
    "--resume", metavar="auto|RUN", help="go on with a run; auto finds one with equal options"
)
@dtype_option
# Solver
@click.option("--sampler_stu", type=click.Choice(STUDENTS), default="amed")
@click.option("--sampler_tea", type=click.Choice(TEACHERS), default="heun")
@click.option("--num_steps", type=click.IntRange(2), default=4, help="nodes of the student's grid")
@click.option("--M", "M", type=int, default=1, help="nodes the teacher inserts per interval")
@click.option("--afs", type=bool, default=False, help="free analytical first step")
@click.option("--scale_dir", type=FRACTION, default=0.0, help="range of the direction scale")
@click.option("--scale_time", type=FRACTION, default=0.0, help="range of the network-time scale")
# Schedule
@click.option("--schedule_type", type=click.Choice(SCHEDULES), help="[default: polynomial, rho 7]")
@click.option("--schedule_rho", type=POSITIVE)
# Additional, for multistep solvers
@click.option("--max_order", type=click.IntRange(1, 4), help="[default: ipndm 4, dpmpp 3]")
@click.option("--predict_x0", type=bool, default=True, help="dpmpp: data form")
@click.option("--lower_order_final", type=bool, default=True, help="dpmpp: taper the order")
@click.option("--thresholding", type=bool, default=False, help="dpmpp: dynamic thresholding")
# Guidance
@guidance_options
# Restart as a teacher
@click.option("--restart_info", metavar="JSON", help="intervals  [default: the model's own]")
@click.option("--restart_target", type=click.Choice(TARGETS), default="flow")
@click.option(
    "--S_noise", "S_noise", type=click.FloatRange(0), default=1.0, help="jump noise scale"
)
@device_option
@dry_run_option
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Train a predictor for a few-step student of a pre-trained diffusion model.

    Prints the run's folder at the end; losses go there and to TensorBoard.
    """
    execute(prepare, parse_options(TrainOptions, flags), dry_run, device)
