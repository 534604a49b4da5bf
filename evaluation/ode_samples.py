"""Samples of a model without solver error: the images themselves, and statistics of them.

Every image is the solution of the probability-flow ODE by dopri5, which is what an exact
deterministic solver would make of the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from evaluation.converged import COMMAND, Converged, describe_conditions
from evaluation.detectors import DetectorOptions, open_detector
from evaluation.passes import ImageStream, gather_features
from metrics.detectors import Detector
from metrics.summary import Requirements
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder
from runtime.images import read_png, to_uint8_tensor
from runtime.log import progress
from runtime.options import Json, flat_options
from runtime.outputs import check_file, claimed
from runtime.record import RunRecord
from runtime.seeds import CONVERGED_START, parse_seeds
from samplers.folder import FREE, Folder
from samplers.generate import SampleBatch
from solvers.oracle import dopri5

SEEDS = f"{CONVERGED_START}-{CONVERGED_START + 9999}"
#: Options that a record holds as they were given.
RECORDED = (
    "model_path", "model_family", "model_settings", "companion_path", "cache_dir", "prompt",
    "prompt_path", "batch", "dtype", "seeds", "outdir",
)  # fmt: skip
#: Options that may change when statistics are asked for again: they leave them alone.
FREE_OF_STATISTICS = tuple({*FREE, "cache_dir"} - {"seeds"})


@dataclass(frozen=True)
class OdeSampleOptions:
    """What ``python -m tools.converged`` is asked for, under the names of its flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)
    seeds: str = SEEDS
    batch: int = 128  #: over all processes
    tol: float = 1e-4  #: relative and absolute tolerance of dopri5
    dest: Path | None = None  #: .npz of statistics
    outdir: Path | None = None  #: folder of images


@torch.inference_mode()
def solve_ode(
    model: Model,
    conditions: Conditions,
    seeds: tuple[int, ...],
    tol: float,
    dtype: torch.dtype,
    device: torch.device,
) -> SampleBatch:
    """Images of ``seeds`` by the ODE from sigma_max to sigma_min, and one Euler step to 0.

    ``tol`` is both the relative and the absolute tolerance of dopri5.  Its step size is controlled
    for the batch as a whole, so an image depends on its neighbours, within the tolerance.
    ``dtype`` is that of the state.
    """
    drawn, card = SeededBatch.open(model, conditions, seeds, dtype, device), model.card
    ts = torch.tensor([card.sigma_max, card.sigma_min], dtype=torch.float64)
    x = dopri5(drawn.meter, drawn.start(card.sigma_max), ts, rtol=tol, atol=tol).x[-1]
    x = drawn.meter(x, ts[-1]).x0
    return SampleBatch(seeds, x, drawn.meter.nfe, model.decode(x), None)


@dataclass(frozen=True)
class OdeSampler:
    """How this process samples its share of the seeds."""

    model: Model
    conditions: Conditions
    tol: float
    dtype: torch.dtype  #: of the state
    share: int  #: images per batch on each process
    here: World
    #: Network evaluations summed over the images so far, and the number of those images.
    spent: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def batches(self, seeds: Sequence[int]) -> Iterator[SampleBatch]:
        """Sample this process's part of ``seeds``, batch by batch."""
        mine, device = self.here.shard(seeds), self.here.device
        for i in range(0, len(mine), self.share):
            some = tuple(mine[i : i + self.share])
            batch = solve_ode(self.model, self.conditions, some, self.tol, self.dtype, device)
            self.spent.add_(torch.tensor([batch.nfe * len(some), len(some)]))
            yield batch

    def nfe(self) -> float:
        """Mean evaluations per image over all processes; every process has to call it."""
        nfe, count = self.here.sum_(self.spent.clone()).tolist()
        return nfe / max(count, 1)


def read_batches(folder: Folder, seeds: Sequence[int], size: int) -> Iterator[Tensor]:
    """The images of ``seeds`` in a folder, uint8 (size, C, H, W), fewer in the last batch."""
    for i in range(0, len(seeds), size):
        pixels = [read_png(folder.image(seed)) for seed in seeds[i : i + size]]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class OdeSampleJob:
    """Converged samples that will be made; nothing has been loaded or written yet."""

    options: OdeSampleOptions
    card: Card
    conditions: Conditions
    seeds: list[int]

    def record(self, weights_sha256: str | None) -> RunRecord:
        """The record of images and statistics; its metered NFE is null until they are made."""
        given = flat_options(self.options)
        options = {key: given[key] for key in RECORDED} | describe_conditions(self.conditions)
        plan: dict[str, Json] = {"solver": "dopri5", "tol": self.options.tol, "nfe_metered": None}
        model = {"name": self.card.name, "sha256": weights_sha256}
        return RunRecord.make(COMMAND, options, model, plan)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.options.model.known_sha256).to_json()

    def run(self, here: World) -> str:
        """Make the statistics and the images that are not there yet; returns what was made."""
        options = self.options
        check_file(options.dest, "--dest", here)
        with nullcontext() if options.outdir is None else claimed(options.outdir, here):
            return self._run(here)

    def _run(self, here: World) -> str:
        options, source = self.options, self.options.model
        model, dest = source.load(here), options.dest
        share, dtype = here.share(options.batch), source.state_dtype
        sampler = OdeSampler(model, self.conditions, options.tol, dtype, share, here)
        record, lines = self.record(model.sha256), []
        if dest is not None:
            detector = open_detector(options.detector, here)
            if not has_statistics(dest, record, detector):
                return self._make_statistics(dest, sampler, record, detector)
            lines.append(f"{dest} exists already")
        if options.outdir is not None:
            lines.append(self._make_images(Folder(options.outdir), sampler, record))
        return "\n".join(lines)

    def _make_images(self, folder: Folder, sampler: OdeSampler, record: RunRecord) -> str:
        """Make the images that the folder lacks; returns a sentence that says so."""
        here = sampler.here
        record, missing = folder.open_on_all(record, self.seeds, here)
        with progress(len(missing), "dopri5", "img", enabled=here.is_main) as bar:
            for batch in sampler.batches(missing):
                folder.save(batch)
                bar.update(min(len(batch.seeds) * here.size, len(missing) - bar.n))
        nfe = sampler.nfe()
        if here.is_main and missing:
            folder.close(record, round(nfe))
        return f"{folder.path}: {len(missing)} images made, {nfe:.1f} NFE each on average"

    def _make_statistics(
        self, dest: Path, sampler: OdeSampler, record: RunRecord, detector: Detector
    ) -> str:
        """Write statistics of the images to ``dest``, and the images to their folder, if any.

        Images are read instead of made where the folder has all of them.  Returns a sentence that
        says what was done.
        """
        here, outdir = sampler.here, self.options.outdir
        folder, opened = None if outdir is None else Folder(outdir), record
        missing = self.seeds
        if folder is not None:
            opened, missing = folder.open_on_all(record, self.seeds, here)
        stream = self._stream(sampler, record, folder, made=not missing)
        cache = cache_folder(self.options.model.cache_dir)
        with gather_features(stream, [detector], Requirements(), 0, here, cache) as summaries:
            nfe = sampler.nfe() if missing else opened.plan["nfe_metered"]
            if here.is_main:
                plan = {**record.plan, "nfe_metered": nfe or None}
                Converged(summaries[0].moments, replace(record, plan=plan)).save(dest)
                if folder is not None:
                    folder.close(opened, round(nfe))
        count = f"N = {len(self.seeds)}, {nfe:.1f} NFE on average"
        return f"wrote {dest}  (detector {detector.name}, {count})"

    def _stream(
        self, sampler: OdeSampler, record: RunRecord, folder: Folder | None, made: bool
    ) -> ImageStream:
        """The samples by number, read from the folder if they are ``made``.

        Otherwise those whose images are kept are written on the way.
        """

        def batches(first: int, bar: tqdm[Any]) -> Iterator[Tensor]:
            if folder is not None and made:
                mine = sampler.here.shard(self.seeds[first:])
                yield from read_batches(folder, mine, sampler.share)
                return
            for batch in sampler.batches(self.seeds[first:]):
                if folder is not None:
                    folder.save(batch)
                yield to_uint8_tensor(batch.images)

        identity = {
            "model": record.model,
            "plan": record.plan,
            "seeds": record.options["seeds"],
            "dtype": record.options["dtype"],
            "outdir": record.options["outdir"],
            **describe_conditions(self.conditions),
        }
        name = f"{self.card.name}, converged"
        return ImageStream(name, len(self.seeds), sampler.share, identity, batches)


def prepare(options: OdeSampleOptions) -> OdeSampleJob:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(options.seeds)
    _check_outputs(seeds, options.outdir, options.dest)
    options.detector.single()
    card = options.model.card()
    conditions = options.conditions.resolve(card)
    conditions.check(card, seeds)
    return OdeSampleJob(options, card, conditions, seeds)


def _check_outputs(seeds: Sequence[int], outdir: Path | None, dest: Path | None) -> None:
    """Raise UserError where neither output is asked for, or a reference would reuse seeds.

    Statistics serve as a reference for tables, so they must not share seeds with them.
    """
    if outdir is None and dest is None:
        raise UserError(
            "nothing to make: give --dest FILE.npz, --outdir FOLDER for images, or both"
        )
    if dest is None:
        return
    if dest.suffix != ".npz":
        raise UserError(f"--dest {dest} has to end in .npz: statistics are known by that")
    if len(seeds) < 2:
        raise UserError("statistics need at least 2 images: give more --seeds")
    if min(seeds) < CONVERGED_START:
        raise UserError(
            f"--seeds {min(seeds)} and others below {CONVERGED_START} are used by tables and "
            f"selections: give a reference other seeds, such as {SEEDS}"
        )


def has_statistics(dest: Path, record: RunRecord, detector: Detector) -> bool:
    """Whether ``dest`` holds these statistics already.

    Raises UserError where it holds statistics of other settings.
    """
    if not dest.exists():
        return False
    older = Converged.load(dest)
    plan = {**older.record.plan, "nfe_metered": record.plan["nfe_metered"]}
    differences = record.differences(replace(older.record, plan=plan), FREE_OF_STATISTICS)
    if older.statistics.detector != detector.id:
        differences.append(f"detector: {detector.id} != {older.statistics.detector}")
    if differences:
        raise UserError(
            f"{dest} holds statistics of other settings (now and in the file: {differences[0]}): "
            "give another --dest, or remove the file"
        )
    return True
