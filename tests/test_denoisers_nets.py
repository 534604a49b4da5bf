"""The EDM family's networks against recorded outputs, names and shapes; layer identities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from denoisers.families.precond import EDMPrecond, build
from denoisers.nets.layers import Conv2d, UNetBlock
from denoisers.nets.song import SongUNet
from tests.tensors import gap

Golden = Callable[[str], Any]
TINY: dict[str, Any] = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
ENTRIES = [
    "edm_song", "edm_song_aug_cond", "edm_song_nb4", "edm_dhariwal", "vp_song", "ve_ncsnpp",
    "edm_ncsnpp_skip", "iddpm_dhariwal",
]  # fmt: skip


def recorded(
    name: str, weights: Any, golden: Golden, golden_json: Golden
) -> tuple[EDMPrecond, Any]:
    net = EDMPrecond(32, 3, **golden_json("net_configs")[name]["kwargs"])
    net.load_state_dict(weights)
    return net.eval().requires_grad_(False), golden(f"net_{name}_io")


def test_drawn_weights_are_the_recorded_ones(golden: Golden, golden_weights: Golden) -> None:
    """One network is stored whole; the others are drawn by the same rule."""
    stored, drawn = golden("net_edm_song_weights"), golden_weights("edm_song")
    assert list(drawn) == stored.files
    assert max(gap(drawn[key], stored[key]) for key in drawn) < 1e-6


@pytest.mark.parametrize("name", ["edm_song", "edm_dhariwal"])
def test_outputs_match_the_recorded_network(
    name: str, golden: Golden, golden_json: Golden, golden_weights: Golden
) -> None:
    net, io = recorded(name, golden_weights(name), golden, golden_json)
    labels = torch.tensor(io["labels"]) if "labels" in io.files else None
    for i, sigma in enumerate(io["sigmas"]):
        out = net(torch.tensor(io[f"x_{i}"]), torch.tensor(sigma), labels)
        assert out.feat is not None
        assert gap(out.x0, io[f"D_{i}"]) < 1e-5
        assert gap(out.feat, io[f"bottleneck_mean_{i}"]) < 1e-5
    x, sigma = torch.tensor(io["x_vec"]), torch.tensor(io["sigma_vec"]).reshape(-1, 1, 1, 1)
    assert gap(net(x, sigma, labels).x0, io["D_vec"]) < 1e-5
    if labels is not None:
        assert gap(net(x, sigma).x0, io["D_vec_nolabel"]) < 1e-5
    noise = torch.tensor(io["raw_noise_labels"])
    raw, _ = net.network(torch.tensor(io["x"]), noise, labels)
    assert gap(raw, io["raw_F"]) < 1e-5


@pytest.mark.parametrize("name", ENTRIES)
def test_names_and_shapes_are_the_published_ones(name: str, golden_json: Golden) -> None:
    entry = golden_json("net_configs")[name]
    config = {"class_name": entry["class"], "img_resolution": 32, "img_channels": 3}
    net = build(config | entry["kwargs"])
    own = {key: list(value.shape) for key, value in net.state_dict().items()}
    published = golden_json("net_keys")[name]
    # The order counts too: published EMA lists are in the order of the parameters.
    assert list(own.items()) == list(published.items())
    assert net.model.bottleneck == entry["bottleneck_module"]


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_resampling_is_a_strided_convolution(
    taps: tuple[int, ...], direction: str, kernel: int
) -> None:
    """Shortcuts (mean, nearest neighbour, 1x1 first) against the definition, written by hand."""
    torch.manual_seed(0)
    conv = Conv2d(4, 5, kernel, **{direction: True}, resample_filter=taps).double()
    conv.requires_grad_(False)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    row = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    planes = x.reshape(8, 1, 6, 6)
    if direction == "up":  # zeros between the pixels, then a smoothing of gain 4
        sparse = torch.zeros(8, 1, 12, 12, dtype=torch.float64)
        sparse[:, :, ::2, ::2] = planes
        pad = len(taps) // 2
        smooth = F.conv2d(F.pad(sparse, (pad, pad - 1) * 2), 4 * torch.outer(row, row)[None, None])
    else:
        smooth = F.conv2d(
            F.pad(planes, ((len(taps) - 1) // 2,) * 4), torch.outer(row, row)[None, None]
        )
        smooth = smooth[:, :, ::2, ::2]
    expected = smooth.reshape(2, 4, *smooth.shape[-2:])
    if kernel:
        torch.nn.init.normal_(conv.bias)
        expected = F.conv2d(expected, conv.weight, conv.bias, padding=kernel // 2)
    assert gap(conv(x), expected) < 1e-12


def test_conv_first_equals_filter_first_inside() -> None:
    """Convolution and filter commute away from the border."""
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"down": True, "resample_filter": (1, 3, 3, 1)}
    first, last = Conv2d(3, 4, 3, conv_first=True, **kwargs), Conv2d(3, 4, 3, **kwargs)
    with torch.no_grad():
        first.bias.normal_()
    x = torch.randn(1, 3, 16, 16)
    smooth = F.conv2d(x, last.resample_filter.expand(3, -1, -1, -1), groups=3, padding=1)
    expected = F.conv2d(smooth, first.weight, first.bias, padding=1)[:, :, ::2, ::2]
    got = first(x)
    assert got.shape == expected.shape == (1, 4, 8, 8)
    assert gap(got[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1]) < 1e-6


def test_attention_reads_the_published_channel_order() -> None:
    """Head, then channel, then q/k/v; scores scaled by 1/sqrt(channels of a head)."""
    torch.manual_seed(0)
    block = UNetBlock(16, 16, emb_channels=4, attention=True, num_heads=2).double()
    torch.nn.init.normal_(block.qkv.bias)
    x = torch.randn(3, 16, 2, 3, dtype=torch.float64)
    qkv = F.conv2d(x, block.qkv.weight, block.qkv.bias).reshape(6, 8, 3, 6)
    q, k, v = qkv.unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / 8**0.5).softmax(2)
    expected = torch.einsum("nqk,nck->ncq", weights, v).reshape(3, 16, 2, 3)
    assert gap(block.attend(x), expected) < 1e-12


@pytest.mark.parametrize("family", ["SongUNet", "DhariwalUNet"])
def test_gradients_in_x_and_sigma(family: str) -> None:
    torch.manual_seed(0)
    net = EDMPrecond(8, 1, model_type=family, **TINY).eval().requires_grad_(False)
    for parameter in net.parameters():  # published layers may start at zero; these must not
        parameter.normal_(0, 0.2)
    net.cast(torch.float64)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    for shape in ((), (2, 1, 1, 1)):
        sigma = torch.full(shape, 0.8, dtype=torch.float64, requires_grad=True)
        # fast mode: random projections of the Jacobian, seeded above
        assert torch.autograd.gradcheck(
            lambda x, s: tuple(net(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
        )


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder_type is 'magic'; known: standard"):
        EDMPrecond(8, 1, model_type="SongUNet", encoder_type="magic", **TINY)
    with pytest.raises(ValueError, match="model_type is 'VGG'; known: SongUNet"):
        EDMPrecond(8, 1, model_type="VGG", **TINY)
    with pytest.raises(ValueError, match="bottleneck is '9x9_block0'; known: 8x8_conv"):
        EDMPrecond(8, 1, model_type="DhariwalUNet", bottleneck="9x9_block0", **TINY)


def song(**kwargs: Any) -> SongUNet:
    torch.manual_seed(0)
    net = SongUNet(8, 3, 3, **TINY, **kwargs).double().requires_grad_(False).eval()
    for parameter in net.parameters():
        parameter.normal_(0, 0.3)
    return net


def test_song_embedding_adds_scaled_classes_and_augmentations() -> None:
    """No recorded network is conditional: the published sum, written out."""
    net = song(label_dim=5, augment_dim=2)
    noise = torch.tensor([0.3, -1.2], dtype=torch.float64)
    classes, augment = torch.eye(5, dtype=torch.float64)[[4, 1]], torch.randn(2, 2).double()
    angle = noise[:, None] * 1e-4 ** (torch.arange(4).double() / 3)
    assert net.map_label is not None and net.map_augment is not None
    total = torch.cat([angle.sin(), angle.cos()], 1)
    total = total + 5**0.5 * net.map_label.weight[:, [4, 1]].T + net.map_label.bias
    total = total + augment @ net.map_augment.weight.T
    hidden = F.silu(total @ net.map_layer0.weight.T + net.map_layer0.bias)
    expected = F.silu(hidden @ net.map_layer1.weight.T + net.map_layer1.bias)
    assert gap(net.embed(noise, classes, augment), expected) < 1e-12


@pytest.mark.parametrize("encoder_type", ["skip", "residual"])
def test_second_pyramid_of_the_encoder(encoder_type: str) -> None:
    """NCSN++: the input, shrunk, joins each coarser level (a sum, or a sum over sqrt 2)."""
    net = song(encoder_type=encoder_type, resample_filter=(1, 3, 3, 1), embedding_type="fourier")
    x, emb = torch.randn(2, 3, 8, 8).double(), torch.randn(2, 32).double()
    skips, _ = net._encode(x, emb)
    down = net.enc["4x4_down"](skips[1], emb)
    if encoder_type == "skip":
        expected = down + net.enc["4x4_aux_skip"](net.enc["4x4_aux_down"](x))
    else:
        expected = (down + net.enc["4x4_aux_residual"](x)) / 2**0.5
    assert len(skips) == 4
    assert gap(skips[2], expected) < 1e-12
    assert gap(skips[3], net.enc["4x4_block0"](expected, emb)) < 1e-12


def test_skip_decoder_sums_an_image_per_level() -> None:
    """The output is the finest image plus the coarser one at twice its size."""
    net = song(decoder_type="skip")
    x, noise = torch.randn(2, 3, 8, 8).double(), torch.zeros(2).double()
    both, _ = net(x, noise)
    seen: dict[str, Tensor] = {}
    for name in ("4x4_aux_conv", "8x8_aux_conv"):
        net.dec[name].register_forward_hook(lambda _m, _i, out, n=name: seen.update({n: out}))
    net(x, noise)
    coarse = seen["4x4_aux_conv"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert gap(both, coarse + seen["8x8_aux_conv"]) < 1e-12
