"""Metrics of a model's samples: they go straight into the statistics, without images on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from denoisers.protocol import Model
from evaluation.converged import NONE
from evaluation.detectors import check_images, open_detectors
from evaluation.metric_report import (
    MeasuredSet,
    MetricOptions,
    report_metrics,
    save_statistics,
)
from evaluation.passes import ImageStream, gather_features
from metrics.detectors import Detector
from metrics.summary import FeatureSummary
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder
from runtime.images import to_uint8_tensor
from runtime.options import flat_options
from runtime.outputs import check_file, claimed
from runtime.record import RunRecord
from samplers.folder import FREE, Folder
from samplers.generate import SampleBatch
from samplers.job import SampleOptions, SamplingJob
from samplers.job import prepare as prepare_sampling

#: Options that a record holds as they were given to ``fid.py gen``.
RECORDED = (
    "outdir", "subdirs", "detector", "detector_path", "metrics", "features", "seed", "ref", "dest",
    "result_path",
)  # fmt: skip
#: Options of ``sample.py`` that ``fid.py gen`` does not have.
PICTURES = ("grid", "return_inters")


@dataclass(frozen=True)
class SampleMetricsOptions:
    """What ``fid.py gen`` is asked for, under the names of its flags."""

    sampling: SampleOptions = field(default_factory=SampleOptions)
    metric: MetricOptions = field(default_factory=MetricOptions)
    ref: tuple[str, ...] = ("cifar10-small",)  #: for each detector, or `NONE`
    dest: tuple[str, ...] | None = None
    result_path: Path | None = None


@dataclass(frozen=True)
class SampleMetricsJob:
    """Samples that will be made and measured; nothing has been loaded or written yet."""

    options: SampleMetricsOptions
    sampling: SamplingJob

    @property
    def folder(self) -> Folder | None:
        """Where the images are kept as well, if they are."""
        return None if self.options.sampling.outdir is None else self.sampling.folder

    def record(
        self, weights_sha256: str | None, here: World | None = None, nfe: int | None = None
    ) -> RunRecord:
        """That of the sampling run, with what is measured; ``nfe`` is the metered one."""
        sampled, given = self.sampling.record(weights_sha256, here), flat_options(self.options)
        options = {k: v for k, v in sampled.options.items() if k not in PICTURES}
        options |= {key: given[key] for key in RECORDED}
        plan = sampled.plan | {"nfe_metered": nfe}
        return RunRecord.make("fid gen", options, sampled.model, plan)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.sampling.source.known_sha256).to_json()

    def run(self, here: World) -> str:
        """Sample, measure and write; returns the metrics and what was written, in words."""
        options = self.options
        check_file(options.result_path, "--json", here)
        for file in [] if options.dest is None else options.metric.destinations(options.dest):
            check_file(file, "--dest", here)
        with nullcontext() if self.folder is None else claimed(self.folder.path, here):
            return self._run(here)

    def _run(self, here: World) -> str:
        options, text = self.options, []
        detectors, references = open_detectors(options.metric.detector, here), []
        if options.ref != (NONE,):
            references = options.metric.open_references(options.ref, detectors)
        with self._measure(detectors, here) as (record, summaries):
            if here.is_main and options.dest is not None:
                files = options.metric.destinations(options.dest)
                text.append(save_statistics(files, summaries, detectors))
            if here.is_main and references:
                sets = list(map(MeasuredSet, detectors, summaries, references))
                text.append(report_metrics(options.metric, sets, record, options.result_path))
        return "\n".join(text)

    @contextmanager
    def _measure(
        self, detectors: Sequence[Detector], here: World
    ) -> Iterator[tuple[RunRecord, list[FeatureSummary]]]:
        """One pass over the samples: the record with the metered NFE, and each detector's summary.

        Where ``--outdir`` asks for it, images go to a folder as well, as ``sample.py`` leaves them.
        """
        job, folder = self.sampling, self.folder
        model = job.load(here)
        check_images(detectors, model, job.source.state_dtype, here)
        record = job.record(model.sha256, here)
        stream = self._stream(model, record, here)
        if folder is not None and here.is_main:
            record, _ = folder.open(record, job.seeds)
        cache, metric = cache_folder(job.source.cache_dir), self.options.metric
        needs = metric.needs(kept=True)
        with gather_features(stream, detectors, needs, metric.seed, here, cache) as summaries:
            nfe = job.sampler.nfe  # generate() has raised if any batch was metered otherwise
            if folder is not None and here.is_main:
                folder.close(record, nfe)
            yield self.record(model.sha256, here, nfe), summaries

    def _stream(self, model: Model, record: RunRecord, here: World) -> ImageStream:
        """The samples by number; those whose images are kept are written on the way."""
        job, folder = self.sampling, self.folder
        kept = {k: v for k, v in record.options.items() if k == "seeds" or k not in FREE}
        identity = {"model": record.model, "plan": record.plan, "options": kept}

        def batches(start: int, bar: tqdm[Any]) -> Iterator[Tensor]:
            if folder is not None:  # images that were removed since their statistics were saved
                lost = folder.missing(job.seeds[:start]) if here.is_main else []
                for _ in self._samples(here.broadcast_object(lost), model, here, bar):
                    pass
            for batch in self._samples(job.seeds[start:], model, here, bar):
                yield to_uint8_tensor(batch.images)

        name, share = f"{job.card.name} {job.sampler.label}", here.share(job.options.batch)
        return ImageStream(name, len(job.seeds), share, identity, batches)

    def _samples(
        self, seeds: Sequence[int], model: Model, here: World, bar: tqdm[Any]
    ) -> Iterator[SampleBatch]:
        """This process's part of the samples of ``seeds``, saved where images are kept."""
        for batch in self.sampling.batches(seeds, model, here, bar):
            if self.folder is not None:
                self.folder.save(batch)
            yield batch


def prepare(options: SampleMetricsOptions) -> SampleMetricsJob:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    metric, dest, sampling = options.metric, options.dest, options.sampling
    metric.needs(kept=True)
    if options.ref == (NONE,) and (dest is None or options.result_path is not None):
        raise UserError(
            "--ref none measures nothing: give --dest to keep the statistics, and no --json"
        )
    if sampling.subdirs and sampling.outdir is None:
        raise UserError("--subdirs requires images on disk: add --outdir")
    job = prepare_sampling(sampling)
    if len(job.seeds) < 2:
        raise UserError(f"--seeds {sampling.seeds} is one image, statistics need two: give more")
    if options.ref != (NONE,):
        metric.references(options.ref)
    if dest is not None:
        metric.destinations(dest)
    return SampleMetricsJob(options, job)
