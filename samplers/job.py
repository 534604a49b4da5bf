"""A sampling run from resolved options to a folder of images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amed.experiments import PREDICTOR, find_run, load_predictor
from denoisers.cards import Card, cards
from denoisers.registry import Model, load_model
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.log import progress
from runtime.record import RunRecord
from runtime.seeds import parse_seeds
from samplers.build import build, build_learned
from samplers.folder import Folder
from samplers.generate import check_class, generate
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
    label: int | None = None  #: the class of every image
    dtype: str = "float32"  #: of the network; the state is float64 for float64, else float32
    outdir: str | None = None
    subdirs: bool = False
    grid: bool = False
    return_inters: bool = False

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32


@dataclass(frozen=True)
class Job:
    """A run that is ready to start; nothing has been written yet."""

    sampler: Sampler
    card: Card
    setup: Setup
    seeds: list[int]
    folder: Folder

    def record(self, weights_sha256: str | None, world: World) -> RunRecord:
        """The record of this run; its metered NFE is null until the work is done."""
        setup = self.setup
        options: dict[str, Any] = {
            "dataset_name": self.card.name,
            "model_path": setup.model_path,
            "seeds": setup.seeds,
            "class": setup.label,
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
        return RunRecord.make(
            "sample", options, model, {**self.sampler.describe(), "nfe_metered": None}
        )

    def known_sha256(self) -> str | None:
        """Hash of the weights as far as it is known without loading or fetching them."""
        return sha256_file(self.setup.model_path) if self.setup.model_path else self.card.sha256


@dataclass(frozen=True)
class Summary:
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


def prepare(options: SamplerOptions, predictor_path: str | None, setup: Setup, world: World) -> Job:
    """Resolve everything that can be wrong before anything is loaded or written.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    seeds = parse_seeds(setup.seeds)
    if world.device.type == "mps" and setup.dtype == "float64":
        raise UserError("device 'mps' has no float64: use --dtype float32, or --device cpu")
    if setup.model_path and not Path(setup.model_path).is_file():
        raise UserError(f"no weights at {setup.model_path}: check --model_path")
    if predictor_path is None and options.sampler is None:
        raise UserError("nothing says how to sample: give --predictor_path or --sampler")
    if predictor_path is not None:
        sampler = _learned(options, predictor_path, setup, world)
        name = str(sampler.settings["dataset_name"])
        card = _card(name)
    else:
        card = _card(setup.dataset_name or DEFAULT_DATASET)
        sampler = build(options, card)
    check_class(card, setup.label)
    path = setup.outdir or f"samples/{card.name}/{sampler.label}_nfe{sampler.nfe}"
    return Job(sampler, card, setup, seeds, Folder(Path(path), setup.subdirs, setup.return_inters))


def run(job: Job, world: World) -> Summary:
    """Make the images that the folder lacks, on all processes, and complete its record."""
    setup, folder = job.setup, job.folder
    model = _load(job, world)
    record, missing = world.broadcast_object(
        folder.open(job.record(model.sha256, world), job.seeds) if world.is_main else None
    ) or (None, [])
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
            labels=setup.label,
            keep_trajectory=setup.return_inters,
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
    return Summary(folder.path, int(made), found, job.sampler.nfe, seconds, tuple(pictures))


def _learned(options: SamplerOptions, spec: str, setup: Setup, world: World) -> Sampler:
    root = Path("exps")
    predictor, student, record = load_predictor(spec, root)
    predictor = predictor.to(dtype=setup.state_dtype).to(world.device)
    return build_learned(
        options, predictor, student, record, _name(find_run(spec, root)), setup.dataset_name
    )


def _name(path: Path) -> str:
    """The folder of a predictor; with the file's stem for a snapshot in it."""
    path = path.resolve()
    if path.name == PREDICTOR:
        path = path.parent
    return path.name if path.is_dir() else f"{path.parent.name}/{path.stem}"


def _card(name: str) -> Card:
    known = cards()
    if name not in known:
        raise UserError(f"unknown dataset {name!r}: choose one of {', '.join(known)}")
    return known[name]


def _load(job: Job, world: World) -> Model:
    """The model on every process; rank 0 goes first, as it may have to fetch the weights."""
    if not world.is_main:
        world.barrier()
    model = load_model(
        job.card.name,
        device=world.device,
        dtype=job.setup.dtype,
        model_path=job.setup.model_path,
    )
    if world.is_main:
        world.barrier()
    return model
