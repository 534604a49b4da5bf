"""Feature detectors by name: uint8 images in, float32 features out.

A detector is known by its name and by the SHA-256 of its weights; both travel with every figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from metrics.cnn import RESOLUTION, load_cnn
from metrics.statistics import DetectorId, Statistics

CHUNK = 64
BUNDLED = Path(__file__).resolve().parent / "bundled"


class Detector:
    """A network that turns uint8 (B, 3, H, W) images into float32 (B, dim) features.

    The network always sees ``CHUNK`` images at once, the last chunk filled up with black ones:
    kernels are chosen by shape and round differently, so this makes the features of an image
    the same bits in every batch and on any number of ranks.
    """

    def __init__(
        self,
        id: DetectorId,
        features: Callable[[Tensor], Tensor],
        device: torch.device,
        resolution: int | None = None,
    ) -> None:
        self.id = id
        self.device = device
        self.resolution = resolution
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

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) on any device -> float32 (B, dim) on the detector's device.

        Raises:
            ValueError: not uint8 RGB, or a size that this detector does not take.
        """
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
        chunks = [self._chunk(chunk) for chunk in images.to(self.device).split(CHUNK)]
        return torch.cat(chunks) if chunks else torch.empty(0, self.dim, device=self.device)

    def _chunk(self, images: Tensor) -> Tensor:
        filled = images.new_zeros(CHUNK, *images.shape[1:])
        filled[: len(images)] = images
        with torch.autocast(self.device.type, enabled=False):
            return self._features(filled)[: len(images)].float()


@dataclass(frozen=True)
class Entry:
    """How a detector is made: from ``bundled`` or from a file that was published at ``url``."""

    make: Callable[[str, Path, torch.device], Detector]
    bundled: Path | None = None
    url: str | None = None


def _small(name: str, path: Path, device: torch.device) -> Detector:
    model, _ = load_cnn(path)
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Detector(
        DetectorId(name, _sha256(path), model.dim), lambda x: model(x).features, device, RESOLUTION
    )


def _torchscript(name: str, path: Path, device: torch.device) -> Detector:
    """The published Inception-v3: takes uint8 or [0, 255] images and resizes them itself."""
    if not path.is_file():
        raise FileNotFoundError(f"detector file {path} does not exist: check --detector-path.")
    try:
        model: nn.Module = torch.jit.load(str(path), map_location=device).eval()
        with torch.no_grad():
            # also fails for a file of another kind, before any image is read
            probe = model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8, device=device),
                          return_features=True)  # fmt: skip
        dim = probe.shape[1]
    except (RuntimeError, IndexError, AttributeError, TypeError) as err:
        raise ValueError(
            f"{path} is not a TorchScript detector that takes return_features=True "
            f"({str(err).strip().splitlines()[-1]}): pass the file published as {INCEPTION_URL}."
        ) from err
    return Detector(
        DetectorId(name, _sha256(path), dim), lambda x: model(x, return_features=True), device
    )


INCEPTION_URL = (
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
    "inception-2015-12-05.pt"
)
DETECTORS = {
    "cifar10-small": Entry(_small, bundled=BUNDLED / "cifar10-small-detector.safetensors"),
    "inception": Entry(_torchscript, url=INCEPTION_URL),
}
REFERENCES = {
    "cifar10-small": BUNDLED / "cifar10-small-train.npz",
    "cifar10-small-test": BUNDLED / "cifar10-small-test.npz",
}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def detector_entry(name: str) -> Entry:
    """The registry's entry; an unknown name raises ValueError."""
    if name not in DETECTORS:
        raise ValueError(f"unknown detector '{name}': choose one of {', '.join(DETECTORS)}.")
    return DETECTORS[name]


def load_detector(
    name: str, *, path: str | Path | None = None, device: torch.device | str
) -> Detector:
    """Make the detector ``name`` from its bundled file or from ``path``.

    Nothing is downloaded here: scripts fetch ``detector_entry(name).url`` and pass the path.

    Raises:
        ValueError: unknown name, a file of the wrong kind, or no path for a detector that is not
            bundled. FileNotFoundError: no such file.
    """
    entry = detector_entry(name)
    file = path or entry.bundled
    if file is None:
        raise ValueError(f"detector {name} is not bundled: pass --detector-path ({entry.url}).")
    return entry.make(name, Path(file), torch.device(device))


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
