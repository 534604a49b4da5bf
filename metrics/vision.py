"""DINOv2 and CLIP as detectors, from folders saved by ``transformers``.

Both get the whole image, resized to a square (bicubic with antialiasing, as in PIL), rounded to
integers and normalised by the constants of their training.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints.snapshots import as_safetensors

DINOV2_RESOLUTION = 224  #: Stein et al., 2023 (arXiv 2306.04675)
SAFE, OLDER = "model*.safetensors", "pytorch_model*.bin"  #: weights, in one or several files
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Vision(NamedTuple):
    """A feature network, with its dimension and the hash of its weights."""

    features: Callable[[Tensor], Tensor]
    dim: int
    sha256: str


def resize(images: Tensor, height: int, width: int | None = None) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, height, width) of integers in [0, 255].

    ``width`` is that of ``height`` by default.  Columns are resized first, then rows, each rounded
    to integers, which agrees with PIL to one level.
    """
    x = images.float()
    width = width or height
    for shape in ((images.shape[2], width), (height, width)):
        if x.shape[2:] != shape:
            resized = F.interpolate(x, shape, mode="bicubic", antialias=True)
            x = resized.round().clamp(0, 255)
    return x


def centre(images: Tensor, size: int) -> Tensor:
    """Resize the shorter side to ``size`` and crop the central square, as in CLIP's training.

    Half pixels are rounded as in torchvision.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    height, width = size * height // short, size * width // short
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resize(images, height, width)[..., top : top + size, left : left + size]


def normalise(images: Tensor, constants: tuple[tuple[float, ...], ...]) -> Tensor:
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in constants)
    return (images / 255 - mean) / std


def load_dinov2(folder: Path, device: torch.device) -> Vision:
    """The class token of DINOv2 (Oquab et al., 2023), after the final layer norm."""
    model = open_model(folder, "Dinov2Model", device)

    def features(images: Tensor) -> Tensor:
        x = normalise(resize(images, DINOV2_RESOLUTION), _IMAGENET)
        token: Tensor = model(pixel_values=x).last_hidden_state[:, 0]
        return token

    return Vision(features, model.config.hidden_size, folder_sha256(folder))


def load_clip(folder: Path, device: torch.device) -> Vision:
    """The image embedding of CLIP (Radford et al., 2021), after the projection, not normalised."""
    model = open_model(folder, "CLIPVisionModelWithProjection", device)

    def features(images: Tensor) -> Tensor:
        x = normalise(resize(images, model.config.image_size), CLIP)
        embedding: Tensor = model(pixel_values=x).image_embeds
        return embedding

    return Vision(features, model.config.projection_dim, folder_sha256(folder))


def open_model(folder: Path, kind: str, device: torch.device) -> Any:
    """The model of class ``kind`` in float32, with all weights from the folder.

    Safetensors files are preferred; files in the older format are read as data.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder {folder} does not exist: give one with config.json and weights of a {kind}."
        )
    library = transformers_library()
    verbosity = library.logging.get_verbosity()
    library.logging.set_verbosity_error()  # it would list the unused weights of the text encoder
    try:
        with _safe_folder(folder) as source:
            model, info = getattr(library, kind).from_pretrained(
                source, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as err:  # the library may raise anything for damaged files
        raise ValueError(
            f"{folder} cannot be read as a {kind} of transformers "
            f"({' '.join(str(err).split())[:200]}): pass a folder with its config.json and "
            "model.safetensors or pytorch_model.bin."
        ) from err
    finally:
        library.logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(
            f"{folder} lacks weights of a {kind} ({min(info['missing_keys'])}): pass a folder of "
            "that model."
        )
    return model.float().to(device).eval().requires_grad_(False)


@contextmanager
def _safe_folder(folder: Path) -> Iterator[Path]:
    """A folder with the configuration and safetensors: ``folder``, or one made of its older files.

    The library unpickles older files by itself, and a small one can take all memory.
    """
    older = sorted(folder.glob(OLDER))
    if any(folder.glob(SAFE)) or not older:
        yield folder
        return
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(folder / "config.json", name)
        as_safetensors(older, Path(name, "model.safetensors"))
        yield Path(name)


def transformers_library() -> ModuleType:
    try:
        import transformers
    except ImportError as err:
        raise ValueError(
            f"CLIP and DINOv2 need {err.name}: pip install 'amed-toolkit[diffusion]'."
        ) from err
    module: ModuleType = transformers
    return module


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the configuration and the weights; other files do not affect the features."""
    weights = sorted(folder.glob(SAFE)) or sorted(folder.glob(OLDER))
    return files_sha256(folder / "config.json", *weights)


def files_sha256(*files: Path) -> str:
    """SHA-256 of the concatenated files."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            while part := opened.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
