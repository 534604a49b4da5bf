"""EDM training of denoisers: its loss, draws and schedules against closed forms, and learning."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoisers.training.optimizers import OPTIMIZERS, MatrixMuon
from denoisers.training.trainer import Examples, Recipe, Trainer, weight, weighted_error
from runtime.dist import World
from runtime.errors import UserError
from tests.denoiser_problems import ALONE, CPU, DHARIWAL, SONG, flat_batch, network, train

# The loss


def test_predicting_as_well_as_uncorrelated_data_allows_costs_one() -> None:
    """x0 ~ N(0, s^2), F = 0: the posterior mean is c_skip x, its error weighs 1 at every level."""
    net = network(SONG)
    generator = torch.Generator().manual_seed(0)
    for level in (0.01, 0.5, 30.0):
        sigma = torch.full((1000, 1, 1, 1), level, dtype=torch.float64)
        clean, noise = torch.randn(2, 1000, 3, 8, 8, generator=generator, dtype=torch.float64) * 0.5
        noisy = clean + sigma * noise * 2
        skip = net.coefficients(sigma).c_skip
        errors = weighted_error(skip * noisy, clean, sigma, 0.5)
        assert errors.shape == (1000,) and float(errors.mean()) == pytest.approx(1, abs=0.02)
    assert float(weight(torch.tensor(1.0), 0.5)) == 5  # (1 + 1/4) / (1/4)


class OneMatrix(nn.Module):
    """The smallest network that EDM's preconditioning can stand around: one matrix."""

    map_augment = None
    label_dropout = 0.0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.map_layer0 = nn.Linear(1, 1)
        self.matrix = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: Tensor, noise: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return (x.flatten(1) @ self.matrix).view_as(x), x[:, 0]


def test_a_linear_network_reaches_the_known_optimum() -> None:
    """Images of one grey, variance s^2, n pixels, one level: the Wiener filter along (1, ..., 1).

    Its error per pixel is sigma^2 s^2 / (sigma^2 + n s^2), so the loss comes down from 1 to
    (sigma^2 + s^2) / (sigma^2 + n s^2).
    """
    shape, sigma = (3, 2, 2), 1.0
    net = network(SONG, img_resolution=2)
    net.model = OneMatrix(12)  # type: ignore[assignment]
    recipe = Recipe(
        kimg=6.4, batch=64, lr=0.05, rampup_kimg=1, decay_kimg=5, ema_kimg=1,
        p_mean=math.log(sigma), p_std=1e-6,
    )  # fmt: skip
    trainer = Trainer(net, recipe, ALONE)
    held_out = flat_batch(10**6, 2048, shape)
    before = trainer.validate(held_out)
    while not trainer.done:
        trainer.step(flat_batch(trainer.images, 64, shape))
    after = trainer.validate(held_out)
    grey = held_out.images[:, 0, 0, 0] / 127.5 - 1
    variance = float((grey**2).mean())  # clipped at -1 and 1, so a little below 1/4
    best = (sigma**2 + 0.25) / 0.25 * variance / (sigma**2 + 12 * variance)
    skip = 0.25 / (sigma**2 + 0.25)
    start = (
        (sigma**2 + 0.25) / (0.25 * sigma**2) * ((skip * sigma) ** 2 + (1 - skip) ** 2 * variance)
    )
    assert before == pytest.approx(start, rel=0.02)
    assert best * 0.97 < after < best * 1.08 < before / 2


@pytest.mark.parametrize("settings", [SONG, DHARIWAL], ids=["song", "dhariwal with classes"])
def test_networks_learn(settings: dict[str, Any]) -> None:
    recipe = Recipe(
        kimg=1.28, batch=32, lr=8e-3, rampup_kimg=0.2, decay_kimg=0.6, ema_kimg=0.1, ema_rampup=1,
        augment=0.1 if "augment_dim" in settings else 0,
    )  # fmt: skip
    trainer = Trainer(network(settings), recipe, ALONE)
    held_out = flat_batch(10**6, 256)
    before = trainer.validate(held_out)
    assert train(trainer).validate(held_out) < 0.5 * before
    assert int(trainer.nonfinite) == 0


def test_classes_matter_to_a_network_that_has_them() -> None:
    recipe = Recipe(kimg=0.64, batch=32, lr=8e-3, rampup_kimg=0.1)
    trainer = train(Trainer(network(DHARIWAL, label_dropout=0, dropout=0), recipe, ALONE))
    held_out = flat_batch(10**6, 256)
    other = held_out._replace(classes=3 - held_out.classes)
    assert trainer.validate(other) > 1.1 * trainer.validate(held_out)


def test_the_network_is_told_what_was_done() -> None:
    """Its weights for the labels move only where labels come, and by their gradient."""
    moved = {}
    for augment in (0.0, 0.5):
        recipe = Recipe(kimg=0.1, batch=16, rampup_kimg=0, augment=augment)
        trainer = Trainer(network(SONG, augment_dim=9), recipe, ALONE)
        before = trainer.net.model.map_augment.weight.detach().clone()
        batch = flat_batch(0, 16)
        made = Examples.make(batch, recipe, 0, 0.0, CPU)
        trainer.step(batch)
        moved[augment] = (trainer.net.model.map_augment.weight - before).abs().amax(0) > 0
        if augment:
            assert torch.equal(moved[augment], (made.augment_labels != 0).any(0))
            assert moved[augment].all()
    assert not moved[0.0].any()
    told = trainer.ema(made.noisy, made.sigma, None, made.augment_labels).x0
    assert (told - trainer.ema(made.noisy, made.sigma).x0).abs().max() > 1e-3


def test_the_averaged_weights_are_the_average_of_the_weights() -> None:
    recipe = Recipe(kimg=0.1, batch=8, ema_kimg=0.02, ema_rampup=1, rampup_kimg=0.03)
    trainer = Trainer(network(SONG), recipe, ALONE)
    name, weights = next(iter(trainer.net.named_parameters()))
    expected = weights.detach().double().clone()
    for _ in range(5):
        rate = recipe.learning_rate(trainer.images)
        trainer.step(flat_batch(trainer.images, 8))
        assert trainer.optimizers["optimizer"].param_groups[0]["lr"] == rate
        keep = 0.5 ** (8 / min(20, trainer.images))
        expected = keep * expected + (1 - keep) * weights.detach().double()
    found = dict(trainer.ema.named_parameters())[name]
    assert (found - expected).abs().max() < 1e-6 < (found - weights).abs().max()
    before = trainer.validate(flat_batch(0, 8))
    weights.data.zero_()
    assert trainer.validate(flat_batch(0, 8)) == before  # it is the average that is judged


# Muon


def test_muon_moves_a_weight_along_the_orthogonal_factor_of_its_gradient() -> None:
    """By lr 0.2 sqrt(larger side) U S V^T with S in 0.5 to 1.5, for a gradient U D V^T."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(32, 8, 3, 3, generator=generator))
    before, gradient = weight.detach().clone(), torch.randn(32, 8, 3, 3, generator=generator)
    optimizer = MatrixMuon([weight], lr=0.1)
    weight.grad = gradient * 1e-6  # its size does not matter
    optimizer.step()
    left, singular, right = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    moved = (before - weight.detach()).flatten(1).double() / (0.1 * 0.2 * math.sqrt(72))
    inside = left.T @ moved @ right.T
    assert float(singular.max() / singular.min()) > 3  # which the update no longer has
    assert float(inside.diag().min()) > 0.5 and float(inside.diag().max()) < 1.5
    assert float((inside - inside.diag().diag()).abs().max()) < 0.05  # it computes in bfloat16
    assert float((moved - left @ inside @ right).norm()) < 0.01 * float(moved.norm())
    optimizer.zero_grad()
    assert weight.grad is None


def test_muon_leaves_vectors_and_small_layers_to_adam() -> None:
    after = {}
    for name in OPTIMIZERS:
        recipe = Recipe(kimg=1, batch=8, rampup_kimg=0, optimizer=name)
        trainer = Trainer(network(SONG, model_channels=16), recipe, ALONE)
        trainer.step(flat_batch(0, 8))
        after[name] = dict(trainer.net.named_parameters())
    for name, p in after["adam"].items():
        taken = p.ndim > 1 and min(len(p), p[0].numel()) >= 16
        assert torch.equal(p, after["muon"][name]) != taken, name
    assert not torch.equal(*(p["model.enc.8x8_conv.weight"] for p in after.values()))


# Precision, many processes, compilation


def test_bfloat16_learns_what_float32_learns() -> None:
    """Gradients of the same examples within 2 %, the loss of a trained network within 2 %."""
    gradients: dict[str, list[Tensor]] = {}
    losses = {}
    for dtype in ("float32", "bfloat16"):
        recipe = Recipe(kimg=0.48, batch=32, lr=2e-3, rampup_kimg=0.1, dtype=dtype, ema_rampup=1)
        trainer = Trainer(network(SONG), recipe, ALONE)
        kept = gradients[dtype] = []
        trainer.optimizers["optimizer"].register_step_pre_hook(
            lambda optimizer, *_, kept=kept: kept.extend(
                p.grad.flatten().clone() for p in optimizer.param_groups[0]["params"]
            )
        )
        trainer.step(flat_batch(0, 32))
        trainer.optimizers["optimizer"]._optimizer_step_pre_hooks.clear()
        train(trainer)
        assert {p.dtype for p in trainer.net.parameters()} == {torch.float32}
        losses[dtype] = trainer.validate(flat_batch(10**6, 256))
    exact, rounded = (torch.cat(gradients[dtype]) for dtype in ("float32", "bfloat16"))
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 0.02
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_gradients_that_are_not_finite_are_replaced_and_counted() -> None:
    trainer = Trainer(network(SONG), Recipe(kimg=1, batch=4), ALONE)
    for p in trainer.net.parameters():
        p.grad = torch.ones_like(p)
    first, second = list(trainer.net.parameters())[:2]
    first.grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    trainer._share_gradients()
    assert int(trainer.nonfinite) == 3
    assert first.grad.view(-1)[:4].tolist() == [0, 1e5, -1e5, 1] and (second.grad == 1).all()


class Twins(World):
    """Two processes with equal gradients."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(2)


def test_gradients_are_means_over_processes() -> None:
    trainer = Trainer(network(SONG), Recipe(kimg=1, batch=4), Twins(0, 2, CPU))
    for p in trainer.net.parameters():
        p.grad = torch.ones_like(p)
    trainer._share_gradients()
    assert all((p.grad == 1).all() for p in trainer.net.parameters())


def test_a_batch_has_to_be_dealt_out_evenly() -> None:
    with pytest.raises(UserError, match="^--batch 9 cannot be dealt out to 2"):
        Trainer(network(SONG), Recipe(kimg=1, batch=9), World(0, 2, CPU))


def test_augmentation_needs_a_network_that_is_told() -> None:
    for settings in ({}, {"augment_dim": 6}):
        with pytest.raises(UserError, match=r"^--augment 0.1 needs a network with"):
            Trainer(network(SONG, **settings), Recipe(kimg=1, augment=0.1), ALONE)


def test_compiled_training_is_training(monkeypatch) -> None:
    """Traced as one graph, once; the backend that generates code is torch's own affair."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    def plain(module: nn.Module) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", plain)
    recipe = Recipe(kimg=0.024, batch=8, rampup_kimg=0)
    losses = []
    for compiled in (False, True):
        trainer = Trainer(network(SONG), recipe, ALONE, compiled=compiled)
        steps = [trainer.step(flat_batch(8 * i, 8)) for i in range(3)]
        losses.append(torch.stack(steps))
    assert len(graphs) == 1
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


# Resuming


def states_equal(one: Trainer, other: Trainer) -> bool:
    pairs = [(one.net, other.net), (one.ema, other.ema)]
    return one.images == other.images and all(
        torch.equal(a, b)
        for mine, theirs in pairs
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_continued_run_is_bit_equal_with_dropout_too(optimizer: str, tmp_path: Path) -> None:
    recipe = Recipe(
        kimg=0.064, batch=8, lr=1e-2, rampup_kimg=0.03, augment=0.3, optimizer=optimizer
    )
    whole = train(Trainer(network(DHARIWAL), recipe, ALONE))
    first = Trainer(network(DHARIWAL), replace(recipe, kimg=0.024), ALONE)
    train(first).save(tmp_path / "state.pt", {"data": "a.zip"})
    torch.rand(5)  # what else draws from torch's generator changes nothing
    again = Trainer(network(DHARIWAL), recipe, ALONE)
    again.resume(tmp_path / "state.pt", {"data": "a.zip"})
    assert again.images == 24 and states_equal(again, first)
    assert states_equal(train(again), whole) and not states_equal(again, first)


def test_states_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path, recipe = tmp_path / "state.pt", Recipe(kimg=1, batch=8)
    Trainer(network(SONG), recipe, ALONE).save(path, {"data": "a.zip"})
    longer = Trainer(network(SONG), replace(recipe, kimg=2, decay_kimg=1), ALONE)
    longer.resume(path, {"data": "a.zip"})
    for changed, about, message in (
        (replace(recipe, optimizer="muon"), "a.zip", "optimizer adam, not muon; repeat that"),
        (replace(recipe, lr=1.0), "a.zip", "lr 0.001, not 1.0; repeat that run's options, or"),
        (recipe, "b.zip", "data a.zip, not b.zip; repeat that run's options, or"),
    ):
        with pytest.raises(UserError, match=f"{path} is of a run with {message}"):
            Trainer(network(SONG), changed, ALONE).resume(path, {"data": about})
    for content in (b"", b"text", path.read_bytes()[:1000], path.read_bytes()[:-1000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} cannot be read .*; delete"):
            longer.resume(path, {"data": "a.zip"})


def test_a_state_from_before_a_setting_existed_has_its_default(tmp_path: Path) -> None:
    path, recipe = tmp_path / "state.pt", Recipe(kimg=1, batch=8)
    Trainer(network(SONG), recipe, ALONE).save(path, {})
    saved = torch.load(path, weights_only=True)
    del saved["recipe"]["augment"]
    torch.save(saved, path)
    Trainer(network(SONG), recipe, ALONE).resume(path, {})
    augmented = Trainer(network(SONG, augment_dim=9), replace(recipe, augment=0.1), ALONE)
    with pytest.raises(UserError, match="of a run with augment 0.0, not 0.1"):
        augmented.resume(path, {})
