"""No random number of an evaluation served a selection or a training, and the record says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import amed.job
import amed.options
import runtime.noise
from amed.batches import STREAMS
from amed.experiments import load_predictor
from commands import train
from comparison.seed_provenance import seeds_section
from denoisers.conditions import Conditions
from runtime.dist import World
from runtime.errors import UserError
from runtime.noise import Name, SeedNoise
from runtime.seeds import SELECTION_START, selection_seeds
from samplers.build import build
from samplers.generate import generate
from samplers.options import SAMPLERS, SamplerOptions
from teachers import trajectories
from teachers.trajectories import TrajectoryOptions
from teachers.trajectory_files import TRAJECTORIES
from tests.sampler_models import trained
from tests.tiny_model import TinySource, tiny_model

Key = tuple[int | str, ...]
CLASSES = "tiny-classes"
TRAINED = (
    f"--dataset_name={CLASSES}", "--num_steps=3", "--batch=4", "--total_kimg=0.012", "--tick=0",
    "--dtype=float64", "--afs=True", "--device=cpu", "--sampler_tea=restart", "--seed=0",
    '--restart_info={"0": [3, 2, 0.06, 4]}',
)  # fmt: skip


class Keys:
    """Every key that a generator was made of."""

    def __init__(self) -> None:
        self.seen: set[Key] = set()
        self._make = runtime.noise._generator

    def __call__(self, seed: int, name: Name) -> object:
        self.seen.add((seed, *((name,) if isinstance(name, str) else name)))
        return self._make(seed, name)

    def take(self) -> set[Key]:
        taken, self.seen = self.seen, set()
        return taken


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    keys = Keys()
    monkeypatch.setattr(runtime.noise, "_generator", keys)
    yield keys


def test_no_key_of_training_is_one_of_sampling(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training, and every sampler that draws anything, on the very same numbers 0 to 11."""
    monkeypatch.setattr(amed.options, "ModelSource", TinySource)
    blank = torch.zeros(1, 3, 4, 4)  # pictures are not trained on
    monkeypatch.setattr(amed.job.TrainingJob, "_preview", lambda *_: lambda _: blank)
    out = tmp_path / "exps"
    done = CliRunner().invoke(train.main, [*TRAINED, f"--outdir={out}"], catch_exceptions=False)
    assert done.exit_code == 0
    restart = TRAINED[-1].partition("=")[2]
    asked = TrajectoryOptions(
        TinySource(CLASSES, cache_dir=str(tmp_path)), teacher="restart", num_steps=5,
        restart_info=restart, number=12,
    )  # fmt: skip
    trajectories.prepare(asked).run(World(0, 1, torch.device("cpu")))
    training = keys.take()
    assert {key[1] for key in training} == set(STREAMS)
    for stream in ("train", TRAJECTORIES):
        assert {key[3] for key in training if key[1] == stream} >= {"latent", "class", "restart"}
    assert {key[0] for key in training if key[1] == "train"} == set(range(12))

    model = tiny_model(CLASSES)
    churned = SamplerOptions(sampler="edm", num_steps=4, S_churn=30.0, S_max=50.0)
    plain = {name: SamplerOptions(sampler=name, num_steps=4) for name in SAMPLERS}
    plain["pds"] = replace(plain["pds"], freq_mask_path="none")
    for options in [churned, *plain.values()]:
        card = replace(model.card, restart_info={"0": [3, 2, 0.06, 0.3]})
        list(generate(build(options, card), model, range(12), batch=12, device="cpu",
                      conditions=Conditions()))  # fmt: skip
    sampling = keys.take()
    words = {key[1] for key in sampling}
    assert words >= {"latent", "class", "restart", "churn", "ddpm"} and not words & set(STREAMS)
    assert not sampling & training

    student = replace(load_predictor(str(next(out.iterdir())), out), name="00000")
    section = json.loads(json.dumps(seeds_section(range(12), selection_seeds(4), [student])))
    assert section["training"] == {"00000": {"seed": 0, "numbers": "0-11"}}
    assert section["keys"]["streams"] == list(STREAMS)


def test_the_same_number_gives_other_noise_in_every_use() -> None:
    names: list[Name] = ["latent", *((stream, 0, "latent") for stream in STREAMS)]
    names += [("train", 1, "latent")]  # a run of another seed
    draws = torch.stack([SeedNoise(range(4)).normal(n, (64,)).flatten().double() for n in names])
    draws = torch.cat([draws, SeedNoise(selection_seeds(4)).normal("latent", (64,)).view(1, -1)])
    likeness = torch.corrcoef(draws) - torch.eye(len(draws))
    assert likeness.abs().max() < 5 / draws.shape[1] ** 0.5


def test_the_section_tells_seeds_apart() -> None:
    student = trained("cifar10-small", "amed", 4, True)
    options = {**student.record.options, "seed": 3, "batch": 64, "total_kimg": 0.1}
    known = replace(student, record=replace(student.record, options=options))
    students = [replace(known, name="1"), replace(student, name="2")]
    section = seeds_section(range(20), selection_seeds(8), students)
    assert section == json.loads(json.dumps(section))
    assert section["evaluation"] == "0-19"
    assert section["selection"] == f"{SELECTION_START}-{SELECTION_START + 7}"
    # two whole batches of 64; a record that does not say is not guessed at
    assert section["training"] == {"1": {"seed": 3, "numbers": "0-127"}, "2": None}
    with pytest.raises(UserError, match=f"seed {SELECTION_START} would serve both"):
        seeds_section(range(SELECTION_START + 1), selection_seeds(8), [])
    assert seeds_section(range(4), [], [])["selection"] is None
