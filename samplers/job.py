"""Sampling runs: options, the resolved job, and its result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from ns.experiments import load_student
from runtime.dist import World, environment
from runtime.errors import UserError
from runtime.log import progress, watch_batch
from runtime.options import Json, flat_options
from runtime.outputs import claimed
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.folder import Folder
from samplers.generate import SampleBatch, check_coupled, generate
from samplers.graph import cuda_graph
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

DEFAULT_DATASET = "cifar10-small"


@dataclass(frozen=True)
class SampleOptions:
    """The options of ``sample.py``, named like its flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    predictor_path: str | None = None
    seeds: str = "0-63"
    batch: int = 64  #: over all processes
    compile: bool = False  #: the network, and walks as graphs; on GPUs only
    outdir: str | None = None
    subdirs: bool = False
    grid: bool = False
    return_inters: bool = False


@dataclass(frozen=True)
class SamplingJob:
    """A resolved sampling run; nothing has been loaded or written yet."""

    options: SampleOptions
    source: ModelSource
    card: Card
    sampler: Sampler
    seeds: list[int]
    folder: Folder
    conditions: Conditions

    def record(self, weights_sha256: str | None, here: World | None = None) -> RunRecord:
        """The record of this run; its metered NFE is null until the run is complete."""
        options = flat_options(self.options)
        resolved: dict[str, Json] = {
            **{key: options[key] for key in RECORDED},
            "dataset_name": self.card.name,
            "class": self.options.conditions.label,
            "prompts": self.conditions.describe(),
            "device": None if here is None else str(here.device),
            "world_size": None if here is None else here.size,
            "outdir": str(self.folder.path),
        }
        model: dict[str, Json] = {"name": self.card.name, "sha256": weights_sha256}
        plan = {**self.sampler.describe(), "nfe_metered": None}
        if self.sampler.coupled:  # an image depends on all seeds of its batch
            plan["coupled_seeds"] = self.options.seeds
        return RunRecord.make("sample", resolved, model, plan)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.source.known_sha256).to_json()

    def load(self, here: World) -> Model:
        """The model of this run, compiled where that is asked for; UserError as its source."""
        source = self.source
        return source.load_compiled(here) if self.options.compile else source.load(here)

    def run(self, here: World, model: Model | None = None) -> SamplingResult:
        """Sample the images missing in the folder, on all processes, and complete its record.

        ``model`` is the job's model if it is loaded already.
        """
        check_coupled(self.sampler, len(self.seeds), self.options.batch, here.size)
        with claimed(self.folder.path, here):
            return self._run(here, model)

    def _run(self, here: World, model: Model | None) -> SamplingResult:
        model = model or self.load(here)
        record = self.record(model.sha256, here)
        record, missing = self.folder.open_on_all(record, self.seeds, here)
        if self.sampler.coupled and missing:
            missing = self.seeds
        begin = time.perf_counter()
        nfe, images = self._sample(missing, model, here)
        seconds = time.perf_counter() - begin
        pictures: list[Path] = []
        if here.is_main:
            if images:
                self.folder.close(record, int(nfe / images))
            if self.options.grid:
                pictures.append(self.folder.save_grid(self.seeds))
            if self.options.return_inters:
                pictures.append(self.folder.save_strips(self.seeds))
        kept = len(self.seeds) - len(missing)
        path = self.folder.path
        return SamplingResult(path, images, kept, self.sampler.nfe, seconds, tuple(pictures))

    def batches(
        self, seeds: Sequence[int], model: Model, here: World, bar: tqdm[Any]
    ) -> Iterator[SampleBatch]:
        """This process's part of the samples of ``seeds``; nothing is saved."""
        return generate(
            self.sampler,
            model,
            here.shard(seeds),
            batch=here.share(self.options.batch),
            device=here.device,
            dtype=self.source.state_dtype,
            conditions=self.conditions,
            keep_trajectory=self.options.return_inters,
            watch=watch_batch(bar),
            record=cuda_graph if self.options.compile else None,
        )

    def _sample(self, missing: list[int], model: Model, here: World) -> tuple[float, int]:
        """Sample and save the images of the seeds; returns their total NFE and their number."""
        totals = torch.zeros(2, dtype=torch.float64)  # NFE, images
        with progress(len(missing), self.sampler.label, "img", enabled=here.is_main) as bar:
            for batch in self.batches(missing, model, here, bar):
                self.folder.save(batch)
                count = len(batch.seeds)
                totals += torch.tensor([batch.nfe * count, count])
                bar.update(min(count * here.size, len(missing) - bar.n))
        nfe, images = here.sum_(totals).tolist()
        return nfe, int(images)


@dataclass(frozen=True)
class SamplingResult:
    """A summary of a run."""

    folder: Path
    made: int  #: new images
    kept: int  #: images that existed already
    nfe: int  #: per image; planned, and checked on every batch
    seconds: float
    pictures: tuple[Path, ...]  #: overview pictures

    def __str__(self) -> str:
        rate = f", {self.made / self.seconds:.1f} images/s" if self.made else ""
        kept = f" ({self.kept} were there already)" if self.kept else ""
        lines = [f"{self.folder}: {self.made} images made{kept}, {self.nfe} NFE each{rate}"]
        return "\n".join([*lines, *map(str, self.pictures)])


#: Options that are recorded without change.
RECORDED = (
    "model_path", "model_family", "model_settings", "companion_path", "seeds", "prompt",
    "prompt_path", "dtype", "compile", "subdirs", "batch", "grid", "return_inters",
)  # fmt: skip


def prepare(options: SampleOptions) -> SamplingJob:
    """Resolve every option before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(options.seeds)
    spec = options.predictor_path
    if spec is None and options.sampler.sampler is None:
        raise UserError("there is no sampler: give --predictor_path or --sampler")
    if spec is None:
        source = options.model.named(DEFAULT_DATASET)
        card = source.card()
        sampler = build(options.sampler, card)
    else:
        student = load_student(spec, "exps")
        source = options.model.named(student.dataset_name)
        card = source.card()
        student.to(dtype=source.state_dtype)
        sampler = build_learned(options.sampler, student, card)
    rate = sampler.guidance_rate
    conditions = options.conditions.at(rate).resolve(card)
    conditions.check(card, seeds)
    check_coupled(sampler, len(seeds), options.batch, environment()[1])
    path = options.outdir or f"samples/{card.name}/{sampler.label}_nfe{sampler.nfe}"
    folder = Folder(Path(path), options.subdirs, options.return_inters)
    return SamplingJob(options, source, card, sampler, seeds, folder, conditions)
