"""From a trained predictor to a sampler: its own walk, or segments of Restart."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch

from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from denoisers.cards import Card
from plans.plan import Solve
from restart.intervals import parse_restart_line
from runtime.errors import UserError
from runtime.record import RunRecord
from samplers.builders.restart import Walker, restart_info, restart_sampler
from samplers.options import (
    LEARNED_RESTART_TAKES,
    LEARNED_TAKES,
    SamplerOptions,
    check_length,
    check_taken,
)
from samplers.sampler import Sampler


def build_learned(
    options: SamplerOptions,
    predictor: AMEDPredictor,
    student: StudentSettings,
    record: RunRecord,
    name: str,
    card: Card,
) -> Sampler:
    """The sampler of a trained predictor; ``name`` is that of its folder or file.

    The predictor stays in its dtype and on its device, so move it first.  Raises UserError where
    an option contradicts what the predictor brings along.
    """
    if options.sampler not in (None, "restart"):
        raise UserError(
            f"--sampler {options.sampler} and --predictor_path {name} are two samplers: give one, "
            "or --sampler restart, whose segments a predictor may walk"
        )
    if card.name != student.dataset_name:
        raise UserError(
            f"predictor {name} was trained for {student.dataset_name!r}, not for {card.name!r}: "
            "leave --dataset_name out, or train one for it"
        )
    if options.sampler is None:
        check_taken(options, LEARNED_TAKES, "a predictor, which brings its own solver and grid")
    rate = student.guidance_rate if options.guidance_rate is None else options.guidance_rate
    options = replace(options, guidance_rate=rate)
    settings: dict[str, Any] = {
        "predictor": name,
        "predictor_sha256": _sha256(predictor),
        "predictor_record": {"created": record.created, "model": record.model},
    }
    own = student.to_options()
    own.pop("guidance_rate")
    if options.sampler == "restart":
        built = _restart(
            options, Walker(_label(student, name), student.solver(), predictor), student, card
        )
        return replace(built, settings=built.settings | settings | {"student": own})
    settings |= own
    grid = student.grid(**card.time_maps)
    plan = (Solve(student.solver(), grid, predictor, student.afs),)
    return Sampler(_label(student, name), plan, settings, card.cost(rate), rate)


def _label(student: StudentSettings, name: str) -> str:
    """``amed-00001`` for a numbered run, ``amed-<name>`` for another."""
    folder, _, snapshot = name.partition("/")
    short = folder.split("-")[0] if folder[:5].isdigit() else folder
    return "-".join(part for part in (student.sampler_stu, short, snapshot) if part)


def _restart(
    options: SamplerOptions, walker: Walker, student: StudentSettings, card: Card
) -> Sampler:
    """Restart with the student on the main walk, in the descents, or both.

    A main walk is the student's own: its nodes, its free first step, and no final 0, because it was
    trained to end at sigma_min; intervals restart at the nearest of its nodes.  A descent has the
    polynomial nodes of its interval, which the student was not trained on, and evaluates its first
    slope: the analytic one holds at sigma_max alone.
    """
    which = options.learned or "main"
    what = f"--learned {which}, where the predictor brings its own"
    check_taken(options, LEARNED_RESTART_TAKES[which], what, "use --learned restart")
    check_length(options)
    if which == "restart":
        low = card.sigma_min if options.sigma_min is None else options.sigma_min
        high = card.sigma_max if options.sigma_max is None else options.sigma_max
        built = restart_sampler(replace(options, learned=None), card, low, high, down=walker)
        label = f"restart-{walker.name}"
    else:
        stated, _ = parse_restart_line(restart_info(options, card))
        if stated not in (None, student.num_steps):
            raise UserError(
                f"--restart_info states {stated} main nodes, and {walker.name} walks its own "
                f"{student.num_steps}: leave the number out, or use --learned restart"
            )
        own = replace(
            options,
            num_steps=student.num_steps,
            schedule_type=student.schedule_type,
            schedule_rho=student.schedule_rho,
            afs=student.afs,
            final_zero=False,
        )
        ends = student.sigma_min, student.sigma_max
        down = walker if which == "both" else None
        built = restart_sampler(own, card, *ends, main=walker, down=down)
        label = f"{walker.name}-restart" + ("-own" if down else "")
    return replace(built, label=label, settings=built.settings | {"learned": which})


def _sha256(predictor: torch.nn.Module) -> str:
    """Of the weights alone: the same for the same predictor under another name or dtype."""
    digest = hashlib.sha256()
    for key, value in sorted(predictor.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().to(torch.float32).numpy().tobytes())
    return digest.hexdigest()
