"""EDM training of a preconditioned network (Karras et al. 2022, arXiv:2206.00364, section 5).

Every draw is a function of (seed, step, rank) and every image of (seed, number of images before
it), so a run that was killed and continued equals one that was not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write

from .edm import EDMPrecond

#: Settings that a continued run may change: how long it is, and how it ends.
FREE = frozenset({"kimg", "decay_kimg"})


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its data and its first weights."""

    kimg: float  #: thousands of images to see
    batch: int = 512  #: over all processes
    lr: float = 1e-3
    rampup_kimg: float = 10.0  #: linear rise of the learning rate
    decay_kimg: float = 0.0  #: linear fall to zero at the end
    ema_kimg: float = 500.0  #: half-life of the average
    ema_rampup: float = 0.05  #: ... and at most this share of the images seen
    p_mean: float = -1.2  #: of ln sigma
    p_std: float = 1.2
    flip: bool = True
    dtype: str = "float32"  #: of the network's convolutions
    seed: int = 0

    def learning_rate(self, images: int) -> float:
        """For the step after ``images`` images."""
        up = (images + self.batch) / max(1e3 * self.rampup_kimg, 1e-9)
        down = (1e3 * self.kimg - images) / max(1e3 * self.decay_kimg, 1e-9)
        return self.lr * max(0.0, min(1.0, up, down))

    def ema_keep(self, images: int) -> float:
        """What the average keeps of itself in the step that ends after ``images`` images."""
        half_life = min(1e3 * self.ema_kimg, images * self.ema_rampup)
        return 0.5 ** (self.batch / max(half_life, 1e-8))


class Order:
    """Batches of indices into ``count`` images: a fresh permutation for every pass over the data.

    Yields this rank's part of every batch from image number ``start`` on, without end.
    """

    def __init__(self, count: int, recipe: Recipe, start: int, rank: int = 0, size: int = 1):
        self.count, self.recipe, self.start, self.rank, self.size = count, recipe, start, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        at = self.start
        epoch, order = -1, torch.empty(0)
        while True:
            batch = []
            for number in range(at + self.rank, at + self.recipe.batch, self.size):
                if number // self.count != epoch:
                    epoch = number // self.count
                    order = torch.randperm(self.count, generator=_generator(self.recipe, epoch, -1))
                batch.append(int(order[number % self.count]))
            yield batch
            at += self.recipe.batch


@dataclass(frozen=True)
class Draw:
    """The chance in one batch: noise levels (B, 1, 1, 1), unit noise like x, flips (B,)."""

    sigma: Tensor
    noise: Tensor
    flip: Tensor

    @classmethod
    def make(cls, recipe: Recipe, x: Tensor, step: int, rank: int) -> Draw:
        generator = _generator(recipe, step, rank, x.device)
        level = torch.randn(len(x), 1, 1, 1, generator=generator, device=x.device)
        return cls(
            (level * recipe.p_std + recipe.p_mean).exp(),
            torch.randn(x.shape, generator=generator, device=x.device),
            torch.rand(len(x), generator=generator, device=x.device) < 0.5 * recipe.flip,
        )


def _generator(
    recipe: Recipe, step: int, rank: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    # 64 bits without collisions for fewer than 2^20 ranks and 2^36 steps of one seed
    key = (recipe.seed << 56) ^ ((step + 1) << 20) ^ (rank + 1)
    return torch.Generator(device).manual_seed(key & ((1 << 63) - 1))


def weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """The loss weight that makes every noise level count alike at the start of training."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def weighted_error(x0: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The EDM loss of each image, (B,), a mean over its pixels."""
    return (weight(sigma, sigma_data) * (x0 - clean) ** 2).mean((1, 2, 3))


class Trainer:
    """A network in training: float32 weights, their average, the optimizer, images seen.

    The forward and backward passes run on ``work``, whose convolutions have ``recipe.dtype``; its
    weights are cast from the float32 ones in every step, so gradients reach those.
    """

    def __init__(self, net: EDMPrecond, recipe: Recipe, world: World, *, compiled: bool = False):
        self.recipe, self.world, self.images = recipe, world, 0
        self.net = net.to(world.device).train().requires_grad_(True)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.work = copy.deepcopy(self.net).cast(getattr(torch, recipe.dtype))
        if compiled:
            self.work.model.compile()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.lr)

    @property
    def done(self) -> bool:
        return self.images >= 1e3 * self.recipe.kimg

    def step(self, clean: Tensor, labels: Tensor | None = None) -> float:
        """One optimizer step on this rank's ``clean`` (B, C, H, W) in [-1, 1]; returns its loss."""
        draw = Draw.make(self.recipe, clean, self.images // self.recipe.batch, self.world.rank)
        clean = torch.where(draw.flip[:, None, None, None], clean.flip(3), clean)
        noisy = clean + draw.sigma * draw.noise
        x0 = functional_call(self.work, self._cast(), (noisy, draw.sigma, labels)).x0
        loss = weighted_error(x0, clean, draw.sigma, self.net.sigma_data).mean()
        loss.backward()
        self._share_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.images += self.recipe.batch
        self._average()
        return loss.item()

    def _cast(self) -> dict[str, Tensor]:
        """The float32 weights in the dtypes and layouts of ``work``."""
        own = dict(self.net.named_parameters())
        return {
            name: own[name].to(p.dtype, memory_format=torch.channels_last)
            if p.ndim == 4 and p.dtype != torch.float32
            else own[name].to(p.dtype)
            for name, p in self.work.named_parameters()
        }

    def _share_gradients(self) -> None:
        """The mean over all ranks; what is not finite is dropped, as in the published training."""
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        flat = self.world.sum_(flat).div_(self.world.size).nan_to_num_(0.0, 1e5, -1e5)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)

    @torch.no_grad()
    def _average(self) -> None:
        keep = self.recipe.ema_keep(self.images)
        for mean, value in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)

    @torch.no_grad()
    def validate(self, clean: Tensor, labels: Tensor | None, parts: int = 64) -> float:
        """The loss of the averaged weights on held-out images, with the same draws every time."""
        draw = Draw.make(self.recipe, clean, -1, 0)
        total = 0.0
        for i in range(0, len(clean), parts):
            part = slice(i, i + parts)
            sigma = draw.sigma[part]
            noisy = clean[part] + sigma * draw.noise[part]
            x0 = self.ema(noisy, sigma, None if labels is None else labels[part]).x0
            total += weighted_error(x0, clean[part], sigma, self.net.sigma_data).sum().item()
        return total / len(clean)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Everything that :meth:`resume` needs, in one file."""
        with atomic_write(path) as temporary:
            torch.save(
                {
                    "recipe": asdict(self.recipe),
                    "about": about,
                    "images": self.images,
                    "net": self.net.state_dict(),
                    "ema": self.ema.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                },
                temporary,
            )

    def resume(self, path: Path, about: dict[str, Any]) -> None:
        """Continue from ``path``; UserError if it is of a run with other settings."""
        try:
            saved = torch.load(path, weights_only=True, map_location=self.world.device)
            before = {**saved["recipe"], **saved["about"]}
        except (RuntimeError, KeyError, TypeError, EOFError, OSError) as error:
            raise UserError(f"{path} is no state of a training run ({error}); remove it") from error
        now = {**asdict(self.recipe), **about}
        for name in sorted((set(before) | set(now)) - FREE):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{path} is of a run with {name} {before.get(name)}, not {now.get(name)}; "
                    "repeat that run's options, or choose another folder"
                )
        self.images = int(saved["images"])
        self.net.load_state_dict(saved["net"])
        self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])


def noise_levels(sigma_min: float, sigma_max: float, count: int) -> Sequence[float]:
    """``count`` levels spaced evenly in ln sigma, for curves of the loss against sigma."""
    low, high = math.log(sigma_min), math.log(sigma_max)
    return [math.exp(low + (high - low) * i / (count - 1)) for i in range(count)]
