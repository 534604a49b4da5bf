"""Sampling: closed forms, and images that depend on their seeds only."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from denoisers.conditions import Conditions
from denoisers.prior import start
from denoisers.protocol import Model
from denoisers.registry import load_model
from plans.plan import Jump, run_plan
from plans.process import ForwardProcess
from runtime.dist import world
from runtime.errors import UserError
from runtime.noise import SeedNoise
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.generate import SampleBatch, generate
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from tests.processes import together
from tests.sampler_models import (
    MEAN,
    SHAPE,
    VAR,
    ClassModel,
    GaussianModel,
    MixtureModel,
    make_card,
    trained,
)

SEEDS = [4, 0, 7, 11, 2, 100000, 3, 9, 8, 1]
ALL: dict[str, dict] = {
    "euler": {},
    "heun": {},
    "dpm": {"r": 0.3},
    "dpmpp": {},
    "dpmpp-thresholding": {"thresholding": True},
    "dpmpp3c": {},
    "ipndm": {"afs": True},
    "ipndm_v": {},
    "deis": {"afs": True},
    "unipc": {"afs": True},
    "edm": {"num_steps": 5, "S_churn": 3.0},
    "restart": {"num_steps": 6},
    "pds": {"num_steps": 8, "freq_mask_path": "none"},
}


def sampler(name: str, **options: object) -> Sampler:
    return build(SamplerOptions(sampler=name.split("-")[0], **options), make_card())  # type: ignore[arg-type]


def learned() -> Sampler:
    student = trained(sampler_stu="ipndm", afs=True)
    student.to(dtype=torch.float64)
    return build_learned(SamplerOptions(), student, make_card())


def samplers() -> dict[str, Sampler]:
    return {name: sampler(name, **options) for name, options in ALL.items()} | {"amed": learned()}


def images(
    chosen: Sampler, model: Model, batch: int, **options: object
) -> tuple[Tensor, list[SampleBatch]]:
    settings: dict = {"dtype": torch.float64, "device": "cpu", **options}
    batches = list(generate(chosen, model, SEEDS, batch=batch, **settings))
    assert [seed for part in batches for seed in part.seeds] == SEEDS
    return torch.cat([part.x for part in batches]), batches


def slope(x: Tensor, t: float) -> Tensor:
    return (x - MEAN) * t / (VAR + t**2)


def euler(x: Tensor, times: list[float]) -> Tensor:
    for t, s in zip(times, times[1:], strict=False):
        x = x + (s - t) * slope(x, t)
    return x


def heun_to_zero(x: Tensor, t: float, s: float) -> Tensor:
    d = slope(x, t)
    ahead = x + (s - t) * d
    return ahead if s == 0 else x + (s - t) / 2 * (d + slope(ahead, s))


def polynomial(count: int, low: float, high: float) -> list[float]:
    a, b = high ** (1 / 7), low ** (1 / 7)
    return [(a + i / (count - 1) * (b - a)) ** 7 for i in range(count)]


def draw(*name: object) -> Tensor:
    key = name if len(name) > 1 else name[0]
    return SeedNoise(SEEDS).normal(key, SHAPE, torch.float64)  # type: ignore[arg-type]


def test_a_classic_solver_equals_its_closed_form() -> None:
    ours, _ = images(sampler("euler", num_steps=5), GaussianModel(), 4)
    expected = euler(80 * draw("latent"), polynomial(5, 0.002, 80))
    assert (ours - expected).abs().max() < 1e-10


def test_restart_is_its_closed_form() -> None:
    """Down to the node nearest to t_min; K times up by named noise and down again."""
    info = json.dumps({"0": [3, 2, 0.4, 2.0]})
    chosen = sampler(
        "restart", num_steps=5, restart_info=info, main_solver="euler", restart_solver="euler",
        S_noise=0.9,
    )  # fmt: skip
    ours, _ = images(chosen, GaussianModel(), 4)
    grid = [*polynomial(5, 0.002, 80), 0.0]
    low = min(range(5), key=lambda i: abs(grid[i] - 0.4))
    x = euler(80 * draw("latent"), grid[: low + 1])
    for k in range(2):
        x = x + 0.9 * math.sqrt(2.0**2 - grid[low] ** 2) * draw("restart", 0, k)
        x = euler(x, polynomial(3, grid[low], 2.0))
    x = euler(x, grid[low:])
    assert (ours - x).abs().max() < 1e-10


def test_edm_is_its_algorithm() -> None:
    """Karras et al. 2022, algorithm 2, on Gaussian data."""
    chosen = sampler("edm", num_steps=4, S_churn=1.2, S_min=0.01, S_max=50.0, S_noise=1.1)
    ours, _ = images(chosen, GaussianModel(), 4)
    grid = [*polynomial(4, 0.002, 80), 0.0]
    x = 80 * draw("latent")
    for i in range(4):
        t = grid[i]
        if 0.01 <= t <= 50:
            hat = t * (1 + 1.2 / 4)
            x, t = x + 1.1 * math.sqrt(hat**2 - t**2) * draw("churn", i), hat
        x = heun_to_zero(x, t, grid[i + 1])
    assert (ours - x).abs().max() < 1e-10


@pytest.mark.parametrize("name", [*ALL, "amed"])
def test_no_image_depends_on_its_batch(name: str) -> None:
    chosen, model = samplers()[name], MixtureModel()
    whole, (only,) = images(chosen, model, 10, keep_trajectory=True)
    assert whole.std(dim=0).min() > 0.01  # the samples differ
    for batch in (1, 3):
        x, parts = images(chosen, model, batch, keep_trajectory=True)
        assert [len(part.seeds) for part in parts] == ([1] * 10 if batch == 1 else [3, 3, 3, 1])
        assert (x - whole).abs().max() < 1e-10
        starts = torch.cat([part.trajectory.x[0] for part in parts if part.trajectory])
        assert only.trajectory is not None and torch.equal(starts, only.trajectory.x[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_latents_are_the_seeds_noise_whatever_the_dtype(dtype: torch.dtype) -> None:
    _, (only,) = images(sampler("euler"), MixtureModel(), 10, keep_trajectory=True, dtype=dtype)
    assert only.trajectory is not None and only.x.dtype == dtype
    expected = SeedNoise(SEEDS).normal("latent", SHAPE).to(dtype) * 80
    assert torch.equal(only.trajectory.x[0], expected)


@pytest.mark.parametrize("name", [*ALL, "amed"])
def test_planned_metered_and_counted_evaluations_agree(name: str) -> None:
    chosen, model = samplers()[name], GaussianModel()
    _, batches = images(chosen, model, 10)
    assert sum(model.calls) == chosen.nfe == chosen.describe()["nfe_planned"]
    assert {part.nfe for part in batches} == {chosen.nfe}


def test_guidance_is_counted_twice() -> None:
    model = GaussianModel()
    chosen = sampler("heun", num_steps=3, guidance_rate=2.0)
    _, (only,) = images(chosen, model, 10)
    assert sum(model.calls) == only.nfe == chosen.nfe == 8 and len(model.calls) == 4


def test_a_wrong_planned_nfe_raises() -> None:
    class Miscounted(Sampler):
        @property
        def nfe(self) -> int:
            return super().nfe + 1

    right = sampler("euler")
    with pytest.raises(RuntimeError, match="used 5 NFE instead of the planned 6"):
        images(Miscounted(right.label, right.plan), GaussianModel(), 10)
    with pytest.raises(UserError, match="takes 1 evaluations but the plan has 2"):
        images(Sampler(right.label, right.plan, cost=2), GaussianModel(), 10)


@pytest.mark.parametrize("name", ["restart", "edm", "ipndm", "pds"])
def test_the_trajectory_ends_in_the_image_and_has_the_described_times(name: str) -> None:
    chosen, model = samplers()[name], MixtureModel()
    final, (plain,) = images(chosen, model, 10)
    _, (kept,) = images(chosen, model, 10, keep_trajectory=True)
    assert plain.trajectory is None and kept.trajectory is not None
    assert torch.equal(kept.trajectory.x[-1], final) and torch.equal(kept.x, final)
    described = torch.tensor(chosen.describe()["times"], dtype=torch.float64)
    assert torch.allclose(kept.trajectory.t, described, rtol=1e-11, atol=0)
    assert len(kept.trajectory.x) == len(described)


def test_watch_is_called_at_every_state() -> None:
    chosen, seen = sampler("restart", num_steps=6), []
    images(chosen, MixtureModel(), 5, watch=lambda state, states: seen.append((state, states)))
    states = len(chosen.describe()["times"]) - 1
    assert seen == 2 * [(state, states) for state in range(1, states + 1)]


def test_classes_belong_to_seeds_or_are_given() -> None:
    chosen, model = sampler("heun", num_steps=12), ClassModel()
    drawn = SeedNoise(SEEDS).integers("class", 4)
    assert len(set(drawn.tolist())) > 1
    for batch in (3, 10):
        x, _ = images(chosen, model, batch)
        means = x.mean(dim=(1, 2, 3))
        assert (means - drawn / 4).abs().max() < 0.01
    given, _ = images(chosen, model, 3, conditions=Conditions(label=2))
    assert (given - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (MixtureModel, {"conditions": Conditions(0)}, "'tiny' has no classes"),
        (ClassModel, {"conditions": Conditions(4)}, "--class 4 "),
        (ClassModel, {"conditions": Conditions(-1)}, "--class -1 "),
        (MixtureModel, {"batch": 0}, "--batch 0 "),
    ],
)
def test_invalid_arguments_raise_before_sampling(
    model: Callable[[], Model], options: dict, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        generate(sampler("euler"), model(), SEEDS, **{"batch": 5, "device": "cpu", **options})


RESTART = SamplerOptions(sampler="restart", num_steps=2, restart_info='{"0": [2, 1, 0.002, 1]}')


def save_shard(folder: Path) -> None:
    """Each seed's states, of the seeds that this process has."""
    with world("cpu") as here:
        model = load_model("cifar10-small", device="cpu", dtype="float64")
        batches = generate(
            build(RESTART, model.card), model, here.shard([5, 6, 7]), batch=4, device="cpu",
            dtype=torch.float64, keep_trajectory=True,
        )  # fmt: skip
        states = {s: b.trajectory.x[:, i].clone() for b in batches for i, s in enumerate(b.seeds)}
        torch.save(states, folder / f"{here.rank}.pt")


def test_two_processes_make_the_images_of_one(tmp_path: Path) -> None:
    done = together(lambda: save_shard(tmp_path), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [sorted(rank) for rank in ranks] == [[5, 7], [6]]
    model = load_model("cifar10-small", device="cpu", dtype="float64")
    (whole,) = generate(
        build(RESTART, model.card), model, [5, 6, 7], batch=3, device="cpu",
        dtype=torch.float64, keep_trajectory=True,
    )  # fmt: skip
    assert whole.trajectory is not None
    for i, seed in enumerate(whole.seeds):
        states = {**ranks[0], **ranks[1]}[seed]
        assert torch.equal(states[0], whole.trajectory.x[0, i])
        assert (states - whole.trajectory.x[:, i]).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("name", "options", "jumps"),
    [
        ("restart", {"num_steps": 8, "restart_info": '{"0": [3, 2, 0.06, 0.3]}'}, 2),
        ("edm", {"num_steps": 6, "S_churn": 2.0}, 6),
    ],
)
def test_jumps_follow_the_model(name: str, options: dict, jumps: int) -> None:
    """The noise of PFGM++ needs no evaluations."""
    card = dataclasses.replace(make_card(), pfgmpp=128)
    plain, built = sampler(name, **options), build(SamplerOptions(name, **options), card)
    assert sum(isinstance(segment, Jump) for segment in built.plan) == jumps
    model = GaussianModel(card)
    whole, batches = images(built, model, 10)
    assert torch.equal(images(plain, model, 10)[0], whole)
    assert {part.nfe for part in batches} == {plain.nfe} == {built.nfe}
    assert (images(built, model, 3)[0] - whole).abs().max() < 1e-10
    noise = SeedNoise(SEEDS)
    normal = lambda name: noise.normal(name, SHAPE, torch.float64)  # noqa: E731
    x = start(card, noise, built.start, torch.float64, "cpu")
    for D, same in ((128, True), (64, False), (None, False)):
        end = run_plan(plain.plan, model.bind(), x, ForwardProcess(normal, D)).x[-1]
        assert torch.equal(end, whole) is same
