"""Several samplers on the same seeds: a folder for each, and one picture of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from runtime.dist import World
from runtime.errors import UserError
from runtime.images import FONT_SIZE, image_grid, save_png
from samplers.folder import read_png
from samplers.job import SamplingJob, Setup, prepare, run
from samplers.options import SamplerOptions

PICTURE = "side-by-side.png"
LEAST_SIDE = 128  #: pixels: smaller images are shown larger
LINES = 16  #: of text in the height of an image


class Spec(NamedTuple):
    """A row as it was asked for."""

    title: str | None  #: None is the sampler's label
    options: SamplerOptions
    predictor_path: str | None = None


def line_up(
    specs: Sequence[Spec], setup: Setup, outdir: Path, world: World
) -> dict[str, SamplingJob]:
    """A job for each row by its title; nothing has been loaded or written yet.

    Its folder in ``outdir`` is named after the title.  Raises UserError or ValueError, one
    sentence with the remedy.
    """
    jobs: dict[str, SamplingJob] = {}
    for spec in specs:
        job = prepare(spec.options, spec.predictor_path, setup, world)
        title = spec.title or job.sampler.label
        path = row_folder(outdir, title)
        if path in [other.folder.path for other in jobs.values()] or path == outdir:
            raise UserError(
                f"two rows are called {title!r}, or none: give each a name of its own, "
                "as in --row 'NAME: ddpm --nfe=100'"
            )
        jobs[title] = replace(job, folder=replace(job.folder, path=path))
    models = list(dict.fromkeys(job.card.name for job in jobs.values()))
    if len(models) > 1:
        raise UserError(
            f"the rows are of the models {' and '.join(models)}: give --dataset_name, and "
            "predictors that were trained for it"
        )
    return jobs


def row_folder(outdir: Path, title: str) -> Path:
    """Where the images of a row lie: its title without what file systems dislike."""
    return outdir / re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.")


def price(job: SamplingJob) -> str:
    """What an image costs, in words: evaluations, and calls where they are not the same."""
    nfe, cost = job.sampler.nfe, job.sampler.cost
    return f"{nfe} NFE" if cost == 1 else f"{nfe} NFE = {nfe // cost} guided calls"


def run_all(jobs: Mapping[str, SamplingJob], columns: int, outdir: Path, world: World) -> str:
    """Make what the folders lack, and the picture of the first ``columns`` seeds; a summary."""
    first = next(iter(jobs.values()))
    model = first.source.load(first.setup.dtype, world)
    lines = [f"{title}: {run(job, world, model)}" for title, job in jobs.items()]
    if not world.is_main:
        return ""
    return "\n".join([*lines, str(_picture(jobs, columns, outdir / PICTURE))])


def _picture(jobs: Mapping[str, SamplingJob], columns: int, target: Path) -> Path:
    """A row for each sampler, a column for each seed."""
    seeds = next(iter(jobs.values())).seeds[:columns]
    images = [read_png(job.folder.image(seed)) for job in jobs.values() for seed in seeds]
    zoom = max(1, LEAST_SIDE // images[0].shape[0])
    images = [image.repeat(zoom, 0).repeat(zoom, 1) for image in images]
    page = image_grid(
        images,
        len(seeds),
        labels=[f"seed {seed}" for seed in seeds],
        row_labels=[f"{title}: {price(job)}" for title, job in jobs.items()],
        font_size=max(FONT_SIZE, images[0].shape[0] // LINES),
    )
    save_png(target, page)
    return target
