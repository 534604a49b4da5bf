"""Scores of images by themselves: which prompt each is to show, the networks, and one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from denoisers.conditions import Conditions
from evaluation.images import from_hub
from evaluation.passes import ImageStream, resumed
from image_data.prompts import read_prompts
from image_data.sources import ImageSource, image_batches
from metrics.clip import (
    TEXT,
    ScoreCollector,
    Scorer,
    load_aesthetic,
    load_clip_score,
    summarise,
)
from metrics.draws import choose
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download, write_json
from runtime.record import RunRecord
from samplers.folder import RECORD

NAMES = ("clip", "aesthetic")
#: ViT-g/14 as OpenCLIP trained it, by which text-to-image models are judged.
CLIP_G = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
CLIP_G_FILES = ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin")
#: What LAION's predictors were trained on.
CLIP_L = "openai/clip-vit-large-patch14"
CLIP_L_FILES = ("config.json", "model.safetensors")
HEAD_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth"
)


@dataclass(frozen=True)
class Pairs:
    """Which images are scored, and against which prompts."""

    names: tuple[str, ...]  #: of files, below the folder or in the zip
    prompts: tuple[str, ...]  #: of each image; all empty where none is needed
    identity: str  #: of the images on disk


def parse_names(text: str) -> tuple[str, ...]:
    """The scores of ``--metrics``, each once; UserError for another name, or none."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names or not set(names) <= set(NAMES):
        raise UserError(f"--metrics {text!r} is no list of {' and '.join(NAMES)}: give one or both")
    return names


def pair(options: Mapping[str, Any], needs_prompts: bool) -> Pairs:
    """The images of the options with their prompts.

    Prompts come from ``--prompt``, ``--prompt_path``, or what the record of ``sample.py`` beside
    the images names.  One prompt is that of every image; of several, an image that ``sample.py``
    made has that of its seed, and of other images the i-th, by name, has the i-th.

    Raises:
        UserError: no prompts, not those that the images were made from, or not one for each image.
    """
    path = options["images"]
    with ImageSource(path) as source:
        chosen = choose(len(source), options["num"], options["seed"])
        names, identity = tuple(source.names), source.identity()
    record = _record(path)
    if not needs_prompts:
        prompts = ("",) * len(names)
    else:
        prompts = _spread(_prompts(options, record, path), names, path, record is not None)
    return Pairs(tuple(names[i] for i in chosen), tuple(prompts[i] for i in chosen), identity)


def _record(path: Path) -> RunRecord | None:
    """The record of sample.py in a folder, or None."""
    file = path / RECORD
    record = RunRecord.read(file) if file.is_file() else None
    return record if record is not None and record.command == "sample" else None


def _prompts(options: Mapping[str, Any], record: RunRecord | None, path: Path) -> tuple[str, ...]:
    prompt, file = options["prompt"], options["prompt_path"]
    made = {} if record is None else record.options
    if prompt is not None and file is not None:
        raise UserError(
            f"--prompt {prompt!r} and --prompt_path {file} both say what the images show: give one"
        )
    if prompt is None and file is None:
        prompt, file = made.get("prompt"), made.get("prompt_path")
        if file is not None and not Path(file).is_file():
            raise UserError(
                f"{file}, from which the prompts of {path} were read, is gone: give --prompt_path"
            )
    if prompt is None and file is None:
        raise UserError(
            f"nothing says what the images in {path} show: give --prompt_path, a prompt for each"
        )
    prompts = (prompt,) if prompt is not None else read_prompts(file)
    known = made.get("prompts")
    if known is not None and known != Conditions(prompts=prompts).describe():
        raise UserError(
            f"the images in {path} were made from other prompts than {file or repr(prompt)}: give "
            f"those ({known['count']}, SHA-256 {known['sha256'][:12]}...)"
        )
    return prompts


def _spread(
    prompts: tuple[str, ...], names: Sequence[str], path: Path, by_seed: bool
) -> tuple[str, ...]:
    """The prompt of each image."""
    if len(prompts) == 1:
        return prompts * len(names)
    if not by_seed:
        if len(prompts) != len(names):
            raise UserError(
                f"{path} holds {len(names)} images, but there are {len(prompts)} prompts: image i "
                "(in the order of names) shows prompt i, so give as many"
            )
        return prompts
    seeds = [Path(name).stem for name in names]
    strange = [n for n, s in zip(names, seeds, strict=True) if not s.isdigit()]
    if strange:
        raise UserError(
            f"{strange[0]} in {path} is no image of sample.py, whose names are seeds: remove it"
        )
    last = max(map(int, seeds))
    if last >= len(prompts):
        raise UserError(
            f"the image of seed {last} in {path} has no prompt: there are {len(prompts)}, and that "
            "of seed i has number i (from 0); give all of them"
        )
    return tuple(prompts[int(seed)] for seed in seeds)


def open_scorers(names: Sequence[str], options: Mapping[str, Any], world: World) -> list[Scorer]:
    """The networks of the scores; published files are fetched into the cache by rank 0."""
    cache = cache_folder(options["cache_dir"])

    def clip(given: Path | None, repository: str, files: Sequence[str]) -> tuple[Path, str]:
        """The folder of a CLIP, and what to call it."""
        if given is not None:
            return given, given.name
        if world.is_main:
            from_hub(repository, files, cache)
        world.barrier()
        return cache / repository, repository

    scorers = []
    if "clip" in names:
        folder, called = clip(options["clip_path"], CLIP_G, CLIP_G_FILES)
        scorers.append(load_clip_score(folder, world.device, called))
    if "aesthetic" in names:
        folder, called = clip(options["aesthetic_clip_path"], CLIP_L, CLIP_L_FILES)
        head = options["aesthetic_path"]
        if head is None:
            head = world.broadcast_object(download(HEAD_URL, cache) if world.is_main else None)
        scorers.append(load_aesthetic(folder, head, world.device, called))
    return scorers


def scored(
    pairs: Pairs, scorers: Sequence[Scorer], options: Mapping[str, Any], world: World
) -> AbstractContextManager[list[Tensor]]:
    """``with scored(...) as (scores,):`` (scorers, images); a killed pass goes on."""
    path, num, seed = options["images"], options["num"], options["seed"]
    share = -(-options["batch"] // world.size)

    def batches(start: int, bar: tqdm[Any]) -> Iterator[Tensor]:
        return image_batches(path, share, (world.rank, world.size), num, seed, start)

    identity = {
        "images": pairs.identity, "num": num, "seed": seed, "prompts": pairs.prompts,
        "scorers": [scorer.describe() for scorer in scorers],
    }  # fmt: skip
    stream = ImageStream(path.name, len(pairs.names), share, identity, batches)
    collector = ScoreCollector(scorers, pairs.prompts)
    return resumed(stream, [collector], world, cache_folder(options["cache_dir"]))


def report(
    scorers: Sequence[Scorer], scores: Tensor, pairs: Pairs, record: RunRecord, path: Path | None
) -> str:
    """The figures in words; in ``path`` as JSON, with the record and the scores of each image."""
    text, results = [], []
    for scorer, own in zip(scorers, scores, strict=True):
        found = summarise(scorer, own)
        text.append(f"{TEXT[scorer.name].format(**found)}  ({scorer.model}, N = {len(own)})")
        results.append({**found, "n": len(own), "scorer": scorer.describe()})
    if path is not None:
        columns = {scorer.name: own.tolist() for scorer, own in zip(scorers, scores, strict=True)}
        content = {
            "results": results,
            "images": {"name": pairs.names, "prompt": pairs.prompts, **columns},
            "record": asdict(record),
        }
        write_json(path, content)
    return "\n".join(text)
