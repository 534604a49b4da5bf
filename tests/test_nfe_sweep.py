"""Sweeps over NFE: the series that were asked for, measured once, resumed and drawn."""

from __future__ import annotations

import json
import math

import pytest
from click.testing import CliRunner

from comparison.job import ComparisonJob
from comparison.series import (
    CHURN,
    NfeSweepOptions,
    Noise,
    churned,
    configurations_of,
    restart_rows,
    series,
)
from evaluation.harness import Harness
from plans.plan import Jump
from restart.tables import configurations
from runtime.errors import UserError
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from tests.comparison_problems import CARD, HERE, OPTIONS, forbid_loading, make_harness
from tools import nfe_sweep

INFO = '{"0": [3, 2, 0.06, 0.3]}'
PLAIN = SamplerOptions(sampler="restart")


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


def test_what_a_restart_is_asked_for_by(tmp_path):
    assert configurations_of("imagenet64-39", PLAIN) == {
        "imagenet64-39": SamplerOptions(sampler="restart", restart_config="imagenet64-39")
    }
    whole = configurations_of("imagenet64", PLAIN)
    assert list(whole) == [n for n, row in configurations().items() if row.model == "imagenet64"]
    assert len(whole) == 8
    file = tmp_path / "params.txt"
    file.write_text(f"18 {INFO}\n\n6 {INFO}\n")
    lines = configurations_of(str(file), PLAIN)
    assert [build.nfe for build in _samplers(str(file))] == [43, 19]
    assert all(options.restart_info == line for line, options in lines.items())
    assert [build.nfe for build in _samplers(f"{file}:3")] == [19]
    assert [build.nfe for build in _samplers(f"5 {INFO}")] == [17]
    with pytest.raises(UserError, match="'cifar10-vp-44' is neither a file nor a"):
        configurations_of("cifar10-vp-44", PLAIN)
    with pytest.raises(UserError, match="not valid JSON"):
        _samplers("18 {0: 1}")


def _samplers(spec: str, options: SamplerOptions = PLAIN) -> list[Sampler]:
    return [row.sampler for row in restart_rows([spec], options, CARD)]


def test_series_spend_what_was_asked_for():
    rows = restart_rows(["cifar10-vp", "cifar10-vp-43"], PLAIN, CARD)
    table = [row for row in configurations().values() if row.model == "cifar10-vp"]
    assert [(r.budget, r.detail) for r in rows] == [(row.nfe, row.name) for row in table]
    thirds = SamplerOptions(sampler="restart", main_solver="dpm3")
    assert restart_rows([INFO], thirds, CARD)[0].method == "Restart (dpm3, descents heun)"
    ode = series("ODE", "ode", SamplerOptions(sampler="edm"), [5, 35], CARD)
    assert [r.sampler.nfe for r in ode] == [5, 35] and not any(
        isinstance(part, Jump) for r in ode for part in r.sampler.plan
    )
    for spec, churn in {**CHURN, "20,0.1,2,1": Noise(20.0, 0.1, 2.0, 1.0)}.items():
        (sde,) = series("SDE", "sde", churned(spec), [35], CARD)
        jumps = [part for part in sde.sampler.plan if isinstance(part, Jump)]
        assert sde.sampler.nfe == 35 and jumps
        assert all(churn.S_min <= jump.t_from <= churn.S_max for jump in jumps)
        assert {jump.scale for jump in jumps} == {churn.S_noise}
        gamma = min(churn.S_churn / 18, math.sqrt(2) - 1)
        assert all(math.isclose(jump.t_to, (1 + gamma) * jump.t_from) for jump in jumps)
    for spec in ("cifar10", "1,2,3", "1,2,3,x"):
        with pytest.raises(UserError, match="nor four numbers"):
            churned(spec)
    with pytest.raises(UserError, match="exactly 6 NFE: give 5 or 7"):
        series("ODE", "ode", SamplerOptions(sampler="edm"), [6], CARD)


def test_a_killed_sweep_goes_on_and_draws_its_figure(harness, tmp_path, monkeypatch):
    rows = series("ODE (Heun)", "ode", SamplerOptions(sampler="edm"), [5, 3], CARD)
    rows += series("SDE", "sde", churned("cifar10-vp"), [5], CARD)
    twins = ['2 {"0": [2, 1, 0.06, 0.3]}', '2 {"0": [2, 1, 0.06, 0.5]}']
    rows += restart_rows(twins, PLAIN, CARD)
    assert len({row.key for row in rows}) == 5  # two plans of one NFE keep two files
    options = NfeSweepOptions(OPTIONS, num=12, blocks=2, outdir=tmp_path)
    job = ComparisonJob(
        "nfe_sweep", options, OPTIONS, CARD, range(12), 2, tmp_path, {}, rows, [], [], 0, {}
    )
    original = Harness.fid
    made: list[str] = []
    most = 3

    def fid(self, sampler, *rest):
        if len(made) == most:
            raise KeyboardInterrupt
        made.append(sampler.label)
        return original(self, sampler, *rest)

    monkeypatch.setattr(Harness, "fid", fid)
    with pytest.raises(KeyboardInterrupt):
        job.run(HERE, harness)
    assert not (tmp_path / "table.md").exists()
    most = 9
    assert job.run(HERE, harness).splitlines()[-1].startswith(str(tmp_path / "report.html"))
    assert len(made) == 5  # each row once
    points = json.loads((tmp_path / "fid-nfe.json").read_text())
    results = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {name: [p["nfe"] for p in line] for name, line in points.items()} == {
        "ODE (Heun)": [3, 5], "SDE": [5], "Restart": [5, 5],
    }  # fmt: skip
    said = sorted((p["nfe"], p["fid"], p["detail"]) for line in points.values() for p in line)
    assert said == sorted((r["nfe_metered"], r["fid"], r["detail"]) for r in results)
    assert {r["detail"] for r in results} >= set(twins)
    assert (tmp_path / "fid-nfe.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert "python -m tools.nfe_sweep --dataset_name=cifar10-small" in page and "--num=12" in page
    assert all(f"<td>{r['method']}<small>" in page for r in results)


def _invoke(*flags: str):
    return CliRunner().invoke(nfe_sweep.main, [*flags, "--device=cpu"])


def test_a_dry_run_loads_nothing(tmp_path, monkeypatch):
    forbid_loading(monkeypatch)
    done = _invoke("-n", f"--outdir={tmp_path / 'out'}", f"--restart=18 {INFO}", "--sde=35",
                   "--ode=none")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"43 NFE: Restart, 18 {INFO}" in done.output
    assert "35 NFE: SDE (EDM, churn cifar10-vp), 18 nodes and 0" in done.output
    assert "ODE" not in done.output and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num=10"], "give --num 8"),
        (["--restart=nothing"], "'nothing' is neither a file nor a published"),
        (["--churn=nothing"], "'nothing' is none of cifar10-vp, cifar10-ve"),
        (["--ode=4"], "exactly 4 NFE: give 3 or 5"),
        (["--ode=4,x"], "--ode '4,x' is not a list of whole numbers"),
    ],
)
def test_nonsense_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path):
    done = _invoke(*flags, f"--outdir={tmp_path / 'out'}")
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception) and "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())
