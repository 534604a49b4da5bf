"""Class, prompt and guidance of every image, as a function of its seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from denoisers.cards import Card
from denoisers.protocol import Model, TextModel
from image_data.prompts import read_prompts
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.seeds import row_of
from solvers.types import Denoiser

StreamName = tuple[str | int, ...]  #: prefix of the names of draws


@dataclass(frozen=True)
class ConditionOptions:
    """Class, prompts and guidance as given on the command line."""

    label: int | None = None  #: ``--class`` of every image
    prompt: str | None = None
    prompt_path: str | None = None
    negative_prompt: str | None = None
    guidance_type: str | None = None
    guidance_rate: float | None = None

    def at(self, guidance_rate: float | None) -> ConditionOptions:
        """The same options with the guidance rate of a sampler."""
        return replace(self, guidance_rate=guidance_rate)

    def resolve(self, card: Card) -> Conditions:
        """The conditions; UserError for those that the model of ``card`` does not have."""
        prompt, path = self.prompt, self.prompt_path
        if not card.text and (prompt is not None or path is not None):
            raise UserError(f"{card.name!r} takes no text: leave --prompt and --prompt_path out")
        if prompt is not None and path is not None:
            raise UserError(
                f"--prompt {prompt!r} and --prompt_path {path} are both prompts: give one"
            )
        prompts = read_prompts(path) if path else (prompt,) if prompt else ()
        conditions = Conditions(
            self.label, prompts, self.guidance_rate, self.guidance_type, self.negative_prompt
        )
        conditions.check(card)
        return conditions


@dataclass(frozen=True)
class Conditions:
    """Class, prompts and guidance.

    A model with classes draws one per seed unless ``label`` fixes it.  A single prompt is that of
    every image.  Of several prompts, sampling uses row i for seed i (seeds of selections and of
    converged samples count from their own start), and training draws a row.  Without prompts, a
    text model gets the empty prompt.
    """

    label: int | None = None
    prompts: tuple[str, ...] = ()
    guidance_rate: float | None = None
    guidance_type: str | None = None  #: only checked against the card
    negative: str | None = None  #: prompt in the place of the empty one under guidance

    def check(self, card: Card, seeds: Sequence[int] = ()) -> None:
        """Raise UserError for a condition that the model of ``card`` does not take."""
        check_class(card, self.label)
        if self.prompts and not card.text:
            raise UserError(f"{card.name!r} takes no text: leave --prompt and --prompt_path out")
        if self.negative is not None and (not card.text or card.cost(self.guidance_rate) == 1):
            raise UserError(
                f"--negative_prompt {self.negative!r} takes the place of the empty prompt in "
                "classifier-free guidance: give a text model a --guidance_rate other than 0 and 1, "
                "or leave it out"
            )
        last = max(seeds, key=row_of, default=0)
        if len(self.prompts) > 1 and row_of(last) >= len(self.prompts):
            shifted = "" if row_of(last) == last else f", here row {row_of(last)}"
            raise UserError(
                f"seed {last} has no prompt: --prompt_path has {len(self.prompts)} rows, and the "
                f"image of seed i takes row i (from 0){shifted}; "
                + ("use fewer images" if shifted else "give smaller --seeds")
            )
        if self.guidance_type not in (None, card.guidance):
            has = f"--guidance_type {card.guidance}" if card.guidance else "no guidance"
            raise UserError(
                f"{card.name!r} has {has}, not {self.guidance_type!r}: leave --guidance_type out"
            )
        if self.guidance_rate is not None and not card.guided:
            raise UserError(
                f"{card.name!r} has no guidance: leave --guidance_rate {self.guidance_rate:g} out"
            )

    def describe(self) -> dict[str, int | str] | None:
        """The number of prompts, their hash and the negative one; None without prompts."""
        if not self.prompts and self.negative is None:
            return None
        digest = hashlib.sha256("\0".join(self.prompts).encode()).hexdigest()
        known: dict[str, int | str] = {"count": len(self.prompts), "sha256": digest}
        return known if self.negative is None else {**known, "negative": self.negative}

    def bind(
        self, model: Model, noise: SeedNoise, device: torch.device, stream: StreamName = ()
    ) -> Denoiser:
        """The denoiser of the images of ``noise.seeds``.

        ``stream`` is set in training: it prefixes the names of the draws, and prompts are drawn.
        """
        given = (
            self._labels(model.card, noise, device, stream),
            self.guidance_rate,
            self._prompts(model.card, noise, stream),
        )
        if self.negative is None:
            return model.bind(*given)
        return cast(TextModel, model).bind(*given, negative=self.negative)

    def _labels(
        self, card: Card, noise: SeedNoise, device: torch.device, stream: StreamName
    ) -> Tensor | None:
        if not card.label_dim:
            return None
        if self.label is not None:
            return torch.full((len(noise.seeds),), self.label, device=device)
        return noise.integers((*stream, "class") if stream else "class", card.label_dim).to(device)

    def _prompts(self, card: Card, noise: SeedNoise, stream: StreamName) -> tuple[str, ...] | None:
        if not card.text:
            return None
        if len(self.prompts) < 2:
            return (self.prompts or ("",)) * len(noise.seeds)
        rows: Sequence[int] = [row_of(seed) for seed in noise.seeds]
        if stream:
            rows = noise.integers((*stream, "prompt"), len(self.prompts)).tolist()
        return tuple(self.prompts[row] for row in rows)


def check_class(card: Card, label: int | None) -> None:
    """Raise UserError for a class that the model of ``card`` does not have."""
    if label is None:
        return
    if not card.label_dim:
        raise UserError(f"{card.name!r} has no classes: leave --class {label} out")
    if not 0 <= label < card.label_dim:
        raise UserError(
            f"--class {label} is not one of the {card.label_dim} classes of {card.name!r}: "
            f"give 0 to {card.label_dim - 1}"
        )
