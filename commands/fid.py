"""Figures of images, or of a model's samples, against reference statistics; making such statistics.

Examples:

    python fid.py gen --predictor_path=1 --seeds 0-49999 --json fid.json
    python fid.py calc --images samples/00001 --num 2000 --json fid.json
    python fid.py calc --images samples/00001 --metrics fid,kid,pr,dc --ref stats.npz
    python fid.py ref --data cifar10-32x32-train.zip --features 10000 --dest stats.npz
    torchrun --standalone --nproc_per_node=2 fid.py calc --images images.zip --num_images 5000
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from commands import sample
from commands.options import detector_options
from evaluation import samples as generated
from evaluation.images import (
    destinations,
    image_pass,
    keep,
    open_detectors,
    open_references,
    report,
)
from metrics.detectors import parse_detectors
from metrics.measures import needs_of, parse_metrics, reference_needs, require
from metrics.statistics import Statistics
from metrics.summary import FeatureSummary
from runtime import cli
from runtime.dist import world
from runtime.errors import UserError
from runtime.record import RunRecord

PATH = click.Path(path_type=Path)
Made = AbstractContextManager[list[FeatureSummary]]
#: All options of sample.py but those of its pictures.
SAMPLING = [o for o in sample.main.params if o.name not in {"outdir", "grid", "return_inters"}]


def common_options(function: Any) -> Any:
    """The options that ``calc`` and ``ref`` share."""
    for option in (
        cli.dry_run_option,
        cli.device_option,
        cli.cache_option,
        cli.batch_option(256),
        # torchrun takes --num for a prefix of its own options, hence the longer name
        click.option("--num", "--num_images", type=click.IntRange(min=2), help="use N images"),
        detector_options,
    ):
        function = option(function)
    return function


def record_of(command: str, options: dict[str, Any]) -> RunRecord:
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    return RunRecord.make(command, plain, {}, {})


@click.group(context_settings={"show_default": True})
def main() -> None:
    """Quality of images, with the detector's name beside every figure."""


@main.command()
@click.option("--images", type=PATH, required=True, help="folder, zip, or .npz of statistics")
@click.option("--ref", default="cifar10-small", help="bundled name, or .npz; one for each detector")
@click.option("--json", "result_path", type=PATH, help="write the result to this file")
@common_options
def calc(dry_run: bool, **options: Any) -> None:
    """Figures of images, or of saved statistics, against a reference."""
    record, images, num = record_of("fid calc", options), options["images"], options["num"]
    names = parse_metrics(options["metrics"])
    needs = needs_of(names, options["features"])
    if dry_run:
        return click.echo(record.to_json())
    with world(options["device"]) as w:
        detectors = open_detectors(options, w)
        references = open_references(options["ref"], detectors, reference_needs(names))
        if images.suffix == ".npz":
            if num is not None:
                raise UserError(f"--num {num} draws images, but {images} holds statistics: omit it")
            made: Made = nullcontext(
                [require(FeatureSummary.load(images, d), needs) for d in detectors]
            )
        else:
            made = image_pass(images, detectors, needs, options, w)
        with made as summaries:
            if w.is_main:
                sets, path = (names, summaries, references, detectors), options["result_path"]
                click.echo(report(*sets, options["seed"], record, path))


@main.command()
@click.option("--data", type=PATH, required=True, help="folder or zip; or .npz of mu and sigma")
@click.option("--dest", required=True, help=".npz to write; one for each detector")
@common_options
def ref(dry_run: bool, **options: Any) -> None:
    """Statistics of images, to compare with later.

    Published statistics that hold mu and sigma alone become a reference when you state which
    detector (--detector) and how many images (--num) made them.
    """
    data, num, kept = options["data"], options["num"], options["features"]
    dests = destinations(options["dest"], len(parse_detectors(options["detector"])))
    needs = needs_of(parse_metrics(options["metrics"]), kept, always=kept is not None)
    if dry_run:
        return click.echo(record_of("fid ref", options).to_json())
    with world(options["device"]) as w:
        detectors = open_detectors(options, w)
        if data.suffix == ".npz":
            if num is None:
                raise UserError(f"{data} does not say how many images it is of: add --num")
            made: Made = nullcontext(
                [FeatureSummary(Statistics.adopt(data, d.id, num)) for d in detectors]
            )
        else:
            made = image_pass(data, detectors, needs, options, w)
        with made as summaries:
            if w.is_main:
                click.echo(keep(dests, summaries, detectors))


@main.command(
    params=SAMPLING, context_settings={"show_default": True, "default_map": {"seeds": "0-1999"}}
)
@click.option("--outdir", metavar="DIR", help="keep the images there too, as sample.py does")
@click.option("--ref", default="cifar10-small", help="as of calc, or 'none' for --dest alone")
@click.option("--dest", help=".npz: keep the statistics as a reference; one for each detector")
@click.option("--json", "result_path", type=PATH, help="write the result to this file")
@detector_options
def gen(dry_run: bool, device: str | None, predictor_path: str | None, **options: Any) -> None:
    """Figures of a model's samples, which go straight into the statistics.

    The samplers and their flags are those of sample.py. A killed command goes on where it stopped.
    """
    with world(device) as w:
        job = generated.plan(options, predictor_path, w)
        text = job.outline() if dry_run else generated.run(job)
        if w.is_main:
            click.echo(text)
