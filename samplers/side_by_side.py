"""Several samplers on the same seeds: a folder for each, and one picture of all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.dist import World
from runtime.errors import UserError
from runtime.images import FONT_SIZE, image_grid, read_png, save_png
from samplers.job import SampleOptions, SamplingJob
from samplers.job import prepare as prepare_sampling
from samplers.options import SamplerOptions

PICTURE = "side-by-side.png"
MIN_SIDE = 128  #: pixels; smaller images are enlarged
LINES = 16  #: lines of text in the height of an image


@dataclass(frozen=True)
class SampledRow:
    """The options of a row."""

    title: str | None  #: None means the sampler's label
    sampler: SamplerOptions
    predictor_path: str | None = None


@dataclass(frozen=True)
class SideBySideOptions:
    """The options of ``visualize.py``."""

    rows: tuple[SampledRow, ...]
    shared: SampleOptions  #: options of every row: model, seeds, conditions
    columns: int = 8  #: number of seeds in the picture
    outdir: Path = Path("samples/visualize")


@dataclass(frozen=True)
class SideBySideJob:
    """A sampling job for each row, by title; nothing has been loaded or written yet."""

    jobs: dict[str, SamplingJob]
    options: SideBySideOptions

    def outline(self) -> str:
        """The record and the NFE of every row."""
        costs = (f"{title}: {nfe_text(job)}" for title, job in self.jobs.items())
        return "\n".join([*(job.outline() for job in self.jobs.values()), *costs])

    def run(self, here: World) -> str:
        """Sample the missing images and draw the picture; returns a line for each."""
        model = next(iter(self.jobs.values())).source.load(here)
        lines = [f"{title}: {job.run(here, model)}" for title, job in self.jobs.items()]
        if not here.is_main:
            return ""
        target = self.options.outdir / PICTURE
        return "\n".join([*lines, str(_picture(self.jobs, self.options.columns, target))])


def prepare(options: SideBySideOptions) -> SideBySideJob:
    """Resolve every row; its folder in ``outdir`` is named after its title.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    jobs: dict[str, SamplingJob] = {}
    for row in options.rows:
        job = prepare_sampling(
            replace(options.shared, sampler=row.sampler, predictor_path=row.predictor_path)
        )
        title = row.title or job.sampler.label
        path = row_folder(options.outdir, title)
        if path in [other.folder.path for other in jobs.values()] or path == options.outdir:
            raise UserError(
                f"the title {title!r} is empty or used twice: give each row its own title, "
                "such as --row 'NAME: ddpm --nfe=100'"
            )
        jobs[title] = replace(job, folder=replace(job.folder, path=path))
    models = list(dict.fromkeys(job.card.name for job in jobs.values()))
    if len(models) > 1:
        raise UserError(
            f"the rows have different models, {' and '.join(models)}: give --dataset_name, and "
            "predictors that were trained for it"
        )
    return SideBySideJob(jobs, options)


def row_folder(outdir: Path, title: str) -> Path:
    """The folder of a row: its title in lower case, with dashes for other characters."""
    return outdir / re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-.")


def nfe_text(job: SamplingJob) -> str:
    """The NFE per image, and the number of guided calls if that is different."""
    nfe, cost = job.sampler.nfe, job.sampler.cost
    return f"{nfe} NFE" if cost == 1 else f"{nfe} NFE = {nfe // cost} guided calls"


def _picture(jobs: Mapping[str, SamplingJob], columns: int, target: Path) -> Path:
    """A row for each sampler, a column for each seed."""
    seeds = next(iter(jobs.values())).seeds[:columns]
    images = [read_png(job.folder.image(seed)) for job in jobs.values() for seed in seeds]
    zoom = max(1, MIN_SIDE // images[0].shape[0])
    images = [image.repeat(zoom, 0).repeat(zoom, 1) for image in images]
    page = image_grid(
        images,
        len(seeds),
        labels=[f"seed {seed}" for seed in seeds],
        row_labels=[f"{title}: {nfe_text(job)}" for title, job in jobs.items()],
        font_size=max(FONT_SIZE, images[0].shape[0] // LINES),
    )
    save_png(target, page)
    return target
