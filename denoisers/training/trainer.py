"""EDM training of a preconditioned network (Karras et al. 2022, arXiv:2206.00364, section 5).

All random numbers of an image are a function of (seed, number of the image), so the result does not
depend on the number of processes, nor on whether a run was interrupted and resumed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from checkpoints.states import Stateful, read_state, restore
from denoisers.families.precond import EDMPrecond
from denoisers.precision import DTYPES, wide_dtype
from denoisers.training.augment import LABELS, Change
from denoisers.training.batches import PARTS, TrainingBatch
from denoisers.training.optimizers import OPTIMIZERS
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.noise import SeedNoise

#: Settings that a resumed run may change: its length, and how it ends.
FREE = frozenset({"kimg", "decay_kimg"})
NAMES: dict[str, Collection[str]] = {"dtype": DTYPES, "optimizer": OPTIMIZERS}
POSITIVE = frozenset({"kimg", "batch", "lr", "p_std"})
SAVED = {"recipe": dict, "about": dict, "images": int}  #: entries of a state, beside its parts
PORTION = 64  #: held-out images evaluated at a time
#: What a run trains, and on which data, as plain values: a state is only resumed with the same.
RunIdentity = Mapping[str, object]


def _setting(help: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training run.

    Raises UserError for invalid values.
    """

    kimg: float = _setting("thousands of images to see")
    batch: int = _setting("images in a step, over all processes", 512)
    optimizer: str = _setting("adam, or muon for the weights of layers", "adam")
    lr: float = _setting("learning rate", 1e-3)
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
        for name, known in NAMES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} '{getattr(self, name)}' is unknown; known: {', '.join(known)}"
                )
        for name, value in asdict(self).items():
            if name in (*NAMES, "flip", "p_mean", "seed"):
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
        """Dtype of weights, images and noise: float32, or float64 for a network in float64."""
        return wide_dtype(DTYPES[self.dtype])

    def learning_rate(self, images: int) -> float:
        """The learning rate of the step after ``images`` images."""
        up = (images + self.batch) / max(1e3 * self.rampup_kimg, 1e-9)
        down = (1e3 * self.kimg - images) / max(1e3 * self.decay_kimg, 1e-9)
        return self.lr * max(0.0, min(1.0, up, down))

    def ema_keep(self, images: int) -> float:
        """The decay of the average in the step that ends after ``images`` images."""
        half_life = min(1e3 * self.ema_kimg, images * self.ema_rampup)
        return 0.5 ** (self.batch / max(half_life, 1e-8))


class Examples(NamedTuple):
    """Inputs of a network, and its target."""

    clean: Tensor  #: (B, C, H, W) in [-1, 1]
    noisy: Tensor
    sigma: Tensor  #: (B, 1, 1, 1)
    labels: Tensor | None  #: one-hot (B, K), zero if the class is withheld
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
        """Augmented and noisy images; their class is withheld with probability ``withhold``."""
        clean = batch.images.to(device, non_blocking=True).to(recipe.wide) / 127.5 - 1
        chance = batch.chance.to(device, non_blocking=True).to(recipe.wide)
        level, shown, turns, noise = chance.split([*PARTS, clean[0].numel()], dim=1)
        sigma = (level * recipe.p_std + recipe.p_mean).exp()[..., None, None]
        labels = None
        if classes:
            labels = F.one_hot(batch.classes, classes).to(device, non_blocking=True)
            labels = labels * (torch.special.ndtr(shown) >= withhold)
        change = Change.draw(turns, recipe.augment, recipe.flip)
        clean = change.flip(clean)
        if recipe.augment:
            clean = change.warp(clean)
        noisy = clean + sigma * noise.view_as(clean)
        return cls(clean, noisy, sigma, labels, change.labels() if recipe.augment else None)


def weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """The loss weight with which all noise levels have the same loss at the start of training."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def weighted_error(x0: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The EDM loss of each image, (B,), a mean over its pixels."""
    return (weight(sigma, sigma_data) * (x0 - clean) ** 2).mean((1, 2, 3))


class Trainer:
    """A network in training: master weights, their average, the optimizer, and images seen.

    The forward and backward passes run on ``work``, whose convolutions have ``recipe.dtype``; its
    weights are cast from the master weights in every step, so that these receive the gradients.
    Raises UserError for a network or a number of processes that the recipe does not fit.
    """

    def __init__(self, net: EDMPrecond, recipe: Recipe, world: World, *, compiled: bool = False):
        if recipe.batch % world.size:
            raise UserError(
                f"--batch {recipe.batch} cannot be dealt out to {world.size} processes; "
                f"give a multiple of {world.size}"
            )
        if recipe.augment and _augment_dim(net) != LABELS:
            raise UserError(
                f"--augment {recipe.augment} needs a network with augment_dim {LABELS}, not "
                f"{_augment_dim(net)}; leave it out, or give --config with that"
            )
        self.recipe, self.world, self.images = recipe, world, 0
        net.to(world.device).train().requires_grad_(True).cast(recipe.wide)
        self.net = net
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.work = copy.deepcopy(self.net).cast(DTYPES[recipe.dtype])
        self.withhold, self.work.model.label_dropout = self.work.model.label_dropout, 0.0
        if compiled:
            self.work.model.compile()
        self.optimizers = OPTIMIZERS[recipe.optimizer](self.net, recipe.lr)
        #: count of gradient entries that were not finite and were replaced
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=world.device)

    @property
    def done(self) -> bool:
        return self.images >= 1e3 * self.recipe.kimg

    def step(self, batch: TrainingBatch) -> Tensor:
        """One optimizer step on this rank's part of the next images; returns its mean loss (0-d).

        Dropout inside the network is drawn for (seed, step, rank) from torch's global generator: it
        is the only randomness that does not belong to an image.
        """
        name = ("dropout", self.recipe.seed, self.world.rank)
        torch.manual_seed(int(SeedNoise([self.images]).integers(name, 1 << 32)))
        examples = Examples.make(
            batch, self.recipe, self.net.label_dim, self.withhold, self.world.device
        )
        inputs = (examples.noisy, examples.sigma, examples.labels, examples.augment_labels)
        x0 = functional_call(self.work, self._cast(), inputs).x0
        loss = self._errors(x0, examples).mean()
        loss.backward()
        self._share_gradients()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.learning_rate(self.images)
            optimizer.step()
            optimizer.zero_grad()
        self.images += self.recipe.batch
        self._average()
        return loss.detach()

    def _cast(self) -> dict[str, Tensor]:
        """The master weights in the dtypes and layouts of ``work``."""
        own = dict(self.net.named_parameters())
        return {
            name: own[name].to(p.dtype, memory_format=torch.channels_last)
            if p.ndim == 4 and p.dtype != self.recipe.wide
            else own[name].to(p.dtype)
            for name, p in self.work.named_parameters()
        }

    def _share_gradients(self) -> None:
        """Average gradients over all ranks; entries that are not finite are replaced and counted.

        The replacements are those of the published code.
        """
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
        """The loss of the averaged weights on images without augmentation, with their classes."""
        plain = replace(self.recipe, flip=False, augment=0.0)
        total = 0.0
        for i in range(0, len(held_out.images), PORTION):
            part = TrainingBatch(*(tensor[i : i + PORTION] for tensor in held_out))
            examples = Examples.make(part, plain, self.net.label_dim, 0.0, self.world.device)
            x0 = self.ema(examples.noisy, examples.sigma, examples.labels).x0
            total += self._errors(x0, examples).sum().item()
        return total / len(held_out.images)

    def _errors(self, x0: Tensor, examples: Examples) -> Tensor:
        """The loss of each image, (B,)."""
        return weighted_error(x0, examples.clean, examples.sigma, self.net.sigma_data)

    def _parts(self) -> dict[str, Stateful]:
        return {"net": self.net, "ema": self.ema, **self.optimizers}

    def save(self, path: Path, identity: RunIdentity) -> None:
        """Write everything that :meth:`resume` needs into one file."""
        with atomic_write(path) as temporary:
            torch.save(
                {
                    "recipe": asdict(self.recipe),
                    "about": dict(identity),
                    "images": self.images,
                    **{name: part.state_dict() for name, part in self._parts().items()},
                },
                temporary,
            )

    def resume(self, path: Path, identity: RunIdentity) -> None:
        """Continue from ``path``; UserError if it is of a run with other settings.

        Settings that an older version did not have are taken to have their defaults.
        """
        defaults = {f.name: f.default for f in fields(Recipe) if f.default is not MISSING}
        saved = read_state(path, SAVED)
        before = {**defaults, **saved["recipe"], **saved["about"]}
        now = {**asdict(self.recipe), **identity}
        for name in sorted((set(before) | set(now)) - FREE):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{path} is of a run with {name} {before.get(name)}, not {now.get(name)}; "
                    "repeat that run's options, or choose another folder"
                )
        parts = self._parts()  # which depend on the recipe
        saved = read_state(path, {**SAVED, **dict.fromkeys(parts, dict)})
        restore(parts, saved, path, begun=saved["images"] > 0)
        self.images = saved["images"]


def _augment_dim(net: EDMPrecond) -> int:
    """The number of augmentation labels that ``net`` takes."""
    layer = net.model.map_augment
    return 0 if layer is None else layer.in_features
