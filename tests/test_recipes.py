"""The published recipes of launch.sh from end to end, on tiny checkpoints in the real formats."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import denoisers.cards
from amed.experiments import load_predictor
from denoisers.cards import cards
from denoisers.families.first_stage import VQDecoder
from denoisers.families.precond import build
from denoisers.nets.openai import UNet
from metrics.statistics import Statistics
from runtime.record import RunRecord
from tests import published, tiny_pipeline
from tests.scripts import Script
from tests.test_denoisers_ldm import ABAR, random_weights

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = {"exps", "samples", "data", ".venv", ".git"}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
Replay = Callable[[str, Path], None]
Smaller = Callable[[str, int], None]
FEATURES = 6  #: of the tiny detector


class Detector(torch.nn.Module):
    """In the place of Inception: means and deviations of the channels."""

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = img.to(torch.float32)
        return torch.cat([x.mean(dim=[2, 3]), x.std(dim=[2, 3])], dim=1)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own for what a recipe writes; the code is this one."""
    checkout = tmp_path / "a checkout"
    (checkout / ".venv/bin").mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.name not in OUTPUTS and path.name != "launch.sh":
            (checkout / path.name).symlink_to(path)
    (checkout / "launch.sh").write_bytes((ROOT / "launch.sh").read_bytes())
    python = checkout / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    key = subprocess.check_output(
        "cat pyproject.toml constraints.txt | cksum", shell=True, cwd=ROOT
    )
    for stamp in ("installed", "installed-diffusion"):
        (checkout / ".venv" / stamp).write_bytes(key)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("AMED_CACHE", str(cache))
    torch.jit.script(Detector()).save(str(cache / "inception-2015-12-05.pt"))
    return checkout


@pytest.fixture
def smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smaller:
    """``smaller(name, side)`` makes a known model one of smaller samples, which saves time."""

    def change(name: str, side: int) -> None:
        home, folder = denoisers.cards.HERE, tmp_path / "cards"
        entries = json.loads((home / "cards.json").read_text())
        card = entries[name]
        if "image_resolution" in card:
            card["image_resolution"] = card["image_resolution"] * side // card["resolution"]
        for key in {"img_resolution", "image_size"} & card["config"].keys():
            card["config"][key] = side
        card["resolution"] = side
        folder.mkdir()
        (folder / "bundled").symlink_to(home / "bundled")
        (folder / "cards.json").write_text(json.dumps(entries))
        monkeypatch.setattr(denoisers.cards, "HERE", folder)

    return change


def launch(checkout: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["bash", str(checkout / "launch.sh"), *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def replay(checkout: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Replay:
    """``replay(recipe, model)`` runs the commands of a recipe in this process, which is faster."""
    monkeypatch.chdir(checkout)

    def run(recipe: str, model: Path) -> None:
        folder = ""
        for line in launch(checkout, recipe, "--try", f"--model_path={model}", "-n").splitlines():
            _, first, *words = shlex.split(line.replace("exps/<run>", folder), comments=True)
            if first == "-c":
                assert Path(words[2], Path(words[1]).name).exists(), "nothing is downloaded here"
                continue
            name, *flags = words if first == "-m" else [first.removesuffix(".py"), *words]
            flags = [flag.replace("<run>", Path(folder).name) for flag in flags]
            done = script(import_module(name if first == "-m" else f"commands.{name}").main, *flags)
            assert done.code == 0, done.err
            folder = done.out.splitlines()[-1] if name == "train" else folder

    return run


def results(checkout: Path, nfe: list[int]) -> list[tuple[np.ndarray, Statistics | None]]:
    """Images (and their statistics) of each student, after checks that hold for all of them."""
    found = []
    for run, spent in zip(sorted((checkout / "exps").glob("0*")), nfe, strict=True):
        student = load_predictor(str(run), checkout / "exps")
        predictor, settings, record = student.predictor, student.settings, student.record
        assert record.plan["nfe"] == spent and f"-{spent}-" in run.name
        assert not torch.equal(predictor.fc_r.weight, type(predictor)(
            settings.scale_dir, settings.scale_time, seed=0).fc_r.weight)  # fmt: skip
        folder = checkout / "samples" / run.name
        assert RunRecord.read(folder / "run.json").plan["nfe_metered"] == spent
        images = np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))])
        assert len(images) == 8 and all(image.std() > 1 for image in images)
        assert len({image.tobytes() for image in images}) == 8
        made = folder.with_name(f"{folder.name}-inception.npz")
        found.append((images, Statistics.load(made) if made.exists() else None))
    return found


def edm_checkpoint(name: str, path: Path) -> Path:
    """A tiny network with the samples and classes of a card, pickled as EDM publishes them."""
    config: dict[str, Any] = {**cards()[name].config, "model_channels": 8, "num_blocks": 1}
    config |= {"channel_mult": [1, 1, 1, 1][: len(config["channel_mult"])], "attn_resolutions": [8]}
    torch.manual_seed(0)
    net = build(config)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    settings = {k: v for k, v in config.items() if k != "class_name"}
    ema = published.network("EDMPrecond", settings, net.state_dict())
    path.write_bytes(published.pickled(published.snapshot(ema)))
    return path


@pytest.mark.parametrize(
    ("name", "statistics"),
    [("cifar10", "cifar10-32x32"), ("imagenet64", "imagenet-64x64")],  # ffhq differs in names
)
def test_pixel_models(
    name: str, statistics: str, checkout: Path, replay: Replay, smaller: Smaller
) -> None:
    smaller(name, 32)
    (checkout / "data/fid-refs").mkdir(parents=True)
    moments = {"mu": np.full(FEATURES, 100.0), "sigma": 50 * np.eye(FEATURES)}
    np.savez(checkout / f"data/fid-refs/{statistics}.npz", **moments)
    model = edm_checkpoint(name, checkout.parent / "network.pkl")
    replay(name, model)
    for images, _ in results(checkout, [5, 5]):
        assert images.shape[1:] == (32, 32, 3)


def test_latent_diffusion(checkout: Path, replay: Replay, smaller: Smaller) -> None:
    smaller("lsun_bedroom_ldm", 16)
    card = cards()["lsun_bedroom_ldm"]
    torch.manual_seed(0)
    small = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 1, 1]}
    net = UNet(**{**card.config, **small, "attention_resolutions": [4]})
    stage = VQDecoder(
        codes=16, embed_dim=3, z_channels=3, out_channels=3, widths=(32, 32, 32), num_blocks=1
    )
    tensors = {f"model.diffusion_model.{k}": v for k, v in random_weights(net).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in random_weights(stage, 0.3).items()}
    tensors["alphas_cumprod"] = torch.tensor(ABAR, dtype=torch.float32)
    path = checkout.parent / "model.ckpt"
    torch.save({"state_dict": tensors}, path)
    replay("lsun_bedroom_ldm", path)
    ((images, made),) = results(checkout, [5])
    assert images.shape[1:] == (64, 64, 3) and made is not None and made.n == 8


def test_stable_diffusion(checkout: Path, replay: Replay, smaller: Smaller) -> None:
    smaller("ms_coco", 8)
    (checkout / "data").mkdir()
    captions = checkout / "data/MS-COCO_val2014_30k_captions.csv"
    captions.write_text("id,text\n" + "".join(f'{i},"a cat, {i}"\n' for i in range(8)))
    replay("ms_coco", tiny_pipeline.stable_diffusion(checkout.parent / "pipe"))
    ((images, made),) = results(checkout, [20])
    assert images.shape[1:] == (16, 16, 3) and made is not None and made.n == 8


def test_stable_diffusion_with_restart(checkout: Path, replay: Replay, smaller: Smaller) -> None:
    """Four samplers at four guidance rates: all metered alike, no two images the same."""
    smaller("ms_coco", 8)
    (checkout / "data").mkdir()
    (checkout / "data/MS-COCO_val2014_30k_captions.csv").write_text(
        "id,text\n1,a cat\n2,a dog\n3,ox\n"
    )
    replay("sd_restart", tiny_pipeline.stable_diffusion(checkout.parent / "pipe"))
    swept = checkout / "samples/sd_restart-try"
    records = [RunRecord.read(path / "run.json") for path in sorted(swept.glob("*-w-*"))]
    assert len(records) == 16 and all(r.plan["nfe_metered"] == 12 for r in records)
    assert {r.plan["guidance_rate"] for r in records} == {2, 3, 5, 8}
    assert all(r.options["prompts"]["count"] == 2 for r in records)
    made = [path.read_bytes() for path in swept.glob("*-w-*/*.png")]
    assert len(made) == len(set(made)) == 32
    with Image.open(swept / "side-by-side.png") as page:
        assert page.height > 16 * 16 and page.width > 2 * 16
