"""Every family that no recipe covers: train.py and sample.py on tiny files of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from commands import sample, train
from denoisers.cards import cards
from denoisers.families.precond import build
from denoisers.nets.openai import Classifier
from runtime import cli
from runtime.record import RunRecord
from tests import ncsnpp_problem, published
from tests.test_denoisers_own import unet

WIDTHS = {"model_channels": 64, "num_res_blocks": 1, "channel_mult": [1, 1]}


def run(script: click.Command, *arguments: str) -> int:
    """The script in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(sys, "argv", ["script.py", *arguments])
        cli.run(script)
    return int(left.value.code or 0)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(v) * 0.1 for name, v in module.state_dict().items()}


def sized(path: Path) -> None:
    """As safetensors that say what the tensors do not."""
    told = {"image_size": 16, "num_head_channels": 32, "attention": "legacy"}
    metadata = {"config": json.dumps(told)}
    save_file(torch.load(path, weights_only=True), path.with_suffix(".safetensors"), metadata)


def adm(folder: Path) -> list[str]:
    """With its classifier: seven classes, guided."""
    settings = {**cards()["imagenet256"].config, **WIDTHS, "attention_resolutions": [2]}
    settings |= {"image_size": 16, "num_classes": None, "out_channels": 7}
    torch.save(weights(Classifier(**settings)), folder / "classifier.pt")
    sized(unet("imagenet256", folder / "m.pt", num_classes=7, image_size=16, **WIDTHS))
    return [f"--companion_path={folder / 'classifier.pt'}", "--guidance_type=cg",
            "--guidance_rate=4", "--schedule_type=discrete", "--schedule_rho=1"]  # fmt: skip


def cm(folder: Path) -> list[str]:
    sized(unet("lsun_bedroom", folder / "m.pt", image_size=16, **WIDTHS))
    return []


def edm_kind(folder: Path, class_name: str, **attributes: int) -> list[str]:
    settings = {"img_resolution": 16, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet"}
    settings |= {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    settings |= {"attn_resolutions": [8]}
    net = build({"class_name": class_name, **settings})
    tensors = {**net.state_dict(), **{k: v for k, v in weights(net).items() if v.ndim > 1}}
    tensors |= {k: v for k, v in net.state_dict().items() if k.endswith("resample_filter")}
    found = published.network(class_name, settings, tensors, **attributes)
    with published.pretended():
        torch.save({"ema": found, "net": found, "optimizer_state": {}}, folder / "m.pt")
    return []


def vp(folder: Path) -> list[str]:
    return edm_kind(folder, "VPPrecond")


def pfgmpp(folder: Path) -> list[str]:
    return edm_kind(folder, "EDMPrecond", D=128)


def ncsnpp(folder: Path) -> list[str]:
    ncsnpp_problem.checkpoint(folder / "m.pt", ncsnpp_problem.weights(ncsnpp_problem.settings()))
    return []


@pytest.mark.parametrize("make", [adm, cm, vp, pfgmpp, ncsnpp])
def test_a_model_of_ones_own_trains_and_samples(
    make: Callable[[Path], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    schedule = make(tmp_path)
    (file,) = sorted(tmp_path.glob("m.safetensors")) or [tmp_path / "m.pt"]
    model = ["--dataset_name=mine", f"--model_path={file.name}"]
    student = ["--sampler_stu=amed", "--sampler_tea=heun", "--num_steps=3", "--scale_dir=0.01"]
    length = ["--batch=2", "--total_kimg=0.002", "--device=cpu"]
    assert run(train.main, *model, *student, *length, *schedule) == 0
    own = [word for word in schedule if word.startswith("--companion")]
    assert run(sample.main, *model, *own, "--predictor_path=1", "--seeds=0-2", "--device=cpu") == 0
    (folder,) = Path("samples/mine").iterdir()
    record = RunRecord.read(folder / "run.json")
    assert record.plan["nfe_metered"] == 4
    assert record.plan["guidance_rate"] == (4 if make is adm else None)
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    assert len(images) == 3 and all(image.shape == (16, 16, 3) for image in images)
    assert len({image.tobytes() for image in images}) == 3


def test_pfgmpp_restarts_churns_and_teaches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that jumps, from the command line; the same network without D is another model."""
    monkeypatch.chdir(tmp_path)
    pfgmpp(tmp_path)
    (tmp_path / "plain").mkdir()
    edm_kind(tmp_path / "plain", "EDMPrecond")
    info = '{"0": [3, 2, 0.06, 0.3]}'
    common = ["--seeds=0-1", "--device=cpu"]
    for folder in (".", "plain"):
        model = ["--dataset_name=mine", f"--model_path={folder}/m.pt"]
        restart = ["--sampler=restart", f"--restart_info=6 {info}", f"--outdir=r/{folder}"]
        churn = ["--sampler=edm", "--num_steps=4", "--S_churn=2", f"--outdir=e/{folder}"]
        assert run(sample.main, *model, *restart, *common) == 0
        assert run(sample.main, *model, *churn, *common) == 0
        for outdir, jumps, nfe in ((f"r/{folder}", 2, 19), (f"e/{folder}", 4, 7)):
            plan = RunRecord.read(Path(outdir) / "run.json").plan
            assert plan["nfe_metered"] == plan["nfe_planned"] == nfe
            assert sum(part.startswith("jump") for part in plan["parts"]) == jumps
    for kind in ("r", "e"):
        for seed in ("000000.png", "000001.png"):
            assert (Path(kind) / seed).read_bytes() != (Path(kind) / "plain" / seed).read_bytes()
    student = ["--sampler_stu=amed", "--num_steps=3", "--batch=2", "--total_kimg=0.002"]
    teacher = ["--sampler_tea=restart", f"--restart_info={info}", "--device=cpu"]
    model = ["--dataset_name=mine", "--model_path=m.pt"]
    assert run(train.main, *model, *student, *teacher, "--restart_target=trajectory") == 0
    assert run(sample.main, *model, "--predictor_path=1", *common) == 0
