"""Sample images with a trained predictor, or with a classic or stochastic sampler."""

from __future__ import annotations

from typing import Any

import click

from commands.help import SETTINGS
from commands.numbers import LIMIT, NOT_NEGATIVE, POSITIVE, SHARE, Number, nodes
from commands.options import (
    Name,
    batch_option,
    class_option,
    compile_option,
    device_option,
    dry_run_option,
    dtype_option,
    guidance_options,
    mask_options,
    model_options,
    prompt_options,
    seeds_option,
    times_option,
)
from denoisers.cards import cards
from restart.tables import configurations
from runtime.job import execute
from runtime.options import parse_options
from samplers.job import DEFAULT_DATASET, SampleOptions, prepare
from samplers.options import LEARNED, SAMPLERS
from solvers.grids import SCHEDULES
from solvers.registry import CLASSIC
from solvers.unipc import VARIANTS

EXAMPLES = """\b
Examples:
  python sample.py --predictor_path=1 --seeds 0-63 --grid
  python sample.py --sampler=ipndm --nfe 5 --afs=True --seeds 0-49999 --subdirs
  python sample.py --sampler=restart --restart_info '{"0": [3, 2, 0.06, 0.3]}' --num_steps 18
  python sample.py --sampler=restart --predictor_path=1 --learned=main
  python sample.py --sampler=pds --speed_up 20 --seeds 0-15
  python sample.py --sampler=edm --num_steps 18 --S_churn 30 --S_min 0.05 --S_max 50
  torchrun --standalone --nproc_per_node=2 sample.py --predictor_path=1 --seeds 0-999
"""


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
# General
@click.option(
    "--predictor_path", metavar="RUN", help="number of a run in exps/, its folder, or a file"
)
@click.option(
    "--sampler",
    metavar="NAME",
    help=f"one of {', '.join(SAMPLERS)}; with --predictor_path only restart, which then uses it",
)
@click.option(
    "--dataset_name",
    metavar="NAME",
    help=f"model: {', '.join(cards())}  [default: the predictor's, else {DEFAULT_DATASET}]",
)
@model_options
@seeds_option("0-63")
@batch_option(64)
@class_option
@prompt_options
@click.option("--outdir", metavar="DIR", help="[default: samples/<dataset>/<sampler>_nfe<NFE>]")
@click.option("--subdirs", is_flag=True, help="a folder for every 1000 seeds")
@click.option(
    "--grid", is_flag=True, help="also one picture of the first images: <outdir>-grid.png"
)
@click.option(
    "--return_inters",
    is_flag=True,
    help="also film strips, a row per sample and a column per time: <outdir>-inters.png",
)
@dtype_option
@compile_option
@device_option
@dry_run_option
# Grid
@click.option(
    "--num_steps",
    type=nodes(2),
    help="grid nodes  [default: 6; ddpm, edm, restart: 18; pds: the model's, else 1000]",
)
@click.option("--nfe", type=nodes(1), help="budget, instead of --num_steps")
@click.option("--afs", type=bool, help="free analytical first step  [default: False]")
@click.option("--schedule_type", type=Name("schedule", SCHEDULES), help="[default: polynomial]")
@click.option(
    "--schedule_rho", type=POSITIVE, help="exponent  [default: polynomial 7, the others 1]"
)
@click.option("--sigma_min", type=POSITIVE, help="last noise level  [default: the model's]")
@click.option("--sigma_max", type=POSITIVE, help="first noise level  [default: the model's]")
@times_option("noise levels one by one, decreasing, instead of a schedule")
# Solver
@click.option(
    "--max_order",
    type=click.IntRange(1, 4),
    help="[default: ipndm, ipndm_v 4; dpmpp, deis, unipc 3]",
)
@click.option("--predict_x0", type=bool, help="dpmpp: data form  [default: True]")
@click.option(
    "--lower_order_final", type=bool, help="dpmpp, unipc: taper the order  [default: True]"
)
@click.option("--variant", type=click.Choice(VARIANTS), help="unipc: B(h)  [default: bh2]")
@click.option("--thresholding", type=bool, help="dpmpp: dynamic thresholding  [default: False]")
@click.option(
    "--r",
    "--dpm_r",  # torchrun takes --r for an abbreviation of its own options
    "r",
    type=SHARE,
    help="dpm: where the inserted node lies  [default: 0.5]",
)
# Noise: ddpm, edm and restart
@click.option("--eta", type=Number(0, 1), help="ddpm: 0 is DDIM  [default: 1]")
@click.option("--S_churn", "S_churn", type=NOT_NEGATIVE, help="[default: 0]")
@click.option("--S_min", "S_min", type=NOT_NEGATIVE, help="[default: 0]")
@click.option("--S_max", "S_max", type=LIMIT, help="[default: no limit]")
@click.option("--S_noise", "S_noise", type=NOT_NEGATIVE, help="[default: 1]")
# Restart
@click.option(
    "--restart_info",
    metavar="JSON|FILE[:LINE]",
    help='{"0": [N_restart, K, t_min, t_max], ...}  [default: the model\'s]',
)
@click.option("--restart_config", metavar="NAME", help=f"published: {', '.join(configurations())}")
@click.option("--restart_gamma", type=NOT_NEGATIVE, help="[default: 0]")
@click.option("--main_solver", type=Name("solver", CLASSIC), help="[default: heun]")
@click.option("--restart_solver", type=Name("solver", CLASSIC), help="[default: heun]")
@click.option("--final_zero", type=bool, help="restart: end at 0, not sigma_min  [default: True]")
@click.option(
    "--learned",
    type=click.Choice(LEARNED),
    help="restart with --predictor_path: the predictor walks the main grid, the descents "
    "(restart) or both  [default: main]",
)
# Predictor-corrector
@click.option("--speed_up", type=nodes(1), help="pds: divides --num_steps  [default: 1]")
@mask_options
@click.option("--alpha", type=Number(1, min_open=True), help="of masks  [default: 5]")
@click.option("--snr", type=POSITIVE, help="of the corrector  [default: the model's, else 0.16]")
@click.option("--n_steps", type=nodes(0), help="of the corrector  [default: 1]")
@click.option(
    "--pds_predictor", type=bool, help="False: the corrector's steps alone  [default: True]"
)
@click.option(
    "--batch_coupled", type=bool, help="step sizes of a batch, as published  [default: False]"
)
# Guidance
@guidance_options
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Sample images, one PNG per seed, with a record of how they were made.

    A killed run continues where it stopped; images depend neither on --batch nor on the number of
    processes.
    """
    execute(prepare, parse_options(SampleOptions, flags), dry_run, device)
