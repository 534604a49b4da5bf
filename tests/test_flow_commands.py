"""The commands on a flow pipeline: Restart, the comparison and the solver error work unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from commands import compare, sample, solver_error
from tests.scripts import Script
from tests.tiny_transformers import PIPELINES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """SD3 in kind, with images of the size that the bundled detector takes."""
    home = tmp_path_factory.mktemp("sd3")
    PIPELINES["sd3"]().save_pretrained(home)
    given = json.dumps({"height": 32, "width": 32})
    flags = ["--dataset_name=mine", f"--model_path={home}", f"--model_settings={given}"]
    return [*flags, "--prompt=a cat", "--device=cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))


def test_restart_samples_a_flow(model: list[str], script: Script) -> None:
    plan = '--restart_info={"0": [3, 1, 0.5, 3]}'
    done = script(sample.main, *model, "--sampler=restart", "--num_steps=4", plan, "--seeds=0-1")
    assert done.code == 0 and "2 images made, 11 NFE each" in done.out, done.err


def test_the_pipelines_own_scheduler_is_a_row(model: list[str], script: Script) -> None:
    given = ["--budgets=3", "--solvers=euler", "--select=none", "--ceilings=False", "--num=4"]
    done = script(
        compare.main, *model, *given, "--blocks=2", "--with=diffusers", "--outdir=cmp"
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = {line.split("|")[1].strip(): line for line in done.out.splitlines() if "|" in line}
    assert "s = 1, 0.751, 0.00893, 0" in rows["diffusers StableDiffusion3's own"]
    assert "s = 1, 0.857, 0.6, 0" in rows["diffusers Euler, shifted once"]
    assert "discrete, 4 nodes" in rows["Euler"]  # equal steps in the time of the flow


def test_the_solver_error_of_a_flow(model: list[str], script: Script) -> None:
    given = ["--budgets=4", "--solvers=euler", "--seeds=0-1", "--detector=none", "--tol=1e-2"]
    done = script(solver_error.main, *model, *given, "--outdir=errors")
    assert done.code == 0, done.err
    rows = json.loads(Path("errors/errors.json").read_text())["rows"]
    assert {row["method"] for row in rows} >= {"Euler", "Heun-35"}
    assert all(0 < row["x"] < 10 for row in rows)
