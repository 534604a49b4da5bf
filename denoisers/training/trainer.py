"""EDM training of a preconditioned network (Karras et al. 2022, arXiv:2206.00364, section 5).

What is random about an image is a function of (seed, number of the image), so N processes train
what one does, and a run that was killed and continued equals one that was not.
"""

from __future__ import annotations

import copy
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from denoisers.families.precond import EDMPrecond
from denoisers.precision import DTYPES, wide_dtype
from denoisers.training.augment import LABELS, Change
from denoisers.training.batches import PARTS, TrainingBatch
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.noise import SeedNoise

#: Settings that a continued run may change: how long it is, and how it ends.
FREE = frozenset({"kimg", "decay_kimg"})
POSITIVE = frozenset({"kimg", "batch", "lr", "p_std"})
PORTION = 64  #: held-out images at a time


def _setting(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """What a training run depends on besides its data and its first weights.

    Raises UserError for values that make no sense.
    """

    kimg: float = _setting("thousands of images to see")
    batch: int = _setting("images in a step, over all processes", 512)
    lr: float = _setting("learning rate of Adam", 1e-3)
    rampup_kimg: float = _setting("kimg of linear rise of the learning rate", 10.0)
    decay_kimg: float = _setting("kimg of linear fall to zero at the end", 0.0)
    ema_kimg: float = _setting("half-life of the averaged weights", 500.0)
    ema_rampup: float = _setting("... but at most this share of the images seen", 0.05)
    p_mean: float = _setting("mean of ln sigma", -1.2)
    p_std: float = _setting("deviation of ln sigma", 1.2)
    flip: bool = _setting("mirror half of the images", True)
    augment: float = _setting("probability of each non-leaky augmentation", 0.0)
    dtype: str = _setting("of the network's convolutions", "float32")
    seed: int = _setting("of the first weights and of every draw", 0)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype '{self.dtype}' is unknown; known: {', '.join(DTYPES)}")
        for name, value in asdict(self).items():
            if name in ("dtype", "flip", "p_mean", "seed"):
                good, wanted = not isinstance(value, float) or math.isfinite(value), "a number"
            elif name in POSITIVE:
                good, wanted = 0 < value < math.inf, "a number above 0"
            elif name == "augment":
                good, wanted = 0 <= value <= 1, "a probability"
            else:
                good, wanted = 0 <= value < math.inf, "a number from 0 on"
            if not good:
                raise UserError(f"--{name} is {value}; give {wanted}")

    @property
    def wide(self) -> torch.dtype:
        """Of weights, images and noise: float32, or float64 for a network in float64."""
        return wide_dtype(DTYPES[self.dtype])

    def learning_rate(self, images: int) -> float:
        """For the step after ``images`` images."""
        up = (images + self.batch) / max(1e3 * self.rampup_kimg, 1e-9)
        down = (1e3 * self.kimg - images) / max(1e3 * self.decay_kimg, 1e-9)
        return self.lr * max(0.0, min(1.0, up, down))

    def ema_keep(self, images: int) -> float:
        """What the average keeps of itself in the step that ends after ``images`` images."""
        half_life = min(1e3 * self.ema_kimg, images * self.ema_rampup)
        return 0.5 ** (self.batch / max(half_life, 1e-8))


class Examples(NamedTuple):
    """What a network is asked, and what it should answer."""

    clean: Tensor  #: (B, C, H, W) in [-1, 1]
    noisy: Tensor
    sigma: Tensor  #: (B, 1, 1, 1)
    labels: Tensor | None  #: one-hot (B, K), zero where the class is withheld
    augment_labels: Tensor | None

    @classmethod
    def make(
        cls,
        batch: TrainingBatch,
        recipe: Recipe,
        classes: int,
        withhold: float,
        device: torch.device,
    ) -> Examples:
        """From images of one of ``classes``, if any, told with probability 1 - ``withhold``."""
        clean = batch.images.to(device, non_blocking=True).to(recipe.wide) / 127.5 - 1
        chance = batch.chance.to(device, non_blocking=True).to(recipe.wide)
        level, told, turns, noise = chance.split([*PARTS, clean[0].numel()], dim=1)
        sigma = (level * recipe.p_std + recipe.p_mean).exp()[..., None, None]
        labels = None
        if classes:
            labels = F.one_hot(batch.classes, classes).to(device, non_blocking=True)
            labels = labels * (torch.special.ndtr(told) >= withhold)
        change = Change.draw(turns, recipe.augment, recipe.flip)
        clean = change.flip(clean)
        if recipe.augment:
            clean = change.warp(clean)
        noisy = clean + sigma * noise.view_as(clean)
        return cls(clean, noisy, sigma, labels, change.labels() if recipe.augment else None)


def weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """The loss weight that makes every noise level count alike at the start of training."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def weighted_error(x0: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The EDM loss of each image, (B,), a mean over its pixels."""
    return (weight(sigma, sigma_data) * (x0 - clean) ** 2).mean((1, 2, 3))


class Trainer:
    """A network in training: wide weights, their average, the optimizer, images seen.

    The forward and backward passes run on ``work``, whose convolutions have ``recipe.dtype``; its
    weights are cast from the wide ones in every step, so gradients reach those.  Raises
    UserError for a network or a number of processes that the recipe does not fit.
    """

    def __init__(self, net: EDMPrecond, recipe: Recipe, world: World, *, compiled: bool = False):
        if recipe.batch % world.size:
            raise UserError(
                f"--batch {recipe.batch} cannot be dealt out to {world.size} processes; "
                f"give a multiple of {world.size}"
            )
        if recipe.augment and _told(net) != LABELS:
            raise UserError(
                f"--augment {recipe.augment} needs a network with augment_dim {LABELS}, not "
                f"{_told(net)}; leave it out, or give --config with that"
            )
        self.recipe, self.world, self.images = recipe, world, 0
        net.to(world.device).train().requires_grad_(True).cast(recipe.wide)
        self.net = net
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.work = copy.deepcopy(self.net).cast(DTYPES[recipe.dtype])
        self.withhold, self.work.model.label_dropout = self.work.model.label_dropout, 0.0
        if compiled:
            self.work.model.compile()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.lr)
        #: entries of gradients that were not finite and were replaced
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=world.device)

    @property
    def done(self) -> bool:
        return self.images >= 1e3 * self.recipe.kimg

    def step(self, batch: TrainingBatch) -> Tensor:
        """One optimizer step on this rank's part of the next images; its mean loss (0-d).

        Dropout inside the network, where there is any, is drawn anew for (seed, step, rank) from
        torch's global generator: the one thing that does not belong to an image.
        """
        name = ("dropout", self.recipe.seed, self.world.rank)
        torch.manual_seed(int(SeedNoise([self.images]).integers(name, 1 << 32)))
        made = Examples.make(
            batch, self.recipe, self.net.label_dim, self.withhold, self.world.device
        )
        asked = (made.noisy, made.sigma, made.labels, made.augment_labels)
        x0 = functional_call(self.work, self._cast(), asked).x0
        loss = weighted_error(x0, made.clean, made.sigma, self.net.sigma_data).mean()
        loss.backward()
        self._share_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.images)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.images += self.recipe.batch
        self._average()
        return loss.detach()

    def _cast(self) -> dict[str, Tensor]:
        """The wide weights in the dtypes and layouts of ``work``."""
        own = dict(self.net.named_parameters())
        return {
            name: own[name].to(p.dtype, memory_format=torch.channels_last)
            if p.ndim == 4 and p.dtype != self.recipe.wide
            else own[name].to(p.dtype)
            for name, p in self.work.named_parameters()
        }

    def _share_gradients(self) -> None:
        """The mean over all ranks; what is not finite is replaced as published, and counted."""
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        flat = self.world.sum_(flat).div_(self.world.size)
        self.nonfinite += flat.numel() - flat.isfinite().sum()
        flat.nan_to_num_(0.0, 1e5, -1e5)
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)

    @torch.no_grad()
    def _average(self) -> None:
        keep = self.recipe.ema_keep(self.images)
        for mean, value in zip(self.ema.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(value, 1 - keep)

    @torch.no_grad()
    def validate(self, held_out: TrainingBatch) -> float:
        """The loss of the averaged weights on images as they are, every class told."""
        plain = replace(self.recipe, flip=False, augment=0.0)
        total = 0.0
        for i in range(0, len(held_out.images), PORTION):
            part = TrainingBatch(*(tensor[i : i + PORTION] for tensor in held_out))
            made = Examples.make(part, plain, self.net.label_dim, 0.0, self.world.device)
            x0 = self.ema(made.noisy, made.sigma, made.labels).x0
            error = weighted_error(x0, made.clean, made.sigma, self.net.sigma_data)
            total += error.sum().item()
        return total / len(held_out.images)

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
        """Continue from ``path``; UserError if it is of a run with other settings.

        A setting that an older version did not have counts as having its default.
        """
        defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
        try:
            saved = torch.load(path, weights_only=True, map_location=self.world.device)
            before = {**defaults, **saved["recipe"], **saved["about"]}
            images, net, ema, optimizer = (saved[k] for k in ("images", "net", "ema", "optimizer"))
        except Exception as error:  # a damaged file raises whatever its bytes happen to mean
            raise UserError(
                f"{path} is no state of a training run ({type(error).__name__}); remove it, or "
                "choose another folder"
            ) from error
        now = {**asdict(self.recipe), **about}
        for name in sorted((set(before) | set(now)) - FREE):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{path} is of a run with {name} {before.get(name)}, not {now.get(name)}; "
                    "repeat that run's options, or choose another folder"
                )
        self.images = int(images)
        self.net.load_state_dict(net)
        self.ema.load_state_dict(ema)
        self.optimizer.load_state_dict(optimizer)


def _told(net: EDMPrecond) -> int:
    """How many augmentation labels ``net`` takes."""
    layer = net.model.map_augment
    return 0 if layer is None else layer.in_features
