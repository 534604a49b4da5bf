"""train.py --sampler_stu=ns: whole runs, killed ones, two processes; and its students in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ns.job
import ns.refine
from commands import sample, solver_error, train
from comparison.students import learned_restart_rows, learned_rows
from denoisers.cards import cards
from denoisers.conditions import ConditionOptions
from denoisers.registry import ModelSource
from ns.experiments import TrainedTable, load_student, read_table, save_table
from ns.options import NsOptions
from ns.search import prior_table
from plans.plan import run_plan
from runtime.errors import UserError
from runtime.log import read_json_lines
from runtime.outputs import LOCK
from runtime.record import RunRecord
from samplers.build import build
from samplers.builders.learned import build_learned
from samplers.options import SamplerOptions
from solvers.table import Table, run_table
from tests.locks import held
from tests.processes import run_command, together
from tests.scripts import Done, Script
from tests.tiny_model import TinySource, tiny_model

#: A short run of the tiny model, with few latents.
SHORT = (
    *("--dataset_name=tiny", "--sampler_stu=ns", "--nfe=3", "--search=0", "--refine=6"),
    *("--trajectories=24", "--batch=8", "--report=2", "--dtype=float64", "--device=cpu"),
)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model, few latents, and caches of this test's own."""
    for name in ("card", "known_sha256", "load"):
        monkeypatch.setattr(ModelSource, name, vars(TinySource)[name])
    monkeypatch.setattr(ns.job, "JUDGED", 24)
    monkeypatch.setattr(ns.job, "CALIBRATED", 32)
    monkeypatch.setattr(ns.job, "SEARCHED", (8, 8))
    monkeypatch.setattr(ns.job, "SHARE", 4)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(script: Script) -> Any:
    def call(*arguments: str, code: int = 0) -> Done:
        done = script(train.main, *SHORT, *arguments)
        assert done.code == code, done.err
        return done

    return call


def folder(done: Done) -> Path:
    return Path(done.out.splitlines()[-1])


def content(path: Path) -> tuple[dict, list]:
    """The table and the metrics of a run, without its record."""
    table = json.loads((path / "table.json").read_text())
    return {k: table[k] for k in ("start", "end", "times", "rows")}, read_json_lines(
        path / "stats.jsonl"
    )


def test_a_run_leaves_a_table_and_what_led_to_it(run: Any) -> None:
    path = folder(run())
    assert path.name == "00001-tiny-3-3-ns-heun"
    student = load_student("1", "exps")
    assert isinstance(student, TrainedTable) and student.label == "ns-00001"
    assert student.record.plan["numbers"] == 13 and student.table.calls == 3
    assert (student.table.start, student.table.end) == (80.0, 0.0)
    rows = read_json_lines(path / "stats.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    calibrated = load_student(str(folder(run("--refine=0"))), "exps")
    assert isinstance(calibrated, TrainedTable)
    classic = distance(prior_table([17.5, 2.5, 0.17], 80.0, 0.002))
    assert max(distance(student.table), distance(calibrated.table)) < 0.75 * classic


def distance(table: Table) -> float:
    """From the images of Heun-35 on latents that no run has seen."""
    model = tiny_model("tiny")
    heun = build(SamplerOptions(sampler="edm", num_steps=18), model.card)
    generator = torch.Generator().manual_seed(1)
    x = 80 * torch.randn(64, *model.card.shape, generator=generator, dtype=torch.float64)
    exact = run_plan(heun.plan, model.bind(), x, lambda _: x).x[-1]
    return float((run_table(table, model.bind(), x).x[-1] - exact).square().mean().sqrt())


def test_a_killed_run_continues_bit_equal(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = folder(run("--outdir=whole"))
    for updates in (1, 3):  # before the first report, and after it
        left, update = iter(range(updates)), ns.refine._Run.update

        def mortal(*given: Any, left: Any = left, update: Any = update) -> float:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return update(*given)

        out = f"--outdir=killed-{updates}"
        with monkeypatch.context() as patch:
            patch.setattr(ns.refine._Run, "update", mortal)
            run(out, code=130)
        resumed = folder(run(out, "--resume=auto"))
        assert content(resumed) == content(whole)
        assert "already trained" in run(out, "--resume=auto").err


def test_two_processes_train_what_one_trains(run: Any, tmp_path: Path) -> None:
    one = folder(run("--outdir=one", "--search=6"))
    flags = (*SHORT, "--outdir=two", "--search=6", "--batch-gpu=1")
    done = together(lambda: run_command(train.main, *flags), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    (first, rows), (second, others) = content(one), content(folder(done[0]))
    assert first["times"] == pytest.approx(second["times"], rel=1e-6)
    for a, b in zip(first["rows"], second["rows"], strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-3)


def test_a_second_run_of_the_same_is_refused(run: Any, tmp_path: Path) -> None:
    path = folder(run())
    with held(path / LOCK, tmp_path):
        assert f"{path} is in use by another run" in run("--resume=auto", code=1).err
    assert "already trained" in run("--resume=auto").err


def test_recomputing_calls_changes_nothing(run: Any) -> None:
    tables = [content(folder(run(*more)))[0] for more in ((), ("--checkpoint",))]
    assert tables[0] == tables[1]


def test_a_table_samples_and_is_measured_like_every_student(run: Any, script: Script) -> None:
    run()
    done = script(sample.main, "--predictor_path=1", "--seeds=0-3", "--device=cpu", "--outdir=x")
    assert done.code == 0 and "4 images made, 3 NFE each" in done.out, done.err
    record = RunRecord.read("x/run.json")
    assert record.plan["nfe_metered"] == 3 and len(record.plan["table"]["rows"]) == 4
    arguments = ("--budgets=3", "--predictors=1", "--seeds=0-3", "--detector=none", "--outdir=e")
    done = script(solver_error.main, "--dataset_name=tiny", *arguments, "--device=cpu")
    assert done.code == 0 and "NS solver" in done.out, done.err


def test_a_comparison_sets_a_table_against_its_prior(run: Any) -> None:
    student = load_student(str(folder(run("--refine=0"))), "exps")
    card = tiny_model("tiny").card
    (row,) = learned_rows([student], card)
    assert (row.method, row.budget, row.own_solver) == ("NS solver", 3, "iPNDM(4) + AFS")
    assert row.detail == "heun teacher, 35 NFE; 48 trajectories, 0 updates"
    assert learned_restart_rows([student], card) == []
    with pytest.raises(UserError, match="cannot be part of --sampler restart"):
        build_learned(SamplerOptions(sampler="restart"), student, card)


def test_guidance_takes_two_evaluations_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSource, "card", lambda _: cards()["ms_coco"])
    model, conditions = ModelSource("ms_coco"), ConditionOptions(guidance_rate=7.5)
    job = ns.job.prepare(NsOptions(model, conditions, nfe=10))
    assert job.calls == 5 and job.curves.nfe == 70 and job.name == "ms_coco-5-10-ns-heun"
    with pytest.raises(UserError, match="--nfe 5 is odd.*give --nfe 6"):
        ns.job.prepare(NsOptions(model, conditions, nfe=5))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_files_hold_every_digit(run: Any, suffix: str, tmp_path: Path) -> None:
    student = load_student(str(folder(run())), "exps")
    assert isinstance(student, TrainedTable)
    path = tmp_path / f"mine{suffix}"
    save_table(path, student.table, student.record)
    table, record = read_table(path)
    assert (
        table.ragged == student.table.ragged
        and table.times.tolist() == student.table.times.tolist()
    )
    assert record == student.record
    again = load_student(str(path), "exps")
    assert isinstance(again, TrainedTable) and again.sha256 == student.sha256


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.pop("times"), "times is missing"),
        (lambda c: c["rows"].pop(), "do not fit 3 times"),
        (lambda c: c["times"].__setitem__(0, -1.0), "must be positive"),
        (lambda c: c.__setitem__("rows", 3), "rows is of type"),
        (lambda c: c.__setitem__("schema", 99), "schema 99"),
    ],
)
def test_a_damaged_table_is_one_sentence(run: Any, change: Any, sentence: str) -> None:
    path = folder(run("--refine=0")) / "table.json"
    damaged = json.loads(path.read_text())
    change(damaged)
    path.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match=sentence):
        load_student("1", "exps")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--M=2",), "--M 2 is not an option of --sampler_stu=ns"),
        (("--batch=25",), "--batch 25 exceeds --trajectories 24"),
        (("--resume=7",), "no run 7"),
        (("--sampler_stu=amed",), "is not an option of --sampler_stu=amed"),
        (("--loss=l2", "--exponent=0.5"), "--exponent 0.5 is not an option of --loss l2"),
        (("--unpaired=1", "--refine=0"), "--unpaired 1 is a term of the refinement"),
        (("--times=80,3,0.002",), "--times 80,3,0.002 has 3 noise levels: give both ends and 3"),
        (("--times=70,9,3,1,0.002",), "must begin and end where the teacher does: at 80 and 0.002"),
        (("--times=80,3,9,1,0.002",), "are no grid"),
        (("--times=80,9,3,1,0.002", "--search=4"), "--search 4 and --times"),
    ],
)
def test_nonsense_is_one_sentence(run: Any, flags: tuple[str, ...], sentence: str) -> None:
    done = run(*flags, code=1)
    assert sentence in done.err and done.err.count("\n") == 1 and not Path("exps").exists()


@pytest.mark.parametrize("loss", ["l2", "huber", "features"])
def test_other_losses_bring_the_image_nearer_too(run: Any, loss: str) -> None:
    path = folder(run(f"--loss={loss}", "--refine=12", "--lr=0.2"))
    rows = read_json_lines(path / "stats.jsonl")
    assert rows[-1]["best"] < 0.99 * rows[0]["held_out"]


def test_an_unpaired_term_compares_with_restart(run: Any) -> None:
    """Its images are computed once, from other latents than the pairs."""
    rows = [read_json_lines(folder(run(*more)) / "stats.jsonl") for more in ((), ("--unpaired=1",))]
    assert abs(rows[0][0]["loss"] - rows[1][0]["loss"]) > 10 * rows[0][0]["loss"]
    records = [RunRecord.read(path) for path in Path("cache/trajectories").glob("*/run.json")]
    plans = {(r.plan["teacher"], r.plan["seed"], r.plan["keep"]) for r in records}
    assert plans == {("heun", 0, "all"), ("restart", 1, "ends")}


def test_given_times_are_those_of_the_table(run: Any) -> None:
    done = run("--refine=0", "--times=80,20,3,0.2,0.002")
    student = load_student(str(folder(done)), "exps")
    assert isinstance(student, TrainedTable) and student.table.times.tolist() == [20, 3, 0.2]


def test_a_dry_run_touches_nothing(run: Any) -> None:
    done = run("-n")
    assert json.loads(done.out)["plan"]["teacher_nfe"] == 35
    assert not list(Path().iterdir())
