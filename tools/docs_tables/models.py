"""The table of known models, from their cards."""

from __future__ import annotations

from denoisers.cards import Card, cards
from tools.docs_tables.pages import markdown

HEAD = ("`--dataset_name`", "family", "samples", "noise levels", "guidance",
        "network evaluations per call", "weights")  # fmt: skip


def table() -> str:
    """One row per card, in the order of ``denoisers/cards.json``."""
    return markdown(HEAD, [_row(card) for card in cards().values()])


def _row(card: Card) -> tuple[str, ...]:
    guided = card.cost(guidance_rate=2.0)
    return (
        f"`{card.name}`",
        card.family + (f", PFGM++ with D = {card.pfgmpp}" if card.pfgmpp else ""),
        _samples(card),
        f"{card.sigma_max:.4g} to {card.sigma_min:.4g}",
        f"`{card.guidance}`" if card.guidance else "",
        "1" if guided == 1 else f"1, or {guided} with guidance",
        _weights(card),
    )


def _samples(card: Card) -> str:
    size = " x ".join(map(str, card.shape))
    parts = [size if card.image_resolution is None else f"latents {size}"]
    if card.image_resolution is not None:
        parts.append(f"images of {card.image_resolution} pixels")
    if card.label_dim:
        parts.append(f"{card.label_dim} classes")
    if card.text:
        parts.append("prompts")
    return ", ".join(parts)


def _weights(card: Card) -> str:
    if card.bundled is not None:
        return "bundled"
    if not card.url:
        return f"{card.file}, to be downloaded by hand"
    if card.url.startswith("hub:"):
        return f"`{card.url}`"
    return f"[`{card.file}`]({card.url})"
