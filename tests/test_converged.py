"""tools/converged.py: the ODE's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from denoisers.registry import ModelSource
from runtime import cli
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from tests.sampler_models import MEAN, SHAPE, VAR, GaussianModel
from tools import converged as tool
from tools.converged import converged

CPU = torch.device("cpu")


def exact(seeds: tuple[int, ...]) -> torch.Tensor:
    """On data N(MEAN, VAR) the ODE scales (x - MEAN) as the deviation; one Euler step follows."""
    high, low = 80.0, 0.002
    x = SeedNoise(seeds).normal("latent", SHAPE, torch.float64) * high
    x = MEAN + (x - MEAN) * ((VAR + low**2) / (VAR + high**2)) ** 0.5
    return MEAN + (x - MEAN) * VAR / (VAR + low**2)


@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_images_are_the_solution_of_the_ode(tol: float) -> None:
    model = GaussianModel()
    made = converged(model, (3, 8, 5), tol, torch.float64, CPU)
    assert made.seeds == (3, 8, 5) and made.nfe == sum(model.calls)
    error = (made.images - exact(made.seeds)).abs().max()
    assert error < 20 * tol
    assert (made.images - exact((3, 5, 8))).abs().max() > 0.1


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> Any:
    monkeypatch.setattr(ModelSource, "load", lambda *_: GaussianModel())
    monkeypatch.setattr(ModelSource, "card", lambda *_: GaussianModel().card)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(
            "sys.argv", ["converged.py", "--outdir=out", "--device=cpu", *arguments]
        )
        with pytest.raises(SystemExit) as stop:
            cli.run(tool.main)
        out = capsys.readouterr()
        return int(stop.value.code or 0), out.out + out.err

    return call


def test_a_run_goes_on_where_it_stopped(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--seeds=0-2", "--dtype=float64")[0] == 0
    files = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    assert sorted(files) == ["000000.png", "000001.png", "000002.png"]
    record = RunRecord.read(Path("out/run.json"))
    assert record.plan["solver"] == "dopri5" and record.plan["nfe_metered"] > 20

    made: list[tuple[int, ...]] = []
    real = converged

    def watched(model: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        made.append(seeds)
        return real(model, seeds, *rest)

    monkeypatch.setattr(tool, "converged", watched)
    Path("out/000001.png").unlink()
    code, text = command("--seeds=0-4", "--dtype=float64", "--batch=2")
    assert code == 0 and "3 images made" in text
    assert made == [(1, 3), (4,)]
    assert Path("out/000001.png").read_bytes() == files["000001.png"]  # the tolerance is below 1/2
    assert RunRecord.read(Path("out/run.json")).options["seeds"] == "0-4"


def test_other_settings_are_refused(command: Any) -> None:
    assert command("--seeds=0-1")[0] == 0
    code, text = command("--seeds=0-1", "--tol=0.1")
    assert code == 1 and "out holds images of other settings" in text and "tol" in text
    code, text = command("--seeds=0-x")
    assert code == 1 and "0-x" in text
