"""The builder of samplers with a trained predictor: a student alone, or in Restart."""

from __future__ import annotations

from dataclasses import replace

from amed.experiments import TrainedStudent
from denoisers.cards import Card
from ns.experiments import AnyStudent, TrainedTable
from plans.plan import Solve
from plans.table import TableWalk
from plans.walk import WalkSpec
from restart.intervals import resolve_intervals
from runtime.errors import UserError
from samplers.builders.restart import restart_sampler
from samplers.options import (
    LEARNED_ACCEPTS,
    LEARNED_RESTART_ACCEPTS,
    SamplerOptions,
    check_accepted,
    check_grid,
)
from samplers.sampler import Sampler


def build_learned(options: SamplerOptions, student: AnyStudent, card: Card) -> Sampler:
    """The sampler of a trained student.

    The predictor keeps its dtype and device, so move it first.  Raises UserError for an option
    that contradicts the student's settings.
    """
    name = student.name
    if options.sampler not in (None, "restart"):
        raise UserError(
            f"--sampler {options.sampler} cannot be combined with --predictor_path {name}: give "
            "one of them, or --sampler restart"
        )
    if card.name != student.dataset_name:
        raise UserError(
            f"predictor {name} was trained for {student.dataset_name!r}, not for {card.name!r}: "
            "leave --dataset_name out, or train one for it"
        )
    if options.sampler is None:
        what = "a predictor, which has its own solver and grid"
        check_accepted(options, LEARNED_ACCEPTS, what)
    rate = student.guidance_rate if options.guidance_rate is None else options.guidance_rate
    options = replace(options, guidance_rate=rate)
    if isinstance(student, TrainedTable):
        return _table(options, student, card)
    settings = student.settings
    walk = WalkSpec(student.label, settings.solver(), student.predictor, settings.afs)
    if options.sampler == "restart":
        return replace(_restart(options, walk, student, card), student=student)
    plan: tuple[Solve, ...] = (walk.solve(settings.grid.resolve(card).nodes()),)
    return Sampler(walk.name, plan, options, card.cost(rate), student)


def _table(options: SamplerOptions, student: TrainedTable, card: Card) -> Sampler:
    if options.sampler is not None:
        raise UserError(
            f"{student.label} is a table, which is a whole sampler and cannot be part of "
            f"--sampler {options.sampler}: leave --sampler out, or give an AMED predictor"
        )
    cost = card.cost(options.guidance_rate)
    return Sampler(student.label, (TableWalk(student.table),), options, cost, student)


def _restart(
    options: SamplerOptions, walk: WalkSpec, student: TrainedStudent, card: Card
) -> Sampler:
    """Restart with the student on the main walk, in the descents, or both.

    On the main walk the student keeps its nodes and its analytic first step, without a final 0,
    because it was trained to end at sigma_min.  A descent has the polynomial nodes of its interval,
    which the student was not trained on, and no analytic step, which is valid only at sigma_max.
    """
    which = options.learned or "main"
    what = f"--learned {which}, which uses the predictor's"
    check_accepted(options, LEARNED_RESTART_ACCEPTS[which], what, "use --learned restart")
    check_grid(options)
    options, descent = replace(options, learned=None), replace(walk, afs=False)
    if which == "restart":
        sampler = restart_sampler(options, card, descent=descent)
        label = f"restart-{walk.name}"
    else:
        options = _on_students_grid(options, walk, student, card)
        sampler = restart_sampler(options, card, walk, descent if which == "both" else None)
        label = f"{walk.name}-restart" + ("-own" if which == "both" else "")
    return replace(sampler, label=label, options=replace(sampler.options, learned=which))


def _on_students_grid(
    options: SamplerOptions, walk: WalkSpec, student: TrainedStudent, card: Card
) -> SamplerOptions:
    settings = student.settings
    stated, _ = resolve_intervals(options.restart_info, card)
    if stated not in (None, settings.num_steps):
        raise UserError(
            f"--restart_info has {stated} main nodes, but {walk.name} has {settings.num_steps}: "
            "leave the number out, or use --learned restart"
        )
    grid = settings.grid.resolve(card)
    return replace(options.with_grid(grid, settings.num_steps), afs=settings.afs, final_zero=False)
