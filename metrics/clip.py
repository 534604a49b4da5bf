"""CLIP score and aesthetic score: a figure for each image by itself, without a reference.

The CLIP score (Hessel et al., 2021, arXiv 2104.08718) is the cosine between the embeddings of an
image and of its prompt.  Two scales are in use, so both are given: the mean cosine, and the mean
of 100 max(cosine, 0).

The aesthetic score is the rating from 1 to 10 that people would give, as predicted from the CLIP
embedding of length one: by a linear map (LAION's first predictor), or by five linear layers
without anything but dropout between them (the improved one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.detectors import CHUNK, Detector
from metrics.statistics import DetectorId, sum_over_ranks
from metrics.vision import (
    CLIP,
    centre,
    files_sha256,
    folder_sha256,
    normalise,
    open_model,
    transformers_library,
)

RESIZE = "the shorter side to the model's size, bicubic with smoothing, then the middle square"
#: Widths of the improved predictor's layers, and what is dropped out after each in its training.
HEAD = ((1024, 0.2), (128, 0.2), (64, 0.1), (16, 0.0), (1, 0.0))


@dataclass(frozen=True)
class Scorer:
    """A figure for each image: ``score(uint8 (B, 3, H, W), prompts) -> (B,) float64``."""

    name: str
    model: str  #: by whose weights, in words
    sha256: str  #: of those
    score: Callable[[Tensor, Sequence[str]], Tensor]

    def describe(self) -> dict[str, str]:
        """What two figures must share to be compared."""
        return {"name": self.name, "model": self.model, "sha256": self.sha256, "resize": RESIZE}


def load_clip_score(folder: Path, device: torch.device, model: str) -> Scorer:
    """Cosines of images and prompts by the whole CLIP in ``folder``, which is called ``model``.

    Raises:
        ValueError, FileNotFoundError: no such model there, no tokenizer, or no ``transformers``.
    """
    clip = open_model(folder, "CLIPModel", device)
    embed, read = _image_tower(clip, folder, device), _text_tower(clip, folder, device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return F.cosine_similarity(embed(images).double(), read(prompts).double()).cpu()

    return Scorer("clip", model, embed.sha256, score)


def load_aesthetic(folder: Path, head: Path, device: torch.device, model: str) -> Scorer:
    """Ratings by the predictor in ``head``, on the image tower of the CLIP in ``folder``.

    Raises:
        ValueError, FileNotFoundError: files of another kind, or a predictor for another CLIP.
    """
    rate = load_head(head).to(device)
    vision = open_model(folder, "CLIPVisionModelWithProjection", device)
    width, dim = next(rate.parameters()).shape[1], vision.visual_projection.out_features
    if width != dim:
        raise ValueError(
            f"{head} rates embeddings of {width} numbers, but the CLIP in {folder} makes "
            f"{dim}: give the one that it was trained on."
        )
    ratings = _image_tower(vision, folder, device, rate)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return ratings(images)[:, 0].double().cpu()

    sha256 = f"{ratings.sha256}, {files_sha256(head)}"
    return Scorer("aesthetic", f"{model}, {head.name}", sha256, score)


def load_head(path: Path) -> nn.Module:
    """An aesthetic predictor from a state dict: the linear or the improved one.

    Raises:
        ValueError: neither of them (nothing in the file is executed). FileNotFoundError: no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the file of an aesthetic predictor.")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tuple(weight.shape) for name, weight in content.items()}
    except Exception as err:  # torch raises what it likes for files of other kinds
        raise ValueError(
            f"{path} is not a state dict of tensors ({type(err).__name__}): give the file "
            "published as sac+logos+ava1-l14-linearMSE.pth or sa_0_4_vit_l_14_linear.pth."
        ) from err
    width = next((shape[1] for shape in shapes.values() if len(shape) == 2), 1)
    with torch.device("meta"):
        heads = nn.Linear(width, 1), _Improved(width)
    for head in heads:
        if shapes == {name: tuple(weight.shape) for name, weight in head.state_dict().items()}:
            head.load_state_dict(content, assign=True)
            return head.float().eval().requires_grad_(False)
    raise ValueError(
        f"{path} holds another network ({', '.join(map(str, list(shapes)[:2])) or 'nothing'}, ...):"
        " give an aesthetic predictor of LAION or the improved one."
    )


class _Improved(nn.Module):
    """The improved predictor; its parameters have the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out, dropped in HEAD:
            layers.append(nn.Linear(width, out))
            layers += [nn.Dropout(dropped)] if dropped else []
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, 1)."""
        rated: Tensor = self.layers(x)
        return rated


def _image_tower(
    model: Any, folder: Path, device: torch.device, head: nn.Module | None = None
) -> Detector:
    """Embeddings of images; with a ``head``, its output for embeddings of length one.

    The head is part of the detector, so that it sees ``CHUNK`` images at once as well: the last
    bit of a matrix product depends on its shape.
    """
    size = model.vision_model.config.image_size

    def features(images: Tensor) -> Tensor:
        x = normalise(centre(images, size), CLIP)
        embedding: Tensor = model.visual_projection(
            model.vision_model(pixel_values=x).pooler_output
        )
        return embedding if head is None else head(F.normalize(embedding))

    dim = model.visual_projection.out_features if head is None else 1
    id = DetectorId("clip", folder_sha256(folder), dim)
    return Detector(id, features, device, resize=RESIZE)


def _text_tower(
    model: Any, folder: Path, device: torch.device
) -> Callable[[Sequence[str]], Tensor]:
    """Embeddings (B, dim) of prompts; what does not fit into the model's context is cut off."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise ValueError(f"{folder} has no tokenizer: add its vocab.json and merges.txt.")
    tokenizer = transformers_library().CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = model.text_model.config.max_position_embeddings

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Tensor:
        """Always ``CHUNK`` at once, as images: no prompt depends on its neighbours."""
        made = []
        for begin in range(0, len(prompts), CHUNK):
            part = list(prompts[begin : begin + CHUNK])
            tokens = tokenizer(
                part + [""] * (CHUNK - len(part)),
                padding="max_length", truncation=True, max_length=length, return_tensors="pt",
            ).to(device)  # fmt: skip
            made.append(
                model.text_projection(model.text_model(**tokens).pooler_output)[: len(part)]
            )
        return torch.cat(made)

    return embed


class ScoreCollector:
    """Gathers the figures of numbered images; neither batches nor ranks leave a trace.

    Its interface is that of ``summary.Collector``.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[str]) -> None:
        self.scorers, self.prompts = scorers, prompts
        self._scores = torch.zeros(len(scorers), len(prompts), dtype=torch.float64)

    def update(self, images: Tensor, positions: Sequence[int]) -> None:
        """Score uint8 (B, 3, H, W) images, which have these numbers among all."""
        prompts = [self.prompts[i] for i in positions]
        for scores, scorer in zip(self._scores, self.scorers, strict=True):
            scores[list(positions)] = scorer.score(images, prompts)

    def state(self) -> dict[str, np.ndarray]:
        """What all ranks have so far; call it on every rank."""
        return {"scores": self.finish().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from ``state``; on one rank only."""
        self._scores = torch.from_numpy(state["scores"])

    def finish(self) -> Tensor:
        """(scorers, images), of all ranks."""
        return sum_over_ranks(self._scores.clone())  # each is zero on all ranks but one


def summarise(scorer: Scorer, scores: Tensor) -> dict[str, float]:
    """Means over the images (N,) with their standard errors."""
    if scorer.name != "clip":
        return _mean(scorer.name, scores)
    return _mean("clip_score", 100 * scores.clamp(min=0)) | _mean("cosine", scores)


def _mean(key: str, values: Tensor) -> dict[str, float]:
    return {key: float(values.mean()), f"{key}_error": float(values.std()) / math.sqrt(len(values))}


TEXT = {
    "clip": "CLIP score {clip_score:.3f} +- {clip_score_error:.2g} (mean of 100 max(cosine, 0)), "
    "mean cosine {cosine:.5f} +- {cosine_error:.2g}",
    "aesthetic": "aesthetic score {aesthetic:.4f} +- {aesthetic_error:.2g}",
}
