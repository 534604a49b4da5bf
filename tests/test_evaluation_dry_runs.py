"""Dry runs of everything that measures: they load nothing, fetch nothing and write nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from commands import clip_score, fid
from tests.comparison_problems import forbid_loading
from tests.scripts import Script
from tools import converged, plan_search

#: A dry run of each command, and what its record says.
RUNS: dict[str, tuple[click.Command, list[str], dict[str, Any]]] = {
    "calc": (
        fid.main,
        ["calc", "--images=nowhere", "--detector=inception,dinov2", "--ref=a.npz,b.npz"],
        {"images": "nowhere", "metrics": "fid", "num": None, "device": None},
    ),
    "ref": (
        fid.main,
        ["ref", "--data=nowhere.zip", "--dest=own.npz", "--detector=clip", "--features=20"],
        {"dest": ["own.npz"], "features": 20},
    ),
    "gen": (
        fid.main,
        ["gen", "--sampler=ipndm", "--nfe=5", "--detector=inception", "--dataset_name=imagenet64"],
        {"dataset_name": "imagenet64", "seeds": "0-1999", "detector": "inception"},
    ),
    "clip_score": (
        clip_score.main,
        ["calc", "--images=nowhere", "--metrics=clip,aesthetic"],
        {"metrics": "clip,aesthetic", "prompt": None},
    ),
    "converged": (
        converged.main,
        ["--dest=own.npz", "--dataset_name=imagenet64", "--class=3", "--detector=inception"],
        {"class": 3, "seeds": "20000000-20009999", "outdir": None},
    ),
    "plan_search": (
        plan_search.main,
        ["--nfe=5", "--dataset_name=imagenet64", "--class=3", "--detector=inception"],
        {"class": 3, "dataset_name": "imagenet64", "nfe": "5", "objective": "fid"},
    ),
}
WITH_A_MODEL = ("gen", "converged", "plan_search")


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to run in, where whatever loads or downloads fails the test."""
    forbid_loading(monkeypatch)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RUNS)
def test_a_dry_run_loads_nothing_and_touches_nothing(
    name: str, script: Script, nothing: Path
) -> None:
    command, flags, expected = RUNS[name]
    done = script(command, *flags, "-n", "--device=cpu")
    assert done.code == 0, done.err
    record, _ = json.JSONDecoder().raw_decode(done.out)
    assert expected.items() <= record["options"].items()
    assert not list(nothing.iterdir())


@pytest.mark.parametrize("name", WITH_A_MODEL)
def test_models_on_the_hub(name: str, script: Script, nothing: Path) -> None:
    """A known name is enough; for a name of one's own the files have to be there."""
    command, flags, _ = RUNS[name]
    hub = "--model_path=hub:somebody/something"
    if name != "gen":  # a pipeline has no class
        flags = [flag for flag in flags if not flag.startswith("--class")]
    done = script(command, *flags, hub, "-n")
    record, _ = json.JSONDecoder().raw_decode(done.out)
    assert done.code == 0 and record["model"] == {"name": "imagenet64", "sha256": None}
    done = script(command, *flags, "--dataset_name=mine", hub, "-n")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") == 1 and "run once without --dry-run" in done.err
    assert not list(nothing.iterdir())


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("calc", ["--detector-path=x.pt"], "--detector-path x.pt is for one detector"),
        ("calc", ["--ref=c.npz"], "--ref a.npz,b.npz,c.npz names 3 for 2 detectors"),
        ("calc", ["--images=x.npz", "--num=5"], "--num 5 draws images, but x.npz holds statistics"),
        ("calc", ["--metrics=is"], "unknown metric 'is'"),
        ("ref", ["--data=x.npz"], "x.npz does not say how many images it is of: add --num"),
        ("ref", ["--dest=other.npz"], "--dest own.npz,other.npz names 2 for 1 detectors"),
        ("gen", ["--ref=a.npz,b.npz"], "--ref a.npz,b.npz names 2 for 1 detectors"),
        ("gen", ["--dest=own"], "--dest own has to end in .npz"),
        ("clip_score", ["--metrics=fid"], "--metrics 'fid' is not a list of clip and aesthetic"),
        ("converged", ["--class=1000"], "--class 1000 is not one of the 1000 classes"),
        ("plan_search", ["--class=1000"], "--class 1000 is not one of the 1000 classes"),
        (
            "plan_search",
            ["--select=4,10000001"],
            "whole numbers from 2 to 10000000",
        ),
    ],
)
def test_what_a_dry_run_finds_wrong(
    name: str, flags: list[str], sentence: str, script: Script, nothing: Path
) -> None:
    command, usual, _ = RUNS[name]
    done = script(command, *usual, *flags, "-n")
    assert (done.code, done.out) == (1, "") and sentence in done.err, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not list(nothing.iterdir())
