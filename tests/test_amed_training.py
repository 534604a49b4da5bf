"""The training step: recorded gradients, micro-batches, ranks, gradients that are not finite."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from amed.predictor import AMEDPredictor
from amed.settings import STUDENTS, StudentSettings
from amed.step import (
    GRADIENT_BOUND,
    IntervalResult,
    MicroBatch,
    next_state,
    student_interval,
    train_batch,
)
from denoisers.analytic import MixtureDenoiser
from solvers.driver import Meter
from teachers.supervision import GridTeacher
from tests.student_problems import (
    Keep,
    micro_of,
    nothing,
    predictor_of,
    settings_of,
    student_of,
    update,
)
from tests.training_problems import Recorder, largest, normals

RECORDED = ("amed|norm|afs1|f64", "ipndm|norm|afs1|f64")


# Recorded runs of the published code


class RecordedRun:
    """One of the recorded passes and our own pass over it."""

    def __init__(self, name: str, vectors: Any, cfg: dict[str, Any], problem: Any) -> None:
        self.name, self.vectors = name, vectors
        self.settings = StudentSettings(
            "golden",
            sigma_min=0.002,
            sigma_max=80.0,
            scale_dir=0.01,
            scale_time=0.2,
            afs=True,
            **cfg,
        )
        self.student = student_of(self.settings)
        self.predictor = AMEDPredictor(0.01, 0.2).double()
        self.predictor.load_state_dict(
            {k[3:]: torch.tensor(vectors[k]) for k in vectors.files if k.startswith("sd|")}
        )
        self.denoiser = MixtureDenoiser(torch.tensor(problem["means"]), float(problem["s"]))
        fine, stride = self.settings.grid.refined(self.settings.M)
        self.teacher = GridTeacher(self.settings.teacher_solver(), fine, stride)
        x = torch.tensor(problem["latents_RandomState1"]) * self.student.ts[0]
        self.supervision = self.teacher.supervise(self.denoiser, x, normals([]))

    def recorded(self, key: str) -> Tensor:
        return torch.tensor(self.vectors[f"{self.name}|{key}"])

    def micro(self) -> MicroBatch:
        return MicroBatch.begin(Meter(self.denoiser), self.supervision)


@pytest.fixture(scope="module", params=RECORDED)
def run(request, golden, golden_json) -> tuple[RecordedRun, dict[str, Any]]:
    meta = golden_json("training_meta")[request.param]
    vectors, problem = golden("training"), golden("denoiser")
    return RecordedRun(request.param, vectors, meta["cfg"], problem), meta


def test_recorded_grid_and_teacher(run):
    ours, meta = run
    assert largest(ours.student.ts, ours.recorded("t_steps")) < 1e-10
    assert len(ours.teacher.fine) == meta["teacher_num_steps"]
    assert ours.supervision.nfe == meta["teacher_nfe"]
    times = ours.teacher.fine[meta["tea_slice"]]
    assert torch.equal(times, ours.teacher.fine[ours.teacher.stride :: ours.teacher.stride])
    assert largest(ours.supervision.target, ours.recorded("teacher")) < 1e-10


def test_recorded_student_states_network_times_and_nfe(run):
    ours, meta = run
    spy = Recorder(ours.denoiser)
    micro = ours.micro()._replace(meter=Meter(spy))
    for n, step in enumerate(meta["steps"]):
        assert largest(micro.state.x, ours.recorded(f"step{n}|in")) < 1e-10
        spy.sigmas.clear()
        spent = micro.meter.nfe
        out = student_interval(ours.student, micro, n, ours.predictor)
        assert micro.meter.nfe - spent == step["nfe"] == len(spy.sigmas)
        seen = torch.stack([sigma.flatten()[0] for sigma in spy.sigmas])
        assert largest(seen, torch.tensor(step["student_sigmas"], dtype=torch.float64)) < 1e-10
        assert largest(out.x, ours.recorded(f"step{n}|student")) < 1e-10
        state = next_state(ours.student, micro, out, n, ours.predictor)
        micro = micro._replace(state=state)


def test_recorded_losses_and_gradients(run):
    ours, meta = run
    keep = Keep(ours.predictor)
    results = train_batch(ours.predictor, keep, ours.student, [ours.micro()], 4, nothing)
    for n, (result, grads, step) in enumerate(zip(results, keep.steps, meta["steps"], strict=True)):
        assert result.loss == pytest.approx(step["loss"], rel=1e-10)
        assert result.nonfinite == 0
        assert set(grads) == set(step["grad_norms"])
        for name, grad in grads.items():
            assert largest(grad, ours.recorded(f"step{n}|grad|{name}")) < 1e-10, (n, name)
            norm = step["grad_norms"][name]
            assert float(grad.norm()) == pytest.approx(norm, rel=1e-10), (n, name)


# Micro-batches and ranks


def assert_same(one: tuple, other: tuple) -> None:
    for name in one[0]:
        assert largest(one[0][name], other[0][name]) < 1e-10, name
    for a, b in zip(one[1], other[1], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-10)
        assert a.mid == pytest.approx(b.mid, rel=1e-10)


@pytest.mark.parametrize("flow", [False, True], ids=["heun", "restart-flow"])
@pytest.mark.parametrize("name", STUDENTS)
def test_accumulated_portions_are_one_batch(name, flow):
    settings = settings_of(name)
    whole = update(settings, [[0, 1, 2, 3]], 4, flow)
    assert_same(update(settings, [[0, 1], [2, 3]], 4, flow), whole)
    assert_same(update(settings, [[3], [0, 2, 1]], 4, flow), whole)
    other = update(settings, [[0, 1], [2, 4]], 4, flow)  # other samples give another result
    assert largest(other[0]["fc_r.weight"], whole[0]["fc_r.weight"]) > 1e-6


class Ranks:
    """Sums over threads, as a collective does over processes."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: dict[int, Tensor] = {}

    def sum_(self, rank: int, flat: Tensor) -> None:
        self.given[rank] = flat.clone()
        self.barrier.wait()
        total = sum(self.given[r] for r in sorted(self.given))
        self.barrier.wait()
        flat.copy_(total)


@pytest.mark.parametrize(("name", "flow"), [("amed", False), ("ipndm", False), ("ipndm", True)])
def test_a_batch_split_over_ranks_is_one_batch(name, flow):
    settings, shards, ranks = settings_of(name), [[0, 2, 4], [1, 3]], Ranks(2)
    whole, results = update(settings, [[0, 1, 2, 3, 4]], 5, flow)

    def work(rank: int) -> tuple[dict[str, Tensor], list[IntervalResult]]:
        return update(settings, [shards[rank]], 5, flow, lambda flat: ranks.sum_(rank, flat))

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(work, range(2)))
    for parameters, _ in done:
        assert all(torch.equal(parameters[k], done[0][0][k]) for k in parameters)
        assert all(largest(parameters[k], whole[k]) < 1e-10 for k in parameters)
    for n, result in enumerate(results):
        shares = [part[n] for _, part in done]
        assert sum(share.loss for share in shares) == pytest.approx(result.loss, rel=1e-10)
        sums = [sum(share.mid[i] for share in shares) for i in range(3)]
        assert sums == pytest.approx(list(result.mid), rel=1e-10)


def test_results_hold_the_sums_of_the_predictors_outputs():
    settings = settings_of("amed")
    predictor, micro = predictor_of(settings), micro_of(settings, range(3))
    chosen = []

    class Spy(nn.Module):
        def forward(self, node, t_next):
            chosen.append(predictor(node, t_next))
            return chosen[-1]

    spy = Spy()
    spy.inner = predictor
    results = train_batch(spy, Keep(spy), student_of(settings), [micro], 3, nothing)
    for result, mid in zip(results, chosen, strict=True):
        assert result.mid == pytest.approx([v.sum().item() for v in mid], rel=1e-12)


# Gradients that are not finite


def test_gradients_that_are_not_finite_are_replaced_and_counted():
    settings = settings_of("amed")
    micro = micro_of(settings, range(3))

    def gradients(spoil: dict[int, float]) -> tuple[list[Tensor], list[IntervalResult]]:
        predictor = predictor_of(settings)
        keep = Keep(predictor)

        def reduce(flat: Tensor) -> None:
            if not keep.steps:  # the first interval alone
                for i, value in spoil.items():
                    flat[i] = value

        results = train_batch(predictor, keep, student_of(settings), [micro], 3, reduce)
        return [torch.cat([g.flatten() for g in s.values()]) for s in keep.steps], results

    clean, _ = gradients({})
    assert all(bool(flat.isfinite().all()) for flat in clean)
    bad = {0: torch.nan, 5: torch.inf, 900: -torch.inf}
    spoilt, results = gradients(bad)
    assert [r.nonfinite for r in results] == [3, 0, 0]
    expected = clean[0].clone()
    for i, value in zip(bad, (0.0, GRADIENT_BOUND, -GRADIENT_BOUND), strict=True):
        expected[i] = value
    assert torch.equal(spoilt[0], expected) and torch.equal(spoilt[1], clean[1])


def test_a_target_that_is_not_finite_changes_no_weight():
    settings = settings_of("amed")
    micro = micro_of(settings, range(3))
    target = micro.supervision.target.clone()
    target[1, 0, 0, 0, 0] = torch.nan
    micro = micro._replace(supervision=micro.supervision._replace(target=target))
    predictor = predictor_of(settings)
    seen = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(deepcopy(predictor.state_dict()))
            super().step()
            seen.append(deepcopy(predictor.state_dict()))

    optimizer = Watch(predictor.parameters(), lr=1e-3)
    results = train_batch(predictor, optimizer, student_of(settings), [micro], 3, nothing)
    assert [r.nonfinite for r in results] == [0, sum(p.numel() for p in predictor.parameters()), 0]
    pairs = zip(seen[::2], seen[1::2], strict=True)
    moved = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in pairs]
    assert moved == [True, False, True]
