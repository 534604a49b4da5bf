"""Exported samplers in other programs: the same images as our own walk."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from amed.experiments import create_run
from denoisers.analytic import MixtureDenoiser
from denoisers.conditions import ConditionOptions
from denoisers.families.diffusers.model import from_pipeline
from denoisers.registry import ModelSource
from export.files import Export, ExportOptions
from ns.experiments import TABLE, TableFile, save_table
from runtime.typed import read_result
from samplers.options import SamplerOptions
from solvers.table import Table, run_table
from tests import tiny_pipeline
from tests.scripts import Script
from tools import export

PROMPTS = ["a cat", "an apple"]
FILES = Path(__file__).resolve().parent.parent / "export"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))


def module(path: Path) -> ModuleType:
    """An exported file, imported from where it is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def opened(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table_of(folder: Path, **sampler: Any) -> Table:
    source = ModelSource("mine", str(folder))
    return Export.of(ExportOptions(source, ConditionOptions(), SamplerOptions(**sampler))).table


def learned(calls: int, start: float) -> Table:
    """A table as training leaves it: no solver's weights, and a first time below the start."""
    generator = torch.Generator().manual_seed(calls)
    times = torch.logspace(0.9, -1.2, calls, 10.0, dtype=torch.float64)
    rows = torch.rand(calls + 1, calls + 1, generator=generator, dtype=torch.float64).tril()
    rows[:, 1:] /= rows[:, 1:].sum(1, keepdim=True).clamp(min=1e-3)
    rows[:, 0] = torch.cat([times, times.new_zeros(1)]) / start
    return Table(start, 0.03, times, rows)


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    ("sampler", "kind", "rate"),
    [
        ("learned", "epsilon", None), ("learned", "epsilon", 4.0),
        ("learned", "v_prediction", 4.0), ("ipndm", "epsilon", 4.0),
        ("dpmpp", "v_prediction", None), ("heun", "epsilon", None),
    ],
)  # fmt: skip
def test_a_pipeline_with_the_scheduler_gives_our_images(
    sampler: str, kind: str, rate: float | None, tmp_path: Path, script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = tiny_pipeline.stable_diffusion(tmp_path / "sd", prediction_type=kind)
    flags = ["--dataset_name=mine", f"--model_path={folder}"]
    flags += [] if rate is None else [f"--guidance_rate={rate}"]
    calls = 6 if rate is None else 12
    if sampler == "learned":
        flags += [f"--predictor_path={trained(tmp_path, folder, rate)}"]
    else:
        flags += [f"--sampler={sampler}", f"--nfe={calls}", "--schedule_type=discrete"]
    done = script(export.main, "diffusers", *flags, "--dest=made")
    assert done.code == 0 and "num_inference_steps=6" in done.out, done.err

    pipe = opened(folder)
    model = from_pipeline(opened(folder))
    kept = module(Path("made/table_scheduler.py")).TableScheduler
    pipe.scheduler = kept.from_pretrained("made")
    noise = latents(2, 4, 8, 8)
    theirs = pipe(
        PROMPTS, num_inference_steps=6, guidance_scale=rate or 1.0, latents=noise,
        output_type="pt",
    ).images  # fmt: skip
    settings = pipe.scheduler.config
    table = Table.of(settings.start, 0.0, settings.times, settings.rows)
    walk = run_table(table, model.bind(None, rate, PROMPTS), noise * table.start)
    ours = model.decode(walk.x[-1]) / 2 + 0.5
    assert walk.nfe == calls and float((ours - theirs).abs().max()) < 1e-4
    pipe.scheduler.save_pretrained("again")  # and with a whole pipeline
    assert kept.from_pretrained("again").config["rows"] == settings.rows
    with pytest.raises(ValueError, match="this table has 6 network calls: give num_inference"):
        pipe(PROMPTS, num_inference_steps=7)


def trained(home: Path, folder: Path, rate: float | None) -> Path:
    """A run with a table that no solver has."""
    source = ModelSource("mine", str(folder))
    card = source.card()
    table = learned(6, card.sigma_max)
    run = create_run(home / "exps", "table")
    chosen = SamplerOptions("euler", nfe=6)
    record = Export.of(ExportOptions(source, ConditionOptions(), chosen)).record()
    options = {**record.options, "dataset_name": "mine", "guidance_rate": rate}
    save_table(run / TABLE, table, replace(record, options=options, plan={"latents": 1}))
    return run


def test_stable_diffusion_xl(tmp_path: Path, script: Script) -> None:
    folder = tiny_pipeline.stable_diffusion_xl(tmp_path / "xl")
    flags = ["--dataset_name=mine", f"--model_path={folder}", "--guidance_rate=3"]
    made = tmp_path / "made"
    done = script(export.main, "diffusers", *flags, "--sampler=ipndm", "--nfe=8", f"--dest={made}")
    assert done.code == 0, done.err
    pipe, model = opened(folder), from_pipeline(opened(folder))
    pipe.scheduler = module(made / "table_scheduler.py").TableScheduler.from_pretrained(made)
    noise, side = latents(1, 4, 8, 8), model.card.image_resolution
    theirs = pipe(
        "a cat", num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="pt",
        height=side, width=side,
    ).images  # fmt: skip
    table = table_of(folder, sampler="ipndm", nfe=8, guidance_rate=3.0)
    walk = run_table(table, model.bind(None, 3.0, ["a cat"]), noise * table.start)
    assert float((model.decode(walk.x[-1]) / 2 + 0.5 - theirs).abs().max()) < 1e-4


def test_the_scheduler_needs_torch_and_diffusers_alone() -> None:
    tree = ast.parse((FILES / "table_scheduler.py").read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    tops = {str(name).split(".")[0] for name in names} - sys.stdlib_module_names
    assert tops == {"torch", "diffusers"}


def scheduler(table: Table) -> Any:
    made = module(FILES / "table_scheduler.py").TableScheduler
    times = table.times.tolist()
    return made(table.start, times, table.ragged, [100 * t for t in times])


def test_an_image_and_noise_are_the_state_at_a_later_call() -> None:
    """The image takes the place of what is left out, so a network that returns it gives it back."""
    table = learned(5, 14.0)
    made, image, noise = scheduler(table), latents(1, 3, 4, 4), latents(1, 3, 4, 4).flip(0)
    for first in range(5):
        made.set_timesteps(5)
        made.set_begin_index(first)
        state = made.add_noise(image, noise, made.timesteps[first : first + 1])
        torch.testing.assert_close(state, image + table.ragged[first][0] * 14 * noise)
        for call in range(first, 5):
            predicted = (state - image) / float(table.times[call])
            state = made.step(predicted, made.timesteps[call], state).prev_sample
        assert float((state - image).abs().max()) < 1e-4


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of ComfyUI, as far as the node imports it."""
    samplers = ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSampler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


class KSampler:
    """In the place of ComfyUI's: it calls the function with a model that returns images."""

    def __init__(self, function: Any) -> None:
        self.function = function


class Images:
    """What ComfyUI hands to a sampler: the guided denoiser, and the latent of the user."""

    def __init__(self, denoiser: MixtureDenoiser, latent_image: Tensor) -> None:
        self.denoiser, self.latent_image = denoiser, latent_image

    def __call__(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        assert conditions == {"cond": 1} and sigma.shape == (len(x),)
        return self.denoiser(x, sigma[:, None, None, None]).x0


def test_the_node_of_comfyui_is_our_walk(
    folder: Path, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for its documented sampler interface; ComfyUI itself was not run."""
    stand_in(monkeypatch)
    file = tmp_path / "node.py"
    flags = ["--dataset_name=mine", f"--model_path={folder}", "--sampler=ipndm", "--nfe=5"]
    done = script(export.main, "comfyui", *flags, "--afs=True", f"--dest={file}")
    assert done.code == 0 and "SamplerCustom" in done.out, done.err
    node = module(file)
    assert (node.TABLE["made_for"], node.TABLE["cfg"]) == ("ipndm4-afs, 5 calls, mine", None)
    assert set(node.NODE_CLASS_MAPPINGS) == set(node.NODE_DISPLAY_NAME_MAPPINGS)
    (sampler,) = node.NODE_CLASS_MAPPINGS["TableSampler"]().get()
    (sigmas,) = node.NODE_CLASS_MAPPINGS["TableSigmas"]().get()

    table = table_of(folder, sampler="ipndm", nfe=5, afs=True)
    denoiser = MixtureDenoiser(0.5 * latents(3, 4, 8, 8).double(), 0.2)
    noise, seen = latents(2, 4, 8, 8).double(), list[Any]()
    model = Images(denoiser, torch.zeros_like(noise))
    more: dict[str, Any] = {"extra_args": {"cond": 1}, "callback": seen.append, "disable": True}
    made = sampler.function(model, noise * sigmas[0].double(), sigmas, **more)
    walk = run_table(table, denoiser, noise * table.start)
    assert float((made - walk.x[-1]).abs().max()) < 1e-5
    assert [step["i"] for step in seen] == [*range(5)] and seen[-1]["denoised"].shape == noise.shape

    image = latents(2, 4, 8, 8).double()
    perfect = Images(denoiser, image)
    monkeypatch.setattr(Images, "__call__", lambda self, x, sigma, **more: self.latent_image)
    part = sampler.function(perfect, image + float(sigmas[2]) * noise, sigmas[2:], **more)
    left = table.ragged[-1][0] * table.start * noise  # an image ends at sigma_min, not at 0
    assert float((part - image - left).abs().max()) < 1e-4 < float(left.abs().max())
    with pytest.raises(ValueError, match="this table has 5 calls: connect its own sigmas"):
        sampler.function(model, noise, torch.ones(9))


def test_levels_markdown_and_json(tmp_path: Path, script: Script) -> None:
    flags = ["--sampler=ipndm", "--nfe=5", "--afs=True"]
    done = script(export.main, "sigmas", *flags)
    levels, say = done.out.splitlines()
    values = [float(level) for level in levels.split(",")]
    assert len(values) == 6 and values == sorted(values, reverse=True)
    assert say == "# choose the solver 'ipndm' beside them"
    for order, word in ((2, "'dpmpp_2m'"), (3, "no solver of another program")):
        given = ["--sampler=dpmpp", "--nfe=5", f"--max_order={order}"]
        assert word in script(export.main, "sigmas", *given).out
    file = tmp_path / "table.json"
    lines = script(export.main, "table", *flags, f"--dest={file}").out.splitlines()
    kept = read_result(TableFile, file)
    assert kept is not None and kept.table().calls == 5 and len(lines) == 2 + 6
    shown = [[float(c) for c in line.split("|")[3:-1] if c.strip()] for line in lines[2:]]
    for row, exact in zip(shown, kept.rows, strict=True):
        assert row == pytest.approx(exact, rel=1e-5)
    assert json.loads(file.read_text())["record"]["command"] == "export"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["diffusers", "--sampler=ipndm", "--nfe=5", "--dest=x"], "is no pipeline of diffusers"),
        (["comfyui", "--sampler=ipndm", "--nfe=5", "--dest=x"], "is no pipeline of diffusers"),
        (["table"], "there is no sampler: give --predictor_path or --sampler"),
        (["sigmas", "--sampler=heun", "--nfe=5"], "exactly 5 NFE"),
    ],
)
def test_nonsense_is_one_sentence(
    arguments: list[str], sentence: str, script: Script, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = script(export.main, *arguments)
    assert done.code == 1 and sentence in done.err and done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_of_other_predictions_is_refused() -> None:
    made = module(FILES / "table_scheduler.py").TableScheduler
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, v_prediction, sample"):
        made(1.0, [1.0], [[1.0], [0.0, 1.0]], [1.0], prediction_type="flow")
    with pytest.raises(ValueError, match="are no table"):
        made(1.0, [1.0], [[1.0], [1.0]], [1.0])
    assert SimpleNamespace(made=made).made.order == 1
