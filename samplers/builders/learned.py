"""From a trained student to a sampler: its own walk, or segments of Restart."""

from __future__ import annotations

from dataclasses import replace

from amed.experiments import TrainedStudent
from denoisers.cards import Card
from plans.plan import Solve
from plans.walk import WalkSpec
from restart.intervals import resolve_intervals
from runtime.errors import UserError
from samplers.builders.restart import restart_sampler
from samplers.options import (
    LEARNED_RESTART_TAKES,
    LEARNED_TAKES,
    SamplerOptions,
    check_length,
    check_taken,
)
from samplers.sampler import Sampler


def build_learned(options: SamplerOptions, student: TrainedStudent, card: Card) -> Sampler:
    """The sampler of a trained student.

    The predictor stays in its dtype and on its device, so move it first.  Raises UserError where
    an option contradicts what the predictor brings along.
    """
    settings, name = student.settings, student.name
    if options.sampler not in (None, "restart"):
        raise UserError(
            f"--sampler {options.sampler} and --predictor_path {name} are two samplers: give one, "
            "or --sampler restart, whose segments a predictor may walk"
        )
    if card.name != settings.dataset_name:
        raise UserError(
            f"predictor {name} was trained for {settings.dataset_name!r}, not for {card.name!r}: "
            "leave --dataset_name out, or train one for it"
        )
    if options.sampler is None:
        check_taken(options, LEARNED_TAKES, "a predictor, which brings its own solver and grid")
    rate = settings.guidance_rate if options.guidance_rate is None else options.guidance_rate
    options = replace(options, guidance_rate=rate)
    walk = WalkSpec(student.label, settings.solver(), student.predictor, settings.afs)
    if options.sampler == "restart":
        return replace(_restart(options, walk, student, card), student=student)
    plan: tuple[Solve, ...] = (walk.solve(settings.grid.resolve(card).nodes()),)
    return Sampler(walk.name, plan, options, card.cost(rate), student)


def _restart(
    options: SamplerOptions, walk: WalkSpec, student: TrainedStudent, card: Card
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
    options, descent = replace(options, learned=None), replace(walk, afs=False)
    if which == "restart":
        sampler = restart_sampler(options, card, descent=descent)
        label = f"restart-{walk.name}"
    else:
        own = _on_students_grid(options, walk, student, card)
        sampler = restart_sampler(own, card, walk, descent if which == "both" else None)
        label = f"{walk.name}-restart" + ("-own" if which == "both" else "")
    return replace(sampler, label=label, options=replace(sampler.options, learned=which))


def _on_students_grid(
    options: SamplerOptions, walk: WalkSpec, student: TrainedStudent, card: Card
) -> SamplerOptions:
    settings = student.settings
    stated, _ = resolve_intervals(options.restart_info, card)
    if stated not in (None, settings.num_steps):
        raise UserError(
            f"--restart_info states {stated} main nodes, and {walk.name} walks its own "
            f"{settings.num_steps}: leave the number out, or use --learned restart"
        )
    grid = settings.grid.resolve(card)
    return replace(options.on(grid, settings.num_steps), afs=settings.afs, final_zero=False)
