"""Building a sampler from its options."""

from __future__ import annotations

from collections.abc import Callable

from denoisers.cards import Card
from runtime.errors import UserError
from samplers.builders.classic import classic_sampler
from samplers.builders.pds import pds_sampler
from samplers.builders.restart import restart_sampler
from samplers.builders.stochastic import ddpm_sampler, edm_sampler
from samplers.options import ACCEPTS, SamplerOptions, check_accepted, check_grid
from samplers.sampler import Sampler
from solvers.names import unknown
from solvers.registry import CLASSIC, SOLVERS

BUILDERS: dict[str, Callable[[SamplerOptions, Card], Sampler]] = {
    **dict.fromkeys(CLASSIC, classic_sampler),
    "ddpm": ddpm_sampler,
    "edm": edm_sampler,
    "restart": restart_sampler,
    "pds": pds_sampler,
}


def build(options: SamplerOptions, card: Card) -> Sampler:
    """The sampler of ``options``, on the noise levels of ``card``'s model.

    Raises UserError or ValueError, one sentence with the remedy, for invalid options.
    """
    name = str(options.sampler)
    if name in SOLVERS and SOLVERS[name].needs_guide:
        raise UserError(
            f"sampler {name!r} requires a trained predictor: train one with train.py and give "
            "--predictor_path instead of --sampler"
        )
    if name not in BUILDERS:
        raise UserError(unknown("sampler", name, BUILDERS))
    check_accepted(options, ACCEPTS[name], f"sampler {name!r}")
    check_grid(options)
    return BUILDERS[name](options, card)
