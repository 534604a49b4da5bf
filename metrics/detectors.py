"""Feature detectors by name: uint8 images in, float32 features out.

A detector is known by its name and by the SHA-256 of its weights; both travel with every figure.
Each declares how it brings images to the size that its network sees (``Detector.resize``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metrics.cnn import RESOLUTION, load_cnn
from metrics.inception import SPATIAL_CHANNELS, SPATIAL_SIDE, WIDTH, load_inception
from metrics.statistics import DetectorId, Statistics
from metrics.vision import DINOV2_RESOLUTION, Vision, load_clip, load_dinov2

CHUNK = 64
BUNDLED = Path(__file__).resolve().parent / "bundled"


class Features(NamedTuple):
    """What a detector makes of a batch: (B, dim), and (B, spatial dim) where it offers that."""

    pooled: Tensor
    spatial: Tensor | None


class Detector:
    """A network that turns uint8 (B, 3, H, W) images into float32 (B, dim) features.

    The network always sees ``CHUNK`` images at once, the last chunk filled up with black ones:
    kernels are chosen by shape and round differently, so this makes the features of an image
    the same bits in every batch and on any number of ranks.

    Args:
        features: (CHUNK, 3, H, W) uint8 -> (CHUNK, dim + spatial_dim), spatial features last.
        resolution: the only size of images it takes; None for any.
        resize: in words, how images of another size are brought to that of the network.
        spatial_dim: how many features keep their place in the image (for sFID); 0 for none.
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
            ValueError: not uint8 RGB, or a size that this detector does not take.
        """
        return self.both(images).pooled

    @torch.no_grad()
    def both(self, images: Tensor) -> Features:
        """As a call, with the spatial features of the same forward pass."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"detector {self.name} takes uint8 images (B, 3, H, W), got {images.dtype} "
                f"{tuple(images.shape)}: convert them first."
            )
        height, width = images.shape[2:]
        if self.resolution is not None and (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"detector {self.name} takes {self.resolution}x{self.resolution} images, got "
                f"{width}x{height}: use --detector inception, which resizes, or images of that "
                "size."
            )
        spatial = self.spatial_id.dim if self.spatial_id else 0
        chunks = [self._chunk(chunk) for chunk in images.to(self.device).split(CHUNK)]
        made = (
            torch.cat(chunks) if chunks else torch.empty(0, self.dim + spatial, device=self.device)
        )
        return Features(made[:, : self.dim], made[:, self.dim :] if spatial else None)

    def _chunk(self, images: Tensor) -> Tensor:
        filled = images.new_zeros(CHUNK, *images.shape[1:])
        filled[: len(images)] = images
        with torch.autocast(self.device.type, enabled=False):
            return self._features(filled)[: len(images)].float()


@dataclass(frozen=True)
class DetectorEntry:
    """How a detector is made, and where its weights are.

    They are ``bundled``, or a file published at ``url``, or the files of a ``repository`` of the
    Hugging Face hub; a detector without any of these has no weights.
    """

    make: Callable[[str, Path, torch.device], Detector]
    bundled: Path | None = None
    url: str | None = None
    repository: str | None = None

    @property
    def source(self) -> str | None:
        """What has to be fetched before the detector can be made, in words."""
        return self.url or self.repository


def _small(name: str, path: Path, device: torch.device) -> Detector:
    model, _ = load_cnn(path)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Detector(
        DetectorId(name, _sha256(path), model.dim), lambda x: model(x).features, device,
        RESOLUTION, f"none: {RESOLUTION}x{RESOLUTION} only",
    )  # fmt: skip


def _scripted(
    name: str, path: Path, device: torch.device, call: Callable[[nn.Module, Tensor], Tensor],
    wanted: str,
) -> Detector:  # fmt: skip
    """A TorchScript file that takes uint8 images of any size, by ``call``, and resizes them."""
    _require_file(path)
    try:
        model: nn.Module = torch.jit.load(str(path), map_location=device).eval()
        with torch.no_grad():
            # also fails for a file of another kind, before any image is read
            probe = call(model, torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device))
        if probe.ndim != 2 or len(probe) != 2:
            raise TypeError(f"it returns {tuple(probe.shape)} for two images")
        dim = probe.shape[1]
    except (RuntimeError, IndexError, AttributeError, TypeError) as err:
        reason = (str(err).strip().splitlines() or [type(err).__name__])[-1]
        raise ValueError(f"{path} is not a TorchScript detector {wanted} ({reason}).") from err
    return Detector(DetectorId(name, _sha256(path), dim), lambda x: call(model, x), device)


def _torchscript(name: str, path: Path, device: torch.device) -> Detector:
    """The published Inception-v3: takes uint8 or [0, 255] images and resizes them itself."""
    wanted = f"that takes return_features=True, as the file published as {INCEPTION_URL} does"
    return _scripted(name, path, device, lambda m, x: m(x, return_features=True), wanted)


def _own(name: str, path: Path, device: torch.device) -> Detector:
    """Somebody's TorchScript file, known by its name."""
    wanted = "of uint8 (B, 3, H, W) images of any size to features (B, d)"
    return _scripted(path.stem, path, device, lambda m, x: m(x), wanted)


def _inception_pt(name: str, path: Path, device: torch.device) -> Detector:
    _require_file(path)
    model = load_inception(path).to(device)
    return Detector(
        DetectorId(name, _sha256(path), WIDTH), lambda x: torch.cat(model(x), 1), device,
        resize="299x299, bilinear, corners not aligned, no smoothing",
        spatial_dim=SPATIAL_CHANNELS * SPATIAL_SIDE**2,
    )  # fmt: skip


def _dinov2(name: str, path: Path, device: torch.device) -> Detector:
    return _vision(name, load_dinov2(path, device), device, str(DINOV2_RESOLUTION))


def _clip(name: str, path: Path, device: torch.device) -> Detector:
    return _vision(name, load_clip(path, device), device, "the model's own size")


def _vision(name: str, vision: Vision, device: torch.device, size: str) -> Detector:
    rule = f"the whole image to a square of {size}, bicubic with smoothing, whole grey levels"
    return Detector(
        DetectorId(name, vision.sha256, vision.dim), vision.features, device, resize=rule
    )


def _pixels(name: str, path: Path, device: torch.device) -> Detector:
    rule = "8x8 by means over areas, in [0, 1]"

    def features(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)

    sha = hashlib.sha256(rule.encode()).hexdigest()  # of the rule, for want of weights
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
DETECTORS = {
    "cifar10-small": DetectorEntry(_small, bundled=BUNDLED / "cifar10-small-detector.safetensors"),
    "inception": DetectorEntry(_torchscript, url=INCEPTION_URL),
    "inception-pt": DetectorEntry(_inception_pt, url=INCEPTION_PT_URL),
    "dinov2": DetectorEntry(_dinov2, repository="facebook/dinov2-large"),
    "clip": DetectorEntry(_clip, repository="openai/clip-vit-large-patch14"),
    "pixels": DetectorEntry(_pixels),
}
SCRIPTS = frozenset({".pt", ".pts", ".ts", ".jit", ".torchscript"})
REFERENCES = {
    "cifar10-small": BUNDLED / "cifar10-small-train.npz",
    "cifar10-small-test": BUNDLED / "cifar10-small-test.npz",
    "cifar10-small-converged": BUNDLED / "cifar10-small-converged.npz",
}


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"detector file {path} does not exist: check --detector-path.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def detector_entry(name: str) -> DetectorEntry:
    """The registry's entry, or that of a TorchScript file; other names raise ValueError."""
    if name in DETECTORS:
        return DETECTORS[name]
    if Path(name).suffix in SCRIPTS:
        return DetectorEntry(_own, bundled=Path(name))
    raise ValueError(
        f"unknown detector '{name}': choose one of {', '.join(DETECTORS)}, or give a TorchScript "
        f"file ({', '.join(sorted(SCRIPTS))})."
    )


def parse_detectors(text: str) -> list[tuple[str, Path | None]]:
    """``"inception,dinov2=FOLDER,mine.pt"`` -> names and, where given, the file or folder of each.

    Raises:
        ValueError: an unknown name, or the same detector twice.
    """
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    chosen = [(name, Path(path) if path else None) for name, _, path in parts]
    for name, _ in chosen:
        detector_entry(name)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"--detector '{text}' is no list of different detectors: give each once.")
    return chosen


def load_detector(
    name: str, *, path: str | Path | None = None, device: torch.device | str
) -> Detector:
    """Make the detector ``name`` from its bundled file or from ``path``.

    Nothing is downloaded here: scripts fetch what ``detector_entry(name)`` says and pass the path.

    Raises:
        ValueError: unknown name, a file of the wrong kind, or no path for a detector that is not
            bundled. FileNotFoundError: no such file.
    """
    entry = detector_entry(name)
    file = path or entry.bundled
    if file is None and entry.source is not None:
        raise ValueError(f"detector {name} is not bundled: pass --detector-path ({entry.source}).")
    if path is not None and entry.bundled is None and entry.source is None:
        raise ValueError(f"detector {name} has no weights: leave {path} out.")
    return entry.make(name, Path(file or ""), torch.device(device))


def load_reference(name_or_path: str | Path, detector: Detector) -> Statistics:
    """Bundled or saved statistics to compare with, checked to be of ``detector``.

    Raises:
        ValueError: unreadable statistics, or made with another detector.
        FileNotFoundError: neither a bundled name nor a file.
    """
    path = REFERENCES.get(str(name_or_path), Path(name_or_path))
    if not path.is_file() and path.suffix != ".npz":
        raise FileNotFoundError(
            f"reference '{name_or_path}' is neither one of {', '.join(REFERENCES)} nor an .npz: "
            "make it with fid.py ref."
        )
    reference = Statistics.load(path)
    reference.require(detector.id)
    return reference
