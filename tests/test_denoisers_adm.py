"""ADM and consistency models: recorded outputs, guidance and its gradients, conditions, files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints.snapshots import read_weights
from denoisers.cards import Card
from denoisers.families.adm import ADMDenoiser, ADMModel, load_adm, resolved
from denoisers.families.cm import CMDenoiser, load_cm
from denoisers.nets.openai import Classifier, UNet
from denoisers.noise_schedules import LinearVP
from denoisers.protocol import Files
from runtime.errors import UserError
from runtime.files import sha256_file
from tests.tensors import gap

Golden = Callable[[str], Any]
CPU = torch.device("cpu")
ADM = Card(
    name="tiny", family="adm", resolution=32, channels=3, label_dim=1000,
    sigma_min=0.0105, sigma_max=152.0, bottleneck="middle_block", file="tiny.pt",
    url="https://example.org/tiny.pt", sha256=None, config={"num_head_channels": 32},
    guidance="cg", noise_schedule={"kind": "linear_vp"},
)  # fmt: skip
CM = replace(ADM, family="cm", label_dim=0, guidance=None, noise_schedule=None)
SMALL: dict[str, Any] = {
    "image_size": 8, "in_channels": 3, "model_channels": 32, "num_res_blocks": 1,
    "attention_resolutions": [2], "channel_mult": [1, 1], "num_head_channels": 32,
    "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
LABELS = torch.tensor([3, 1])


def recorded(name: str, golden_weights: Golden, folder: Path) -> Path:
    """Recorded weights in a file as published: a state dict of PyTorch."""
    torch.save(golden_weights(name), folder / f"{name}.pt")
    return folder / f"{name}.pt"


def small(kind: type[Any], seed: int, **settings: Any) -> Any:
    torch.manual_seed(seed)
    net = kind(**{**SMALL, **settings}).eval().requires_grad_(False)
    net.cast(torch.float64)
    return net


def guided(rate: float) -> ADMDenoiser:
    """A small network and classifier in float64."""
    net = small(UNet, 0, out_channels=6, num_classes=5)
    return ADMDenoiser(net, LinearVP(), LABELS, small(Classifier, 1, out_channels=5), rate)


def saved(folder: Path, **changes: Any) -> Files:
    """Files of a small network with five classes, and of its classifier."""
    net = UNet(**{**SMALL, "out_channels": 6, "num_classes": 5, **changes})
    torch.save(net.state_dict(), folder / "net.pt")
    torch.save(Classifier(**{**SMALL, "out_channels": 5}).state_dict(), folder / "classifier.pt")
    return Files(folder / "net.pt", folder / "classifier.pt")


def load_small(files: Files, dtype: torch.dtype = torch.float32, **changes: Any) -> ADMModel:
    card = replace(ADM, resolution=8, **{"label_dim": 5, **changes})
    return load_adm(card, files, CPU, dtype)


def states(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(2))


def test_adm_matches_its_records(golden: Golden, golden_weights: Golden, tmp_path: Path) -> None:
    """In inference mode, as samplers call it; the tolerance is that of eps where sigma > 1."""
    io = golden("net_adm_io")
    names = ("adm", "adm_classifier")
    files = Files(*(recorded(name, golden_weights, tmp_path) for name in names))
    model = load_adm(ADM, files, CPU, torch.float32)
    assert model.sha256 == sha256_file(files.main)
    with torch.inference_mode():
        labels = torch.tensor(io["labels"])
        for rate in (0.0, 1.0, 4.0):
            denoise = model.bind(labels, rate)
            for i, sigma in enumerate(io["sigmas"]):
                x, level = torch.tensor(io[f"x_{i}"]), torch.tensor(sigma)
                for shaped in (level, level.expand(2, 1, 1, 1))[: 1 + (rate == 4)]:
                    x0 = denoise(x, shaped).x0
                    assert x0.dtype == torch.float32
                    assert gap(x0, io[f"D_rate{rate}_{i}"]) < 1e-5 * max(1, sigma)
                times = denoise.steps(level.float())
                assert float(times) == pytest.approx(float(io[f"c_noise_{i}"]), rel=1e-6)
                if rate:
                    scaled = x / (1 + level.float() ** 2).sqrt()
                    pull = denoise.pull(scaled, times.expand(2))
                    assert gap(rate * pull, io[f"cond_grad_rate{rate}_{i}"]) < 1e-6


def test_cm_matches_its_records(golden: Golden, golden_weights: Golden, tmp_path: Path) -> None:
    io = golden("net_cm_io")
    model = load_cm(CM, Files(recorded("cm", golden_weights, tmp_path)), CPU, torch.float32)
    denoise = model.bind()
    for i, sigma in enumerate(io["sigmas"]):
        out = denoise(torch.tensor(io[f"x_{i}"]), torch.tensor(sigma))
        assert gap(out.x0, io[f"D_{i}"]) < 1e-5
        assert gap(out.feat, io[f"middle_mean_{i}"]) < 1e-5
    level = torch.full((2, 1, 1, 1), float(io["sigmas"][1]))
    assert gap(denoise(torch.tensor(io["x_1"]), level).x0, io["D_sigma_1111"]) < 1e-5


def test_network_time_is_the_schedules() -> None:
    sigma = torch.logspace(-2, 2, 50, dtype=torch.float64)
    steps = ADMDenoiser(small(UNet, 0, out_channels=3), LinearVP(), None).steps(sigma)
    assert gap(steps, 999 * LinearVP().sigma_inv(sigma)) < 1e-9
    ends = LinearVP().sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert guided(0.0).steps(ends).tolist() == pytest.approx([0.999, 999.0], abs=1e-9)


def test_the_pull_is_the_slope_of_the_log_probability() -> None:
    denoise, x = guided(1.0), states()
    times, way = torch.tensor([30.0, 700.0]).double(), states(4)[2:]

    def log_probability(x: Tensor) -> Tensor:
        return denoise.classifier(x, times).softmax(1)[[0, 1], LABELS].log()

    with torch.no_grad():
        step = 1e-5
        slope = (log_probability(x + step * way) - log_probability(x - step * way)) / (2 * step)
        pull = denoise.pull(x, times)
    assert gap((pull * way).sum((1, 2, 3)), slope) < 1e-7 * float(slope.abs().max())
    assert float(slope.abs().min()) > 1e-3  # there is something to compare


def test_the_pull_has_a_slope_where_attention_is_fused() -> None:
    """Above 256 pixels attention runs in a kernel that has no second derivative."""
    wide = {"image_size": 20, "channel_mult": [1], "attention_resolutions": [1], "out_channels": 5}
    denoise = replace(guided(1.0), classifier=small(Classifier, 1, **wide))
    x, way = torch.randn(2, 2, 3, 20, 20, dtype=torch.float64, generator=torch.manual_seed(3))
    times, step = torch.tensor([30.0, 700.0], dtype=torch.float64), 1e-4
    x.requires_grad_()
    (slope,) = torch.autograd.grad((denoise.pull(x, times) * way).sum(), x)
    with torch.no_grad():
        change = denoise.pull(x + step * way, times) - denoise.pull(x - step * way, times)
    expected = float((change * way).sum() / (2 * step))
    assert float((slope * way).sum()) == pytest.approx(expected, rel=1e-5)


def test_guidance_moves_the_noise_by_the_published_term() -> None:
    x, sigma = 0.2 * states(), torch.tensor(0.3, dtype=torch.float64)
    plain, pulled = guided(0.0)(x, sigma), guided(2.5)(x, sigma)
    spread = (1 + sigma**2).sqrt()
    pull = guided(1.0).pull(x / spread, guided(0.0).steps(sigma).expand(2))
    inside = (plain.x0.abs() < 0.9) & (pulled.x0.abs() < 0.9)
    moved = (plain.x0 + 2.5 * sigma * sigma / spread * pull)[inside]
    assert inside.float().mean() > 0.5
    assert gap(pulled.x0[inside], moved) < 1e-12 < gap(plain.x0[inside], moved)
    assert gap(pulled.feat, plain.feat) == 0
    clamped = guided(2.5)(10 * x, sigma).x0
    assert float(clamped.abs().max()) == 1


@pytest.mark.parametrize("rate", [0.0, 30.0])
@pytest.mark.parametrize("shape", [(), (2, 1, 1, 1)])
def test_adm_gradients_in_x_and_sigma(rate: float, shape: tuple[int, ...]) -> None:
    """The guidance term is differentiated as well (fast mode: seeded random projections)."""
    denoise = guided(rate)
    x = (0.2 * states()).requires_grad_()
    sigma = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: tuple(denoise(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(), (2, 1, 1, 1)])
def test_cm_gradients_in_x_and_sigma(shape: tuple[int, ...]) -> None:
    net = small(UNet, 0, out_channels=3, attention="flash", use_scale_shift_norm=False)
    x = states().requires_grad_()
    sigma = torch.full(shape, 0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, s: tuple(CMDenoiser(net, None)(x, s)), (x, sigma), fast_mode=True, rtol=1e-4
    )


def test_guidance_is_the_same_whatever_the_mode_of_gradients(tmp_path: Path) -> None:
    """The classifier is read on demand, here in inference mode, and must work in all modes."""
    model, x = load_small(saved(tmp_path), torch.float64), 0.2 * states()
    sigma = torch.tensor(0.3, dtype=torch.float64)
    with torch.inference_mode():
        first = model.bind(LABELS.clone(), 5.0)(x.clone(), sigma.clone()).x0
    with torch.no_grad():
        second = model.bind(LABELS, 5.0)(x.clone().requires_grad_(), sigma).x0
    third = model.bind(LABELS, 5.0)(x, sigma).x0
    assert not second.requires_grad and not third.requires_grad
    fourth = model.bind(LABELS, 5.0)(x.clone().requires_grad_(), sigma).x0
    assert fourth.requires_grad
    for other in (second, third, fourth):
        assert gap(other, first.clone()) < 1e-12
    assert gap(model.bind(LABELS)(x, sigma).x0, third) > 1e-3


def test_samples_do_not_see_their_neighbours(tmp_path: Path) -> None:
    denoise = load_small(saved(tmp_path), torch.float64).bind
    x, sigma = 0.2 * states(), torch.tensor([0.3, 4.0]).double().view(2, 1, 1, 1)
    both = denoise(LABELS, 5.0)(x, sigma)
    alone = denoise(LABELS[1:], 5.0)(x[1:], sigma[1])
    assert gap(both.x0[1:], alone.x0) < 1e-12
    assert denoise(LABELS, 5.0).cost == ADM.cost(5.0) == 1
    with pytest.raises(ValueError, match="2 labels are bound but the batch has 1"):
        denoise(LABELS)(x[1:], sigma[1])


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_half_precision_keeps_the_states_dtype(
    dtype: torch.dtype, digits: float, tmp_path: Path
) -> None:
    files, x = saved(tmp_path), 0.2 * states()
    sigma = torch.tensor(0.3, dtype=torch.float64)
    exact, model = load_small(files, torch.float64), load_small(files, dtype)
    assert model.classifier.dtype == torch.float32
    truth, out = exact.bind(LABELS, 5.0)(x, sigma), model.bind(LABELS, 5.0)(x, sigma)
    assert out.x0.dtype == out.feat.dtype == torch.float64
    assert 0 < gap(out.x0, truth.x0) < digits * 0.3
    assert 0 < gap(out.feat, truth.feat) < digits


def test_conditions_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    files = saved(tmp_path)
    model = load_small(files)
    for wrong in (-1, 5):
        with pytest.raises(UserError, match=rf"class {wrong} is not one of the 5 classes"):
            model.bind(torch.tensor([0, wrong]))
    with pytest.raises(UserError, match="trained with classes: give every sample one"):
        model.bind(None)
    with pytest.raises(UserError, match="'tiny' takes no text"):
        model.bind(LABELS, None, ["a bedroom"] * 2)
    with pytest.raises(UserError, match="needs its classifier: .*--companion_path"):
        load_small(Files(files.main)).bind(LABELS, 1.0)
    load_small(Files(files.main)).bind(LABELS, 0.0)  # no classifier, no guidance: fine
    with pytest.raises(UserError, match="net.pt is no classifier of guided diffusion"):
        load_small(Files(files.main, files.main)).bind(LABELS, 1.0)
    torch.save(Classifier(**{**SMALL, "out_channels": 7}).state_dict(), tmp_path / "seven.pt")
    with pytest.raises(UserError, match="seven.pt tells 7 classes of 3-channel images"):
        load_small(Files(files.main, tmp_path / "seven.pt")).bind(LABELS, 1.0)


def test_only_the_unet_has_another_order_of_attention(tmp_path: Path) -> None:
    config = {"num_head_channels": 8, "attention": "new"}
    model = load_small(saved(tmp_path), config=config)
    assert not model.net.middle_block[1].legacy
    assert model.classifier.middle_block[1].legacy
    assert model.classifier.middle_block[1].heads == model.net.middle_block[1].heads == 4


def test_a_network_without_classes_is_guided_by_its_classifier(tmp_path: Path) -> None:
    model = load_small(saved(tmp_path, num_classes=None), torch.float64)
    x, sigma = 0.2 * states(), torch.tensor(0.3, dtype=torch.float64)
    assert model.card.label_dim == 5
    plain = model.bind()(x, sigma).x0
    assert gap(model.bind(LABELS)(x, sigma).x0, plain) == 0
    one, other = (model.bind(LABELS + i, 5.0)(x, sigma).x0 for i in (0, 1))
    assert gap(one, plain) > 1e-3 < gap(one, other)
    with pytest.raises(UserError, match="at rate 5 steers towards a class"):
        model.bind(None, 5.0)
    with pytest.raises(UserError, match="'tiny' has no classes"):
        load_small(saved(tmp_path, num_classes=None), guidance=None, label_dim=0).bind(LABELS)


def test_conditions_of_consistency_models(tmp_path: Path) -> None:
    own = {**SMALL, "out_channels": 3, "attention": "flash"}
    torch.save(UNet(**own, num_classes=5).state_dict(), tmp_path / "classes.pt")
    card = replace(CM, resolution=8, label_dim=5)
    model = load_cm(card, Files(tmp_path / "classes.pt"), CPU, torch.float64)
    x, sigma = states(), torch.tensor(0.3, dtype=torch.float64)
    assert gap(model.bind(LABELS)(x, sigma).x0, model.bind(LABELS + 1)(x, sigma).x0) > 1e-4
    with pytest.raises(UserError, match="trained with classes"):
        model.bind()
    with pytest.raises(UserError, match="'tiny' has no guidance, but the rate is 2.0"):
        model.bind(LABELS, 2.0)


def test_ones_own_network_needs_no_settings(tmp_path: Path) -> None:
    """What shapes tell is read off; what they cannot tell may come with a safetensors file."""
    files = saved(tmp_path)
    card = resolved(replace(ADM, resolution=8), *read_weights(files.main))
    assert (card.shape, card.label_dim) == ((3, 8, 8), 5)
    assert card.config == {
        **SMALL, "channel_mult": [1.0, 1.0], "out_channels": 6, "num_classes": 5
    }  # fmt: skip
    path = tmp_path / "own.safetensors"
    net = UNet(**{**SMALL, "num_head_channels": 8, "out_channels": 3, "attention": "new"})
    config = {"image_size": 8, "num_head_channels": 8, "attention": "new"}
    save_file(net.state_dict(), path, {"config": json.dumps(config)})
    card = resolved(CM, *read_weights(path))
    model = load_cm(card, Files(path), CPU, torch.float64)
    net.cast(torch.float64)
    x, times = states(), torch.tensor([1.0, 500.0], dtype=torch.float64)
    assert gap(model.net(x, times)[0], net.eval()(x, times)[0].detach()) == 0


@pytest.mark.parametrize("config", ["{", "[1]"])
def test_metadata_that_is_no_dict_is_refused(config: str, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"config": config})
    sentence = r"config in the metadata of .*own\.safetensors is ('\[|not valid JSON)"
    with pytest.raises(UserError, match=sentence):
        read_weights(path)


def test_files_of_other_models_are_refused(tmp_path: Path) -> None:
    files = saved(tmp_path)
    with pytest.raises(UserError, match=r"samples \(3, 8, 8\) with 5 classes where"):
        load_small(files, label_dim=10)
    with pytest.raises(UserError, match="predicts 6 channels where 'tiny' needs 3; it"):
        load_cm(replace(CM, resolution=8, label_dim=5), files, CPU, torch.float32)
    saved(tmp_path, out_channels=4)
    with pytest.raises(UserError, match="predicts 4 channels where 'tiny' needs 3, or"):
        load_small(files)
    with pytest.raises(UserError, match="'tiny' is None; a model of this family has"):
        load_small(saved(tmp_path), noise_schedule=None)
    tensors = torch.load(files.main, weights_only=True)
    torch.save({k: v for k, v in tensors.items() if k != "out.0.bias"}, files.main)
    with pytest.raises(UserError, match=r"net\.pt lacks 'out\.0\.bias'; it holds the"):
        load_small(files)
