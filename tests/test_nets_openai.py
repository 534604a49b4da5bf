"""The U-Net of guided diffusion: recorded outputs, published names and sizes, layer identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoisers.nets.openai import Classifier, Encoder, UNet, is_openai, settings_from
from denoisers.nets.openai_blocks import AttentionBlock, Downsample, ResBlock, Upsample
from runtime.errors import UserError
from tests.tensors import gap

Golden = Callable[[str], Any]
TINY: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1.0, 2.0, 2.0],
    "num_classes": None,
    "num_head_channels": 32,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "attention": "legacy",
}
MODULATED = {"use_scale_shift_norm": True, "resblock_updown": True}
#: The networks with recorded names: their class, and their settings over TINY.
RECORDED: dict[str, tuple[type[Encoder], dict[str, Any]]] = {
    "adm_tiny": (UNet, {"out_channels": 6, "num_classes": 1000, **MODULATED}),
    "adm_tiny_classifier": (Classifier, {"out_channels": 1000, **MODULATED}),
    "adm_tiny_variant": (UNet, {"out_channels": 3, "attention": "new"}),
    "cm_tiny": (UNet, {"out_channels": 3, "attention": "flash", "resblock_updown": True}),
}
WIDE = {
    "image_size": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "channel_mult": [1.0, 1.0, 2.0, 2.0, 4.0, 4.0],
    **MODULATED,
}
#: Published networks at full size, and their published numbers of parameters in millions.
PUBLISHED: dict[str, tuple[type[Encoder], dict[str, Any], float]] = {
    "imagenet256": (
        UNet,
        {
            **WIDE, "model_channels": 256, "attention_resolutions": [8, 16, 32],
            "num_classes": 1000, "out_channels": 6,
        },
        553.8,
    ),
    "imagenet512": (  # a first level narrower than the embedding's base
        UNet,
        {
            **WIDE, "model_channels": 256, "image_size": 512,
            "channel_mult": [0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0],
            "attention_resolutions": [16, 32, 64], "num_classes": 1000, "out_channels": 6,
        },
        559.0,
    ),
    "classifier256": (
        Classifier,
        {
            **WIDE, "model_channels": 128, "attention_resolutions": [8, 16, 32],
            "out_channels": 1000,
        },
        54.1,
    ),
    "lsun_bedroom_ldm": (
        UNet,
        {
            "model_channels": 224, "channel_mult": [1.0, 2.0, 3.0, 4.0], "num_res_blocks": 2,
            "attention_resolutions": [2, 4, 8], "num_head_channels": 32, "out_channels": 3,
        },
        274.1,
    ),
}  # fmt: skip


def recorded(name: str, weights: dict[str, Tensor]) -> Any:
    kind, settings = RECORDED[name]
    net = kind(**{**TINY, **settings})
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False)


def random(**settings: Any) -> UNet:
    """A small network in float64; published layers may start at zero, these do not."""
    torch.manual_seed(0)
    small = {"image_size": 8, "channel_mult": [1, 1], "attention_resolutions": [2]}
    net = UNet(**{**TINY, "out_channels": 3, **small, **settings}).eval().requires_grad_(False)
    net.cast(torch.float64)
    return net


def test_outputs_match_the_recorded_networks(golden: Golden, golden_weights: Golden) -> None:
    io = golden("net_adm_io")
    x, times = torch.tensor(io["x_1"]), torch.tensor(io["raw_t"])
    net = recorded("adm_tiny", golden_weights("adm"))
    raw, feat = net(x, times, torch.tensor(io["labels"]))
    assert gap(raw, io["raw_out"]) < 1e-5
    assert gap(feat, io["raw_middle_mean"]) < 1e-5
    logits = recorded("adm_tiny_classifier", golden_weights("adm_classifier"))(x, times)
    assert gap(logits, io["raw_clf_logits"]) < 1e-5
    io = golden("net_cm_io")
    net = recorded("cm_tiny", golden_weights("cm"))
    raw, _ = net(torch.tensor(io["x_1"]), torch.tensor(io["raw_t"]))
    assert gap(raw, io["raw_out"]) < 1e-5


@pytest.mark.parametrize("name", list(RECORDED))
def test_names_and_shapes_are_the_published_ones(name: str, golden_json: Golden) -> None:
    published = golden_json("net_keys")[name]
    kind, settings = RECORDED[name]
    net = kind(**{**TINY, **settings})
    assert [(key, list(v.shape)) for key, v in net.state_dict().items()] == list(published.items())
    # and back: the settings are read off the published names and shapes
    tensors = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    base = {"image_size": 32, "num_head_channels": 32, "attention": "legacy"}
    if name == "adm_tiny_variant":  # the two orders have the same shapes
        base["attention"] = "new"
    assert is_openai(tensors)
    assert settings_from(tensors, base) == {**TINY, **settings}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_full_size_networks_and_their_settings(name: str) -> None:
    kind, settings, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = kind(**{**TINY, **settings})
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions
    base = {key: {**TINY, **settings}[key] for key in ("image_size", "num_head_channels")}
    found = settings_from(net.state_dict(), {**base, "attention": "legacy"})
    assert found == {**TINY, **settings}


@pytest.mark.parametrize("deep", [1, 3])
def test_settings_of_a_network_of_one_level(deep: int) -> None:
    settings = {**TINY, **MODULATED, "channel_mult": [1.0], "attention_resolutions": []}
    own = {**settings, "num_res_blocks": deep, "out_channels": 3, "num_classes": 7}
    with torch.device("meta"):
        tensors = UNet(**own).state_dict()
    assert settings_from(tensors, TINY) == own


def test_weights_of_other_networks_are_refused() -> None:
    with torch.device("meta"):
        good = UNet(**{**TINY, "out_channels": 3}).state_dict()
    assert not is_openai({k: v for k, v in good.items() if not k.startswith("time_embed")})
    # Stable Diffusion keeps these names, but has transformers where attention was
    text = {k.replace("1.qkv", "1.transformer_blocks.0.attn1.to_q"): v for k, v in good.items()}
    assert not is_openai(text)
    with pytest.raises(UserError, match=r"has no 'out\.2\.weight'"):
        settings_from({k: v for k, v in good.items() if k != "out.2.weight"}, TINY)
    with pytest.raises(UserError, match="5 input blocks cannot be 3 levels"):
        settings_from({k: v for k, v in good.items() if "input_blocks.5." not in k}, TINY)
    with pytest.raises(UserError, match="'learn_sigma' is no setting of the U-Net"):
        settings_from(good, {**TINY, "learn_sigma": True})
    with pytest.raises(UserError, match="heads of 48 channels cannot share attention"):
        UNet(**{**TINY, "out_channels": 3, "num_head_channels": 48})
    with pytest.raises(UserError, match="5 heads cannot share attention over 64"):
        UNet(**{**TINY, "out_channels": 3, "num_head_channels": None, "num_heads": 5})
    with pytest.raises(ValueError, match="attention is 'old'; known: legacy, new"):
        UNet(**{**TINY, "out_channels": 3, "attention": "old"})


@pytest.mark.parametrize("layout", ["legacy", "new", "flash"])
def test_attention_reads_its_channel_order(layout: str) -> None:
    """Legacy: head, q/k/v, channel; the others: q/k/v, head, channel. Written out per head."""
    torch.manual_seed(0)
    block = AttentionBlock(64, num_heads=2, num_head_channels=None, layout=layout).double()
    assert block.qkv.weight.ndim == (4 if layout == "flash" else 3)
    x = torch.randn(3, 64, 2, 3, dtype=torch.float64)
    normed = F.group_norm(x, 32).flatten(2)  # a fresh normalisation has no gain
    rows = F.conv1d(normed, block.qkv.weight.view(192, 64, 1), block.qkv.bias)
    parts = rows.split(32, 1)  # six of 32 channels
    order = [(0, 1, 2), (3, 4, 5)] if layout == "legacy" else [(0, 2, 4), (1, 3, 5)]
    mixed = []
    for q, k, v in order:
        weight = (parts[q].mT @ parts[k] / 32**0.5).softmax(-1)  # (B, queries, keys)
        mixed.append((weight @ parts[v].mT).mT)
    out = F.conv1d(torch.cat(mixed, 1), block.proj_out.weight.view(64, 64, 1), block.proj_out.bias)
    assert gap(block(x), (x.flatten(2) + out).view_as(x).detach()) < 1e-12


def test_resampling_by_single_convolutions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 4, 6)
    down, up = Downsample(32), Upsample(32)
    whole = F.conv2d(F.pad(x, (1, 1, 1, 1)), down.op.weight, down.op.bias)
    assert gap(down(x), whole[:, :, ::2, ::2].detach()) < 1e-5
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert gap(up(x), F.conv2d(big, up.conv.weight, up.conv.bias, padding=1).detach()) < 1e-5


def test_a_residual_block_without_modulation_adds_the_embedding() -> None:
    torch.manual_seed(0)
    block = ResBlock(32, 64, emb_channels=8, dropout=0.0, scale_shift=False).double()
    x, emb = torch.randn(2, 32, 4, 4).double(), torch.randn(2, 8).double()
    first, second = block.in_layers[2], block.out_layers[3]
    h = F.conv2d(F.silu(F.group_norm(x, 32)), first.weight, first.bias, padding=1)
    linear = block.emb_layers[1]
    h = h + (F.silu(emb) @ linear.weight.T + linear.bias)[:, :, None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 32)), second.weight, second.bias, padding=1)
    skip = F.conv2d(x, block.skip_connection.weight, block.skip_connection.bias)
    assert gap(block(x, emb), (skip + h).detach()) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {**MODULATED, "num_classes": 5, "out_channels": 6},
        {"attention": "flash", "resblock_updown": True},
        {},
    ],
    ids=["adm", "cm", "ldm"],
)
def test_gradients_in_x_and_time(settings: dict[str, Any]) -> None:
    net = random(**settings)
    labels = torch.tensor([1, 4]) if "num_classes" in settings else None
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([3.7, 420.1], dtype=torch.float64, requires_grad=True)
    # fast mode: random projections of the Jacobian, seeded above
    assert torch.autograd.gradcheck(
        lambda x, t: net(x, t, labels), (x, times), fast_mode=True, rtol=1e-4
    )


def test_classes_and_times_enter_by_the_embedding() -> None:
    net = random(num_classes=5)
    times = torch.tensor([2.0, 900.0], dtype=torch.float64)
    labels = torch.tensor([4, 0])
    angle = times[:, None] * 1e-4 ** (torch.arange(16).double() / 16)
    first, second = net.time_embed[0], net.time_embed[2]
    hidden = torch.cat([angle.cos(), angle.sin()], 1) @ first.weight.T + first.bias
    expected = F.silu(hidden) @ second.weight.T + second.bias + net.label_emb.weight[labels]
    assert gap(net.embed(times, labels), expected) < 1e-10
    # one sample's label and time never reach another
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    both, one = net(x, times, labels)[0], net(x[1:], times[1:], labels[1:])[0]
    assert gap(both[1:], one) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_narrows_the_torso_only(dtype: torch.dtype) -> None:
    net = random(num_classes=5, **MODULATED)
    x, times, labels = torch.randn(2, 3, 8, 8), torch.tensor([2.0, 900.0]), torch.tensor([4, 0])
    exact, exact_feat = net(x, times, labels)
    net.cast(dtype)
    kinds = {name: p.dtype for name, p in net.named_parameters()}
    narrow = [name for name, kind in kinds.items() if kind == dtype]
    assert {kinds[name] for name in kinds if name not in narrow} == {torch.float32}
    conv = (".0.0.", "in_layers.2.", "out_layers.3.", "skip_connection.", "qkv.", "proj_out.")
    assert all(any(part in name for part in conv) for name in narrow)
    assert {"input_blocks.0.0.weight", "middle_block.1.qkv.bias"} < set(narrow)
    wide = ("out.2.weight", "time_embed.0.weight", "label_emb.weight", "middle_block.1.norm.weight")
    assert not set(wide) & set(narrow)
    raw, feat = net(x, times, labels)
    assert raw.dtype == feat.dtype == torch.float32
    tolerance = 0.05 if dtype == torch.bfloat16 else 0.006
    assert 0 < gap(raw, exact) < tolerance * float(exact.abs().max())
    assert 0 < gap(feat, exact_feat) < tolerance * float(exact_feat.abs().max())
