"""What only a GPU can show.  Without one these tests are skipped: ``pytest -m cuda``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from commands import fid, sample
from denoisers.cards import cards
from denoisers.families.cm import CMDenoiser
from denoisers.families.edm import EDMDenoiser
from denoisers.families.precond import PRECONDITIONINGS, build
from denoisers.nets.openai import UNet
from denoisers.registry import load_model
from denoisers.training.trainer import Recipe, Trainer
from plans.plan import AnyPlan
from plans.table import TableWalk, tabulate
from runtime.dist import World, exact_float32
from samplers.build import build as build_sampler
from samplers.generate import generate
from samplers.graph import cuda_graph
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.registry import CLASSIC
from solvers.types import Denoiser
from tests.denoiser_problems import SONG, flat_batch, network
from tests.scripts import Script
from tests.test_denoisers_own import SMALL

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
#: Relative to the largest value, against float32 on the CPU.
TOLERANCES = {torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
SIZE = {"img_resolution": 16, "img_channels": 3, "model_channels": 32, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [8]}  # fmt: skip


@pytest.fixture(autouse=True)
def precise() -> None:
    exact_float32()


def edm(kind: str, model_type: str, **more: Any) -> Any:
    def make(dtype: torch.dtype) -> Denoiser:
        torch.manual_seed(0)
        net = build({"class_name": kind, "model_type": model_type, **SIZE, **more})
        return EDMDenoiser(net.eval().requires_grad_(False).cast(dtype), None)

    return make


def openai(dtype: torch.dtype) -> Denoiser:
    """The network of ADM, CM and LDM."""
    settings = {**cards()["lsun_bedroom"].config, **SMALL, "attention_resolutions": [2]}
    torch.manual_seed(0)
    net = UNet(**{**settings, "image_size": 16}).eval().requires_grad_(False)
    net.cast(dtype)
    return CMDenoiser(net, None)


FAMILIES = {
    **{kind: edm(kind, "SongUNet") for kind in PRECONDITIONINGS},
    "dhariwal": edm("EDMPrecond", "DhariwalUNet"),
    "ncsnpp": edm("VEPrecond", "SongUNet", embedding_type="fourier", encoder_type="residual",
                  resample_filter=[1, 3, 3, 1], channel_mult_noise=2),
    "openai": openai,
}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_network_is_that_of_the_cpu(family: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for level in (0.1, 1.0, 10.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        expected = FAMILIES[family](torch.float32)(level * x, sigma)
        denoiser: Any = FAMILIES[family](dtype)
        denoiser.net.to(CUDA)
        found = denoiser((level * x).to(CUDA), sigma)
        for one, other in zip(found, expected, strict=True):
            error = (one.cpu().float() - other).abs().max() / other.abs().max()
            assert error < TOLERANCES[dtype]


@torch.inference_mode()
def test_convolutions_are_not_in_tf32() -> None:
    x, weight = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = F.conv2d(x.to(CUDA), weight.to(CUDA), padding=1).cpu().double()
    assert float((found - exact).abs().max() / exact.abs().max()) < 2e-6  # TF32: some 3e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_is_that_of_the_cpu(dtype: str) -> None:
    recipe = Recipe(kimg=0.008, batch=8, rampup_kimg=0, dtype=dtype)
    losses = []
    for device in (CPU, CUDA):
        trainer = Trainer(network(SONG), recipe, World(0, 1, device))
        losses.append(float(trainer.step(flat_batch(0, 8)).cpu()))
        assert all(bool(p.isfinite().all()) for p in trainer.net.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4 if dtype == "float32" else 2e-2)


def test_nccl_with_one_process(tmp_path: Path) -> None:
    method = f"file://{tmp_path / 'store'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=method, rank=0, world_size=1)
    try:
        for device in (CPU, CUDA):
            total = torch.arange(3.0, dtype=torch.float64, device=device)
            dist.all_reduce(total)
            assert total.tolist() == [0, 1, 2]
    finally:
        dist.destroy_process_group()


def images(plan: AnyPlan, dtype: str, **more: Any) -> Tensor:
    model = load_model("cifar10-small", device=CUDA, dtype=dtype)
    batches = generate(Sampler("it", plan), model, range(6), batch=3, device=CUDA, **more)
    return torch.cat([part.images for part in batches])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_replayed_walks_are_walks(dtype: str) -> None:
    card = cards()["cifar10-small"]
    plans = [build_sampler(SamplerOptions(sampler=name, num_steps=5), card).plan
             for name in CLASSIC]  # fmt: skip
    for plan in [*plans, (TableWalk(tabulate(plans[0])),)]:
        assert torch.equal(images(plan, dtype, record=cuda_graph), images(plan, dtype))


def test_a_compiled_network_is_the_network() -> None:
    plain = load_model("cifar10-small", device=CUDA)
    compiled: Any = load_model("cifar10-small", device=CUDA)
    compiled.network.compile()
    x, sigma = torch.randn(4, 3, 32, 32, device=CUDA), torch.tensor(1.0, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(
            compiled.bind()(x, sigma).x0, plain.bind()(x, sigma).x0, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("more", [(), ("--compile",)])
def test_commands(more: tuple[str, ...], script: Script, tmp_path: Path) -> None:
    """Detector and sampler share the GPU; the second run is the first."""
    given = ("--sampler=dpmpp", "--nfe=5", "--device=cuda", "--batch=16", *more)
    done = script(sample.main, *given, "--seeds=0-39", f"--outdir={tmp_path / 'images'}")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "images").glob("*.png"))) == 40
    said = [script(fid.main, "gen", *given, "--seeds=0-39") for _ in range(2)]
    assert said[0].code == 0 and said[0].out == said[1].out
