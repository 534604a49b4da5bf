"""The bundled statistics of images, by name and detector."""

from __future__ import annotations

from pathlib import Path

from metrics.detectors import BUNDLED, Detector
from metrics.statistics import Statistics

#: Bundled statistics, by the names of the reference and of the detector.
REFERENCES = {
    ("cifar10-small", "cifar10-small"): BUNDLED / "cifar10-small-train.npz",
    ("cifar10-small", "cifar10-small-resnet"): BUNDLED / "cifar10-small-resnet-train.npz",
    ("cifar10-small-test", "cifar10-small"): BUNDLED / "cifar10-small-test.npz",
    ("cifar10-small-test", "cifar10-small-resnet"): BUNDLED / "cifar10-small-resnet-test.npz",
    ("cifar10-small-converged", "cifar10-small"): BUNDLED / "cifar10-small-converged.npz",
    ("cifar10-small-converged", "cifar10-small-resnet"): BUNDLED
    / "cifar10-small-resnet-converged.npz",
}


def load_reference(name_or_path: str | Path, detector: Detector) -> Statistics:
    """Load bundled or saved statistics of ``detector``.

    Raises:
        ValueError: unreadable statistics, or of another detector.
        FileNotFoundError: neither a bundled name nor a file.
    """
    reference = Statistics.load(reference_file(name_or_path, detector.name))
    reference.require(detector.id)
    return reference


def is_bundled_reference(name: str) -> bool:
    """Whether it is the name of bundled statistics, of one detector or several."""
    return any(name == known for known, _ in REFERENCES)


def reference_file(name_or_path: str | Path, detector: str) -> Path:
    """The file of the bundled reference of that name for a detector, or the path itself.

    Raises:
        ValueError: the reference is bundled for other detectors only.
        FileNotFoundError: neither a bundled name nor a file.
    """
    name = str(name_or_path)
    path = REFERENCES.get((name, detector), Path(name))
    if is_bundled_reference(name) and (name, detector) not in REFERENCES:
        others = ", ".join(of for known, of in REFERENCES if known == name)
        raise ValueError(
            f"reference '{name}' is bundled for {others}, not for detector {detector}: make one "
            "with fid.py ref."
        )
    if not path.is_file() and path.suffix != ".npz":
        names = ", ".join(dict.fromkeys(known for known, _ in REFERENCES))
        raise FileNotFoundError(
            f"reference '{name}' is neither one of {names} nor an .npz: make it with fid.py ref."
        )
    return path
