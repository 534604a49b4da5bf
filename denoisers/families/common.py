"""What all families share: checks of conditions, of batches and of files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from denoisers.cards import Card
from denoisers.conditions import check_class
from runtime.errors import UserError
from solvers.types import Denoiser


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model of any family, as :class:`denoisers.protocol.Model`.

    The conditions that it takes are those of its card.  A subclass implements :meth:`_denoiser`,
    which is only called with conditions that fit.
    """

    card: Card
    sha256: str  #: hash of the weights that were loaded

    def decode(self, x: Tensor) -> Tensor:
        """Final states (B, *card.shape) as images: unchanged, unless samples are latents."""
        return x

    @property
    def network(self) -> nn.Module:
        """The network alone, without the arithmetic around it; UserError where none is to be had.

        Kept apart because the states' arithmetic is in their own dtype and is not compiled.
        """
        raise UserError(
            f"the network of '{self.card.name}', of the family {self.card.family}, cannot be "
            "compiled: leave --compile out"
        )

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Denoiser:
        """Fix classes, (B,) int64 or None, the rate of guidance and prompts, one per sample.

        Raises UserError for classes out of range, and for conditions that the model does not
        support or cannot do without.
        """
        name, text = self.card.name, self.card.text
        if prompts is not None and not text:
            raise UserError(f"'{name}' takes no text: leave the prompts out")
        if prompts is None and text:
            raise UserError(f"'{name}' is conditioned on text; give --prompt or --prompt_path")
        if guidance_rate not in (None, 0.0, 1.0) and not self.card.guided:
            raise UserError(
                f"'{name}' has no guidance, but the rate is {guidance_rate}; leave it out"
            )
        if labels is not None:
            for extreme in (labels.min(), labels.max()):
                check_class(self.card, int(extreme))
        return self._denoiser(labels, guidance_rate, prompts)

    def _denoiser(
        self, labels: Tensor | None, guidance_rate: float | None, prompts: Sequence[str] | None
    ) -> Denoiser:
        """The denoiser with these conditions, which are those of the card."""
        raise NotImplementedError


def require_labels(card: Card, labels: Tensor | None, classes: int | None) -> None:
    """Raise UserError if a network with an embedding of ``classes`` classes gets no labels."""
    if classes and labels is None:
        raise UserError(
            f"'{card.name}' was trained with classes: give every sample one of 0 to {classes - 1}"
        )


def check_batch(bound: Tensor | None, x: Tensor, what: str = "labels", copies: int = 1) -> None:
    """Raise ValueError unless ``bound`` has ``copies`` rows for every sample of ``x``."""
    if bound is not None and len(bound) != copies * len(x):
        raise ValueError(f"{len(bound) // copies} {what} are bound but the batch has {len(x)}")


def samples_of(card: Card) -> str:
    """The samples of a model in words: shape, classes and, under PFGM++, its D."""
    added = "" if card.pfgmpp is None else f" and the D = {card.pfgmpp} of PFGM++"
    return f"{card.shape} with {card.label_dim} classes{added}"


def check_samples(found: Card, card: Card, source: object) -> None:
    """Raise UserError unless the file ``source``, described by ``found``, fits ``card``."""
    if samples_of(found) != samples_of(card):
        raise UserError(
            f"{source} is for samples {samples_of(found)} where '{card.name}' has "
            f"{samples_of(card)}; choose the dataset it belongs to"
        )
