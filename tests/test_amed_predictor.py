"""The predictor: its published outputs, its initialisation, its ranges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from amed.predictor import AMEDPredictor
from solvers.types import InsertedNode, Node

NAMES = ("r", "scale_dir", "scale_time")
TAGS = {"dir0.01_time0.2_bias": (0.01, 0.2), "dir0.01_time0_init": (0.01, 0.0)}


def node(feat: Tensor | None, t: float, batch: int = 4, dtype: torch.dtype = torch.float64) -> Node:
    x = torch.zeros(batch, 3, 8, 8, dtype=dtype)
    return Node(torch.tensor(t, dtype=torch.float64), x, x, feat)


def at(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def spread(predictor: AMEDPredictor, scale: float, seed: int = 3) -> AMEDPredictor:
    """Weights far from the initial ones, so that heads leave their middle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in predictor.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return predictor


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-6), ("float64", 1e-10)])
def test_recorded_outputs(golden, tag, dtype, tol):
    recorded, kind = golden("predictor"), getattr(torch, dtype)
    predictor = AMEDPredictor(*TAGS[tag]).to(kind)
    prefix = f"{tag}|sd|"
    predictor.load_state_dict(
        {k[len(prefix) :]: torch.tensor(recorded[k]) for k in recorded.files if prefix in k}
    )
    feat = torch.tensor(recorded["features"], dtype=kind).reshape(4, 8, 8)
    checked = 0
    for i, (t, t_next) in enumerate(recorded["t_pairs"]):
        mid = predictor(node(feat, t, dtype=kind), at(t_next))
        for name, value in zip(NAMES, mid, strict=True):
            key = f"{tag}|f{dtype[-2:]}|pair{i}|{name}"
            if key not in recorded.files:  # a head without range is not recorded
                assert torch.equal(value, torch.ones(4, 1, 1, 1, dtype=kind))
                continue
            expected = torch.tensor(recorded[key]).reshape(4, 1, 1, 1)
            torch.testing.assert_close(value, expected, rtol=tol, atol=0)
            checked += 1
    assert checked == 6 * (3 if TAGS[tag][1] else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_embedding_is_four_sines_before_four_cosines(dtype):
    """Channel by channel: [sin(t f), cos(t f)] with f_k = 10^(-4 k / 3), k = 0 .. 3."""
    predictor = AMEDPredictor().to(dtype)
    with torch.no_grad():  # the layer passes its input on, lifted to where SiLU is invertible
        predictor.map_layer0.weight.copy_(torch.eye(8))
        predictor.map_layer0.bias.fill_(3.0)
        for t in (0.002, 0.7, 2.5, 10.0, 80.0):
            angles = [t * 1e-4 ** (k / 3) for k in range(4)]
            channels = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            lifted = torch.tensor([3.0 + c for c in channels], dtype=torch.float64)
            embedding = predictor._embed(at(t), 2)
            assert embedding.shape == (2, 8) and embedding.dtype == dtype
            # the frequencies are rounded to float32: 2^-24 of an angle of at most 80
            assert (embedding.double() - lifted * lifted.sigmoid()).abs().max() < 1e-5


def test_parameter_count():
    def count(*scales: float) -> int:
        return nn.utils.parameters_to_vector(AMEDPredictor(*scales).parameters()).numel()

    # 8*8 + 8 for the embedding, 64*128 + 128 and 128*4 + 4 for the bottleneck, 21 for a head
    assert count(0.0, 0.0) == 72 + 8320 + 516 + 21
    assert count(0.01, 0.0) == count(0.0, 0.2) == count(0.0, 0.0) + 21
    assert count(0.01, 0.2) == 8971  # "about 9k"


def test_embedding_is_xavier_uniform_and_the_rest_kaiming_normal():
    drawn: dict[str, list[Tensor]] = {}
    for seed in range(300):
        for name, p in AMEDPredictor(0.01, 0.2, seed=seed).named_parameters():
            drawn.setdefault(name, []).append(p.detach().flatten())
    weights = {name: torch.cat(values).double() for name, values in drawn.items()}
    assert not any(w.any() for name, w in weights.items() if name.endswith("bias"))

    bound = math.sqrt(6 / (8 + 8))
    embedding = weights["map_layer0.weight"]
    assert embedding.abs().max() <= bound and embedding.abs().max() > 0.999 * bound
    assert math.isclose(embedding.std(), bound / math.sqrt(3), rel_tol=0.02)  # uniform, not normal
    assert math.isclose((embedding.abs() < bound / 2).double().mean(), 0.5, abs_tol=0.02)

    for name, fan_in in (
        ("enc_layer0.weight", 64),
        ("enc_layer1.weight", 128),
        ("fc_r.weight", 20),
        ("fc_scale_dir.weight", 20),
        ("fc_scale_time.weight", 20),
    ):
        w = weights[name] * math.sqrt(fan_in)  # a standard normal sample
        n = len(w)
        assert abs(w.mean()) < 5 / math.sqrt(n), name
        assert abs(w.var() - 1) < 5 * math.sqrt(2 / n), name
        assert abs((w**4).mean() - 3) < 5 * math.sqrt(96 / n), name  # a uniform law has 1.8


def test_a_seed_fixes_the_weights():
    one, same, other = (AMEDPredictor(0.01, 0.2, seed=s).state_dict() for s in (5, 5, 6))
    for name in one:
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == name.endswith("bias")
    parameters = {name for name, _ in AMEDPredictor(0.01, 0.2).named_parameters()}
    assert set(one) == parameters  # the frequencies are a rule, not a weight


@pytest.mark.parametrize("scales", [(0.0, 0.0), (0.05, 0.0), (0.0, 0.3), (0.05, 0.3)])
def test_ranges_and_constant_heads(scales):
    feat = torch.linspace(-40, 40, 64 * 64, dtype=torch.float64).reshape(64, 8, 8)
    wide = InsertedNode([], [], [])
    for seed in range(8):
        predictor = spread(AMEDPredictor(*scales).double(), 1.0, seed)
        for t, t_next in ((80.0, 10.0), (10.0, 0.5), (0.5, 0.002)):
            for values, value in zip(wide, predictor(node(feat, t, 64), at(t_next)), strict=True):
                assert value.shape == (64, 1, 1, 1)
                values.append(value)
    r, c, a = (torch.cat(values) for values in wide)
    assert ((r >= 0) & (r <= 1)).all() and r.min() < 0.05 and r.max() > 0.95
    for value, scale in ((c, scales[0]), (a, scales[1])):
        if not scale:
            assert torch.equal(value, torch.ones_like(value))
            continue
        assert ((value >= 1 - scale) & (value <= 1 + scale)).all()
        assert value.min() < 1 - 0.9 * scale and value.max() > 1 + 0.9 * scale


def test_a_zero_logit_rescales_nothing():
    predictor = spread(AMEDPredictor(0.05, 0.3).double(), 0.0)
    mid = predictor(node(None, 80.0), at(10.0))
    for value, expected in zip(mid, (0.5, 1.0, 1.0), strict=True):
        assert torch.equal(value, torch.full((4, 1, 1, 1), expected, dtype=torch.float64))


def test_missing_features_are_zeros():
    predictor = spread(AMEDPredictor(0.05, 0.3).double(), 1.0)
    zeros = torch.zeros(4, 8, 8, dtype=torch.float64)
    without = predictor(node(None, 80.0), at(9.0))
    for value, expected in zip(without, predictor(node(zeros, 80.0), at(9.0)), strict=True):
        assert torch.equal(value, expected)
    other = predictor(node(zeros + 0.1, 80.0), at(9.0))
    assert all((u - v).abs().min() > 1e-6 for u, v in zip(without, other, strict=True))


@pytest.mark.parametrize("side", [16, 32])
def test_larger_features_are_averaged_to_eight_by_eight(side):
    predictor = spread(AMEDPredictor(0.05, 0.3).double(), 0.5)
    small = torch.randn(4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = side // 8
    large = small.repeat_interleave(k, 1).repeat_interleave(k, 2)
    ripple = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(side // 2)  # of mean zero
    expected = predictor(node(small, 7.0), at(1.0))
    for value, want in zip(predictor(node(large + ripple, 7.0), at(1.0)), expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=0)


def test_smaller_features_are_repeated_to_eight_by_eight():
    predictor = spread(AMEDPredictor(0.05, 0.3).double(), 0.5)
    small = torch.randn(4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    repeated = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = predictor(node(repeated, 7.0), at(1.0))
    for value, want in zip(predictor(node(small, 7.0), at(1.0)), expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=0)


def test_samples_do_not_see_their_neighbours():
    predictor = spread(AMEDPredictor(0.05, 0.3).double(), 1.0)
    feat = torch.randn(6, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = predictor(node(feat, 7.0, 6), at(1.0))
    for b in range(6):
        alone = predictor(node(feat[b : b + 1], 7.0, 1), at(1.0))
        for value, all_values in zip(alone, together, strict=True):
            torch.testing.assert_close(value[0], all_values[b], rtol=1e-12, atol=0)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.float64])
def test_outputs_have_the_dtype_of_the_state(state, own):
    predictor = spread(AMEDPredictor(0.05, 0.3), 1.0).to(own)
    feat = torch.ones(4, 8, 8, dtype=torch.bfloat16)
    for value in predictor(node(feat, 7.0, dtype=state), at(1.0)):
        assert value.dtype == state


@pytest.mark.parametrize("scales", [(-0.1, 0.0), (1.0, 0.0), (0.0, 1.5), (math.nan, 0.0)])
def test_scales_out_of_range_raise(scales):
    with pytest.raises(ValueError, match=f"scale_dir = {scales[0]:g} .* = {scales[1]:g}"):
        AMEDPredictor(*scales)
