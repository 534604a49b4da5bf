"""Teachers: sliced walks, Restart's visits and targets against plain loops, and their variance."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from amed.settings import StudentSettings
from denoisers.analytic import GaussianDenoiser
from plans.plan import plan_nfe
from plans.process import ForwardProcess
from restart.intervals import Interval, parse_restart_info
from solvers.driver import Meter, integrate
from solvers.registry import make_solver
from solvers.types import Denoiser
from teachers.build import TEACHERS, RestartSupervision, build_teacher
from teachers.supervision import RestartTeacher, Teacher, teacher_nfe, visit_variance
from tests.training_problems import SHAPE, Recorder, largest, mixture, normals, starts

CLASSIC = ("heun", "dpm", "dpmpp", "euler", "ipndm")
GRIDS = [("polynomial", 7.0), ("time_uniform", 1.0), ("logsnr", None)]
#: Student times of four polynomial nodes: 80, 9.72, 0.47, 0.002.
BELOW = {"0": [3, 2, 0.06, 0.3]}  #: jumps below the last start
AROUND = {"0": [3, 2, 0.06, 2.0]}  #: the final descent passes through 0.47
TWICE = {"0": [4, 2, 0.03, 1.0], "1": [3, 2, 3.0, 20.0]}  #: both inner student times


def settings_of(num_steps: int = 4, M: int = 2, grid: int = 0, **options) -> StudentSettings:
    schedule, rho = GRIDS[grid]
    return StudentSettings(
        "tiny",
        options.pop("sampler_stu", "amed"),
        num_steps,
        0.002,
        80.0,
        M=M,
        schedule_type=schedule,
        schedule_rho=rho,
        **options,
    )


def teacher_of(name: str, settings: StudentSettings, info: dict | None = None, **kw) -> Teacher:
    fine, stride = settings.grid.refined(settings.M)
    restart = None
    target, noise = kw.pop("restart_target", "flow"), kw.pop("s_noise", 1.0)
    if info is not None:
        intervals = parse_restart_info(json.dumps(info))
        restart = RestartSupervision(intervals, target, noise)
    return build_teacher(name, fine, stride, restart=restart, **kw)


def restart_of(info: dict, target: str = "flow", **kw) -> tuple[RestartTeacher, StudentSettings]:
    settings = settings_of(**{k: v for k, v in kw.items() if k != "s_noise"})
    s_noise = kw.get("s_noise", 1.0)
    teacher = teacher_of("restart", settings, info, restart_target=target, s_noise=s_noise)
    assert isinstance(teacher, RestartTeacher)
    return teacher, settings


def test_restart_teaches_by_the_jumps_of_the_model():
    settings, names = settings_of(), set()
    x, plain = starts(range(3)), normals(range(3))

    def spy(name):
        names.add(name)
        return plain(name)

    gaussian = teacher_of("restart", settings, AROUND)
    states, other = (gaussian.visit(mixture(), x, ForwardProcess(spy, D)) for D in (16, None))
    assert {("restart", 0, 0, "spread"), ("restart", 0, 1, "spread")} < names
    assert torch.equal(states[1], other[1]) and largest(states[2:], other[2:]) > 1e-3


# Classic teachers


@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("grid", range(len(GRIDS)))
@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_teacher_is_its_refined_walk_at_the_students_times(name, grid, M):
    settings = settings_of(M=M, grid=grid)
    fine = settings.grid.refined(settings.M)[0].tolist()
    assert len(fine) == (M + 1) * 3 + 1
    student = settings.grid.nodes().tolist()
    at = [min(range(len(fine)), key=lambda i: abs(fine[i] / t - 1)) for t in student]
    assert [fine[i] for i in at] == pytest.approx(student, rel=1e-12)
    x, denoiser = starts(range(2)), mixture()
    walk = integrate(make_solver(name), denoiser, x, torch.tensor(fine, dtype=torch.float64)).x
    got = teacher_of(name, settings).supervise(denoiser, x, normals(range(2)))
    assert torch.equal(got.start, walk[at[:-1]]) and torch.equal(got.target, walk[at[1:]])
    assert torch.equal(got.target[:-1], got.start[1:]) and not got.origins


@pytest.mark.parametrize("name", TEACHERS)
def test_no_teacher_takes_the_analytic_first_step(name):
    settings, spy = settings_of(afs=True), Recorder(mixture())
    info = BELOW if name == "restart" else None
    got = teacher_of(name, settings, info).supervise(spy, starts(range(2)), normals(range(2)))
    assert float(spy.sigmas[0]) == pytest.approx(80.0, rel=1e-12)
    assert got.nfe == len(spy.sigmas)
    if name in CLASSIC:
        assert got.nfe == 9 * (2 if name in ("heun", "dpm") else 1)


@pytest.mark.parametrize("cost", [1, 2])
@pytest.mark.parametrize("name", TEACHERS)
def test_planned_nfe_is_metered_nfe(name, cost):
    settings, denoiser = settings_of(), mixture()
    denoiser.cost = cost
    for info in (BELOW, AROUND, TWICE) if name == "restart" else (None,):
        for target in ("flow", "trajectory"):
            teacher = teacher_of(name, settings, info, restart_target=target)
            meter = Meter(denoiser)
            meter.nfe = 5  # what was spent before is not the teacher's
            got = teacher.supervise(meter, starts(range(2)), normals(range(2)))
            assert got.nfe == meter.nfe - 5 > 0
            assert teacher_nfe(teacher, cost) == (None if name == "dopri5" else got.nfe)


def test_dopri5_teacher_solves_the_gaussian_ode():
    denoiser = GaussianDenoiser(torch.linspace(-1, 1, 32).reshape(SHAPE), 0.3)
    settings = settings_of()
    x = starts(range(3))
    got = teacher_of("dopri5", settings).supervise(denoiser, x, normals(range(3)))
    assert not got.origins and not teacher_of("dopri5", settings).stochastic
    heun = teacher_of("heun", settings).supervise(denoiser, x, normals(range(3)))
    for n, t in enumerate(settings.grid.nodes()[1:]):
        exact = denoiser.solution(x, 80.0, t)
        assert largest(got.target[n], exact) < 5e-4  # the tolerance is 1e-4 a step
    assert largest(heun.target[-1], exact) > 5e-3  # what nine Heun steps make of it


# Restart as plain loops


def plain_heun(denoiser: Denoiser, x: Tensor, t: float, t_next: float) -> Tensor:
    def slope(state: Tensor, sigma: float) -> Tensor:
        return (state - denoiser(state, torch.tensor(sigma, dtype=torch.float64)).x0) / sigma

    d = slope(x, t)
    guess = x + (t_next - t) * d
    return x + (t_next - t) * (d + slope(guess, t_next)) / 2


def plain_ramp(top: float, bottom: float, nodes: int) -> list[float]:
    a, b = top ** (1 / 7), bottom ** (1 / 7)
    inner = [(a + i / (nodes - 1) * (b - a)) ** 7 for i in range(1, nodes - 1)]
    return [top, *inner, bottom]


def plain_restart(
    denoiser: Denoiser,
    x: Tensor,
    fine: list[float],
    student: list[float],
    info: dict,
    seeds: Sequence[int],
    s_noise: float = 1.0,
) -> dict[float, Tensor]:
    """The state of the last visit to every time."""
    draw, last, t = normals(seeds), {fine[0]: x}, fine[0]
    landing = {
        min(fine, key=lambda node: abs(node - row[2])): (i, row)
        for i, row in ((int(key), row) for key, row in info.items())
    }
    for t_next in fine[1:]:
        x = plain_heun(denoiser, x, t, t_next)
        t = t_next
        last[t] = x
        if t not in landing:
            continue
        i, (nodes, times, _, t_max) = landing[t]
        for k in range(times):
            x = x + s_noise * math.sqrt(t_max**2 - t**2) * draw(("restart", i, k))
            way = plain_ramp(t_max, t, nodes)
            if k == times - 1:  # the final descent passes through the student's times
                way = sorted({*way, *(s for s in student if t < s < t_max)}, reverse=True)
            for a, b in zip(way, way[1:], strict=False):
                x = plain_heun(denoiser, x, a, b)
                last[b] = x
    return last


@pytest.mark.parametrize("info", [BELOW, AROUND, TWICE], ids=["below", "around", "twice"])
@pytest.mark.parametrize("s_noise", [1.0, 1.003])
def test_trajectory_targets_are_the_last_visits(info, s_noise):
    teacher, settings = restart_of(info, "trajectory", s_noise=s_noise)
    seeds, denoiser = [4, 9], mixture()
    x = starts(seeds)
    fine, student = teacher.fine.tolist(), settings.grid.nodes().tolist()
    last = plain_restart(denoiser, x, fine, teacher.fine[::3].tolist(), info, seeds, s_noise)
    got = teacher.supervise(denoiser, x, normals(seeds))
    assert not got.origins and teacher.stochastic
    assert torch.equal(got.target[:-1], got.start[1:]) and torch.equal(got.start[0], x)
    for n, t in enumerate(student[1:]):
        truth = last[min(last, key=lambda node: abs(node - t))]
        assert largest(got.target[n], truth) < 1e-12, t
    heun = teacher_of("heun", settings).supervise(denoiser, x, normals(seeds))
    moved = [largest(a, b) > 1e-3 for a, b in zip(got.target, heun.target, strict=True)]
    assert (
        moved
        == {"below": [0, 0, 1], "around": [0, 1, 1], "twice": [1, 1, 1]}[
            next(
                k
                for k, v in {"below": BELOW, "around": AROUND, "twice": TWICE}.items()
                if v is info
            )
        ]
    )


@pytest.mark.parametrize("info", [BELOW, AROUND, TWICE], ids=["below", "around", "twice"])
def test_flow_targets_are_fine_walks_from_the_visited_states(info):
    teacher, settings = restart_of(info)
    seeds, denoiser = [4, 9], mixture()
    x, fine = starts(seeds), teacher.fine.tolist()
    last = plain_restart(denoiser, x, fine, fine[::3], info, seeds)
    got = teacher.supervise(denoiser, x, normals(seeds))
    visits = teacher.visit(denoiser, x, normals(seeds))
    for n in range(3):
        state = last[fine[3 * n]]
        assert largest(got.start[n], state) < 1e-12 and torch.equal(got.start[n], visits[n])
        for a, b in zip(fine[3 * n : 3 * n + 3], fine[3 * n + 1 : 3 * n + 4], strict=True):
            state = plain_heun(denoiser, state, a, b)
        assert largest(got.target[n], state) < 1e-12


@pytest.mark.parametrize(
    ("info", "walked_anew"),
    [
        (BELOW, 1),  # the walk from 0.47 is interrupted by the jumps
        (AROUND, 1),  # from 0.47 on; above, the main walk has been there from the same states
        (TWICE, 2),  # the descents come to 9.72 and to 0.47 on other nodes
    ],
    ids=["below", "around", "twice"],
)
def test_what_restart_walked_itself_is_not_walked_again(info, walked_anew):
    teacher, _ = restart_of(info)
    spy = Recorder(mixture())
    got = replace(teacher, origins=False).supervise(spy, starts([0]), normals([0]))
    assert got.nfe == len(spy.sigmas) == plan_nfe(teacher.plan) + walked_anew * 2 * teacher.stride
    spy.sigmas.clear()
    again = teacher.supervise(spy, starts([0]), normals([0]))
    climbed = sum(n for n, origin in enumerate(again.origins) if origin is not None)
    assert again.nfe == len(spy.sigmas) == got.nfe + climbed * 2 * teacher.stride
    assert torch.equal(again.target, got.target)


def test_a_flow_target_is_deterministic_given_the_visited_state():
    teacher, settings = restart_of(AROUND)
    denoiser, x = mixture(), starts([0])
    one, two = (teacher.supervise(denoiser, x, normals([s])) for s in (10, 11))
    assert torch.equal(one.target[:2], two.target[:2])  # from states before any jump
    assert largest(one.start[2], two.start[2]) > 1e-2
    fine = teacher.fine[-1 - teacher.stride :]
    for got in (one, two):
        again = integrate(make_solver("heun"), denoiser, got.start[2], fine).x[-1]
        assert torch.equal(got.target[2], again)


@pytest.mark.parametrize(
    ("info", "changes"),
    [
        (BELOW, False),
        (AROUND, True),
        (TWICE, True),
        ({"0": [3, 1, 0.06, "ts[2]"]}, True),  # the jump itself lands on a start
        ({"0": [3, 1, 0.4699, 0.6]}, True),  # it restarts at a start
        ({"0": [3, 1, 0.06, 0.46]}, False),
    ],
)
def test_changes_starts_tells_a_restart_teacher_from_a_heun_teacher(info, changes):
    ts = settings_of().grid.refined(2)[0][::3].tolist()
    info = {k: [ts[2] if v == "ts[2]" else v for v in row] for k, row in info.items()}
    teacher, settings = restart_of(info)
    assert teacher.changes_starts == changes
    x, denoiser = starts([0, 1]), mixture()
    got = teacher.supervise(denoiser, x, normals([0, 1]))
    heun = teacher_of("heun", settings).supervise(denoiser, x, normals([0, 1]))
    assert torch.equal(got.start[:2], heun.start[:2]) or info == TWICE
    assert (largest(got.start, heun.start) > 1e-9) == changes
    if not changes:
        assert torch.equal(got.start, heun.start) and torch.equal(got.target, heun.target)


# Variance


def gaussian_factor(v: float, t: float, t_next: float) -> float:
    """What one Heun step multiplies the state by where data are N(0, v)."""
    slope, slope_next = t / (v + t * t), t_next / (v + t_next * t_next)
    h = t_next - t
    return 1 + h / 2 * (slope + slope_next * (1 + h * slope))


def gaussian_variance(
    v: float, fine: list[float], student: list[float], info: dict, s_noise: float
) -> list[float]:
    """Variance of the last visit to each student time given the start, by linear propagation."""
    variance, last, t = 0.0, {fine[0]: 0.0}, fine[0]
    landing = {min(fine, key=lambda node: abs(node - row[2])): row for row in info.values()}
    for t_next in fine[1:]:
        variance *= gaussian_factor(v, t, t_next) ** 2
        t = t_next
        last[t] = variance
        if t not in landing:
            continue
        nodes, times, _, t_max = landing[t]
        for k in range(times):
            variance += s_noise**2 * (t_max**2 - t**2)
            way = plain_ramp(t_max, t, nodes)
            if k == times - 1:
                way = sorted({*way, *(s for s in student if t < s < t_max)}, reverse=True)
            for a, b in zip(way, way[1:], strict=False):
                variance *= gaussian_factor(v, a, b) ** 2
                last[b] = variance
    return [last[s] for s in student]


@pytest.mark.parametrize("info", [BELOW, AROUND, TWICE], ids=["below", "around", "twice"])
@pytest.mark.parametrize(("s_noise", "target"), [(1.0, "flow"), (1.4, "trajectory")])
def test_variance_of_restart_on_gaussian_data(info, s_noise, target):
    v, samples, draws = 0.3, 32, 4
    teacher, _ = restart_of(info, target, s_noise=s_noise)
    fine = teacher.fine.tolist()
    exact = gaussian_variance(v, fine, fine[::3], info, s_noise)
    denoiser = GaussianDenoiser(0.1, v)
    streams = [normals(range(100 * k, 100 * k + samples)) for k in range(1, draws + 1)]
    got = visit_variance(teacher, denoiser, starts(range(samples)), streams)
    assert got.shape == (4,) and got.dtype == torch.float64
    # chi-square with (draws - 1) * samples * pixels degrees of freedom, five standard deviations
    bound = 5 * math.sqrt(2 / ((draws - 1) * samples * math.prod(SHAPE)))
    assert got.tolist() == pytest.approx(exact, rel=bound, abs=0)
    assert exact[-1] > 0.01 and bound < 0.13


@pytest.mark.parametrize("name", [*CLASSIC, "dopri5"])
def test_a_deterministic_teacher_has_no_variance(name):
    teacher = teacher_of(name, settings_of())
    assert not teacher.stochastic
    streams = [normals([k]) for k in range(3)]
    assert visit_variance(teacher, mixture(), starts([0]), streams).tolist() == [0.0] * 4


# Errors


@pytest.mark.parametrize(
    ("name", "restart", "message"),
    [
        ("amed", None, "unknown teacher 'amed'"),
        ("restart", None, "pass --restart_info="),
        ("restart", RestartSupervision((Interval(3, 2, 0.06, 0.3),), "states"), "'states'"),
        ("restart", RestartSupervision((Interval(3, 2, 0.06, 100),)), r"\[3, 2, 0.06, 100\]"),
    ],
)
def test_invalid_teachers_raise(name, restart, message):
    settings = settings_of()
    with pytest.raises(ValueError, match=message):
        build_teacher(name, *settings.grid.refined(settings.M), restart=restart)


@pytest.mark.parametrize("M", [0, -1])
def test_a_teacher_without_inserted_nodes_raises(M):
    with pytest.raises(ValueError, match=f"^M = {M} "):
        settings_of(M=M)
