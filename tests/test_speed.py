"""What a training is said to spend is what it spends, and the time follows from a few calls."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import denoisers.speed
from commands import train
from denoisers.analytic import MixtureDenoiser
from denoisers.batch import SeededBatch
from denoisers.conditions import Conditions
from denoisers.speed import Speed, Work, probe
from runtime.dist import World
from solvers.types import Denoised
from tests.scripts import Script
from tests.test_ns_job import SHORT, small  # noqa: F401, a fixture that is used by itself
from tests.tiny_model import tiny_model

HERE = World(0, 1, torch.device("cpu"))
AMED = (
    *("--dataset_name=tiny", "--num_steps=3", "--batch=4", "--total_kimg=0.012", "--tick=0"),
    *("--dtype=float64", "--device=cpu"),
)


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Samples that the network was asked for, with and without a gradient."""
    counts: Counter[str] = Counter()
    real = MixtureDenoiser.__call__

    def counted(self: MixtureDenoiser, x: Tensor, sigma: Tensor) -> Denoised:
        graph = torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad)
        counts["gradients" if graph else "forward"] += len(x)
        return real(self, x, sigma)

    monkeypatch.setattr(MixtureDenoiser, "__call__", counted)
    return counts


def planned(script: Script, *arguments: str) -> str:
    done = script(train.main, *arguments, "--dry-run")
    assert done.code == 0, done.err
    return done.err.splitlines()[-1]


@pytest.mark.parametrize("more", [(), ("--unpaired=0.1",), ("--checkpoint",)])
def test_a_table_spends_what_its_dry_run_says(
    more: tuple[str, ...], script: Script, spent: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ns.job.UNPAIRED", 16)
    said = planned(script, *SHORT, *more)
    spent.clear()
    assert script(train.main, *SHORT, *more).code == 0
    gradients = 6 * 8 * 3
    assert spent["gradients"] == gradients * (2 if more == ("--checkpoint",) else 1)
    forward = spent.total() - gradients
    assert said.startswith(f"{forward:,} network evaluations and {gradients:,} with gradients, ")
    again = planned(script, *SHORT, *more)
    assert "MB" not in again  # the trajectories are on disk


@pytest.mark.parametrize("student", ["amed", "ipndm"])
@pytest.mark.parametrize(
    "more",
    [
        *((), ("--afs=True", "--tick=0.008"), ('--restart_info={"0": [3, 2, 0.06, 9]}',)),
        ("--trajectories=8", "--afs=True"),
    ],
)
def test_a_predictor_spends_what_its_dry_run_says(
    student: str, more: tuple[str, ...], script: Script, spent: Counter[str]
) -> None:
    teacher = "restart" if "restart" in str(more) else "heun"
    given = [*AMED, f"--sampler_stu={student}", f"--sampler_tea={teacher}", *more]
    said = planned(script, *given)
    spent.clear()
    assert script(train.main, *given).code == 0
    words = said.replace(",", "").split()
    assert int(words[4]) == spent["gradients"]
    # a plugin that starts anew from the states of Restart evaluates some of them again
    assert int(words[0]) == pytest.approx(spent["forward"], rel=0.02 if teacher == "restart" else 0)


def test_the_time_is_that_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.6, 2.0, 5.6])  # three calls in 0.6 s, and three with gradients in 3.6 s
    monkeypatch.setattr(denoisers.speed.time, "perf_counter", lambda: next(clock))
    model = tiny_model("tiny")
    speed = probe(SeededBatch.open(model, Conditions(), range(4), torch.float64, HERE.device))
    assert speed == (pytest.approx(0.6 / 12), pytest.approx(3.6 / 12))
    work = Work(forward=1200, gradients=600, disk=5_000_000)
    assert str(work) == "1,200 network evaluations and 600 with gradients, 5 MB on disk"
    assert speed.of(work, HERE) == "about 4 min"
    assert speed.of(work, World(0, 2, HERE.device)) == "about 2 min"
    assert Speed(1.0, 1.0).of(Work(30_000, 0), HERE) == "about 8.3 h"
    assert Speed(1.0, 1.0).of(Work(3, 0), HERE) == "about 3 s"


def test_weights_that_are_not_here_are_not_fetched_for_an_estimate(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("AMED_CACHE", str(tmp_path))
    done: Any = script(train.main, "--dataset_name=cifar10", "--dry-run")
    assert done.code == 0 and "could tell the time" in done.err
    assert not list(tmp_path.iterdir())
