"""The fused normalisation against its definition, its derivatives, and bfloat16 end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoisers.families.precond import EDMPrecond
from denoisers.nets import fused
from denoisers.nets.fused import fused_norm
from denoisers.registry import load_model

SETTINGS: dict[str, Any] = {"groups": 3, "eps": 1e-5}


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """An image batch and (shift, gain, offset) with one row, or one for each sample."""
    torch.manual_seed(0)
    x = torch.randn(4, 12, 3, 5, dtype=dtype) * 3 + 1
    return x, *(torch.randn(rows, 12, dtype=torch.float64) for _ in range(3))


def plain(x: Tensor, shift: Tensor, gain: Tensor, offset: Tensor, *, silu: bool) -> Tensor:
    shift, gain, offset = (v[..., None, None] for v in (shift, gain, offset))
    y = F.group_norm(x + shift, 3, eps=1e-5) * gain + offset
    return F.silu(y) if silu else y


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("chunk", [1, 400, 1 << 20])  # 1, 2 and 4 samples at a time
def test_fused_norm_is_the_plain_chain(
    chunk: int, rows: int, silu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "CHUNK", chunk)
    x, *vectors = inputs(rows)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        got = fused_norm(given, *vectors, silu=silu, **SETTINGS)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert float((got - plain(x, *vectors, silu=silu)).abs().max()) < 1e-12
    leaves = [t.clone().requires_grad_() for t in (x, *vectors)]
    target = torch.randn_like(x)
    ours = torch.autograd.grad((fused_norm(*leaves, silu=silu, **SETTINGS) * target).sum(), leaves)
    true = torch.autograd.grad((plain(*leaves, silu=silu) * target).sum(), leaves)
    for a, b in zip(ours, true, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) < 1e-11


def test_fused_norm_rounds_once() -> None:
    """From bfloat16 to bfloat16: half a unit in the last place of the exact result, no more."""
    x, *vectors = inputs(4, torch.bfloat16)
    exact = plain(x.double(), *vectors, silu=True)
    got = fused_norm(x, *(v.float() for v in vectors), silu=True, **SETTINGS)
    assert got.dtype == torch.bfloat16
    assert bool(((got.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all())


@pytest.mark.parametrize("family", ["SongUNet", "DhariwalUNet"])
def test_bfloat16_follows_float32_in_value_and_gradient(family: str) -> None:
    """Both families, labels and per-sample sigma, through every fused step."""
    settings = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    torch.manual_seed(0)
    net = EDMPrecond(16, 3, label_dim=4, model_type=family, attn_resolutions=[8], **settings)
    net.eval().requires_grad_(False)
    results = []
    x, labels = torch.randn(6, 3, 16, 16), torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    for dtype in (torch.float32, torch.bfloat16):
        net.cast(dtype)
        state = x.clone().requires_grad_()
        sigma = torch.linspace(0.3, 2, 6).reshape(-1, 1, 1, 1).requires_grad_()
        out = net(state, sigma, labels)
        assert out.feat is not None
        assert out.feat.dtype == out.x0.dtype == torch.float32
        (out.x0.square().sum() + out.feat.square().sum()).backward()
        assert state.grad is not None and sigma.grad is not None
        results.append([out.x0.detach(), out.feat.detach(), state.grad, sigma.grad])
    for high, low in zip(*results, strict=True):
        assert 0 < float((high - low).norm() / high.norm()) < 0.02


def test_bfloat16_is_as_exact_as_autocast() -> None:
    """Root mean square error of the bundled model's x0 against float32, at three noise levels."""
    high = load_model("cifar10-small", device="cpu").bind()
    low = load_model("cifar10-small", device="cpu", dtype="bfloat16").bind()
    for sigma in (80.0, 1.0, 0.1):
        torch.manual_seed(1)
        x, t = torch.randn(8, 3, 32, 32) * (sigma**2 + 0.25) ** 0.5, torch.tensor(sigma)
        exact = high(x, t).x0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = (high(x, t).x0 - exact).square().mean().sqrt()
        ours = (low(x, t).x0 - exact).square().mean().sqrt()
        assert float(ours) < 1.25 * float(autocast)
        assert float(ours) < 2e-3
