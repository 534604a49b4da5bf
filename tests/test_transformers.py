"""Pipelines with a transformer: our walk on a pipeline's levels is the pipeline's own output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.families.diffusers.files import describe_diffusers
from denoisers.families.diffusers.one_step import TransformerModel
from denoisers.families.diffusers.prompts import RememberedPrompts
from denoisers.registry import ModelSource
from runtime.dist import World
from runtime.errors import UserError
from solvers.driver import Meter, integrate
from solvers.registry import make_solver
from tests import tiny_transformers as tiny
from tests.tiny_transformers import PIPELINES, normal

PROMPTS = ["a cat", "a dog!"]
INFINITE = 1e8  #: sigma at s = 1, where networks are told 999.99999 for 1000
#: Height and width in pixels of the images of each tiny pipeline.
SIZES = dict.fromkeys(PIPELINES, (16, 32)) | {"lumina2": (64, 128), "sana": (32, 64)}
BATCHED = {"sd3", "z_image", "sana", "pixart", "pixart_sigma"}  # guidance in one call of two halves


@pytest.fixture(scope="module", params=list(PIPELINES))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(kind)
    PIPELINES[kind]().save_pretrained(home)
    return Path(home)


def load(folder: Path, dtype: str = "float32", **settings: Any) -> TransformerModel:
    given = json.dumps(settings) if settings else None
    source = ModelSource("mine", str(folder), model_settings=given, dtype=dtype)
    model = source.load(World(0, 1, torch.device("cpu")))
    assert isinstance(model, TransformerModel)
    return model


@pytest.fixture(scope="module")
def model(kind: str, folder: Path) -> TransformerModel:
    height, width = SIZES[kind]
    return load(folder, height=height, width=width)


def theirs(model: TransformerModel, noise: Tensor, **said: Any) -> Tensor:
    """The images of the pipeline itself, in [-1, 1]."""
    height, width = model.image_size
    model.pipe.set_progress_bar_config(disable=True)
    images: Tensor = model.pipe(
        **said, **model.kind.fixed, latents=model._packed(noise.clone()), height=height,
        width=width, num_inference_steps=4, output_type="pt",
    ).images  # fmt: skip
    return 2 * images - 1


def levels(model: TransformerModel) -> Tensor:
    """Our noise levels of the scheduler's last run."""
    s = model.pipe.scheduler.sigmas.double()
    if model.prediction.kind != "flow_prediction":
        return s
    return torch.where(s < 1, s / (1 - s), INFINITE)


def ours(model: TransformerModel, noise: Tensor, rate: float | None, prompts: Any) -> Any:
    """The walk of Euler's method along ``levels``; its state is that of the pipeline at first."""
    ts = levels(model)
    scale = ts[0] if model.prediction.kind == "flow_prediction" else (1 + ts[0] ** 2).sqrt()
    meter = Meter(model.bind(None, rate, prompts))
    with torch.no_grad():
        return integrate(make_solver("euler"), meter, noise * scale.float(), ts)


class Door:
    """Evaluations at the transformer's door: samples of all its calls."""

    def __init__(self, model: TransformerModel) -> None:
        self.samples = 0
        self._hook = model.pipe.transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        self.samples += len(states)

    def close(self) -> int:
        self._hook.remove()
        return self.samples


@pytest.mark.parametrize("rate", [1.0, 3.0])
def test_our_walk_is_the_pipelines_own_output(
    kind: str, model: TransformerModel, rate: float
) -> None:
    """With and without guidance, on images that are no square; calls are counted at the door."""
    noise, pipeline = normal(2, *model.card.shape), model.kind
    negative = {} if kind == "flux" else {"negative_prompt": [""] * 2}
    if rate == 1:
        negative = {}
    own = {pipeline.rate: rate - pipeline.offset}
    expected = theirs(model, noise, prompt=list(PROMPTS), **own, **negative)
    assert float(expected.std()) > 0.1  # no blank images
    door = Door(model)
    walk = ours(model, noise, rate, PROMPTS)
    assert door.close() == walk.nfe * len(noise)
    assert walk.nfe == (4 if rate == 1 or kind == "flux" else 8)
    assert float((model.decode(walk.x[-1]) - expected).abs().max()) < 1e-4


def test_the_card_is_that_of_the_settings(kind: str, model: TransformerModel) -> None:
    height, width = SIZES[kind]
    factor = {"lumina2": 8}.get(kind, 2)
    assert model.card.shape == (tiny.CHANNELS, height // factor, width // factor)
    assert model.image_size == (height, width)
    assert model.card.guidance == ("embedded" if kind == "flux" else "cfg")
    noise = model.card.noise_schedule
    assert noise is not None
    if kind.startswith("pixart"):
        assert noise["kind"] == "discrete_vp" and model.card.sigma_max == pytest.approx(157.40728)
    else:
        scheduler = model.pipe.scheduler
        mu = 0.5 + (1.15 - 0.5) * (32 - 4) / 60  # of 4 x 8 patches
        shift = 2.718281828**mu if scheduler.config.use_dynamic_shifting else 3.0
        assert noise == {"kind": "flow", "shift": pytest.approx(shift)}
        assert model.card.sigma_max == pytest.approx(999 * shift)


def test_samples_at_different_levels_are_those_of_each_alone(model: TransformerModel) -> None:
    x, sigma = 9 * normal(2, *model.card.shape), torch.tensor([9.0, 2.0]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        both = model.bind(None, 2.0, PROMPTS)(x, sigma).x0
        for i in range(2):
            one = model.bind(None, 2.0, PROMPTS[i : i + 1])(x[i : i + 1], sigma[i, 0, 0, 0]).x0
            torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_state_and_no_weight(model: TransformerModel) -> None:
    x = normal(1, *model.card.shape).requires_grad_()
    denoiser = model.bind(None, 2.0, ["a"])
    direction = normal(1, *model.card.shape, seed=1)
    (denoiser(x, torch.tensor(1.5)).x0 * direction).sum().backward()
    assert x.grad is not None and all(p.grad is None for p in model.pipe.transformer.parameters())
    step = 1e-2
    with torch.no_grad():
        ends = [denoiser(x + k * step * direction, torch.tensor(1.5)).x0 for k in (1, -1)]
    slope = float(((ends[0] - ends[1]) * direction).sum()) / (2 * step)
    assert float((x.grad * direction).sum()) == pytest.approx(slope, rel=0.05)


def test_rate_zero_and_none(model: TransformerModel, kind: str) -> None:
    if kind == "flux":
        pytest.skip("its rate is an input of the network")
    x, sigma = normal(1, *model.card.shape), torch.tensor(1.0)
    with torch.no_grad():
        without = model.bind(None, 0.0, ["a"])(x, sigma).x0
        empty = model.bind(None, None, [""])(x, sigma).x0
        given = model.bind(None, None, ["a"])(x, sigma).x0
    assert torch.equal(without, empty) and not torch.allclose(given, empty, atol=1e-3)
    with pytest.raises(UserError, match=r"--guidance_rate 0\.5 is below 1, where the pipeline"):
        model.bind(None, 0.5, ["a"])


def test_a_negative_prompt_is_the_pipelines(model: TransformerModel, kind: str) -> None:
    if kind == "flux":
        pytest.skip("see test_true_guidance_of_flux")
    noise, pipeline = normal(1, *model.card.shape), model.kind
    own: dict[str, Any] = {pipeline.rate: 3.0 - pipeline.offset, "negative_prompt": ["dull"]}
    expected = theirs(model, noise, prompt=["a"], **own)
    ts = levels(model)
    scale = ts[0] if model.prediction.kind == "flow_prediction" else (1 + ts[0] ** 2).sqrt()
    denoiser = model.bind(None, 3.0, ["a"], negative="dull")
    with torch.no_grad():
        walk = integrate(make_solver("euler"), denoiser, noise * scale.float(), ts)
    assert float((model.decode(walk.x[-1]) - expected).abs().max()) < 1e-4


def test_memory_for_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def encode(prompt: list[str], device: torch.device) -> tuple[Any, None]:
        made.append(prompt[0])
        prompt[0] = "rewritten"  # as Z-Image does
        return [torch.full((100,), float(len(made)))], None

    remembered = RememberedPrompts(encode)
    monkeypatch.setattr("denoisers.families.diffusers.prompts.KEPT_BYTES", 1000)  # two of them
    cpu = torch.device("cpu")
    for word in ("a", "b", "a", "c", "a", "b"):
        remembered(prompt=[word], device=cpu)
    assert made == ["a", "b", "c", "b"]  # b was the one used longest ago
    [found], nothing = remembered(prompt=["a"], device=cpu, in_dtype=torch.float64)
    assert found.dtype == torch.float64 and float(found[0]) == 1 and nothing is None


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("flux")
    tiny.flux().save_pretrained(home)
    return Path(home)


def test_true_guidance_of_flux(flux: Path) -> None:
    """Beside the scale that its network is told, as a setting of the model: two calls a step."""
    model = load(flux, height=16, width=16, true_cfg_scale=2.5)
    noise = normal(2, *model.card.shape)
    said = {"guidance_scale": 4.0, "true_cfg_scale": 2.5, "negative_prompt": [""] * 2}
    expected = theirs(model, noise, prompt=list(PROMPTS), **said)
    door = Door(model)
    walk = ours(model, noise, 4.0, PROMPTS)
    assert door.close() == 16 and walk.nfe == 8
    assert float((model.decode(walk.x[-1]) - expected).abs().max()) < 1e-4
    plain = load(flux, height=16, width=16)
    assert plain.sha256 != model.sha256 and plain.card.cost(4.0) == 1


def test_prompts_are_embedded_once(flux: Path) -> None:
    model = load(flux, height=16, width=16)
    calls = []
    model.pipe.text_encoder_2.register_forward_pre_hook(lambda module, args: calls.append(1))
    denoiser = model.bind(None, 4.0, PROMPTS)
    x = normal(2, *model.card.shape)
    with torch.no_grad():
        first = denoiser(x, torch.tensor(2.0)).x0
        again = denoiser(x, torch.tensor(2.0)).x0
        model.bind(None, 4.0, PROMPTS)(x, torch.tensor(1.0))
        model.decode(x)
        model.decode(x)
    assert torch.equal(first, again) and len(calls) == 2  # the prompts, and none for decoding


#: Of SD3, and of Z-Image, which asks for float32 states, more than one.
DTYPES = {"sd3": ["bfloat16", "float16", "float64"], "z_image": ["bfloat16", "float64"]}


def test_other_dtypes(kind: str, folder: Path, model: TransformerModel) -> None:
    """The network in another precision: near, and decoded in float32 at least."""
    for dtype in DTYPES.get(kind, ["bfloat16"]):
        check_dtype(dtype, kind, folder, model)


def check_dtype(dtype: str, kind: str, folder: Path, model: TransformerModel) -> None:
    height, width = SIZES[kind]
    other = load(folder, dtype, height=height, width=width)
    assert other.pipe.transformer.dtype == getattr(torch, dtype)
    assert other.pipe.vae.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    x = normal(1, *model.card.shape)
    with torch.no_grad():
        near = other.bind(None, 2.0, ["a"])(x, torch.tensor(1.0)).x0
        exact = model.bind(None, 2.0, ["a"])(x, torch.tensor(1.0)).x0
    error = float((near - exact).abs().mean() / exact.abs().mean())
    assert near.dtype == torch.float32 and error < (1e-4 if dtype == "float64" else 0.1)
    torch.testing.assert_close(other.decode(x), model.decode(x), rtol=1e-3, atol=1e-3)


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("file", "entries", "sentence"),
    [
        ("model_index.json", {"_class_name": "HiDreamImagePipeline"}, "HiDreamImagePipeline is no"),
        ("model_index.json", {"text_encoder": ["transformers", "BertModel"]}, "'BertModel' is not"),
        ("transformer/config.json", {"in_channels": 10**6}, "in_channels = 1000000 is no whole"),
        ("scheduler/scheduler_config.json", {"shift": "x"}, "shift 'x' is no number"),
        ("scheduler/scheduler_config.json", {"max_shift": 1e4}, "is none that a flow can have"),
        ("scheduler/scheduler_config.json", {"max_image_seq_len": 4}, "4 is not above 4"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10}, "of a flow is not 1000"),
        ("vae/config.json", {"block_out_channels": []}, "as a list of 1 to 8"),
    ],
)
def test_other_pipelines_are_refused(
    file: str, entries: dict[str, Any], sentence: str, flux: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(flux, copied, ignore=shutil.ignore_patterns("*.safetensors"))
    change(copied / file, **entries)
    with pytest.raises(UserError, match=sentence) as caught:
        describe_diffusers("mine", copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"heigth": 16}, "has 'heigth', and a pipeline takes height, width, true_cfg_scale alone"),
        ({"height": 18}, "height 18 is no multiple of 4 up to 8192 pixels"),
        ({"width": -4}, "width -4 is no multiple of 4"),
        ({"width": "4"}, "width '4' is no multiple of 4"),
        ({"true_cfg_scale": 1}, "true_cfg_scale 1 is no rate above 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], sentence: str, flux: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        describe_diffusers("mine", flux, settings)


@pytest.mark.parametrize(("kind", "side"), [("sd3", 8), ("chroma", 128)])
def test_without_a_size_it_is_the_pipelines(kind: str, side: int, tmp_path: Path) -> None:
    """That of the network, or of 1024 pixels for a first stage that halves three times."""
    PIPELINES[kind]().save_pretrained(tmp_path)
    card = describe_diffusers("mine", tmp_path)
    assert card.shape == (tiny.CHANNELS, side, side) and card.image_resolution == 2 * side
