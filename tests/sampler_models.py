"""Models in closed form for the tests of the samplers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from amed.experiments import TrainedStudent
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from denoisers.analytic import GaussianDenoiser, MixtureDenoiser
from denoisers.cards import Card
from runtime.record import RunRecord
from solvers.types import Denoised, Denoiser

SHAPE = (3, 4, 4)
MEAN, VAR = 0.3, 0.09
RESTART = {"0": [3, 2, 0.06, 0.3]}


def make_card(label_dim: int = 0) -> Card:
    """A card that no registry holds."""
    return Card(
        name="tiny",
        family="analytic",
        resolution=SHAPE[1],
        channels=SHAPE[0],
        label_dim=label_dim,
        sigma_min=0.002,
        sigma_max=80.0,
        bottleneck="",
        file="",
        url=None,
        sha256="0" * 64,
        config={},
        restart_info=RESTART,
        guidance="cfg",
    )


@dataclass(eq=False)
class Counted:
    """Counts what a denoiser is really asked, whatever a meter says."""

    inner: Denoiser
    cost: int
    calls: list[int]

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        self.calls.append(self.cost)
        return self.inner(x, sigma)


@dataclass(eq=False)
class GaussianModel:
    """Data N(MEAN, VAR): every linear walk on it has a closed form."""

    card: Card = field(default_factory=make_card)
    sha256: str = "0" * 64
    calls: list[int] = field(default_factory=list)

    def decode(self, x: Tensor) -> Tensor:
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        mean, var = (torch.tensor(value, dtype=torch.float64) for value in (MEAN, VAR))
        return Counted(GaussianDenoiser(mean, var), self.card.cost(guidance_rate), self.calls)


@dataclass(eq=False)
class MixtureModel:
    """Two narrow modes, so that samples part ways; nothing about it is linear."""

    card: Card = field(default_factory=make_card)
    sha256: str = "1" * 64

    def decode(self, x: Tensor) -> Tensor:
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        means = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).reshape(2, *SHAPE)
        return MixtureDenoiser(means, 0.2)


@dataclass(eq=False)
class ClassModel:
    """Class k is the constant image k / 4, up to a very small spread."""

    card: Card = field(default_factory=lambda: make_card(label_dim=4))
    sha256: str = "2" * 64

    def decode(self, x: Tensor) -> Tensor:
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        assert labels is not None and labels.dtype == torch.int64
        return GaussianDenoiser(labels.reshape(-1, 1, 1, 1) / 4, 1e-12)


def trained(
    dataset_name: str = "tiny", sampler_stu: str = "amed", num_steps: int = 3, afs: bool = False
) -> TrainedStudent:
    """A student with a random predictor, as ``load_predictor`` would give it."""
    student = StudentSettings(
        dataset_name,
        sampler_stu,
        num_steps,
        0.002,
        80.0,
        afs=afs,
        scale_dir=0.05,
        scale_time=0.2,
    )
    predictor = AMEDPredictor(0.05, 0.2, seed=3).requires_grad_(False).eval()
    record = RunRecord.make("train", student.to_options(), {"name": dataset_name}, {})
    return TrainedStudent(predictor, student, record, "1")
