"""tools.converged: the ODE's own images, and statistics of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from commands import compare
from denoisers.conditions import Conditions
from denoisers.registry import ModelSource
from evaluation import ode_samples, passes
from evaluation.converged import Converged
from evaluation.ode_samples import solve_ode
from metrics.detectors import load_detector
from metrics.statistics import Statistics
from runtime.images import to_uint8
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from runtime.seeds import CONVERGED_START, SELECTION_START
from tests.processes import run_command, together
from tests.sampler_models import MEAN, SHAPE, VAR, ClassModel, GaussianModel
from tests.scripts import Script
from tools import converged as tool
from tools import nfe_sweep

CPU = torch.device("cpu")
SEEDS = f"{CONVERGED_START}-{CONVERGED_START + 8}"
STATISTICS = ("--dest=own.npz", "--detector=pixels", "--dtype=float64", "--tol=1e-6", "--batch=4")


def exact(seeds: tuple[int, ...]) -> torch.Tensor:
    """On data N(MEAN, VAR) the ODE scales (x - MEAN) as the deviation; one Euler step follows."""
    high, low = 80.0, 0.002
    x = SeedNoise(seeds).normal("latent", SHAPE, torch.float64) * high
    x = MEAN + (x - MEAN) * ((VAR + low**2) / (VAR + high**2)) ** 0.5
    return MEAN + (x - MEAN) * VAR / (VAR + low**2)


@pytest.mark.parametrize("tol", [1e-4, 1e-7])
def test_images_are_the_solution_of_the_ode(tol: float) -> None:
    model = GaussianModel()
    made = solve_ode(model, Conditions(), (3, 8, 5), tol, torch.float64, CPU)
    assert made.seeds == (3, 8, 5) and made.nfe == sum(model.calls)
    error = (made.images - exact(made.seeds)).abs().max()
    assert error < 20 * tol
    assert (made.images - exact((3, 5, 8))).abs().max() > 0.1


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Any:
    monkeypatch.setattr(ModelSource, "load", lambda *_: GaussianModel())
    monkeypatch.setattr(ModelSource, "card", lambda *_: GaussianModel().card)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str]:
        done = script(tool.main, "--device=cpu", *arguments)
        return done.code, done.out + done.err

    return call


def test_a_run_goes_on_where_it_stopped(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("--outdir=out", "--seeds=0-2", "--dtype=float64")[0] == 0
    files = {path.name: path.read_bytes() for path in Path("out").glob("*.png")}
    assert sorted(files) == ["000000.png", "000001.png", "000002.png"]
    record = RunRecord.read(Path("out/run.json"))
    assert record.plan["solver"] == "dopri5" and record.plan["nfe_metered"] > 20

    made: list[tuple[int, ...]] = []

    def watched(model: Any, conditions: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        made.append(seeds)
        return solve_ode(model, conditions, seeds, *rest)

    monkeypatch.setattr(ode_samples, "solve_ode", watched)
    Path("out/000001.png").unlink()
    code, text = command("--outdir=out", "--seeds=0-4", "--dtype=float64", "--batch=2")
    assert code == 0 and "3 images made" in text
    assert made == [(1, 3), (4,)]
    assert Path("out/000001.png").read_bytes() == files["000001.png"]  # the tolerance is below 1/2
    assert RunRecord.read(Path("out/run.json")).options["seeds"] == "0-4"


def test_other_settings_are_refused(command: Any) -> None:
    assert command("--outdir=out", "--seeds=0-1")[0] == 0
    code, text = command("--outdir=out", "--seeds=0-1", "--tol=0.1")
    assert code == 1 and "out holds images of other settings" in text and "tol" in text
    code, text = command("--outdir=out", "--seeds=0-x")
    assert code == 1 and "0-x" in text


def own_statistics(batch: int = 4) -> Statistics:
    """Of what STATISTICS asks for, by hand."""
    first, last = map(int, SEEDS.split("-"))
    seeds = range(first, last + 1)
    stats = Statistics(load_detector("pixels", device="cpu").id)
    for i in range(0, len(seeds), batch):
        some = tuple(seeds[i : i + batch])
        made = solve_ode(GaussianModel(), Conditions(), some, 1e-6, torch.float64, CPU)
        pixels = torch.from_numpy(to_uint8(made.images)).permute(0, 3, 1, 2)
        stats.update(load_detector("pixels", device="cpu")(pixels))
    return stats


def assert_equal(found: Statistics, truth: Statistics) -> None:
    assert found.n == truth.n == 9 and found.detector == truth.detector
    assert np.abs(found.mean - truth.mean).max() < 1e-12
    assert np.abs(found.cov - truth.cov).max() < 1e-12


def test_statistics_are_those_of_the_images_and_say_how_they_were_made(command: Any) -> None:
    code, text = command(*STATISTICS, f"--seeds={SEEDS}")
    assert code == 0 and "wrote own.npz  (detector pixels, N = 9, " in text, text
    made = Converged.load(Path("own.npz"))
    assert_equal(made.statistics, own_statistics())
    assert made.record.model == {"name": "tiny", "sha256": "0" * 64}
    assert made.record.options["seeds"] == SEEDS and made.record.options["dtype"] == "float64"
    plan = made.record.plan
    assert (plan["solver"], plan["tol"]) == ("dopri5", 1e-6) and plan["nfe_metered"] > 20
    assert not list(Path().rglob("*.png"))
    before = Path("own.npz").read_bytes()
    assert command(*STATISTICS, f"--seeds={SEEDS}") == (0, "own.npz exists already\n")
    code, text = command(*STATISTICS, f"--seeds={SEEDS}", "--tol=1e-2")
    assert code == 1 and "own.npz holds statistics of other settings" in text and "tol" in text
    code, text = command(*STATISTICS, f"--seeds={CONVERGED_START}-{CONVERGED_START + 4}")
    assert code == 1 and "options.seeds" in text and Path("own.npz").read_bytes() == before


def test_images_are_kept_where_they_are_asked_for(command: Any) -> None:
    assert command(*STATISTICS, f"--seeds={SEEDS}", "--outdir=out")[0] == 0
    assert len(list(Path("out").glob("*.png"))) == 9
    assert RunRecord.read(Path("out/run.json")).plan["nfe_metered"] > 20
    Path("own.npz").unlink()
    text = command("--outdir=out", "--dtype=float64", "--tol=1e-6", f"--seeds={SEEDS}")[1]
    assert "out: 0 images made" in text


def test_kept_images_are_read_for_the_statistics_of_another_detector(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = (*STATISTICS, f"--seeds={SEEDS}", "--outdir=out")
    assert command(*flags)[0] == 0
    metered = RunRecord.read(Path("out/run.json")).plan["nfe_metered"]
    Path("own.npz").unlink()
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    monkeypatch.setattr(ode_samples, "solve_ode", None)  # no image is made again
    code, text = command(*flags)
    assert code == 0 and f"N = 9, {metered:.1f} NFE on average" in text
    found = Converged.load(Path("own.npz"))
    assert_equal(found.statistics, own_statistics())
    assert found.record.plan["nfe_metered"] == metered
    assert before == {path: path.read_bytes() for path in Path("out").iterdir()}


def test_killed_statistics_go_on(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "SAVE_EVERY", 0.0)
    made: list[int] = []

    def mortal(model: Any, conditions: Any, seeds: tuple[int, ...], *rest: Any) -> Any:
        if len(made) == 8:
            raise KeyboardInterrupt
        made.extend(seeds)
        return solve_ode(model, conditions, seeds, *rest)

    monkeypatch.setattr(ode_samples, "solve_ode", mortal)
    assert command(*STATISTICS, f"--seeds={SEEDS}")[0] == 130
    assert len(made) == 8 and not Path("own.npz").exists()
    made.clear()
    assert command(*STATISTICS, f"--seeds={SEEDS}")[0] == 0
    assert made == [CONVERGED_START + 8]
    assert_equal(Converged.load(Path("own.npz")).statistics, own_statistics())
    assert not list(Path("cache").rglob("*.npz"))  # nothing is left behind


def test_conditions_reach_the_samples_and_their_record(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelSource, "load", lambda *_: ClassModel())
    monkeypatch.setattr(ModelSource, "card", lambda *_: ClassModel().card)
    flags = ("--dest=own.npz", "--detector=pixels", "--tol=1e-2", f"--seeds={SEEDS}")
    code, text = command(*flags, "--class=3", "--guidance_rate=2")
    assert code == 0, text
    made = Converged.load(Path("own.npz"))
    assert made.statistics.mean == pytest.approx(np.full(192, int(0.75 * 127.5 + 128) / 255))
    assert (made.record.options["class"], made.record.options["guidance_rate"]) == (3, 2.0)
    given = ClassModel(), load_detector("pixels", device="cpu"), range(8)
    assert made.misfit(*given, Conditions(3, guidance_rate=2.0)) is None
    for other, which in (
        (Conditions(2, guidance_rate=2.0), "class"),
        (Conditions(3, guidance_rate=1.5), "guidance_rate"),
        (Conditions(3, ("a cat",), 2.0), "prompts"),
        (None, "class"),
    ):
        assert made.misfit(*given, other) == f"were made with another {which}"
    code, text = command(*flags, "--class=2", "--guidance_rate=2")
    assert code == 1 and "options.class: 2 != 3" in text


def test_two_processes_make_the_statistics_of_one(command: Any, tmp_path: Path) -> None:
    flags = (*STATISTICS, f"--seeds={SEEDS}", "--device=cpu")
    done = together(lambda: run_command(tool.main, *flags), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    assert [rank.out.count("wrote own.npz") for rank in done] == [1, 0]
    # other neighbours, hence other steps: the same images, since the tolerance is far below 1/2
    assert_equal(Converged.load(tmp_path / "own.npz").statistics, own_statistics())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--seeds=0-3",), "nothing to make: give --dest FILE.npz, --outdir FOLDER"),
        ((*STATISTICS, "--seeds=0-3"), "--seeds 0 and others below 20000000 are used by tables"),
        ((*STATISTICS, f"--seeds={CONVERGED_START - 1},{CONVERGED_START}"), "--seeds 19999999 and"),
        ((*STATISTICS, f"--seeds={SELECTION_START}-{CONVERGED_START}"), "more than 10000000 seeds"),
        ((*STATISTICS, f"--seeds={CONVERGED_START}"), "at least 2 images: give more --seeds"),
        (("--dest=own.txt",), "--dest own.txt has to end in .npz"),
    ],
)
def test_nonsense_is_one_sentence(command: Any, flags: tuple[str, ...], sentence: str) -> None:
    code, text = command(*flags)
    assert code == 1 and sentence in text and text.count("\n") == 1
    assert not list(Path().iterdir())


def test_a_dry_run_touches_nothing(command: Any) -> None:
    code, text = command("-n", "--dest=own.npz")
    plan = json.loads(text)
    assert code == 0 and not list(Path().iterdir())
    assert plan["options"]["seeds"] == f"{CONVERGED_START}-{CONVERGED_START + 9999}"
    assert plan["plan"]["tol"] == 1e-4


def test_tables_are_held_against_what_the_command_wrote(command: Any) -> None:
    assert command(*STATISTICS, f"--seeds={SEEDS}")[0] == 0
    own_statistics(batch=3).save("data.npz")
    fixed = ["--ref=data.npz", "--detector=pixels", "--num=8", "--blocks=2", "--device=cpu",
             "--dtype=float64"]  # fmt: skip
    compared = [compare.main, "--budgets=none"]
    swept = [nfe_sweep.main, "--sde=none", "--ode=35", '--restart=2 {"0": [2, 1, 1, 2]}']
    for out, (main, *flags) in {"compared": compared, "swept": swept, "plain": swept}.items():
        given = "none" if out == "plain" else "own.npz"
        flags += [*fixed, f"--outdir={out}", f"--ref_model={given}"]
        done = CliRunner().invoke(main, flags)
        assert done.exit_code == 0, done.output
        assert ("| FID | FID to converged |" in done.output) == (given == "own.npz")
        assert ("There is no FID to the model's own" in done.output) == (given == "none")
    for out in ("compared", "swept"):
        rows = json.loads(Path(out, "results.json").read_text())["rows"]
        heun = next(row for row in rows if row["nfe_planned"] == 35)
        # both references are of the same images; rounding is all that is between the files
        assert heun["fid_converged"] == pytest.approx(heun["fid"], abs=1e-9)
