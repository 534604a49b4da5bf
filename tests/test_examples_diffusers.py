"""A trained predictor inside diffusers: the same latents as our own sampling, by the same seeds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from samplers.options import SamplerOptions

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from click.testing import CliRunner

from amed.experiments import create_run, load_predictor, save_predictor
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from commands import sample, train
from denoisers.conditions import Conditions
from denoisers.families.diffusers.loading import load_diffusers
from denoisers.families.diffusers.model import from_pipeline
from denoisers.registry import ModelSource
from examples import stable_diffusion
from plans.plan import Solve
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from samplers.generate import generate
from samplers.in_diffusers import WalkScheduler, use_predictor
from samplers.sampler import Sampler
from solvers.driver import integrate
from solvers.registry import make_solver
from tests import published, tiny_pipeline
from tools import export

PROMPTS = ["a cat", "an apple"]
CPU = torch.device("cpu")
PAGE = Path(__file__).resolve().parent.parent / "docs" / "own-model.md"
#: What makes a command of the page a matter of a second.
SHORTER = {
    "train.py": ["--device=cpu", "--total_kimg=0.004", "--batch=4", "--tick=0.004"],
    "ns": ["--device=cpu", "--trajectories=8", "--batch=2", "--search=2", "--refine=1"],
    "tools.export": [],
    "sample.py": ["--device=cpu"],
    "examples.stable_diffusion": [],
}
SCRIPTS = {
    "train.py": train.main,
    "sample.py": sample.main,
    "examples.stable_diffusion": stable_diffusion.main,
    "tools.export": export.main,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def pipe(folder):
    return open_pipeline(folder)


def open_pipeline(folder, dtype=torch.float32):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_model(folder):
    source = ModelSource("mine", str(folder))
    card = source.card()
    return load_diffusers(card, source.files(card), CPU, torch.float32)


@pytest.fixture(scope="module")
def model(folder):
    return own_model(folder)


def predictor() -> AMEDPredictor:
    """Random heads that hear the bottleneck: r differs from image to image."""
    made = AMEDPredictor(0.1, 0.2, seed=3)
    with torch.no_grad():
        made.enc_layer1.weight.mul_(4)
    return made.requires_grad_(False)


def walk_of(model, name: str, guide=None, afs: bool = False) -> Solve:
    card = model.card
    ts = card.schedule.sigma(torch.linspace(1, 1e-3, 4, dtype=torch.float64))
    ts[0], ts[-1] = card.sigma_max, card.sigma_min
    return Solve(make_solver(name), ts, guide, afs)


def latents(count: int = 2, dtype=torch.float32) -> torch.Tensor:
    return SeedNoise(range(count)).normal("latent", (4, 8, 8), dtype)


def run(pipe, scheduler, rate=5.0, prompts=PROMPTS, noise=None, **options):
    noise = latents(len(prompts)) if noise is None else noise
    steps = scheduler.num_inference_steps
    options = {"num_inference_steps": steps, "output_type": "latent", **options}
    return pipe(prompts, guidance_scale=rate, latents=noise, **options).images


@pytest.mark.parametrize("rate", [1.0, 5.0])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("name", ["amed", "ipndm", "dpmpp", "euler"])
def test_a_predictor_gives_the_latents_of_our_own_sampler(pipe, model, name, afs, rate) -> None:
    walk = walk_of(model, name, predictor(), afs)
    scheduler = WalkScheduler.install(pipe, walk)
    sampler = Sampler("x", (walk,), SamplerOptions(guidance_rate=rate), model.card.cost(rate))
    conditions = Conditions(prompts=tuple(PROMPTS))
    (ours,) = generate(sampler, model, [0, 1], batch=2, device=CPU, conditions=conditions)
    theirs = run(pipe, scheduler, rate)
    assert scheduler.num_inference_steps * sampler.cost == ours.nfe
    scale = float(ours.x.abs().max())
    assert float((theirs - ours.x).abs().max()) < 1e-5 * scale
    images = run(pipe, scheduler, rate, output_type="pt")
    assert float((images * 2 - 1 - ours.images).abs().max()) < 1e-4


def test_every_image_has_times_of_its_own_from_the_bottleneck(pipe, model) -> None:
    """Were the hook not there, the predictor would see zeros, as in a fixed table of times."""
    walk = walk_of(model, "amed", predictor())
    told = []
    hook = pipe.unet.time_proj.register_forward_hook(lambda module, args, out: told.append(args[0]))
    scheduler = WalkScheduler.install(pipe, walk)
    seen = run(pipe, scheduler)
    hook.remove()
    inserted = torch.stack(told[1::2])  # (3, 4): two halves of two images each
    assert torch.equal(inserted[:, :2], inserted[:, 2:])
    assert float((inserted[:, 0] - inserted[:, 1]).abs().min()) > 0.1
    nodes = torch.stack(told[::2])
    own = 1000 * model.card.schedule.sigma_inv(walk.ts[:-1]) - 1
    assert float((nodes - own[:, None]).abs().max()) < 1e-3
    scheduler._bottleneck.take = lambda rows: None  # type: ignore[method-assign]
    assert float((run(pipe, scheduler) - seen).abs().max()) > 0.01


@torch.no_grad()
def test_the_network_may_be_called_by_name(pipe, model) -> None:
    scheduler = WalkScheduler.install(pipe, walk_of(model, "amed", predictor(), True))
    scheduler.set_timesteps(5)
    y = scheduler.scale_model_input(latents())
    text = pipe.encode_prompt(PROMPTS, CPU, 1, False)[0]
    placed = pipe.unet(y, 3, encoder_hidden_states=text).sample
    named = pipe.unet(sample=y, timestep=3, encoder_hidden_states=text).sample
    own = pipe.unet
    scheduler.remove()
    unknown = own(y, 3, encoder_hidden_states=text).sample
    assert torch.equal(placed, named) and float((placed - unknown).abs().max()) > 0.01


def test_a_walk_without_a_predictor_is_the_librarys_euler(pipe, model) -> None:
    from diffusers import EulerDiscreteScheduler

    walk = walk_of(model, "euler")
    steps = [999, 666, 333]
    levels = model.card.schedule.sigma((torch.tensor([*steps, 0]) + 1) / 1000)
    levels[-1] = 0
    scheduler = WalkScheduler.install(pipe, Solve(walk.solver, levels))
    ours = run(pipe, scheduler)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        scheduler.config, timestep_spacing="trailing"
    )
    theirs = run(pipe, scheduler, timesteps=steps, num_inference_steps=None)
    assert float((ours - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


def test_several_images_of_a_prompt_and_many_calls(pipe, model) -> None:
    scheduler = WalkScheduler.install(pipe, walk_of(model, "ipndm", predictor(), True))
    four = run(pipe, scheduler, noise=latents(4), num_images_per_prompt=2)
    again = run(pipe, scheduler, noise=latents(4)[2:], prompts=["an apple"] * 2)
    assert float((four[2:] - again).abs().max()) < 1e-4
    assert torch.equal(run(pipe, scheduler), run(pipe, scheduler))


def test_half_precision_keeps_a_state_in_float32(folder, model) -> None:
    pipe = open_pipeline(folder, torch.bfloat16)
    walk = walk_of(model, "amed", predictor())
    scheduler = WalkScheduler.install(pipe, walk)
    theirs = run(pipe, scheduler, noise=latents(dtype=torch.bfloat16))
    assert theirs.dtype == torch.bfloat16
    start = latents(dtype=torch.bfloat16).float() * scheduler.init_noise_sigma
    assert scheduler._start.dtype == torch.float32
    # the pipeline rounds unit noise times sigma to bfloat16
    assert float((scheduler._start - start).abs().max() / start.abs().max()) < 4e-3
    half = from_pipeline(open_pipeline(folder, torch.bfloat16))
    walk = walk_of(model, "amed", predictor())
    ours = integrate(
        walk.solver, half.bind(None, 5.0, PROMPTS), scheduler._start, walk.ts, walk.guide
    )
    error = (theirs.float() - ours.x[-1]).abs().max() / ours.x[-1].abs().max()
    assert float(error) < 0.03  # guidance is mixed in bfloat16 by the pipeline, in float32 by us


def test_stable_diffusion_xl(tmp_path: Path) -> None:
    folder = tiny_pipeline.stable_diffusion_xl(tmp_path)
    model, pipe = own_model(folder), open_pipeline(folder)
    walk = walk_of(model, "amed", predictor(), True)
    theirs = run(pipe, WalkScheduler.install(pipe, walk))
    start = latents() * walk.ts[0]
    ours = integrate(
        walk.solver, model.bind(None, 5.0, PROMPTS), start, walk.ts, walk.guide, walk.afs
    ).x[-1]
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_an_unconditional_latent_pipeline(tmp_path: Path) -> None:
    folder = tiny_pipeline.latent_unconditional(tmp_path)
    model, pipe = own_model(folder), open_pipeline(folder)
    walk = walk_of(model, "ipndm", predictor())
    scheduler = WalkScheduler.install(pipe, walk)
    images = pipe(
        batch_size=2,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=scheduler.num_inference_steps,
        output_type="np",
    ).images
    start = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * walk.ts[0]
    ours = integrate(walk.solver, model.bind(), start, walk.ts, walk.guide).x[-1]
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    assert float((model.decode(ours) - theirs).abs().max()) < 1e-4 and float(theirs.std()) > 0.1


def test_a_pipeline_is_left_as_it_was(pipe, model) -> None:
    unet, own = pipe.unet, pipe.scheduler
    before = pipe(PROMPTS, num_inference_steps=3, latents=latents(), output_type="latent").images
    for _ in range(2):
        scheduler = WalkScheduler.install(pipe, walk_of(model, "amed", predictor()))
        assert len(unet._forward_pre_hooks) == len(unet.mid_block._forward_hooks) == 1
    scheduler.set_timesteps(6)
    scheduler.scale_model_input(latents())  # a walk that was broken off
    pipe.scheduler = own
    after = pipe(PROMPTS, num_inference_steps=3, latents=latents(), output_type="latent").images
    assert torch.equal(before, after)
    scheduler.remove()
    assert not unet._forward_pre_hooks and not unet.mid_block._forward_hooks


def test_unsupported_uses_raise(pipe, model, tmp_path: Path) -> None:
    scheduler = WalkScheduler.install(pipe, walk_of(model, "amed", predictor()))
    with pytest.raises(UserError, match="not 50: give num_inference_steps=6"):
        pipe("a cat")

    def edit(pipe, i, t, given):
        return {"latents": given["latents"] + 1}

    with pytest.raises(UserError, match="changed the latents"):
        run(pipe, scheduler, callback_on_step_end=edit)
    with pytest.raises(UserError, match="StableDiffusionPipeline starts from an image"):
        scheduler.add_noise(latents(), latents(), 3)
    scheduler.set_timesteps(6)
    with pytest.raises(UserError, match="does not scale"):
        scheduler.step(latents(), 0, latents())
    with pytest.raises(UserError, match="from sigma 80 to 0.002, but this pipeline"):
        ts = torch.tensor([80.0, 0.002], dtype=torch.float64)
        WalkScheduler.install(pipe, Solve(make_solver("euler"), ts))
    assert pipe.scheduler is scheduler
    pixels = open_pipeline(tiny_pipeline.unconditional(tmp_path))
    ts = torch.tensor([100.0, 1.0], dtype=torch.float64)
    walk = WalkScheduler.install(pixels, Solve(make_solver("euler"), ts))
    with pytest.raises(UserError, match="DDPMPipeline does not scale"):
        pixels(num_inference_steps=walk.num_inference_steps)


def test_training_on_a_pipeline_and_sampling_inside_it(folder, model, tmp_path, monkeypatch):
    """train.py on a folder, then the example script: the image is that of our own sampler."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    args = f"--dataset_name=mine --model_path={folder} --prompt_path=prompts.txt --device=cpu"
    args += " --guidance_rate=5 --num_steps=3 --schedule_type=discrete --schedule_rho=1 --afs=True"
    args += " --scale_dir=0.01 --scale_time=0.2 --total_kimg=0.012 --batch=4 --tick=0.004"
    train.main(args.split(), standalone_mode=False)
    student_ = load_predictor("1", "exps")
    guide, student = student_.predictor, student_.settings
    changed = AMEDPredictor(0.01, 0.2, seed=0)
    assert (
        float((guide.fc_r.weight - changed.fc_r.weight).detach().abs().max()) > 1e-3
    )  # it has learned
    assert student.guidance_rate == 5

    pipe = open_pipeline(folder)
    scheduler = use_predictor(pipe, 1)
    grid = student.grid.resolve(model.card).nodes()
    assert (
        torch.allclose(scheduler.walk.ts, grid, rtol=1e-12) and scheduler.num_inference_steps == 3
    )
    walk = integrate(
        student.solver(), model.bind(None, 5.0, PROMPTS), latents() * grid[0], grid, guide, True
    )
    theirs = run(pipe, scheduler)
    assert float((theirs - walk.x[-1]).abs().max()) < 1e-5 * float(walk.x[-1].abs().max())

    command = [str(folder), "--predictor=1", "--prompt=a cat", "--guidance_rate=5"]
    done = CliRunner().invoke(stable_diffusion.main, command)
    assert done.exception is None and "image.png: 3 network calls" in done.output
    assert (tmp_path / "image.png").stat().st_size > 100


def page_blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def own_network(path: Path) -> None:
    """A tiny network of the EDM family in a pickle, as its authors publish it."""
    from denoisers.families.precond import build

    config = {
        "class_name": "EDMPrecond",
        "img_resolution": 8,
        "img_channels": 3,
        "model_type": "DhariwalUNet",
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    settings = {k: v for k, v in config.items() if k != "class_name"}
    weights = build(config).state_dict()
    network = published.network("EDMPrecond", settings, weights)
    path.write_bytes(published.pickled(published.snapshot(network)))


def test_the_guides_commands_run(folder, tmp_path, monkeypatch) -> None:
    """Every command of the page, in its order, in a folder with files of the names it uses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-pipeline").symlink_to(folder)
    (tmp_path / "prompts.txt").write_text("a red apple\na pear\na cat\n")
    own_network(tmp_path / "network-snapshot.pkl")
    lines = "".join(page_blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("python ")]
    commands = [line[2:] if line[1] == "-m" else line[1:] for line in words]
    assert [command[0] for command in commands].count("train.py") == 3 and len(commands) == 8
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    for script, *args in commands:
        shorter = SHORTER["ns" if "--sampler_stu=ns" in args else script]
        SCRIPTS[script].main([*args, *shorter], standalone_mode=False)
    assert (tmp_path / "my-scheduler" / "table_scheduler.py").is_file()
    made = sorted(path.relative_to(tmp_path / "samples") for path in tmp_path.rglob("0*.png"))
    assert len(made) == 3 + 3 + 4 and (tmp_path / "image.png").is_file()
    assert {path.parts[0] for path in made} == {"my-model", "mine"}
    assert {path.parent.name[-5:] for path in made} == {"nfe10", "_nfe5"}  # as the page says


def test_the_guides_code_runs(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-pipeline").symlink_to(folder)
    guide = predictor()
    student = StudentSettings(
        "mine",
        "amed",
        num_steps=3,
        sigma_min=0.03,
        sigma_max=14.6,
        scale_dir=guide.scale_dir,
        scale_time=guide.scale_time,
    )
    record = RunRecord.make("train", student.to_options(), {"name": "mine"}, {})
    create_run("exps", "table")  # run 1 of the page; the predictor is run 2
    save_predictor(create_run("exps", "mine") / "predictor.safetensors", guide, record)
    inside, denoiser = page_blocks("python")
    names: dict = {}
    exec(inside, names)
    assert [image.size for image in names["images"]] == [(16, 16)] * 2

    class Network(torch.nn.Module):
        """Says the noise of data that are all zero, and where it was asked."""

        def __init__(self):
            super().__init__()
            self.middle = torch.nn.Conv2d(3, 5, 1)

        def forward(self, y, time):
            assert time.shape == y.shape[:1] and not self.middle.weight.requires_grad
            self.middle(y)
            alpha2 = torch.exp(-0.5 * 19.9 * (time / 999) ** 2 - 0.1 * time / 999)
            return y / (1 - alpha2).sqrt().reshape(-1, 1, 1, 1)

    exec(denoiser, names)
    mine = names["MyDenoiser"](Network())
    x = torch.randn(2, 3, 4, 4)
    for sigma in (torch.tensor(5.0, dtype=torch.float64), torch.full((2, 1, 1, 1), 0.5)):
        out = mine(x * sigma.to(x), sigma.requires_grad_())
        assert out.feat.shape == (2, 4, 4) and float(out.x0.abs().max()) < 1e-3
        assert torch.autograd.grad(out.feat.sum(), sigma)[0].shape == sigma.shape
