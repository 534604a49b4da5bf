"""Feature detectors by name: networks from uint8 images to float32 features.

A detector is identified by its name and the SHA-256 of its weights, which are stored with every
result. ``Detector.resize`` describes how images are resized for the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.classifiers import load_classifier
from metrics.cnn import RESOLUTION
from metrics.inception import SPATIAL_CHANNELS, SPATIAL_SIDE, WIDTH, load_inception
from metrics.statistics import DetectorId
from metrics.vision import DINOV2_RESOLUTION, Vision, files_sha256, load_clip, load_dinov2

CHUNK = 64
BUNDLED = Path(__file__).resolve().parent / "bundled"


class Features(NamedTuple):
    """Features of a batch: pooled (B, dim), and spatial (B, spatial dim) where there are any."""

    pooled: Tensor
    spatial: Tensor | None


class Detector:
    """A network that turns uint8 (B, 3, H, W) images into float32 (B, dim) features.

    The network always runs on ``CHUNK`` images, the last chunk padded with black ones: kernels
    depend on the shape and round differently, so this makes the features of an image bit-equal in
    every batch and on any number of ranks.

    Args:
        features: (CHUNK, 3, H, W) uint8 -> (CHUNK, dim + spatial_dim), spatial features last.
        resolution: the only accepted size of images; None for any.
        resize: description of how images are resized.
        spatial_dim: number of spatial features (for sFID); 0 for none.
    """

    def __init__(
        self,
        id: DetectorId,
        features: Callable[[Tensor], Tensor],
        device: torch.device,
        resolution: int | None = None,
        resize: str = "by the network itself",
        spatial_dim: int = 0,
    ) -> None:
        self.id = id
        self.device = device
        self.resolution = resolution
        self.resize = resize
        self.spatial_id = (
            DetectorId(f"{id.name}/spatial", id.sha256, spatial_dim) if spatial_dim else None
        )
        self._features = features

    @property
    def name(self) -> str:
        return self.id.name

    @property
    def sha256(self) -> str:
        return self.id.sha256

    @property
    def dim(self) -> int:
        return self.id.dim

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on any device -> float32 (B, dim) on the detector's device.

        Raises:
            ValueError: not uint8 RGB, or a size that this detector does not accept.
        """
        return self.both(images).pooled

    @torch.no_grad()
    def both(self, images: Tensor) -> Features:
        """Pooled and spatial features from one forward pass; errors as in ``__call__``."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"detector {self.name} takes uint8 images (B, 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}: convert them first."
            )
        height, width = images.shape[2:]
        if self.resolution is not None and (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"detector {self.name} takes {self.resolution}x{self.resolution} images, got "
                f"{width}x{height}: resize them, or use --detector inception, which does so."
            )
        spatial = self.spatial_id.dim if self.spatial_id else 0
        empty = torch.empty(0, self.dim + spatial, device=self.device)
        chunks = [self._chunk(chunk) for chunk in images.to(self.device).split(CHUNK)]
        features = torch.cat([empty, *chunks])
        return Features(features[:, : self.dim], features[:, self.dim :] if spatial else None)

    def _chunk(self, images: Tensor) -> Tensor:
        padded = images.new_zeros(CHUNK, *images.shape[1:])
        padded[: len(images)] = images
        with torch.autocast(self.device.type, enabled=False):
            return self._features(padded)[: len(images)].float()


@dataclass(frozen=True)
class DetectorEntry:
    """A detector's factory and the source of its weights.

    Weights are ``bundled``, a file at ``url``, or the files of a ``repository`` of the Hugging Face
    hub; a detector without any of these has no weights.
    """

    make: Callable[[str, Path, torch.device], Detector]
    bundled: Path | None = None
    url: str | None = None
    repository: str | None = None

    @property
    def source(self) -> str | None:
        """Where the weights can be downloaded, or None."""
        return self.url or self.repository


def _classifier(name: str, path: Path, device: torch.device) -> Detector:
    model, _ = load_classifier(path)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Detector(
        DetectorId(name, files_sha256(path), model.dim), lambda x: model(x).features, device,
        RESOLUTION, f"none: {RESOLUTION}x{RESOLUTION} only",
    )  # fmt: skip


def _scripted(
    name: str, path: Path, device: torch.device, call: Callable[[nn.Module, Tensor], Tensor],
    expected: str,
) -> Detector:  # fmt: skip
    """A TorchScript network for images of any size, run by ``call``; ``expected`` is for errors."""
    _require_file(path)
    try:
        model: nn.Module = torch.jit.load(str(path), map_location=device).eval()
        with torch.no_grad():  # an early error for other networks
            probe = call(model, torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
        if probe.ndim != 2 or len(probe) != 2:
            raise TypeError(f"it returns {tuple(probe.shape)} for two images")
        dim = probe.shape[1]
    except (RuntimeError, IndexError, AttributeError, TypeError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[-1]
        raise ValueError(f"{path} is not a TorchScript detector {expected} ({reason}).") from err
    return Detector(DetectorId(name, files_sha256(path), dim), lambda x: call(model, x), device)


def _torchscript(name: str, path: Path, device: torch.device) -> Detector:
    """The published Inception-v3, which resizes images itself."""
    expected = f"with the argument return_features, such as {INCEPTION_URL}"
    return _scripted(name, path, device, lambda m, x: m(x, return_features=True), expected)


def _custom(name: str, path: Path, device: torch.device) -> Detector:
    """A custom TorchScript file, named after the file."""
    expected = "of uint8 (B, 3, H, W) images of any size to features (B, d)"
    return _scripted(path.stem, path, device, lambda m, x: m(x), expected)


def _inception_pt(name: str, path: Path, device: torch.device) -> Detector:
    _require_file(path)
    model = load_inception(path).to(device)
    return Detector(
        DetectorId(name, files_sha256(path), WIDTH), lambda x: torch.cat(model(x), 1), device,
        resize="299x299, bilinear, corners not aligned, no smoothing",
        spatial_dim=SPATIAL_CHANNELS * SPATIAL_SIDE**2,
    )  # fmt: skip


def _vision(
    load: Callable[[Path, torch.device], Vision], size: str, name: str, path: Path,
    device: torch.device,
) -> Detector:  # fmt: skip
    rule = f"the whole image to a square of {size}, bicubic with smoothing, whole grey levels"
    net = load(path, device)
    return Detector(DetectorId(name, net.sha256, net.dim), net.features, device, resize=rule)


def _pixels(name: str, path: Path, device: torch.device) -> Detector:
    rule = "8x8 by means over areas, in [0, 1]"

    def features(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)

    sha = hashlib.sha256(rule.encode()).hexdigest()  # there are no weights to hash
    return Detector(DetectorId(name, sha, 3 * 8 * 8), features, device, resize=rule)


INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
INCEPTION_PT_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
REPOSITORY_FILES = ("config.json", "model.safetensors")
_dinov2 = partial(_vision, load_dinov2, str(DINOV2_RESOLUTION))
_clip = partial(_vision, load_clip, "the model's own size")
DETECTORS = {
    "cifar10-small": DetectorEntry(
        _classifier, bundled=BUNDLED / "cifar10-small-detector.safetensors"
    ),
    "cifar10-small-resnet": DetectorEntry(
        _classifier, bundled=BUNDLED / "cifar10-small-resnet-detector.safetensors"
    ),
    "inception": DetectorEntry(_torchscript, url=INCEPTION_URL),
    "inception-pt": DetectorEntry(_inception_pt, url=INCEPTION_PT_URL),
    "dinov2": DetectorEntry(_dinov2, repository="facebook/dinov2-large"),
    "clip": DetectorEntry(_clip, repository="openai/clip-vit-large-patch14"),
    "pixels": DetectorEntry(_pixels),
}
SCRIPTS = frozenset({".pt", ".pts", ".ts", ".jit", ".torchscript"})


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"detector file {path} does not exist: check --detector-path.")


def detector_entry(name: str) -> DetectorEntry:
    """The entry of a detector's name or of a TorchScript file; ValueError for other names."""
    if name in DETECTORS:
        return DETECTORS[name]
    if Path(name).suffix in SCRIPTS:
        return DetectorEntry(_custom, bundled=Path(name))
    raise ValueError(
        f"unknown detector '{name}': choose one of {', '.join(DETECTORS)}, or give a TorchScript "
        f"file ({', '.join(sorted(SCRIPTS))})."
    )


def parse_detectors(text: str) -> list[tuple[str, Path | None]]:
    """``"inception,dinov2=FOLDER,mine.pt"`` -> the names, each with its file or folder, or None.

    A comma is part of a path if there is a file or folder of that name.

    Raises:
        ValueError: an unknown name, or the same detector twice.
    """
    parts = [part.partition("=") for part in _parts(text.split(","))]
    chosen = [(name, Path(path) if path else None) for name, _, path in parts]
    for name, _ in chosen:
        detector_entry(name)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"--detector '{text}' is empty or repeats a detector: give each once.")
    return chosen


def _parts(pieces: list[str]) -> Iterator[str]:
    """Pieces between commas, rejoined where together they are the longest path that exists."""
    while pieces:
        name = f"{pieces[0].partition('=')[0]}=" if "=" in pieces[0] else ""
        joined = [",".join(pieces[:n]).strip() for n in range(len(pieces), 1, -1)]
        paths = (part for part in joined if Path(part.removeprefix(name.strip())).exists())
        part = next(paths, pieces[0].strip())
        if part:
            yield part
        pieces = pieces[part.count(",") + 1 :]


def load_detector(
    name: str, *, path: str | Path | None = None, device: torch.device | str
) -> Detector:
    """Load the detector ``name`` from its bundled file or from ``path``; nothing is downloaded.

    Raises:
        ValueError: unknown name, an invalid file, or no path for a detector that is not bundled.
        FileNotFoundError: no such file.
    """
    entry = detector_entry(name)
    file = path or entry.bundled
    if file is None and entry.source is not None:
        raise ValueError(f"detector {name} is not bundled: pass --detector-path ({entry.source}).")
    if path is not None and entry.bundled is None and entry.source is None:
        raise ValueError(f"detector {name} has no weights: leave {path} out.")
    return entry.make(name, Path(file or ""), torch.device(device))
