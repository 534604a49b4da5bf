"""The builders of the stochastic samplers of EDM and DDPM."""

from __future__ import annotations

from dataclasses import asdict, replace

from denoisers.cards import Card
from plans.stochastic import ddpm_plan, edm_plan
from samplers.builders.common import resolve_length
from samplers.options import SamplerOptions
from samplers.sampler import Sampler


def ddpm_sampler(options: SamplerOptions, card: Card) -> Sampler:
    """DDPM's ancestral sampler (DDIM with ``eta`` 0) on the grid with a final 0."""
    eta = 1.0 if options.eta is None else options.eta
    grid = options.grid.resolve(card)
    num_steps, plan = resolve_length(options, card, lambda n: ddpm_plan(grid.closed(n), eta))
    options = replace(options.with_grid(grid, num_steps), eta=eta)
    label = "ddpm" if eta == 1 else f"ddpm-eta{eta:g}"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))


def edm_sampler(options: SamplerOptions, card: Card) -> Sampler:
    """EDM's stochastic sampler; without churn its deterministic sampler, Heun's method."""
    churn = options.churn
    grid = options.grid.resolve(card)
    num_steps, plan = resolve_length(options, card, lambda n: edm_plan(grid.closed(n), churn))
    options = replace(options.with_grid(grid, num_steps), **asdict(churn))
    label = f"edm-churn{churn.S_churn:g}" if churn.S_churn else "edm"
    return Sampler(label, plan, options, card.cost(options.guidance_rate))
