"""A sampling run from resolved options to a folder of images."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from amed.experiments import PREDICTOR, find_run, load_predictor
from denoisers.cards import Card
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from denoisers.registry import ModelSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.log import progress, watch_batch
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from samplers.builders.classic import build
from samplers.builders.learned import build_learned
from samplers.folder import Folder
from samplers.generate import check_coupled, generate
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

DEFAULT_DATASET = "cifar10-small"


@dataclass(frozen=True)
class Setup:
    """What a run is about besides its sampler; None means the default."""

    seeds: str
    batch: int = 64  #: over all processes
    dataset_name: str | None = None
    model_path: str | None = None
    model_family: str | None = None
    companion_path: str | None = None
    cache_dir: str | None = None
    label: int | None = None  #: the class of every image
    prompt: str | None = None
    prompt_path: str | None = None
    guidance_type: str | None = None
    dtype: str = "float32"  #: of the network; the state is float64 for float64, else float32
    outdir: str | None = None
    subdirs: bool = False
    grid: bool = False
    return_inters: bool = False

    def source(self, name: str) -> ModelSource:
        """Where the model called ``name`` comes from."""
        return ModelSource(
            name, self.model_path, self.model_family, self.companion_path, self.cache_dir
        )

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class SamplingJob:
    """A run that is ready to start; nothing has been written yet."""

    sampler: Sampler
    source: ModelSource
    card: Card
    setup: Setup
    seeds: list[int]
    folder: Folder
    conditions: Conditions

    def record(self, weights_sha256: str | None, world: World) -> RunRecord:
        """The record of this run; its metered NFE is null until the work is done."""
        setup = self.setup
        options: dict[str, Any] = {
            "dataset_name": self.card.name,
            "model_path": setup.model_path,
            "model_family": setup.model_family,
            "companion_path": setup.companion_path,
            "seeds": setup.seeds,
            "class": setup.label,
            "prompt": setup.prompt,
            "prompt_path": setup.prompt_path,
            "prompts": self.conditions.describe(),
            "dtype": setup.dtype,
            "subdirs": setup.subdirs,
            "batch": setup.batch,
            "device": str(world.device),
            "world_size": world.size,
            "grid": setup.grid,
            "return_inters": setup.return_inters,
            "outdir": str(self.folder.path),
        }
        model = {"name": self.card.name, "sha256": weights_sha256}
        plan = {**self.sampler.describe(), "nfe_metered": None}
        if self.sampler.coupled:  # other seeds make other images, even of the same seeds
            plan["coupled_seeds"] = setup.seeds
        return RunRecord.make("sample", options, model, plan)

    def known_sha256(self) -> str | None:
        """Hash of the weights as far as it is known without loading or fetching them."""
        path = self.setup.model_path
        if path is None:
            return self.card.sha256
        return sha256_file(path) if Path(path).is_file() else None


@dataclass(frozen=True)
class SamplingResult:
    """What a run did."""

    folder: Path
    made: int
    found: int  #: images that were there already
    nfe: int  #: planned, and metered on every batch
    seconds: float
    pictures: tuple[Path, ...]

    def __str__(self) -> str:
        rate = f", {self.made / self.seconds:.1f} images/s" if self.made else ""
        kept = f" ({self.found} were there already)" if self.found else ""
        lines = [f"{self.folder}: {self.made} images made{kept}, {self.nfe} NFE each{rate}"]
        return "\n".join([*lines, *map(str, self.pictures)])


def prepare(
    options: SamplerOptions, predictor_path: str | None, setup: Setup, world: World
) -> SamplingJob:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(setup.seeds)
    if world.device.type == "mps" and setup.dtype == "float64":
        raise UserError("device 'mps' has no float64: use --dtype float32, or --device cpu")
    if predictor_path is None and options.sampler is None:
        raise UserError("nothing says how to sample: give --predictor_path or --sampler")
    if predictor_path is not None:
        source, sampler = _learned(options, predictor_path, setup, world)
        card = source.card()
    else:
        source = setup.source(setup.dataset_name or DEFAULT_DATASET)
        card = source.card()
        sampler = build(options, card)
    conditions = Conditions.of(
        card,
        setup.prompt,
        setup.prompt_path,
        setup.label,
        sampler.guidance_rate,
        setup.guidance_type,
    )
    conditions.check(card, seeds)
    check_coupled(sampler, len(seeds), setup.batch, world.size)
    path = setup.outdir or f"samples/{card.name}/{sampler.label}_nfe{sampler.nfe}"
    folder = Folder(Path(path), setup.subdirs, setup.return_inters)
    return SamplingJob(sampler, source, card, setup, seeds, folder, conditions)


def run(job: SamplingJob, world: World, model: Model | None = None) -> SamplingResult:
    """Make the images that the folder lacks, on all processes, and complete its record.

    ``model`` is the job's, where it is loaded already.
    """
    setup, folder = job.setup, job.folder
    model = open_model(job, world, model)
    record, missing = world.broadcast_object(
        folder.open(job.record(model.sha256, world), job.seeds) if world.is_main else None
    ) or (None, [])
    if job.sampler.coupled and missing:
        missing = job.seeds
    spent = torch.zeros(2, dtype=torch.float64)  # NFE of all images, images
    begin = time.perf_counter()
    with progress(len(missing), job.sampler.label, "img", enabled=world.is_main) as bar:
        for batch in generate(
            job.sampler,
            model,
            world.shard(missing),
            batch=-(-setup.batch // world.size),
            device=world.device,
            dtype=setup.state_dtype,
            conditions=job.conditions,
            keep_trajectory=setup.return_inters,
            watch=watch_batch(bar),
        ):
            folder.save(batch)
            count = len(batch.seeds)
            spent += torch.tensor([batch.nfe * count, count])
            bar.update(min(count * world.size, len(missing) - bar.n))
    nfe, made = world.sum_(spent).tolist()
    seconds = time.perf_counter() - begin
    pictures: list[Path] = []
    if world.is_main:
        if made and record is not None:
            folder.close(record, int(nfe / made))
        if setup.grid:
            pictures.append(folder.save_grid(job.seeds))
        if setup.return_inters:
            pictures.append(folder.save_strips(job.seeds))
    found = len(job.seeds) - len(missing)
    return SamplingResult(folder.path, int(made), found, job.sampler.nfe, seconds, tuple(pictures))


def open_model(job: SamplingJob, world: World, model: Model | None = None) -> Model:
    """The model of a job, loaded unless given; notes where a predictor was trained on another."""
    model = model or job.source.load(job.setup.dtype, world)
    note = _other_weights(job.sampler, model.sha256)
    if note and world.is_main:
        tqdm.write(note, file=sys.stderr)
    return model


def _learned(
    options: SamplerOptions, spec: str, setup: Setup, world: World
) -> tuple[ModelSource, Sampler]:
    root = Path("exps")
    predictor, student, record = load_predictor(spec, root)
    predictor = predictor.to(dtype=setup.state_dtype).to(world.device)
    source = setup.source(setup.dataset_name or student.dataset_name)
    name = _name(find_run(spec, root))
    return source, build_learned(options, predictor, student, record, name, source.card())


def _other_weights(sampler: Sampler, sha256: str) -> str | None:
    """A warning where a predictor was trained on other weights than these.

    No error: the same network in another file has another hash as well.
    """
    record = sampler.settings.get("predictor_record", {})
    trained = record.get("model", {}).get("sha256")
    if trained in (None, sha256):
        return None
    return (
        f"note: {sampler.label} was trained on weights with the SHA-256 {trained[:12]}..., and "
        f"these have {sha256[:12]}...: unless they are the same network, train one for them"
    )


def _name(path: Path) -> str:
    """The folder of a predictor; with the file's stem for a snapshot in it."""
    path = path.resolve()
    if path.name == PREDICTOR:
        path = path.parent
    return path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"
