"""Metrics of images, or of a model's samples, against reference statistics."""

from __future__ import annotations

from typing import Any

import click

from commands import sample
from commands.help import SETTINGS
from commands.options import (
    PATH,
    batch_option,
    cache_option,
    combine,
    device_option,
    dry_run_option,
    json_option,
    metric_options,
    num_option,
    references_option,
    statistics_option,
)
from evaluation.image_metrics import (
    ImageMetricsOptions,
    StatisticsOptions,
    prepare_metrics,
    prepare_statistics,
)
from evaluation.samples import SampleMetricsOptions
from evaluation.samples import prepare as prepare_samples
from runtime.job import execute
from runtime.options import parse_options

#: All options of sample.py but those of its pictures.
SAMPLING = [o for o in sample.main.params if o.name not in {"outdir", "grid", "return_inters"}]
pass_options = combine(
    metric_options, num_option, batch_option(256), cache_option, device_option, dry_run_option
)
EXAMPLES = """\b
Examples:
  python fid.py gen --predictor_path=1 --seeds 0-49999 --json fid.json
  python fid.py calc --images samples/00001 --num 2000 --json fid.json
  python fid.py calc --images samples/00001 --metrics fid,kid,pr,dc --ref stats.npz
  python fid.py calc --images samples/00001 --ref samples/00002
  python fid.py ref --data cifar10-32x32-train.zip --features 10000 --dest stats.npz
  torchrun --standalone --nproc_per_node=2 fid.py calc --images images.zip --num_images 5000
"""


@click.group(epilog=EXAMPLES, context_settings=SETTINGS)
def main() -> None:
    """Quality of images, with the detector's name beside every number."""


@main.command()
@click.option("--images", type=PATH, required=True, help="folder, zip, or .npz of statistics")
@references_option
@json_option
@pass_options
def calc(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Metrics of images, or of saved statistics, against a reference.

    Run the same command again to continue after an interruption.
    """
    execute(prepare_metrics, parse_options(ImageMetricsOptions, flags), dry_run, device)


@main.command()
@click.option("--data", type=PATH, required=True, help="folder or zip; or .npz of mu and sigma")
@statistics_option(required=True)
@pass_options
def ref(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Statistics of images, to compare with later.

    Published statistics that hold mu and sigma alone become a reference when you state which
    detector (--detector) and how many images (--num) made them.
    """
    execute(prepare_statistics, parse_options(StatisticsOptions, flags), dry_run, device)


@main.command(params=SAMPLING, context_settings={**SETTINGS, "default_map": {"seeds": "0-1999"}})
@click.option("--outdir", metavar="DIR", help="keep the images there too, as sample.py does")
@references_option
@statistics_option(required=False)
@json_option
@metric_options
def gen(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Metrics of a model's samples, which go straight into the statistics.

    The samplers and their flags are those of sample.py.  Run the same command again to continue
    after an interruption.
    """
    execute(prepare_samples, parse_options(SampleMetricsOptions, flags), dry_run, device)
