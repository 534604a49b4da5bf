"""An image has the same bits in every batch, on the CPU, whatever the dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amed.predictor import AMEDPredictor
from denoisers.families.first_stage import VQDecoder
from denoisers.nets.batch_invariant import conv2d, linear, upsampling_conv2d
from denoisers.nets.openai import UNet
from denoisers.registry import ModelSource
from runtime.dist import World
from solvers.driver import Meter, integrate
from solvers.grids import get_grid
from solvers.registry import make_solver
from tests.test_denoisers_ldm import SETTINGS, STAGE

Product = Callable[..., Tensor]
HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def walked(x: Tensor, dtype: str, batch: int) -> Tensor:
    """Two evaluations of the bundled network under a predictor, whose times are each sample's."""
    model = ModelSource("cifar10-small", dtype=dtype).load(HERE)
    predictor = AMEDPredictor(0.05, 0.2, seed=0)
    ts = get_grid("polynomial", 2, 0.5, 80.0)
    return torch.cat(
        [
            integrate(make_solver("ipndm"), Meter(model.bind()), 80 * part, ts, predictor).x[-1]
            for part in x.split(batch)
        ]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_students_images_do_not_see_the_batch(dtype: str) -> None:
    x = normal(4, 3, 32, 32)
    whole = walked(x, dtype, 4)
    for batch in (1, 3):
        assert torch.equal(walked(x, dtype, batch), whole), f"{dtype}, batches of {batch}"
    assert torch.equal(walked(x.flip(0), dtype, 4).flip(0), whole)


@pytest.mark.parametrize("kind", ["linear", "conv", "pointwise", "grouped", "upsampling"])
def test_products_do_not_see_the_batch(kind: str, threads: int) -> None:
    """Of 37 samples, any one and any few of them; and they are the usual products."""
    x, weight, bias = normal(37, 48), normal(64, 48, seed=1), normal(64, seed=2)
    images, kernel = normal(37, 48, 8, 8), normal(64, 48, 3, 3, seed=3)
    kinds: dict[str, tuple[Product, Product, tuple[Tensor, ...]]] = {
        "linear": (linear, F.linear, (x, weight, bias)),
        "conv": (
            partial(conv2d, padding=1),
            partial(F.conv2d, padding=1),
            (images, kernel, bias),
        ),
        "pointwise": (conv2d, F.conv2d, (images, weight[:, :, None, None], bias)),
        "grouped": (
            partial(conv2d, stride=2, padding=1, groups=48),
            partial(F.conv2d, stride=2, padding=1, groups=48),
            (images, kernel[:48, :1], bias[:48]),
        ),
        "upsampling": (
            upsampling_conv2d,
            partial(F.conv_transpose2d, stride=2, padding=1),
            (images, normal(48, 64, 4, 4, seed=4), bias),
        ),
    }
    ours, usual, (first, *others) = kinds[kind]
    for form in (torch.contiguous_format, torch.channels_last):
        if first.ndim == 4:
            first = first.contiguous(memory_format=form)
        with torch.inference_mode():
            whole = ours(first, *others)
            for part in (slice(0, 1), slice(3, 4), slice(2, 5), slice(5, 36)):
                assert torch.equal(ours(first[part], *others), whole[part]), part
        assert torch.allclose(whole, usual(first, *others), rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_the_usual_products() -> None:
    x = normal(3, 48).requires_grad_()
    weight = normal(64, 48, seed=1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert linear(x, weight).requires_grad


def test_other_networks_do_not_see_the_batch() -> None:
    """The U-Net of ADM and LDM with a noise level for each sample, and the first stage of LDM."""
    torch.manual_seed(0)
    net, stage = UNet(**SETTINGS).eval(), VQDecoder(**STAGE).eval()
    for parameter in (*net.parameters(), *stage.parameters()):
        parameter.data.normal_(0, 0.1)
    x, times = normal(7, 3, 8, 8), torch.linspace(3, 900, 7)
    parts = [slice(0, 1), slice(1, 4), slice(4, 7)]
    with torch.inference_mode():
        whole, images = net(x, times, None)[0], stage(x)
        assert torch.equal(torch.cat([net(x[p], times[p], None)[0] for p in parts]), whole)
        assert torch.equal(torch.cat([stage(x[p]) for p in parts]), images)
