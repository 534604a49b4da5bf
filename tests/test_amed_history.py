"""State and gradients between the intervals of a training step."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from amed.settings import STUDENTS
from amed.step import (
    MicroBatch,
    next_state,
    student_interval,
    train_batch,
)
from restart.intervals import Interval
from solvers.driver import Meter, State, integrate
from solvers.registry import make_solver
from teachers.build import RestartSupervision, build_teacher
from teachers.supervision import Supervision
from tests.student_problems import (
    HISTORY,
    Keep,
    micro_of,
    nothing,
    predictor_of,
    settings_of,
    student_of,
)
from tests.training_problems import largest, mixture, normals, starts


def supervision() -> Supervision:
    states = torch.arange(4 * 32, dtype=torch.float64).reshape(4, 1, 2, 4, 4)
    return Supervision(states[:-1], states[1:], 0)


@pytest.mark.parametrize("name", STUDENTS)
def test_where_the_next_interval_starts(name):
    settings = settings_of(name)
    micro = micro_of(settings, [0])
    predictor = predictor_of(settings)
    out = student_interval(student_of(settings), micro, 0, predictor)
    assert out.x.requires_grad
    given = supervision()
    micro = micro._replace(supervision=given)
    state = next_state(student_of(settings), micro, out, 0, predictor)
    if name not in HISTORY:
        assert torch.equal(state.x, given.start[1]) and state.history == () and state.substeps == 0
        return
    assert torch.equal(state.x, out.x)
    assert len(state.history) == 2 and state.substeps == 2
    for node, before in zip(state.history, out.history, strict=True):
        assert torch.equal(node.d, before.d) and torch.equal(node.t, before.t)
        assert not (node.t.requires_grad or node.x.requires_grad or node.x0.requires_grad)
        assert node.feat is None or not node.feat.requires_grad
    assert out.history[-1].x0.requires_grad  # so there was something to detach
    assert not state.x.requires_grad


def test_after_the_last_interval_there_is_only_a_state():
    out = State(torch.ones(1, 2, 4, 4, requires_grad=True) * 2, substeps=6)
    settings = settings_of("ipndm")
    micro = micro_of(settings, [0])._replace(supervision=supervision())
    state = next_state(student_of(settings), micro, out, 2, predictor_of(settings))
    assert torch.equal(state.x, out.x) and state.history == () and not state.x.requires_grad


@pytest.mark.parametrize("name", HISTORY)
def test_gradients_stay_inside_their_interval(name):
    settings = settings_of(name, num_steps=4)
    student, micro = student_of(settings), micro_of(settings, range(2))
    predictor = predictor_of(settings)
    frozen = predictor_of(settings).requires_grad_(False)
    keep = Keep(predictor)
    train_batch(predictor, keep, student, [micro], 2, nothing)

    def gradient(first: nn.Module, second: nn.Module) -> Tensor:
        """Gradient of the second interval's loss, with a separate predictor per interval."""
        predictor.zero_grad()
        out = student_interval(student, micro, 0, first)
        out = student_interval(student, micro._replace(state=out), 1, second)
        ((out.x - micro.supervision.target[1]).square().sum() / 2).backward()
        return torch.cat([p.grad.flatten() for p in predictor.parameters()])

    ours = torch.cat([g.flatten() for g in keep.steps[1].values()])
    assert largest(ours, gradient(frozen, predictor)) < 1e-12
    assert largest(ours, gradient(predictor, predictor)) > 1e-3  # through the history


@pytest.mark.parametrize("name", HISTORY)
def test_train_batch_does_not_change_its_micro_batches(name):
    settings = settings_of(name)
    predictor, micro = predictor_of(settings), micro_of(settings, range(2))
    before = deepcopy(micro.supervision)
    keep = Keep(predictor)
    for _ in range(2):
        train_batch(predictor, keep, student_of(settings), [micro], 2, nothing)
    assert micro.state.history == () and micro.state.substeps == 0
    assert all(torch.equal(a, b) for a, b in zip(before[:2], micro.supervision[:2], strict=True))
    for first, second in zip(keep.steps[:3], keep.steps[3:], strict=True):
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_multistep_student_uses_its_history():
    """Otherwise the tests above would pass for a student without history."""
    settings = settings_of("ipndm")
    student, micro = student_of(settings), micro_of(settings, range(2))
    predictor = predictor_of(settings)
    out = student_interval(student, micro, 0, predictor)
    state = next_state(student, micro, out, 0, predictor)
    with_history = student_interval(student, micro._replace(state=state), 1, predictor)
    without = student_interval(student, micro._replace(state=State(state.x)), 1, predictor)
    assert largest(without.x, with_history.x) > 1e-3
    assert [len(s.history) for s in (out, with_history)] == [2, 3]


def test_after_a_jump_the_history_is_that_of_the_new_trajectory():
    """Earlier slopes belong to noise that the jump replaced."""
    settings = settings_of("ipndm", num_steps=4, sampler_tea="restart", M=15)
    fine, stride = settings.grid.refined(settings.M)
    ts = fine[::stride].tolist()
    restart = RestartSupervision((Interval(3, 1, ts[2], 3 * ts[2]),))
    build = partial(build_teacher, "restart", fine, stride, restart=restart)
    meter, x, normal = Meter(mixture()), starts([0, 1]), normals([0, 1])
    given = build(histories=True).supervise(meter, x, normal)
    assert [o is None for o in given.origins] == [True, True, False]
    origin = given.origins[2]
    down = integrate(make_solver("heun"), mixture(), origin, fine[: 2 * stride + 1]).x[-1]
    assert largest(down, given.start[2]) < 0.02  # the ODE up and down again
    assert largest(x, origin) > 0.2  # not the initial latent
    student, predictor = student_of(settings), predictor_of(settings)
    micro = MicroBatch.begin(meter, given)
    out = student_interval(student, micro, 0, predictor)
    micro = micro._replace(state=next_state(student, micro, out, 0, predictor))
    out = student_interval(student, micro, 1, predictor)
    state = next_state(student, micro, out, 1, predictor)
    assert torch.equal(state.x, given.start[2]) and state.substeps == 4
    own = integrate(student.solver, mixture(), origin, student.ts[:3], predictor, student.afs).x[1]
    assert torch.equal(state.history[-2].x, own)  # the node at t_1 of the student's walk
    assert build(histories=False).supervise(meter, x, normal).origins == (None, None, None)
