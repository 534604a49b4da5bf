"""The sensitivity of a detector's FID: test images with noise or blur, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from commands.help import SETTINGS
from image_data.sources import image_batches
from metrics.detectors import load_detector
from metrics.fid import gather
from metrics.references import load_reference
from runtime import cli

EXAMPLES = """\b
Example:
  python -m benchmarks.detector --data cifar10-32x32-test.zip
"""
NOISE = (0, 1, 2, 4, 8, 16)  #: standard deviations, in grey levels
BLUR = (0.4, 0.5, 0.7, 1.0, 1.5)  #: standard deviations of a Gaussian filter, in pixels


def noisy(images: np.ndarray, level: float) -> np.ndarray:
    """Images (N, 3, H, W) plus Gaussian noise of standard deviation ``level``."""
    return images + level * np.random.default_rng(0).standard_normal(images.shape)


def blurred(images: np.ndarray, level: float) -> np.ndarray:
    """Images (N, 3, H, W) after a Gaussian filter of standard deviation ``level``."""
    return gaussian_filter(images, (0, 0, level, level), mode="reflect")


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="folder or zip of images"
)
@click.option("--num", type=click.IntRange(min=2), default=2000, help="number of images")
@click.option("--detector", default="cifar10-small", help="name of a detector")
@click.option("--ref", default="cifar10-small", help="reference statistics")
def main(data: Path, num: int, detector: str, ref: str) -> None:
    """Measure the FID of images that are degraded step by step, by noise and by blur.

    The exit code is 1 unless the FID grows with every step.
    """
    device = torch.device("cpu")
    features = load_detector(detector, device=device)
    reference = load_reference(ref, features)
    images = torch.cat(list(image_batches(data, 500, (0, 1), num, 0))).numpy().astype(float)

    def figures(name: str, change: Callable, levels: tuple[float, ...]) -> list[float]:
        found = []
        for level in levels:
            worse = change(images, level).round().clip(0, 255).astype(np.uint8)
            found.append(gather(torch.from_numpy(worse).split(500), features, name).fid(reference))
            click.echo(f"{name} {level:g}: FID {found[-1]:.3g}")
        return found

    noise, blur = figures("noise", noisy, NOISE), figures("blur", blurred, BLUR)
    steps = [*pairwise(noise), *pairwise([noise[0], *blur])]
    if not all(better < worse for better, worse in steps):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main)
