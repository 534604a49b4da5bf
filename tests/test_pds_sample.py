"""sample.py --sampler=pds from the command line; what --batch_coupled may and may not do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import sample
from denoisers.analytic import MixtureDenoiser
from denoisers.cards import Card, cards
from denoisers.registry import ModelSource
from runtime.dist import World
from runtime.errors import UserError
from runtime.images import to_uint8
from runtime.record import RunRecord
from samplers.build import build
from samplers.generate import generate
from samplers.job import SampleOptions, prepare
from samplers.options import SamplerOptions
from solvers.types import Denoiser
from tests.scripts import Script

SMALL = "cifar10-small"


class TwoImageModel:
    """Two smooth images and a spread, of the size of the bundled model."""

    card: Card = cards()[SMALL]
    sha256 = "0" * 64

    def decode(self, x):
        return x

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        ramp = torch.linspace(-0.8, 0.8, 32).expand(1, 3, 32, 32)
        return MixtureDenoiser(torch.cat([ramp, -ramp.mT]), 0.2)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Script:
    """The script in an empty folder, with a closed form in the place of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSource, "load", lambda *_: TwoImageModel())
    return lambda *arguments: script(sample.main, "--sampler=pds", *arguments)


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(Image.open(p)) for p in sorted(folder.glob("*.png"))}


def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)


def test_a_dry_run_says_what_it_would_spend_and_touches_nothing(
    run: Script, tmp_path: Path
) -> None:
    code, out, _ = run("--speed_up=20", "-n")
    plan = json.loads(out)["plan"]
    assert code == 0 and plan["nfe_planned"] == 100 and plan["iterations"] == 50
    assert plan["freq_mask"]["name"] == "cifar10-freq.npy" and plan["space_mask"] is None
    assert not list(tmp_path.iterdir())


def test_images_are_those_of_their_seeds_however_they_are_batched(
    run: Script, tmp_path: Path
) -> None:
    flags = ("--num_steps=12", "--space_mask_path=bundled", "--freq_mask_path=bundled", "--snr=0.2")
    assert run(*flags, "--seeds=0-4", "--batch=5", "--outdir=whole")[0] == 0
    assert run(*flags, "--seeds=3-4", "--batch=1", "--outdir=parts")[0] == 0
    code, out, _ = run(*flags, "--seeds=0-4", "--batch=2", "--outdir=parts")
    assert code == 0 and "3 images made (2 were there already), 24 NFE each" in out
    whole = pixels(tmp_path / "whole")
    assert len(whole) == 5 and same(whole, pixels(tmp_path / "parts"))
    options = SamplerOptions(
        sampler="pds", num_steps=12, space_mask_path="bundled", freq_mask_path="bundled", snr=0.2
    )
    chosen = build(options, TwoImageModel.card)
    (made,) = generate(chosen, TwoImageModel(), range(5), batch=5, device="cpu")
    assert np.array_equal(np.stack(list(whole.values())), to_uint8(made.images))
    record = RunRecord.read(tmp_path / "whole" / "run.json").plan
    assert record["nfe_metered"] == record["nfe_planned"] == chosen.nfe == 24
    assert record["label"] == "pds-freq-space" and record["alpha"] == 5.0


def test_every_setting_reaches_the_images(run: Script, tmp_path: Path) -> None:
    base = ("--num_steps=10", "--seeds=0-1")
    assert run(*base, "--outdir=base")[0] == 0
    plain = pixels(tmp_path / "base")
    for i, flag in enumerate((
        "--freq_mask_path=none", "--space_mask_path=bundled", "--alpha=2", "--snr=0.3",
        "--n_steps=2", "--speed_up=2", "--sigma_max=40", "--batch_coupled=True",
    )):  # fmt: skip
        code, _, err = run(*base, flag, f"--outdir={i}")
        assert code == 0, err
        assert not same(plain, pixels(tmp_path / str(i))), flag


def test_a_custom_mask(run: Script, tmp_path: Path) -> None:
    bundled = SamplerOptions(sampler="pds", num_steps=10)
    rng = np.random.default_rng(0)
    np.save(tmp_path / "space.npy", rng.random((1, 3, 32, 32), np.float32))
    code, out, _ = run("--num_steps=10", "--space_mask_path=space.npy", "--seeds=0", "-n")
    plan = json.loads(out)["plan"]
    assert code == 0 and plan["label"] == "pds-space" and plan["space_mask"]["name"] == "space.npy"
    assert plan["freq_mask"] is None and build(bundled, TwoImageModel.card).label == "pds-freq"
    code, _, err = run("--freq_mask_path=space.npy", "--seeds=0")  # the wrong way round
    assert code == 1 and "is not even" in err
    assert [path.name for path in tmp_path.iterdir()] == ["space.npy"]


def test_coupled_batches_are_refused_where_they_would_be_split(run: Script, tmp_path: Path) -> None:
    flags = ("--num_steps=10", "--batch_coupled=True", "--outdir=x")
    code, _, err = run(*flags, "--seeds=0-4", "--batch=4")
    assert code == 1 and "give --batch 5 on one process" in err and not list(tmp_path.iterdir())
    options = SamplerOptions(sampler="pds", num_steps=10, batch_coupled=True)
    with pytest.raises(UserError, match="--batch_coupled requires"):
        generate(
            build(options, TwoImageModel.card), TwoImageModel(), range(5), batch=4, device="cpu"
        )
    job = prepare(SampleOptions(sampler=options, seeds="0-3", outdir="y"))
    with pytest.raises(UserError, match="--batch_coupled requires"):
        job.run(World(0, 2, torch.device("cpu")))


def test_a_coupled_batch_is_made_whole_or_not_at_all(run: Script, tmp_path: Path) -> None:
    flags = ("--num_steps=10", "--batch_coupled=True", "--outdir=x")
    assert run(*flags, "--seeds=0-4")[0] == 0
    made = pixels(tmp_path / "x")
    (tmp_path / "x" / "000002.png").unlink()  # as a kill would leave it
    code, out, _ = run(*flags, "--seeds=0-4", "--batch=8")
    assert code == 0 and "5 images made" in out and same(made, pixels(tmp_path / "x"))
    code, _, err = run(*flags, "--seeds=0-5")
    assert code == 1 and "images of other settings" in err and "coupled_seeds" in err
    assert same(made, pixels(tmp_path / "x"))
    assert run(*flags[:-1], "--outdir=y", "--seeds=0-1")[0] == 0
    alone = pixels(tmp_path / "y")
    assert not np.array_equal(alone["000000.png"], made["000000.png"])  # why all this
