"""The builder of preconditioned predictor-corrector sampling."""

from __future__ import annotations

from dataclasses import replace

from denoisers.cards import Card
from pds.chain import Chain, ve_levels
from pds.masks import Mask, load_mask
from pds.operators import Preconditioner
from runtime.errors import UserError
from runtime.options import Json
from samplers.options import SamplerOptions
from samplers.sampler import Sampler

#: Published for CIFAR-10 (arXiv:2011.13456, appendix G); the defaults of cards without their own.
PUBLISHED = {"N": 1000, "n_steps": 1, "snr": 0.16}
ALPHA = 5.0  #: published


def pds_sampler(options: SamplerOptions, card: Card) -> Sampler:
    """The predictor-corrector chain of ``options``, by default with the bundled frequency mask.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    if card.pfgmpp is not None:
        raise UserError(
            f"{card.name!r} is a PFGM++ model, but pds supports only Gaussian noise: "
            "use another --sampler"
        )
    defaults = {**PUBLISHED, **card.langevin}
    snr = defaults["snr"] if options.snr is None else options.snr
    n_steps = int(defaults["n_steps"] if options.n_steps is None else options.n_steps)
    predictor = options.pds_predictor is not False
    if not predictor and n_steps == 0:
        raise UserError("--pds_predictor False and --n_steps 0 leave no step: give --n_steps 1")
    cost = card.cost(options.guidance_rate)
    num_steps, speed_up = _length(options, int(defaults["N"]), cost * (n_steps + predictor))
    iterations = num_steps // speed_up
    sigma_min, sigma_max = options.grid.resolve(card).ends
    levels = ve_levels(iterations, sigma_min, sigma_max)
    masks = _masks(options, card)
    kinds = [kind for kind, mask in masks.items() if mask]
    alpha = ALPHA if options.alpha is None else options.alpha
    freq, space = (None if mask is None else mask.values for mask in masks.values())
    operators, coupled = Preconditioner.of(freq, space, alpha), bool(options.batch_coupled)
    chain = Chain(*levels, operators, snr, n_steps, predictor, coupled)
    options = replace(
        options,
        num_steps=num_steps,
        nfe=None,
        speed_up=speed_up,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        alpha=alpha if kinds else None,
        snr=snr,
        n_steps=n_steps,
        pds_predictor=None if predictor else False,
        batch_coupled=coupled,
    )
    extra: dict[str, Json] = {"iterations": iterations}
    extra |= {f"{kind}_mask": mask.describe() if mask else None for kind, mask in masks.items()}
    label = "-".join(["pds", *(kinds or ["plain"])])
    label += ("" if predictor else "-corrector") + ("-coupled" if coupled else "")
    return Sampler(label, (chain,), options, cost, extra=extra)


def _masks(options: SamplerOptions, card: Card) -> dict[str, Mask | None]:
    freq, space = options.freq_mask_path, options.space_mask_path
    freq = freq or ("bundled" if space is None else "none")
    specs = {"freq": freq, "space": space or "none"}
    masks = {kind: load_mask(kind, spec, card.name, card.shape) for kind, spec in specs.items()}
    if options.alpha is not None and not any(masks.values()):
        raise UserError(f"--alpha {options.alpha:g} needs a mask: give one, or leave it out")
    return masks


def _length(options: SamplerOptions, published: int, per_iteration: int) -> tuple[int, int]:
    """Noise levels and their divisor ``speed_up``; an iteration has ``per_iteration`` NFE."""
    nfe, speed_up = options.nfe, options.speed_up or 1
    if nfe is None:
        num_steps = options.num_steps or published
        if num_steps // speed_up < 2:
            raise UserError(
                f"--speed_up {speed_up} leaves {num_steps // speed_up} of {num_steps} iterations: "
                f"give {num_steps // 2} or less"
            )
        return num_steps, speed_up
    if options.speed_up is not None:
        raise UserError(
            f"--speed_up {speed_up} and --nfe {nfe} both set the length of the chain: "
            "give one of them"
        )
    iterations, left = divmod(nfe, per_iteration)
    if left or iterations < 2:
        near = [n * per_iteration for n in (iterations, iterations + 1) if n >= 2]
        raise UserError(
            f"pds cannot use exactly {nfe} NFE: "
            f"give {' or '.join(map(str, near or [2 * per_iteration]))}"
        )
    return iterations, 1
