"""CLIP score and aesthetic score: scores of single images, without a reference.

The CLIP score (Hessel et al., 2021, arXiv 2104.08718) is the cosine between the embeddings of an
image and of its prompt.  Two scales are in use and reported: the mean cosine, and the mean of
100 max(cosine, 0).

The aesthetic score predicts a human rating from 1 to 10 from the normalised CLIP embedding: by a
linear map (LAION's first predictor), or by five linear layers with only dropout between them (the
improved predictor).
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

from checkpoints.arrays import require_like
from checkpoints.pickles.records import shown
from checkpoints.snapshots import read_weights
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
#: Widths of the improved predictor's layers, and the dropout rates after them.
HEAD = ((1024, 0.2), (128, 0.2), (64, 0.1), (16, 0.0), (1, 0.0))


@dataclass(frozen=True)
class Scorer:
    """A score per image: ``score(uint8 (B, 3, H, W), prompts) -> (B,) float64``."""

    name: str
    model: str  #: name of the model
    sha256: str  #: hash of its weights
    score: Callable[[Tensor, Sequence[str]], Tensor]

    def describe(self) -> dict[str, str]:
        """The properties that two scores must share to be comparable."""
        return {"name": self.name, "model": self.model, "sha256": self.sha256, "resize": RESIZE}


def load_clip_score(folder: Path, device: torch.device, model: str) -> Scorer:
    """Cosines of images and prompts by the CLIP in ``folder``; ``model`` is its name in records.

    Raises:
        ValueError, FileNotFoundError: no such model there, no tokenizer, or no ``transformers``.
    """
    clip = open_model(folder, "CLIPModel", device)
    image, text = _image_encoder(clip, folder, device), _text_encoder(clip, folder, device)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return F.cosine_similarity(image(images).double(), text(prompts).double()).cpu()

    return Scorer("clip", model, image.sha256, score)


def load_aesthetic(folder: Path, head: Path, device: torch.device, model: str) -> Scorer:
    """Ratings by the predictor in ``head``, with the image encoder of the CLIP in ``folder``.

    Raises:
        ValueError, FileNotFoundError: other files, or a predictor for another CLIP.
    """
    predictor = load_head(head).to(device)
    vision = open_model(folder, "CLIPVisionModelWithProjection", device)
    width, dim = next(predictor.parameters()).shape[1], vision.visual_projection.out_features
    if width != dim:
        raise ValueError(
            f"{head} needs embeddings of dimension {width}, but the CLIP in {folder} has {dim}: "
            "give the CLIP that it was trained on."
        )
    ratings = _image_encoder(vision, folder, device, predictor)

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return ratings(images)[:, 0].double().cpu()

    sha256 = f"{ratings.sha256}, {files_sha256(head)}"
    return Scorer("aesthetic", f"{model}, {head.name}", sha256, score)


def load_head(path: Path) -> nn.Module:
    """Load an aesthetic predictor, linear or improved, from a state dict.

    Raises:
        ValueError: another file (nothing in it is executed). FileNotFoundError: no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the file of an aesthetic predictor.")
    content, _ = read_weights(path)
    shapes = {name: tuple(weight.shape) for name, weight in content.items()}
    width = next((shape[1] for shape in shapes.values() if len(shape) == 2), 1)
    with torch.device("meta"):
        heads = nn.Linear(width, 1), _Improved(width)
    for head in heads:
        if shapes == {name: tuple(weight.shape) for name, weight in head.state_dict().items()}:
            head.load_state_dict(content, assign=True)
            return head.float().eval().requires_grad_(False)
    raise ValueError(
        f"{path} is another network ({', '.join(map(shown, list(shapes)[:2]))}, ...): give LAION's "
        "linear aesthetic predictor or the improved one, published as sa_0_4_vit_l_14_linear.pth "
        "and sac+logos+ava1-l14-linearMSE.pth."
    )


class _Improved(nn.Module):
    """The improved predictor; its parameters have the published names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for out, dropout in HEAD:
            layers.append(nn.Linear(width, out))
            layers += [nn.Dropout(dropout)] if dropout else []
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) -> (B, 1)."""
        rating: Tensor = self.layers(x)
        return rating


def _image_encoder(
    model: Any, folder: Path, device: torch.device, head: nn.Module | None = None
) -> Detector:
    """Embeddings of images, or the output of ``head`` for their normalised embeddings.

    The head is part of the detector, so that it also runs on ``CHUNK`` images at a time: the
    rounding of a matrix product depends on its shape.
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


def _text_encoder(
    model: Any, folder: Path, device: torch.device
) -> Callable[[Sequence[str]], Tensor]:
    """Embeddings (B, dim) of prompts, truncated to the model's context length."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise ValueError(f"{folder} has no tokenizer: add its vocab.json and merges.txt.")
    library = transformers_library()
    try:
        tokenizer = library.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as err:  # the library may raise anything for damaged files
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({' '.join(str(err).split())[:200]}): "
            "copy its vocab.json and merges.txt again."
        ) from err
    length = model.text_model.config.max_position_embeddings

    @torch.no_grad()
    def embed(prompts: Sequence[str]) -> Tensor:
        """Embed ``CHUNK`` prompts at a time, so that a prompt does not depend on the others."""
        chunks = []
        for begin in range(0, len(prompts), CHUNK):
            part = list(prompts[begin : begin + CHUNK])
            tokens = tokenizer(
                part + [""] * (CHUNK - len(part)),
                padding="max_length", truncation=True, max_length=length, return_tensors="pt",
            ).to(device)  # fmt: skip
            embeddings = model.text_projection(model.text_model(**tokens).pooler_output)
            chunks.append(embeddings[: len(part)])
        return torch.cat(chunks)

    return embed


class ScoreCollector:
    """Collects the scores of numbered images; the result does not depend on batches or ranks.

    Its interface is that of `metrics.summary.Collector`.
    """

    def __init__(self, scorers: Sequence[Scorer], prompts: Sequence[str]) -> None:
        self.scorers, self.prompts = scorers, prompts
        self._scores = torch.zeros(len(scorers), len(prompts), dtype=torch.float64)

    def update(self, images: Tensor, positions: Sequence[int]) -> None:
        """Score uint8 (B, 3, H, W) images with these numbers."""
        prompts = [self.prompts[i] for i in positions]
        for scores, scorer in zip(self._scores, self.scorers, strict=True):
            scores[list(positions)] = scorer.score(images, prompts)

    def state(self) -> dict[str, np.ndarray]:
        """The scores of all ranks so far; call it on every rank."""
        return {"scores": self.finish().numpy()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from ``state``; call it on one rank only; ValueError for another's."""
        require_like(state, {"scores": self._scores.numpy()})
        self._scores = torch.from_numpy(state["scores"])

    def finish(self) -> Tensor:
        """The scores of all ranks, (scorers, images)."""
        return sum_over_ranks(self._scores.clone())  # each is zero on all ranks except one


def summarise(scorer: Scorer, scores: Tensor) -> dict[str, float]:
    """Means of the scores (N,) with their standard errors."""
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
