"""A checkpoint in the published format of NCSN++ goes through train.py and sample.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import sample, train
from runtime.record import RunRecord
from tests.ncsnpp_problem import RANGE, checkpoint, settings, weights
from tests.test_families_run import run

#: One of a kind: one and two evaluations per interval, history, and noise on the way.
STUDENTS = ("amed", "ipndm")
SAMPLERS = ("euler", "heun", "dpmpp", "edm", "restart")


def test_samplers_and_students_walk_a_published_ncsnpp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the card's name: 32 x 32 pixels, and its noise levels."""
    monkeypatch.chdir(tmp_path)
    config = settings(img_resolution=32, channel_mult=[1, 1], model_channels=4)
    checkpoint(tmp_path / "checkpoint_3.pth", weights(config))
    model = ["--dataset_name=cifar10-ncsnpp", "--model_path=checkpoint_3.pth", "--device=cpu"]
    jumps = '--restart_info={"0": [3, 1, 0.06, 0.3]}'
    for number, student in enumerate(STUDENTS, 1):
        teacher = ["--sampler_tea=restart", jumps] if student == "ipndm" else ["--sampler_tea=heun"]
        length = ["--num_steps=3", "--M=1", "--batch=1", "--total_kimg=0.001"]
        learned = ["--scale_dir=0.01", "--afs=True"]
        stu = f"--sampler_stu={student}"
        assert run(train.main, *model, stu, *teacher, *length, *learned) == 0
        assert run(sample.main, *model, f"--predictor_path={number}", "--seeds=0,1") == 0
    for sampler in SAMPLERS:
        own = [jumps, "--num_steps=6"] if sampler == "restart" else ["--num_steps=4"]
        assert run(sample.main, *model, f"--sampler={sampler}", *own, "--seeds=0,1") == 0
    folders = list(Path("samples/cifar10-ncsnpp").iterdir())
    assert len(folders) == len(STUDENTS) + len(SAMPLERS)
    for folder in folders:
        plan = RunRecord.read(folder / "run.json").plan
        assert folder.name.endswith(f"_nfe{plan['nfe_metered']}")  # as planned
        assert (plan["sigma_min"], plan["sigma_max"]) == RANGE
        images = [np.asarray(Image.open(path)) for path in folder.glob("*.png")]
        assert len(images) == 2 and all(image.std() > 1 for image in images)
        assert (images[0] != images[1]).any()
