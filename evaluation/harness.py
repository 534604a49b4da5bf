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
from evaluation.detectors import DetectorOptions, open_detector
from evaluation.image_prompts import PromptsIdentity
from metrics.detectors import Detector
from metrics.fid import BlockFid, block_fid
from metrics.measures import KEPT
from metrics.references import load_reference
from metrics.statistics import Statistics
from metrics.summary import Collector, FeatureSummary, Requirements, joined
from runtime.dist import World
from runtime.images import to_uint8, to_uint8_tensor
from runtime.options import Json
from runtime.seeds import seed_ranges
from runtime.typed import OPTIONAL
from samplers.generate import SampleBatch, generate
from samplers.sampler import Sampler

SHOWN = 10  #: images of each sampler in pictures


class Measured(NamedTuple):
    """What one pass over the images of a sampler gives."""

    fid: BlockFid  #: to the data
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
    ref: str = "cifar10-small"  #: reference statistics: a bundled name or an .npz
    ref_model: str | None = None  #: see `evaluation.converged.open_converged`
    batch: int = 128  #: images at once, over all processes

    def resolve_conditions(self, seeds: Sequence[int]) -> Conditions:
        """The conditions of images of ``seeds``; UserError for what the model does not take."""
        card = self.model.card()
        conditions = self.conditions.resolve(card)
        conditions.check(card, seeds)
        self.detector.single()
        return conditions

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


@dataclass(frozen=True)
class Harness:
    """One model, one detector, the same references and the same seeds for every sampler."""

    model: Model
    detector: Detector
    reference: Statistics
    seeds: Sequence[int]
    blocks: int  #: disjoint, equal blocks of seeds, for the spread
    batch: int  #: images at once on one process
    dtype: torch.dtype  #: of the state
    here: World
    conditions: Conditions = Conditions()  #: the guidance rate is each sampler's own
    converged: Converged | None = None  #: the second reference, where there is one
    precision: str = "float32"  #: dtype of the network

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
        )

    def fid(
        self, sampler: Sampler, seeds: Sequence[int], blocks: int, tick: Callable[[int], object]
    ) -> Measured:
        """FID of ``seeds`` in equal blocks to each reference, by one pass.

        ``tick`` is told how many images of all processes have been made.
        """
        size, parts, nfe, seconds = len(seeds) // blocks, [], 0, 0.0
        for b in range(blocks):
            block = seeds[b * size : (b + 1) * size]
            summary, nfe, spent = self._block(sampler, block, KEPT // blocks, tick)
            parts.append(summary)
            seconds += spent
        moments, second = [part.moments for part in parts], None
        if self.converged is not None:
            second = block_fid(moments, self.converged.statistics)
        per_image = seconds / max(1, len(seeds) // self.here.size)  # of this process
        rate = self.here.size / per_image
        return Measured(block_fid(moments, self.reference), second, nfe, rate, joined(parts))

    def _block(
        self, sampler: Sampler, seeds: Sequence[int], kept: int, tick: Callable[[int], object]
    ) -> tuple[FeatureSummary, int, float]:
        """Features of one block of all processes, the metered NFE, and seconds of sampling here."""
        needs, nfe, seconds = Requirements(kept), 0, 0.0
        collector = Collector(self.detector, needs, len(seeds), source=sampler.label)
        positions = self.here.shard(range(len(seeds)))
        begin = time.perf_counter()
        for batch in self.generate(sampler, [seeds[position] for position in positions]):
            pixels = to_uint8_tensor(batch.images)  # waits for the device
            seconds += time.perf_counter() - begin
            nfe = batch.nfe
            now, positions = positions[: len(pixels)], positions[len(pixels) :]
            collector.update(pixels, now)
            tick(len(pixels) * self.here.size)
            begin = time.perf_counter()
        return collector.finish(), nfe, seconds

    def pictures(self, sampler: Sampler) -> np.ndarray:
        """Images of the first few seeds, (SHOWN, H, W, C) uint8."""
        seeds = self.seeds[:SHOWN]
        batches = self.generate(sampler, seeds, batch=len(seeds))
        return np.concatenate([to_uint8(batch.images) for batch in batches])


def open_harness(
    options: HarnessOptions, seeds: Sequence[int], blocks: int, here: World
) -> Harness:
    """Load the model, the detector and both references; call it on every rank.

    Raises UserError or ValueError, one sentence with the remedy, for files that are missing or do
    not fit each other.
    """
    conditions = options.resolve_conditions(seeds)
    detector = open_detector(options.detector, here)
    reference = load_reference(options.ref, detector)
    model = options.model.load(here)
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
    )
