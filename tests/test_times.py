"""Noise levels given one by one, with ``--times``: the grid, samplers on it, rows of tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from commands import compare, sample, visualize
from comparison.rows import classic_rows, timed_rows
from restart.tables import configurations
from runtime.errors import UserError
from runtime.lists import parse_numbers
from runtime.record import RunRecord
from samplers.build import build
from samplers.options import SamplerOptions
from samplers.sampler import Sampler
from solvers.grids import EXPLICIT, Grid
from tests.comparison_problems import CARD, forbid_loading, guided_card
from tests.sampler_models import make_card

TIMES = (80.0, 10.9, 3.5, 1.4, 0.4, 0.002)
CONFIG = next(iter(configurations()))


def sampler(name: str = "ipndm", **more: object) -> Sampler:
    return build(SamplerOptions(sampler=name, times=TIMES, **more), make_card())


def test_a_grid_of_given_levels_has_these_nodes() -> None:
    grid = Grid.explicit(TIMES)
    assert grid.resolve(make_card()).nodes().tolist() == list(TIMES)
    assert grid.closed().tolist() == [*TIMES, 0.0] and grid.nodes(6).dtype == torch.float64
    assert grid.ends == (0.002, 80.0)
    with pytest.raises(ValueError, match="a grid of 6 given noise levels has no 11 nodes"):
        grid.refined(1)


@pytest.mark.parametrize(
    "times",
    [(), (80.0,), (80.0, 80.0), (1.0, 2.0), (80.0, 0.0), (80.0, -1.0), (float("inf"), 1.0),
     (80.0, float("nan"), 1.0)],
)  # fmt: skip
def test_levels_that_are_no_grid_are_refused(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="that decrease from 100000 or less and stay above 0"):
        Grid.explicit(times)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm", "dpm3", "dpmpp", "dpmpp3c", "ipndm"])
def test_every_solver_walks_over_the_given_levels(name: str) -> None:
    found = sampler(name)
    assert found.describe()["times"] == list(TIMES)
    assert (found.options.num_steps, found.options.schedule_type) == (6, EXPLICIT)


def test_samplers_with_a_final_zero_add_it() -> None:
    assert sampler("edm").describe()["times"] == [*TIMES, 0.0]
    noisy: Any = sampler("ddpm").describe()["times"]  # goes lower, then adds noise
    assert {*TIMES, 0.0} <= set(noisy) and sampler("ddpm").nfe == 6
    info = '{"0": [3, 1, 0.4, 3.5]}'
    times: Any = sampler("restart", restart_info=info).describe()["times"]
    assert times[:5] == list(TIMES[:5]) and times[-2:] == [0.002, 0.0] and 3.5 in times[5:]


def test_the_levels_of_a_schedule_are_the_sampler_of_that_schedule() -> None:
    plain = build(SamplerOptions(sampler="dpmpp", num_steps=6), make_card())
    nodes = tuple(plain.plan[0].ts.tolist())
    given = build(SamplerOptions(sampler="dpmpp", times=nodes), make_card())
    assert torch.equal(given.plan[0].ts, plain.plan[0].ts)
    assert given.label == plain.label and given.describe()["times"] == plain.describe()["times"]


def test_the_number_of_steps_is_that_of_the_levels() -> None:
    assert sampler(nfe=5).nfe == sampler(num_steps=6).nfe == 5
    assert sampler(nfe=4, afs=True).options.num_steps == 6
    with pytest.raises(UserError, match="ipndm cannot use exactly 6 NFE: give 5"):
        sampler(nfe=6)
    assert build(sampler().options, make_card()).describe() == sampler().describe()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"num_steps": 7}, "--num_steps 7 and --times 80,10.9,3.5,1.4,0.4,0.002 both set the grid"),
        ({"schedule_type": "logsnr"}, "--schedule_type logsnr and --times"),
        ({"schedule_rho": 7.0}, "--schedule_rho 7.0 and --times"),
        ({"sigma_min": 0.01}, "--sigma_min 0.01 and --times"),
        ({"sigma_max": 50.0}, "--sigma_max 50.0 and --times"),
        ({"name": "pds"}, "--times .* is not an option of sampler 'pds'"),
        ({"name": "restart", "restart_config": CONFIG}, "--times .* is not an option"),
        (
            {"name": "restart", "restart_info": '18 {"0": [3, 1, 0.4, 3.5]}'},
            "--times has 6 noise levels, but --restart_info has 18 main nodes",
        ),
    ],
)
def test_options_that_contradict_the_levels_are_errors(more: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sampler(**more)


def test_lists_of_numbers() -> None:
    assert parse_numbers("--times", "80, 9.5,1e-2") == (80.0, 9.5, 0.01)
    for text in ("", "80,x", ","):
        with pytest.raises(UserError, match="is not a list of numbers; give --times 80,9.5,0.002"):
            parse_numbers("--times", text)


def test_sample_takes_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    flags = ["-n", "--sampler=ipndm", "--times=80,10.9,3.5,1.4,0.4,0.002"]
    done = CliRunner().invoke(sample.main, flags, catch_exceptions=False)
    plan = RunRecord.from_json(done.output).plan
    assert (plan["times"], plan["schedule_type"], plan["nfe_planned"]) == (list(TIMES), EXPLICIT, 5)
    rows = ["--row", "ipndm --times 80,4,0.002", "--row", "heun", "--outdir", str(tmp_path / "x")]
    done = CliRunner().invoke(visualize.main, ["-n", *rows], catch_exceptions=False)
    assert "ipndm4: 2 NFE" in done.output
    done = CliRunner().invoke(sample.main, [*flags[:2], "--times", "80,x", "-n"])
    assert "--times '80,x' is not a list of numbers" in str(done.exception)


def test_rows_on_given_levels_stand_beside_the_solvers_own() -> None:
    rows = timed_rows(TIMES, [3, 5], CARD)
    assert [row.method for row in rows[5]] == [
        "Euler, given levels", "DPM-Solver++(3), given levels", "iPNDM(4), given levels",
    ]  # fmt: skip
    assert rows[3] == []
    own = {row.method for row in classic_rows(5, CARD)}
    for row in rows[5]:
        assert row.own_solver in own and row.sampler.nfe == row.budget == 5
        assert row.sampler.describe()["times"] == list(TIMES)
        assert row.key not in {row.key for row in classic_rows(5, CARD)}
    guided = timed_rows(TIMES, [10], guided_card(), 2.0)
    assert len(guided[10]) == 3
    with pytest.raises(UserError, match="give --budgets 5"):
        timed_rows(TIMES, [3], CARD)
    assert timed_rows(None, [3], CARD) == {3: []}


def test_compare_has_rows_on_given_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_loading(monkeypatch)
    flags = ["-n", "--budgets", "5", "--times", ",".join(map(str, TIMES)), "--device", "cpu"]
    done = CliRunner().invoke(compare.main, flags, catch_exceptions=False)
    assert "iPNDM(4), given levels" in done.output and "iPNDM(4) + AFS, " in done.output
    record = json.loads(done.output[: done.output.index("\n}") + 2])
    assert record["options"]["times"] == list(TIMES)
    done = CliRunner().invoke(compare.main, [*flags, "--times", "1,2"])
    assert isinstance(done.exception, ValueError) and "are no grid" in str(done.exception)
