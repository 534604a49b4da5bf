"""Noise belongs to (seed, name) and to nothing else."""

import hashlib
import math

import pytest
import torch

from runtime.noise import Name, SeedNoise

SHAPE = (3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 10])
def test_batches_and_dtypes_leave_every_bit_alone(size: int, dtype: torch.dtype) -> None:
    seeds = [7, 0, 123456789012, *range(40, 67)]
    whole = SeedNoise(seeds).normal(("restart", 2), SHAPE)
    parts = [
        SeedNoise(seeds[i : i + size]).normal(("restart", 2), SHAPE, dtype=dtype)
        for i in range(0, len(seeds), size)
    ]
    assert torch.equal(torch.cat(parts), whole.to(dtype))
    integers = SeedNoise(seeds).integers("label", 10)
    parts = [SeedNoise(seeds[i : i + size]).integers("label", 10) for i in range(0, 30, size)]
    assert torch.equal(torch.cat(parts), integers)


def test_other_draws_leave_a_draw_alone() -> None:
    noise = SeedNoise([1, 2])
    first = noise.normal("latent", SHAPE)
    noise.normal("restart", (5,))
    noise.integers("latent", 3)
    assert torch.equal(noise.normal("latent", SHAPE), first)


def test_a_shorter_draw_is_the_beginning_of_a_longer_one() -> None:
    noise = SeedNoise([3])
    assert torch.equal(noise.normal("latent", (4,)), noise.normal("latent", (9,))[:, :4])
    assert noise.normal("latent", ()).shape == (1,)
    assert SeedNoise([]).normal("latent", SHAPE).shape == (0, *SHAPE)


def test_moments_and_independence_of_names_and_seeds() -> None:
    noise = SeedNoise(range(100))
    names: list[Name] = [
        "latent",
        ("restart", 1),
        ("restart", "1"),
        ("restart", 1, 11),
        ("restart", 11, 1),
    ]
    draws = torch.stack([noise.normal(name, (3, 32, 32)).double().flatten() for name in names])
    n = draws.shape[1]
    assert draws.mean(1).abs().max() < 5 / math.sqrt(n)
    assert (draws.var(1) - 1).abs().max() < 5 * math.sqrt(2 / n)
    assert ((draws**4).mean(1) - 3).abs().max() < 5 * math.sqrt(96 / n)
    between_names = draws @ draws.T / n - torch.eye(len(names))
    assert (between_names - between_names.diag().diag()).abs().max() < 5 / math.sqrt(n)
    images = draws[0].reshape(100, -1)
    between_seeds = images @ images.T / images.shape[1]
    off = between_seeds - between_seeds.diag().diag()
    assert off.abs().max() < 6 / math.sqrt(images.shape[1])  # 4950 pairs: 6 sigma, not 5


def test_many_seeds_never_share_their_noise() -> None:
    pairs = SeedNoise(range(20_000)).normal("latent", (2,)).tolist()
    assert len({tuple(pair) for pair in pairs}) == 20_000


def test_integers_are_uniform() -> None:
    counts = SeedNoise(range(5000)).integers("label", 10).bincount(minlength=10)
    assert counts.shape == (10,)
    chi2 = float(((counts - 500) ** 2 / 500).sum())
    assert chi2 < 27.9  # 9 degrees of freedom, one in a thousand


def test_the_numbers_are_these_for_good() -> None:
    """A change here changes every image that was ever recorded by its seed."""
    draw = SeedNoise([0, 1]).normal("latent", (3, 32, 32))
    assert draw[0, 0, 0, :3].tolist() == FIRST
    assert hashlib.sha256(draw.numpy().tobytes()).hexdigest() == DIGEST


FIRST = [-0.03507131338119507, -0.9107311367988586, 0.13370884954929352]
DIGEST = "96288a85d72774da9fa5c43cdb39e6ff66cb4b10e1bf4a19bcdeca791ff176d3"
