"""Measuring samplers: images of the same seeds, block by block, through one detector."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation.converged import Converged, ConvergedIdentity, open_converged
from evaluation.detectors import DetectorOptions, open_detectors
from evaluation.image_prompts import PromptsIdentity
from metrics.detectors import Detector
from metrics.fid import BlockFid, block_fid
from metrics.measures import KEPT
from metrics.references import load_reference
from metrics.statistics import Statistics
from metrics.summary import Collector, FeatureSummary, Requirements, joined
from runtime.dist import World
from runtime.errors import UserError
from runtime.images import to_uint8, to_uint8_tensor
from runtime.options import Json
from runtime.seeds import seed_ranges
from runtime.typed import OPTIONAL
from samplers.generate import SampleBatch, generate
from samplers.graph import Record, cuda_graph
from samplers.sampler import Sampler

SHOWN = 10  #: images of each sampler in pictures


class DetectorReference(NamedTuple):
    """A detector, and statistics of the data in its features."""

    detector: Detector
    statistics: Statistics


class Measured(NamedTuple):
    """What one pass over the images of a sampler gives."""

    fid: BlockFid  #: to the data
    others: tuple[float, ...]  #: FID to the data by each of `Harness.others`
    converged: BlockFid | None  #: to the model's own converged samples
    nfe: int  #: metered
    images_per_second: float  #: of sampling alone
    summary: FeatureSummary  #: with features of at most `KEPT` images, in the order of the seeds


@dataclass(frozen=True)
class HarnessOptions:
    """What metrics of samplers depend on, under the names of the flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    #: Reference statistics: a bundled name or an .npz; of several detectors one name that all
    #: have, or one for each, by comma.
    ref: str = "cifar10-small"
    ref_model: str | None = None  #: see `evaluation.converged.open_converged`
    batch: int = 128  #: images at once, over all processes
    compile: bool = False  #: the network, and walks as graphs; on GPUs only

    def resolve_conditions(self, seeds: Sequence[int]) -> Conditions:
        """The conditions of images of ``seeds``; UserError for what the model does not take."""
        card = self.model.card()
        conditions = self.conditions.resolve(card)
        conditions.check(card, seeds)
        self.references()
        return conditions

    def references(self) -> list[str]:
        """The reference of each detector; UserError where their numbers differ."""
        count = len(self.detector.sources())
        names = [self.ref] if count == 1 else self.ref.split(",")
        if len(names) not in (1, count):
            raise UserError(
                f"--ref {self.ref} names {len(names)} for {count} detectors: give one that all "
                "have, or one for each, separated by commas"
            )
        return names * (count // len(names))

    def describe(self, seeds: Sequence[int], blocks: int) -> dict[str, Json]:
        """As much of the `HarnessIdentity` as is known before anything is loaded."""
        return {
            "model": self.model.card().name,
            "model_sha256": self.model.known_sha256,
            "detector": self.detector.detector,
            "reference": self.ref,
            "seeds": seed_ranges(seeds),
            "blocks": blocks,
        }


@dataclass(frozen=True)
class ReferenceIdentity:
    """What decides the FID of given images by another detector."""

    detector: str
    detector_sha256: str
    reference: str
    reference_n: int
    reference_sha256: str


@dataclass(frozen=True)
class HarnessIdentity:
    """What two metrics must share to be compared."""

    model: str
    model_sha256: str
    detector: str
    detector_sha256: str
    reference: str
    reference_n: int
    reference_sha256: str
    seeds: str
    blocks: int
    converged: ConvergedIdentity | None = field(default=None, metadata=OPTIONAL)
    prompts: PromptsIdentity | None = field(default=None, metadata=OPTIONAL)
    label: int | None = field(default=None, metadata=OPTIONAL)  #: class of all images
    others: tuple[ReferenceIdentity, ...] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Harness:
    """One model, the same detectors, references and seeds for every sampler."""

    model: Model
    detector: Detector  #: whose features are kept and whose FID ranks the samplers
    reference: Statistics
    seeds: Sequence[int]
    blocks: int  #: disjoint, equal blocks of seeds, for the spread
    batch: int  #: images at once on one process
    dtype: torch.dtype  #: of the state
    here: World
    conditions: Conditions = Conditions()  #: the guidance rate is each sampler's own
    converged: Converged | None = None  #: the second reference, where there is one
    precision: str = "float32"  #: dtype of the network
    others: Sequence[DetectorReference] = ()  #: more detectors, which add an FID to each row
    record: Record | None = None  #: see `samplers.generate.generate`

    @property
    def identity(self) -> HarnessIdentity:
        """What metrics of two harnesses must share to be compared; the samplers aside."""
        reference = self.reference
        return HarnessIdentity(
            model=self.model.card.name,
            model_sha256=self.model.sha256,
            detector=self.detector.name,
            detector_sha256=self.detector.sha256,
            reference=reference.source,
            reference_n=reference.n,
            reference_sha256=reference.source_sha256,
            seeds=seed_ranges(self.seeds),
            blocks=self.blocks,
            converged=None if self.converged is None else self.converged.identity,
            prompts=PromptsIdentity.of(self.conditions),
            label=self.conditions.label,
            others=tuple(map(_identity, self.others)) or None,
        )

    def generate(
        self, sampler: Sampler, seeds: Sequence[int], batch: int | None = None
    ) -> Iterator[SampleBatch]:
        """Images of ``seeds`` on this process, batch by batch, under the harness's conditions."""
        return generate(
            sampler,
            self.model,
            seeds,
            batch=batch or self.batch,
            device=self.here.device,
            dtype=self.dtype,
            conditions=self.conditions,
            record=self.record,
        )

    def fid(
        self, sampler: Sampler, seeds: Sequence[int], blocks: int, tick: Callable[[int], object]
    ) -> Measured:
        """FID of ``seeds`` in equal blocks to each reference, by one pass.

        ``tick`` is told how many images of all processes have been made.
        """
        size, nfe, seconds = len(seeds) // blocks, 0, 0.0
        by_detector: list[list[FeatureSummary]] = [[] for _ in (None, *self.others)]
        for b in range(blocks):
            block = seeds[b * size : (b + 1) * size]
            summaries, nfe, spent = self._block(sampler, block, KEPT // blocks, tick)
            for parts, summary in zip(by_detector, summaries, strict=True):
                parts.append(summary)
            seconds += spent
        parts, *more = by_detector
        moments, second = [part.moments for part in parts], None
        if self.converged is not None:
            second = block_fid(moments, self.converged.statistics)
        per_image = seconds / max(1, len(seeds) // self.here.size)  # of this process
        rate = self.here.size / per_image
        others = tuple(
            joined(parts).moments.fid(other.statistics)
            for parts, other in zip(more, self.others, strict=True)
        )
        fid = block_fid(moments, self.reference)
        return Measured(fid, others, second, nfe, rate, joined(parts))

    def _block(
        self, sampler: Sampler, seeds: Sequence[int], kept: int, tick: Callable[[int], object]
    ) -> tuple[list[FeatureSummary], int, float]:
        """One block of all processes by each detector, the metered NFE, and seconds of sampling.

        Only the first detector's features are kept.
        """
        nfe, seconds = 0, 0.0
        needs = {self.detector: Requirements(kept)}
        needs |= {other.detector: Requirements() for other in self.others}
        collectors = [
            Collector(detector, need, len(seeds), source=sampler.label)
            for detector, need in needs.items()
        ]
        positions = self.here.shard(range(len(seeds)))
        begin = time.perf_counter()
        for batch in self.generate(sampler, [seeds[position] for position in positions]):
            pixels = to_uint8_tensor(batch.images)  # waits for the device
            seconds += time.perf_counter() - begin
            nfe = batch.nfe
            now, positions = positions[: len(pixels)], positions[len(pixels) :]
            for collector in collectors:
                collector.update(pixels, now)
            tick(len(pixels) * self.here.size)
            begin = time.perf_counter()
        return [collector.finish() for collector in collectors], nfe, seconds

    def pictures(self, sampler: Sampler) -> np.ndarray:
        """Images of the first few seeds, (SHOWN, H, W, C) uint8."""
        seeds = self.seeds[:SHOWN]
        batches = self.generate(sampler, seeds, batch=len(seeds))
        return np.concatenate([to_uint8(batch.images) for batch in batches])


def open_harness(
    options: HarnessOptions, seeds: Sequence[int], blocks: int, here: World
) -> Harness:
    """Load the model, the detectors and all references; call it on every rank.

    Raises UserError or ValueError, one sentence with the remedy, for files that are missing or do
    not fit each other.
    """
    conditions = options.resolve_conditions(seeds)
    detectors = open_detectors(options.detector, here)
    (detector, reference), *others = (
        DetectorReference(detector, load_reference(name, detector))
        for detector, name in zip(detectors, options.references(), strict=True)
    )
    source = options.model
    model = source.load_compiled(here) if options.compile else source.load(here)
    return Harness(
        model,
        detector,
        reference,
        seeds,
        blocks,
        here.share(options.batch),
        options.model.state_dtype,
        here,
        conditions,
        open_converged(options.ref_model, model, detector, seeds, conditions),
        options.model.dtype,
        others,
        cuda_graph if options.compile else None,
    )


def _identity(other: DetectorReference) -> ReferenceIdentity:
    id, statistics = other.detector.id, other.statistics
    return ReferenceIdentity(
        id.name, id.sha256, statistics.source, statistics.n, statistics.source_sha256
    )
