"""DINOv2 and CLIP as detectors, from folders as ``transformers`` saves them.

Both see the whole image, made square: bicubic with the smoothing that a smaller size needs
(the rule of PIL), rounded to whole grey levels, then normalised by the constants of their training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DINOV2_RESOLUTION = 224  #: Stein et al., 2023 (arXiv 2306.04675)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Vision(NamedTuple):
    """A network as a detector wants it."""

    features: Callable[[Tensor], Tensor]
    dim: int
    sha256: str


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, size, size) of whole numbers in [0, 255].

    Columns first, then rows, each rounded to grey levels: as PIL does it, to one level.
    """
    x = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        if x.shape[2:] != shape:
            made = F.interpolate(x, shape, mode="bicubic", antialias=True)
            x = made.round().clamp(0, 255)
    return x


def _normalise(images: Tensor, constants: tuple[tuple[float, ...], ...]) -> Tensor:
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in constants)
    return (images / 255 - mean) / std


def load_dinov2(folder: Path, device: torch.device) -> Vision:
    """The class token of DINOv2 (Oquab et al., 2023), after the last normalisation."""
    model = _open(folder, "Dinov2Model", device)

    def features(images: Tensor) -> Tensor:
        x = _normalise(resize(images, DINOV2_RESOLUTION), _IMAGENET)
        token: Tensor = model(pixel_values=x).last_hidden_state[:, 0]
        return token

    return Vision(features, model.config.hidden_size, _sha256(folder))


def load_clip(folder: Path, device: torch.device) -> Vision:
    """The image embedding of CLIP (Radford et al., 2021), after the projection, not normalised."""
    model = _open(folder, "CLIPVisionModelWithProjection", device)

    def features(images: Tensor) -> Tensor:
        x = _normalise(resize(images, model.config.image_size), _CLIP)
        embedding: Tensor = model(pixel_values=x).image_embeds
        return embedding

    return Vision(features, model.config.projection_dim, _sha256(folder))


def _open(folder: Path, kind: str, device: torch.device) -> Any:
    """The model of class ``kind`` in float32; every weight has to be in the folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"detector folder {folder} does not exist: check --detector-path.")
    library = _transformers()
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()  # a table of the text tower's weights, which nobody needs
    try:
        model, info = getattr(library, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as err:
        raise ValueError(
            f"{folder} cannot be read as a {kind} of transformers "
            f"({' '.join(str(err).split())[:200]}): pass a folder with its config.json and "
            "model.safetensors."
        ) from err
    finally:
        library.logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(
            f"{folder} lacks weights of a {kind} ({min(info['missing_keys'])}): pass a folder of "
            "that model."
        )
    return model.float().to(device).eval().requires_grad_(False)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as err:
        raise ValueError(
            f"this detector needs {err.name}: pip install 'amed-toolkit[diffusion]'."
        ) from err
    module: ModuleType = transformers
    return module


def _sha256(folder: Path) -> str:
    """Hash of the configuration and of the weights; other files do not change the features."""
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with open(file, "rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
