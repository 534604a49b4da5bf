"""The operators of PDS: recorded probes, B = A A^T, and what the real-part trick does."""

import pytest
import torch

from pds.operators import Preconditioner, to_filter
from runtime.errors import UserError
from tests.pds_problems import (
    SHAPE,
    SIZE,
    Published,
    draw,
    matrix,
    preconditioners,
    random_masks,
)
from tests.tensors import gap


def test_recorded_filters_and_transforms(golden) -> None:
    """The recorded frequency mask is random, not even, so the real-part trick has work to do."""
    file = {name: torch.from_numpy(array) for name, array in golden("pds").items()}
    masks = file["freq_mask_raw"][0], file["space_mask_raw"][0]
    assert gap(to_filter(masks[0], 5.0), file["freq_filter_applied"][0]) < 1e-12
    assert gap(to_filter(masks[1], 5.0), file["space_filter_applied"][0]) < 1e-12
    published = Preconditioner.of(*masks, 5.0, real_part_trick=True)
    probe = file["probe_in"]
    assert gap(published.noise(probe), file["probe_noise_transform"]) < 1e-12
    assert gap(published.drift(probe), file["probe_grad_transform"]) < 1e-12
    ours = Preconditioner.of(*masks, 5.0)
    assert gap(ours.noise(probe), file["probe_noise_transform"]) < 1e-12
    assert gap(ours.drift(probe), file["probe_grad_transform"]) > 0.01  # knowingly


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("kind", ["plain", "freq", "space", "both"])
def test_b_is_a_times_its_transpose(kind: str, even: bool) -> None:
    operators = preconditioners(1.5, even)[kind]
    a, b = matrix(operators.noise), matrix(operators.drift)
    assert gap(b, a @ a.T) < 1e-12
    assert gap(b, b.T) < 1e-12
    # No filter goes below 1, so B is positive: nothing is ever frozen.
    assert torch.linalg.eigvalsh(b).min() > 1 - 1e-12
    assert kind == "plain" or torch.linalg.eigvalsh(b).max() > 2


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 4), (1, 4, 5), (2, 3, 5)])
def test_real_transforms_equal_complex_ones(shape: tuple[int, ...]) -> None:
    masks = random_masks(shape)
    ours, published = Preconditioner.of(*masks, 2.0), Published.of(*masks, 2.0)
    x = draw(3, *shape)
    assert gap(ours.noise(x), published.noise(x)) < 1e-12
    assert gap(ours.drift(x), published.drift(x)) < 1e-12


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 5, 4), (1, 3, 5)])
def test_the_real_part_trick_adds_to_the_drift_and_not_to_the_noise(
    shape: tuple[int, ...],
) -> None:
    """B - A A^T = Q S^2 Q^T, never negative: the chain is pulled more than it is shaken."""
    masks = random_masks(shape, even=False)
    published = Published.of(*masks, 1.5)
    trick = Preconditioner.of(*masks, 1.5, real_part_trick=True)
    x = draw(3, *shape)
    assert gap(trick.noise(x), published.noise(x)) < 1e-12
    assert gap(trick.drift(x), published.drift(x)) < 1e-12
    a, b = matrix(trick.noise, shape), matrix(trick.drift, shape)
    extra = torch.linalg.eigvalsh(b - a @ a.T)
    assert extra.min() > -1e-12 and extra.max() > 0.1


def test_samples_do_not_touch_each_other_and_dtypes_follow_the_state() -> None:
    operators = preconditioners(5.0)["both"]
    x = draw(3, *SHAPE)
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(operators.noise(x)[0], operators.noise(changed)[0])
    single = x.float()
    assert operators.to(single).drift(single).dtype == torch.float32
    assert gap(operators.to(single).drift(single).double(), operators.drift(x)) < 1e-5


def test_a_filter_is_1_where_the_mask_is_largest() -> None:
    mask = torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)
    assert gap(to_filter(mask, 5.0), torch.tensor([1, 5 / 4.5, 5 / 4], dtype=torch.float64)) < 1e-15
    for alpha in (1.0, 0.5, float("nan")):
        with pytest.raises(UserError, match=f"--alpha {alpha:g} "):
            to_filter(mask, alpha)


def test_without_masks_nothing_happens() -> None:
    x = draw(2, *SHAPE)
    assert Preconditioner.of(None, None, 5.0).noise(x) is x
    assert torch.equal(matrix(Preconditioner().drift), torch.eye(SIZE, dtype=torch.float64))
