"""How well images show their prompts, and their looks: CLIP score and aesthetic score."""

from __future__ import annotations

from typing import Any

import click

from commands.help import SETTINGS
from commands.numbers import SEED
from commands.options import (
    PATH,
    batch_option,
    cache_option,
    device_option,
    dry_run_option,
    json_option,
    num_option,
    prompt_options,
)
from evaluation.scores import CLIP_G, CLIP_L, NAMES, ScoreOptions, prepare
from runtime.job import execute
from runtime.options import parse_options

EXAMPLES = """\b
Examples:
  python clip_score.py calc --images samples/ms_coco/dpmpp_nfe8
  python clip_score.py calc --images images.zip --prompt_path MS-COCO_val2014_30k_captions.csv
  python clip_score.py calc --images samples/a --metrics clip,aesthetic --json scores.json
  torchrun --standalone --nproc_per_node=2 clip_score.py calc --images samples/a --batch 256
"""


@click.group(epilog=EXAMPLES, context_settings=SETTINGS)
def main() -> None:
    """Scores of text-to-image models, with the network's name beside every number."""


@main.command(context_settings=SETTINGS)
@click.option("--images", type=PATH, required=True, help="folder or zip")
@prompt_options
@click.option("--metrics", default="clip", metavar="LIST", help=f"of {', '.join(NAMES)}, by comma")
@click.option("--clip-path", type=PATH, help=f"folder of another CLIP  [default: {CLIP_G}]")
@click.option("--aesthetic-path", type=PATH, help="predictor  [default: the improved one]")
@click.option("--aesthetic-clip-path", type=PATH, help=f"its CLIP  [default: {CLIP_L}]")
@num_option
@click.option("--seed", type=SEED, default=0, help="draws the N images")
@json_option
@batch_option(64)
@cache_option
@device_option
@dry_run_option
def calc(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Score images against their prompts, and their looks.

    The prompts are those that sample.py recorded with the images; for other images give
    --prompt_path, whose row i belongs to the i-th image by name.  Run the same command again to
    continue after an interruption.
    """
    execute(prepare, parse_options(ScoreOptions, flags), dry_run, device)
