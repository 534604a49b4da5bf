"""The distance to the exact solution, on Gaussian data where that solution is a closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from commands import solver_error
from comparison.rows import ceiling_rows, classic_rows
from comparison.solver_error.exact import Exact, Problem
from comparison.solver_error.harness import ErrorHarness
from comparison.solver_error.job import SolverErrorOptions, lay_out, prepare
from comparison.solver_error.plane import fit_plane
from comparison.solver_error.results import SolverErrorResults
from comparison.solver_error.walks import local_errors, measure_errors, rms, times, walks
from denoisers.analytic import GaussianDenoiser
from denoisers.conditions import Conditions
from denoisers.registry import ModelSource
from metrics.detectors import Detector
from metrics.statistics import DetectorId
from plans.plan import Solve
from runtime.dist import World
from runtime.images import to_uint8
from runtime.noise import SeedNoise
from runtime.typed import read_result
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.driver import Meter
from solvers.registry import make_solver
from tests.comparison_problems import forbid_loading
from tests.sampler_models import MEAN, SHAPE, VAR, ClassModel, GaussianModel, make_card

CPU = torch.device("cpu")
HIGH, LOW = 80.0, 0.002
HERE = World(0, 1, CPU)
SEEDS = (3, 8, 5)


def latents(seeds: tuple[int, ...]) -> Tensor:
    return SeedNoise(seeds).normal("latent", SHAPE, torch.float64) * HIGH


def solution(x: Tensor, start: float, end: float) -> Tensor:
    """Data N(MEAN, VAR): the ODE scales (x - MEAN) as the standard deviation of the noisy data."""
    return MEAN + (x - MEAN) * math.sqrt((VAR + end**2) / (VAR + start**2))


def euler_factor(t: float, t_next: float) -> float:
    """What one Euler step multiplies (x - MEAN) by: its slope is t / (VAR + t^2)."""
    return 1 + (t_next - t) * t / (VAR + t**2)


def exact_of(model: GaussianModel, levels: list[float], folder: Path, tol: float = 1e-9) -> Exact:
    problem = Problem(model, Conditions(), HIGH, torch.float64, CPU)
    return Exact(problem, tol, tuple(levels), folder)


def test_exact_states_are_the_closed_form(tmp_path: Path) -> None:
    levels = [HIGH, 5.0, 0.3, LOW, 0.0]
    exact = exact_of(GaussianModel(), levels, tmp_path)
    assert exact.solve(SEEDS) == len(exact.problem.model.calls)  # type: ignore[attr-defined]
    states = exact.states(SEEDS, levels)
    for t, x in zip(levels[:-1], states, strict=False):
        assert float((x - solution(latents(SEEDS), HIGH, t)).abs().max()) < 1e-6
    last = solution(latents(SEEDS), HIGH, LOW)
    closed = MEAN + (last - MEAN) * VAR / (VAR + LOW**2)
    assert float((states[-1] - closed).abs().max()) < 1e-6


def test_solutions_are_kept_and_extended(tmp_path: Path) -> None:
    model = GaussianModel()
    exact = exact_of(model, [HIGH, 1.0, LOW], tmp_path)
    nfe, before = exact.solve(SEEDS), exact.file(SEEDS).read_bytes()
    spent = len(model.calls)
    assert exact_of(model, [HIGH, LOW], tmp_path).solve(SEEDS) == nfe
    assert len(model.calls) == spent and exact.file(SEEDS).read_bytes() == before
    more = exact_of(model, [HIGH, 4.0, LOW], tmp_path)
    old = exact.states(SEEDS, [1.0, LOW])
    more.solve(SEEDS)
    assert len(model.calls) > spent and more.file(SEEDS) == exact.file(SEEDS)
    assert float((more.states(SEEDS, [1.0, LOW]) - old).abs().max()) < 1e-12  # same steps
    more.file(SEEDS).write_bytes(before[:100])
    more.solve(SEEDS)
    assert float((more.states(SEEDS, [LOW]) - old[1:]).abs().max()) < 1e-12
    others = {
        exact_of(model, [HIGH, LOW], tmp_path, tol=1e-3).file(SEEDS),
        exact.file((3, 8)),
        exact_of(GaussianModel(sha256="7" * 64), [HIGH, LOW], tmp_path).file(SEEDS),
    }
    assert len(others | {exact.file(SEEDS)}) == 4
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("num_steps", [4, 9])
def test_measured_errors_of_euler_are_the_true_ones(num_steps: int, tmp_path: Path) -> None:
    card = make_card()
    sampler = build(SamplerOptions(sampler="euler", num_steps=num_steps), card)
    solves = walks(sampler)
    levels = times(solves)
    exact = exact_of(GaussianModel(), levels, tmp_path)
    exact.solve(SEEDS)
    found = measure_errors(solves, exact, SEEDS)
    assert found.nfe == sampler.nfe == num_steps - 1
    x, walked = latents(SEEDS), 1.0
    assert float(found.along[0].max()) == 0
    for n, (t, t_next) in enumerate(zip(levels, levels[1:], strict=False)):
        walked *= euler_factor(t, t_next)
        truth = solution(x, HIGH, t_next)
        true = rms(MEAN + (x - MEAN) * walked - truth)
        torch.testing.assert_close(found.along[n + 1], true, rtol=1e-5, atol=1e-6)
        head = solution(x, HIGH, t)
        step = rms(MEAN + (head - MEAN) * euler_factor(t, t_next) - truth)
        torch.testing.assert_close(found.local[n], step, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm", 2), ("ipndm", 2)])
def test_reported_errors_fall_at_the_order_of_the_solver(
    name: str, order: int, tmp_path: Path
) -> None:
    card, found = make_card(), []
    walked = [build(SamplerOptions(sampler=name, num_steps=n), card) for n in (65, 129)]
    levels = sorted({t for s in walked for t in times(walks(s))}, reverse=True)
    exact = exact_of(GaussianModel(), levels, tmp_path, tol=1e-10)
    exact.solve(SEEDS)
    for sampler in walked:
        found.append(float(measure_errors(walks(sampler), exact, SEEDS).along[-1].mean()))
    assert math.log2(found[0] / found[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("max_order", [1, 2, 3, 4])
def test_local_errors_of_multistep_solvers_have_exact_history(max_order: int) -> None:
    """With exact history one interval errs by h^(k + 1); from a walked state the order is k."""
    denoiser = GaussianDenoiser(MEAN, VAR)
    x = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(1, *SHAPE)
    last = []
    for intervals in (80, 160):
        ts = torch.linspace(3.0, 1.0, intervals + 1, dtype=torch.float64)
        truth = torch.stack([solution(x, 3.0, float(t)) for t in ts])
        part = Solve(make_solver("ipndm", max_order=max_order), ts)
        meter = Meter(denoiser)
        local = local_errors(part, meter, truth)
        assert meter.nfe == intervals and local.shape == (intervals, 1)
        last.append(float(local[-1].max()))
    assert math.log2(last[0] / last[1]) == pytest.approx(max_order + 1, abs=0.2)


def test_local_errors_of_unipc_are_those_of_its_predictor() -> None:
    """An exact state is not corrected, and the predictor is DPM-Solver++ of true third order."""
    x = torch.linspace(-2, 2, 48, dtype=torch.float64).reshape(1, *SHAPE)
    ts = torch.tensor([9.0, 6.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    truth = torch.stack([solution(x, 9.0, float(t)) for t in ts])
    ours, other = (
        local_errors(Solve(make_solver(name), ts), Meter(GaussianDenoiser(MEAN, VAR)), truth)
        for name in ("unipc", "dpmpp3c")
    )
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_stochastic_rows_are_left_out_with_a_reason() -> None:
    card = make_card()
    rows = [*classic_rows(5, card), *ceiling_rows(card)]
    (shared,), (skipped,) = lay_out(rows)  # solved once for all of them
    assert skipped.method == "Restart-43" and skipped.why.startswith("stochastic")
    assert {row.method for row in shared.rows} == {r.method for r in rows} - {"Restart-43"}
    assert shared.start == HIGH == shared.times[0] and shared.times[-1] == 0
    needed = {t for row in shared.rows for t in times(walks(row.sampler))}
    assert needed <= set(shared.times)


def test_conditions_decide_the_solutions(tmp_path: Path) -> None:
    """Each class is a constant image, on which its solutions end."""
    model = ClassModel()
    files = set()
    for label in (None, 0, 3):
        problem = Problem(model, Conditions(label), HIGH, torch.float64, CPU)
        exact = Exact(problem, 1e-6, (HIGH, LOW), tmp_path)
        exact.solve(SEEDS)
        files.add(exact.file(SEEDS))
        ends = exact.states(SEEDS, [LOW])[0]
        drawn = SeedNoise(SEEDS).integers("class", 4) if label is None else torch.tensor([label])
        assert float((ends - drawn.reshape(-1, 1, 1, 1) / 4).abs().max()) < 0.05
    assert len(files) == 3


def ellipse(third: float) -> tuple[Tensor, Tensor]:
    """16 points of an ellipse (axes 5 and 2) in R^48, with an oscillation off its plane."""
    angle = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    basis = torch.linalg.qr(torch.randn(48, 3, generator=torch.Generator().manual_seed(0)).double())
    flat = torch.stack([5 * angle.cos(), 2 * angle.sin(), third * (2 * angle).cos()], 1)
    points = flat @ basis.Q.T + 0.7
    return points.reshape(16, *SHAPE), flat


def test_a_plane_is_found_with_all_of_the_variance() -> None:
    points, flat = ellipse(third=0)
    plane = fit_plane(points)
    assert plane.explained == pytest.approx((25 / 29, 4 / 29), abs=1e-12)
    assert sum(plane.explained) == pytest.approx(1, abs=1e-12)
    assert plane.off < 1e-12 and plane.rest == pytest.approx(1, abs=1e-12)
    seen = plane.project(points)
    assert torch.allclose(torch.cdist(seen, seen), torch.cdist(flat, flat), atol=1e-10)
    assert float(seen[-1, 0]) > float(seen[0, 0])  # from left to right


def test_what_leaves_the_plane_is_counted() -> None:
    points, flat = ellipse(third=1)
    plane = fit_plane(points)
    assert plane.explained == pytest.approx((25 / 30, 4 / 30), abs=1e-12)
    assert plane.rest == pytest.approx(4 / 5, abs=1e-12)
    assert plane.off == pytest.approx(1 / float((flat[-1] - flat[0]).norm()), abs=1e-12)
    with pytest.raises(ValueError, match="2 states do not span a plane"):
        fit_plane(points[:2])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> GaussianModel:
    model = GaussianModel()
    monkeypatch.setattr(ModelSource, "card", lambda _: model.card)
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    return model


def call(out: Path, *flags: str) -> Any:
    fixed = ["--detector=none", "--dtype=float64", "--device=cpu", "--tol=1e-8", f"--outdir={out}"]
    return CliRunner().invoke(solver_error.main, [*fixed, *flags], catch_exceptions=True)


def test_the_command_measures_reports_and_goes_on(model: GaussianModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--seeds=3,8,5", "--budgets=5", "--batch=2", "--check=true")
    done = call(out, *flags)
    assert done.exit_code == 0, done.output
    content = json.loads((out / "errors.json").read_text())
    rows = {(r["method"], r["nfe_planned"]): r for r in content["rows"]}
    assert all(r["nfe_planned"] == r["nfe_metered"] for r in content["rows"])
    euler = rows["Euler", 5]
    walked = math.prod(map(euler_factor, euler["times"], euler["times"][1:]))
    x = latents(SEEDS)
    each = rms(MEAN + (x - MEAN) * walked - solution(x, HIGH, LOW))
    assert euler["x"] == pytest.approx(float(each.mean()), abs=1e-6)
    assert euler["x_error"] == pytest.approx(float(each.std()) / math.sqrt(3), abs=1e-6)
    assert rows["Heun-399", 399]["x"] < 2e-4 < rows["Heun-35", 35]["x"]
    # Gaussian data: every trajectory lies on a line through MEAN
    assert content["plane"]["one_mean"] == pytest.approx(1, abs=1e-9)
    made = {path.name for path in out.iterdir()}
    assert made >= {"errors.md", "errors-nfe.png", "errors-local.png", "trajectories.png",
                    "report.html", "errors-run.json"}  # fmt: skip
    assert "Left out: Restart-43" in done.output
    results = read_result(SolverErrorResults, out / "errors.json")
    assert results is not None and results.rows[0].x == content["rows"][0]["x"]
    assert content["schema"] == 1 and results.record.command == "solver_error"
    spent, row = len(model.calls), out / "errors" / f"{euler['key']}.json"
    row.unlink()
    assert call(out, *flags).exit_code == 0
    again = json.loads((out / "errors.json").read_text())
    assert again["rows"][0]["x"] == content["rows"][0]["x"] and row.exists()
    shown = sum(r["nfe_planned"] for r in content["rows"] if r["budget"])
    # one trajectory of each row for the plot; of the lost row two groups, walked and by intervals
    assert len(model.calls) - spent == shown + 2 * 2 * 5


def test_features_are_those_of_the_images(model: GaussianModel, tmp_path: Path) -> None:
    def means(images: Tensor) -> Tensor:
        return images.float().mean((2, 3))

    options = SolverErrorOptions(
        ModelSource("tiny", dtype="float64"),
        budgets="3",
        seeds="3,8,5",
        tol=1e-8,
        ceilings=False,
        batch=3,
        outdir=tmp_path,
    )
    prepare(options).run(HERE, Detector(DetectorId("means", "1" * 64, 3), means, CPU))
    content = json.loads((tmp_path / "errors.json").read_text())
    euler = next(r for r in content["rows"] if r["method"] == "Euler")
    x = latents(SEEDS)
    walked = MEAN + (x - MEAN) * math.prod(map(euler_factor, euler["times"], euler["times"][1:]))
    both = [torch.from_numpy(to_uint8(v)).double().mean((1, 2)) for v in
            (walked, solution(x, HIGH, LOW))]  # fmt: skip
    far = (both[0] - both[1]).norm(dim=1)
    assert euler["features"] == pytest.approx(float(far.mean()), rel=1e-4) and far.mean() > 0.1
    scale = math.sqrt(2 * float(torch.cov(both[1].T).trace()))
    assert content["exact"]["feature_scale"] == pytest.approx(scale, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("count", "batch"), [(16, 8), (16, 32), (7, 2), (3, 1)])
def test_progress_counts_every_image_once(size: int, count: int, batch: int) -> None:
    """By what the main process sees of its own groups."""
    harness = ErrorHarness(None, range(count), batch, World(0, size, CPU))
    assert sum(harness.finished(position) for position, _ in harness.own_groups) == count


def test_a_dry_run_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    flags = ["-n", "--budgets=5", f"--outdir={tmp_path / 'out'}"]
    for more in ([], ["--dataset_name=imagenet64", "--detector=inception"]):  # to be downloaded
        done = CliRunner().invoke(solver_error.main, [*flags, *more], catch_exceptions=False)
        assert done.exit_code == 0 and not (tmp_path / "out").exists()
        assert "5 NFE: iPNDM(4) + AFS" in done.output and "left out: Restart-" in done.output


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budgets=5,x"], "--budgets '5,x' is not a list of whole numbers"),
        (["--seeds=0-x"], "'0-x' is neither a number nor a range"),
        (["--predictors=no/such/run"], "there is no predictor at no/such/run"),
    ],
)
def test_nonsense_is_one_sentence(
    flags: list[str], sentence: str, model: GaussianModel, tmp_path: Path
) -> None:
    done = call(tmp_path / "out", *flags)
    assert isinstance(done.exception, ValueError) and sentence in str(done.exception)
    assert not (tmp_path / "out").exists()
