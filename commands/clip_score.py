"""How well images show their prompts, and how they please: CLIP score and aesthetic score.

Examples:

    python clip_score.py calc --images samples/ms_coco/dpmpp_nfe8
    python clip_score.py calc --images images.zip --prompt_path MS-COCO_val2014_30k_captions.csv
    python clip_score.py calc --images samples/a --metrics clip,aesthetic --json scores.json
    torchrun --standalone --nproc_per_node=2 clip_score.py calc --images samples/a --batch 256
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from evaluation.scores import CLIP_G, CLIP_L, NAMES, open_scorers, pair, parse_names, report, scored
from runtime import cli
from runtime.dist import world
from runtime.record import RunRecord

PATH = click.Path(path_type=Path)


@click.group()
def main() -> None:
    """Scores of text-to-image models, with the network's name beside every figure."""


@main.command(context_settings={"show_default": True})
@click.option("--images", type=PATH, required=True, help="folder or zip")
@cli.prompt_options
@click.option("--metrics", default="clip", metavar="LIST", help=f"of {', '.join(NAMES)}, by comma")
@click.option("--clip-path", type=PATH, help=f"folder of another CLIP  [default: {CLIP_G}]")
@click.option("--aesthetic-path", type=PATH, help="predictor  [default: the improved one]")
@click.option("--aesthetic-clip-path", type=PATH, help=f"its CLIP  [default: {CLIP_L}]")
# torchrun takes --num for a prefix of its own options, hence the longer name
@click.option("--num", "--num_images", type=click.IntRange(min=2), help="score N images")
@click.option("--seed", type=int, default=0, help="draws the N images")
@click.option("--json", "result_path", type=PATH, help="write the result to this file")
@cli.batch_option(64)
@cli.cache_option
@cli.device_option
@cli.dry_run_option
def calc(dry_run: bool, **options: Any) -> None:
    """Score images against their prompts, and their looks.

    The prompts are those that sample.py recorded with the images; for other images give
    --prompt_path, whose row i belongs to the i-th image by name.  A killed command goes on.
    """
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    names, record = (
        parse_names(options["metrics"]),
        RunRecord.make("clip_score calc", plain, {}, {}),
    )
    if dry_run:
        return click.echo(record.to_json())
    pairs = pair(options, "clip" in names)
    with world(options["device"]) as here:
        scorers = open_scorers(names, options, here)
        with scored(pairs, scorers, options, here) as (scores,):
            if here.is_main:
                click.echo(report(scorers, scores, pairs, record, options["result_path"]))
