"""Samples of a model straight into statistics: no image has to lie on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from denoisers.protocol import Model
from evaluation.images import destinations, keep, open_detectors, open_references, report
from evaluation.passes import ImageStream, gathered
from metrics.detectors import Detector, parse_detectors
from metrics.measures import needs_of, parse_metrics, reference_needs
from metrics.summary import FeatureSummary, Requirements
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder
from runtime.images import to_uint8
from runtime.log import watch_batch
from runtime.record import RunRecord
from samplers.folder import FREE
from samplers.generate import SampleBatch, generate
from samplers.job import SamplingJob, Setup, open_model, prepare
from samplers.options import SamplerOptions

NONE = "none"


@dataclass(frozen=True)
class SampleMetricsJob:
    """What is to be sampled and measured; nothing has been loaded or written yet."""

    job: SamplingJob
    options: Mapping[str, Any]  #: of ``fid.py gen``
    names: tuple[str, ...]  #: of the metrics
    needs: Requirements
    dests: list[str]
    world: World

    def record(self, weights_sha256: str | None, nfe: int | None = None) -> RunRecord:
        """That of the sampling run, with what is measured; ``nfe`` is the metered one."""
        sampled = self.job.record(weights_sha256, self.world)
        mine = ("outdir", "subdirs", "detector", "detector_path", "metrics", "features", "seed",
                "ref", "dest", "result_path")  # fmt: skip
        left = {k: v for k, v in sampled.options.items() if k not in ("grid", "return_inters")}
        given = {k: str(v) if isinstance(v := self.options[k], Path) else v for k in mine}
        return RunRecord.make(
            "fid gen", left | given, sampled.model, sampled.plan | {"nfe_metered": nfe}
        )

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.job.known_sha256()).to_json()


def plan(options: Mapping[str, Any], predictor_path: str | None, world: World) -> SampleMetricsJob:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    names, kept = parse_metrics(options["metrics"]), options["features"]
    dest, count = options["dest"], len(parse_detectors(options["detector"]))
    if options["ref"] == NONE and (dest is None or options["result_path"] is not None):
        raise UserError(
            "--ref none measures nothing: give --dest to keep the statistics, and no --json"
        )
    if options["subdirs"] and options["outdir"] is None:
        raise UserError("--subdirs means nothing without images on disk: add --outdir")
    setup = Setup(**{n: options[n] for n in Setup.__dataclass_fields__ if n in options})
    sampler = SamplerOptions(**{n: options[n] for n in SamplerOptions.__dataclass_fields__})
    job = prepare(sampler, predictor_path, setup, world)
    if len(job.seeds) < 2:
        raise UserError(f"--seeds {setup.seeds} is one image, statistics need two: give more")
    needs = needs_of(names, kept, always=kept is not None)
    dests = [] if dest is None else destinations(dest, count)
    return SampleMetricsJob(job, options, names, needs, dests, world)


def run(gen: SampleMetricsJob) -> str:
    """Sample, measure and write; returns the figures in words, and what was written."""
    options, world, text = gen.options, gen.world, []
    detectors = open_detectors(options, world)
    references = []
    if options["ref"] != NONE:
        references = open_references(options["ref"], detectors, reference_needs(gen.names))
    with sampled(gen, detectors) as (record, made):
        if world.is_main and gen.dests:
            text.append(keep(gen.dests, made, detectors))
        if world.is_main and references:
            sets, path = (gen.names, made, references, detectors), options["result_path"]
            text.append(report(*sets, options["seed"], record, path))
    return "\n".join(text)


@contextmanager
def sampled(
    gen: SampleMetricsJob, detectors: list[Detector]
) -> Iterator[tuple[RunRecord, list[FeatureSummary]]]:
    """One pass over the samples: the record with the metered NFE, and each detector's summary.

    Images go to a folder as well where ``--outdir`` asks for it, as ``sample.py`` leaves them.
    """
    job, world, setup = gen.job, gen.world, gen.job.setup
    model = open_model(job, world)
    _try_out(model, detectors, world)
    record = job.record(model.sha256, world)
    kept = {k: v for k, v in record.options.items() if k == "seeds" or k not in FREE}
    identity = {"model": record.model, "plan": record.plan, "options": kept}
    folder = job.folder if setup.outdir is not None else None
    if folder is not None and world.is_main:
        record, _ = folder.open(record, job.seeds)
    share = -(-setup.batch // world.size)

    def walk(seeds: list[int], bar: tqdm[Any]) -> Iterator[SampleBatch]:
        for batch in generate(
            job.sampler, model, world.shard(seeds), batch=share, device=world.device,
            dtype=setup.state_dtype, conditions=job.conditions, watch=watch_batch(bar),
        ):  # fmt: skip
            if folder is not None:
                folder.save(batch)
            yield batch

    def batches(start: int, bar: tqdm[Any]) -> Iterator[Tensor]:
        if folder is not None:  # images that somebody removed since their statistics were kept
            lost = folder.missing(job.seeds[:start]) if world.is_main else []
            for _ in walk(world.broadcast_object(lost), bar):
                pass
        for batch in walk(job.seeds[start:], bar):
            yield torch.from_numpy(to_uint8(batch.images)).permute(0, 3, 1, 2)

    name = f"{job.card.name} {job.sampler.label}"
    stream = ImageStream(name, len(job.seeds), share, identity, batches)
    cache, seed = cache_folder(setup.cache_dir), gen.options["seed"]
    with gathered(stream, detectors, gen.needs, seed, world, cache) as made:
        nfe = job.sampler.nfe  # generate() has raised if any batch was metered otherwise
        if folder is not None and world.is_main:
            folder.close(record, nfe)
        yield gen.record(model.sha256, nfe), made


@torch.inference_mode()
def _try_out(model: Model, detectors: list[Detector], world: World) -> None:
    """Raise the ValueError of a detector that does not take such images, before any work."""
    x = torch.zeros(1, *model.card.shape, device=world.device)
    blank = torch.from_numpy(to_uint8(model.decode(x))).permute(0, 3, 1, 2)
    for detector in detectors:
        detector(blank)
