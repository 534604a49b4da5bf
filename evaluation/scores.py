"""Scores of single images: how well they show their prompts, and their looks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import Tensor

from evaluation.detectors import fetch_repository
from evaluation.image_prompts import PromptedImages, PromptSource, pair_images
from evaluation.images import ImagePassOptions, image_stream
from evaluation.passes import resumable_pass
from metrics.clip import (
    TEXT,
    ScoreCollector,
    Scorer,
    load_aesthetic,
    load_clip_score,
    summarise,
)
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download, write_json
from runtime.lists import parse_words
from runtime.options import flat_options
from runtime.outputs import check_file
from runtime.record import RunRecord

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
class ScorerOptions:
    """Which scores, and where their networks are, under the names of the flags."""

    metrics: str = "clip"
    clip_path: Path | None = None  #: folder of a CLIP; None is the published one
    aesthetic_path: Path | None = None  #: predictor of the aesthetic score
    aesthetic_clip_path: Path | None = None  #: the CLIP that it was trained on
    cache_dir: str | None = None  #: see :func:`runtime.files.cache_folder`

    @property
    def names(self) -> tuple[str, ...]:
        """The scores, each once; UserError for an unknown one, or none."""
        names = tuple(dict.fromkeys(parse_words(self.metrics)))
        if not names or not set(names) <= set(NAMES):
            raise UserError(
                f"--metrics {self.metrics!r} is not a list of {' and '.join(NAMES)}: give one or "
                "both"
            )
        return names


@dataclass(frozen=True)
class ScoreOptions:
    """What ``clip_score.py calc`` is asked for, under the names of its flags."""

    images: Path  #: folder or zip
    prompts: PromptSource = field(default_factory=PromptSource)
    scorers: ScorerOptions = field(default_factory=ScorerOptions)
    reading: ImagePassOptions = field(default_factory=ImagePassOptions)
    result_path: Path | None = None


@dataclass(frozen=True)
class ScoreJob:
    """Images that will be scored; nothing has been loaded or written yet."""

    options: ScoreOptions

    def record(self, here: World | None = None) -> RunRecord:
        """The record of the result."""
        device = None if here is None else str(here.device)
        options = {**flat_options(self.options), "device": device}
        return RunRecord.make("clip_score calc", options, {}, {})

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record().to_json()

    def run(self, here: World) -> str:
        """Score, and write the result where asked; returns the means in words."""
        options = self.options
        check_file(options.result_path, "--json", here)
        source = options.prompts if "clip" in options.scorers.names else None
        images = pair_images(options.images, options.reading, source)
        scorers = open_scorers(options.scorers, here)
        with score_images(options.images, images, scorers, options.reading, here) as (scores,):
            if not here.is_main:
                return ""
            return report(scorers, scores, images, self.record(here), options.result_path)


def prepare(options: ScoreOptions) -> ScoreJob:
    """Check the options; UserError, one sentence with the remedy."""
    if "clip" in options.scorers.names:
        options.prompts.check()
    return ScoreJob(options)


def open_scorers(options: ScorerOptions, here: World) -> list[Scorer]:
    """Load the networks of the scores.

    Rank 0 downloads published files into the cache first, so call it on every rank.
    """
    cache = cache_folder(options.cache_dir)

    def clip(given: Path | None, repository: str, files: Sequence[str]) -> tuple[Path, str]:
        """The folder of a CLIP, and its name in results."""
        if given is not None:
            return given, given.name
        if here.is_main:
            fetch_repository(repository, files, cache)
        here.barrier()
        return cache / repository, repository

    scorers = []
    if "clip" in options.names:
        folder, name = clip(options.clip_path, CLIP_G, CLIP_G_FILES)
        scorers.append(load_clip_score(folder, here.device, name))
    if "aesthetic" in options.names:
        folder, name = clip(options.aesthetic_clip_path, CLIP_L, CLIP_L_FILES)
        head = options.aesthetic_path
        if head is None:
            head = here.broadcast_object(download(HEAD_URL, cache) if here.is_main else Path())
        scorers.append(load_aesthetic(folder, head, here.device, name))
    return scorers


def score_images(
    path: Path,
    images: PromptedImages,
    scorers: Sequence[Scorer],
    reading: ImagePassOptions,
    here: World,
) -> AbstractContextManager[list[Tensor]]:
    """``with score_images(...) as (scores,):`` (scorers, images); see `resumable_pass`."""
    stream = image_stream(path, reading, here)
    identity = {
        **stream.identity,
        "num": reading.num,
        "seed": reading.seed,
        "prompts": images.prompts,
        "scorers": [scorer.describe() for scorer in scorers],
    }
    collector = ScoreCollector(scorers, images.prompts)
    return resumable_pass(replace(stream, identity=identity), [collector], here, reading.cache)


def report(
    scorers: Sequence[Scorer],
    scores: Tensor,
    images: PromptedImages,
    record: RunRecord,
    path: Path | None,
) -> str:
    """The mean scores in words; in ``path`` as JSON, with the record and every image's score."""
    text, results = [], []
    for scorer, own in zip(scorers, scores, strict=True):
        means = summarise(scorer, own)
        text.append(f"{TEXT[scorer.name].format(**means)}  ({scorer.model}, N = {len(own)})")
        results.append({**means, "n": len(own), "scorer": scorer.describe()})
    if path is not None:
        columns = {scorer.name: own.tolist() for scorer, own in zip(scorers, scores, strict=True)}
        content = {
            "results": results,
            "images": {"name": images.names, "prompt": images.prompts, **columns},
            "record": asdict(record),
        }
        write_json(path, content)
    return "\n".join(text)
