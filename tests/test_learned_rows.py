"""Restart walked by students, against Heun on the same nodes at equal NFE."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from amed.experiments import save_predictor
from commands import compare
from comparison.report.table import own_row, write_report
from comparison.rows import TrainedStudent, distinct, learned_restart_rows
from evaluation.harness import measure
from plans.plan import Jump
from runtime.record import RunRecord
from tests.comparison_problems import CARD, make_harness
from tests.sampler_models import trained

INFO = '{"0": [2, 1, 0.5, 5]}'
WORDS = ["AMED-Solver main", "AMED-Solver descents", "AMED-Solver"]


def student(name: str, kind: str = "amed", nodes: int = 4) -> TrainedStudent:
    student = trained("cifar10-small", kind, nodes, True)
    predictor, settings, record = student.predictor, student.settings, student.record
    options = {**record.options, "total_kimg": 0.5}
    return TrainedStudent(name, predictor, settings, replace(record, options=options))


def test_each_row_has_heun_on_its_nodes_at_its_nfe():
    rows = learned_restart_rows([student("00001"), student("00002", "ipndm")], CARD, INFO)
    learned = [row for row in rows if row.group == "learned"]
    assert [row.method for row in learned[:3]] == [f"Restart, {words}" for words in WORDS]
    assert len(learned) == 6 and len(rows) == 6 + 2  # one Heun for main and both, one for descents
    for row in learned:
        (heun,) = [r for r in rows if r.method == row.own_solver and r.budget == row.budget]
        assert heun.sampler.nfe == row.sampler.nfe == row.budget
        assert heun.sampler.describe()["times"] == row.sampler.describe()["times"]
        ours, theirs = heun.sampler.plan, row.sampler.plan
        assert [p for p in ours if isinstance(p, Jump)] == [
            p for p in theirs if isinstance(p, Jump)
        ]
        assert [getattr(p, "afs", None) for p in ours] == [getattr(p, "afs", None) for p in theirs]
        assert not any(getattr(p, "guide", None) for p in ours)
    # 4 nodes: 5 evaluations with the free step, or 7 and the final 0; and 2 more in the descent
    assert [row.budget for row in learned[:3]] == [7, 9, 7]


def test_the_number_of_a_line_is_that_of_the_other_main_walk():
    rows = learned_restart_rows([student("00001")], CARD, f"6 {INFO}")
    nodes = {r.method: r.sampler.settings["num_steps"] for r in rows if r.group == "learned"}
    assert [nodes[f"Restart, {words}"] for words in WORDS] == [4, 6, 4]
    own = learned_restart_rows([student("00001")], CARD)  # the model's own intervals
    assert own[0].sampler.settings["restart_info"] == {"0": [3, 2, 0.06, 0.3]}


def test_two_students_of_one_kind_share_heun_and_keep_their_files():
    rows = distinct(learned_restart_rows([student("00001"), student("00002")], CARD, INFO))
    assert len(rows) == 6 + 2 and len({row.key for row in rows}) == 8
    others = learned_restart_rows([student("00001"), student("00003", nodes=5)], CARD, INFO)
    assert len(others) == 6 + 4  # other nodes


def test_the_table_holds_learned_segments_against_heun(tmp_path):
    harness = make_harness()
    rows = learned_restart_rows([student("00001", nodes=3)], CARD, INFO)
    results = [measure(row, harness, tmp_path, lambda n: None) for row in rows]
    assert all(r["nfe_metered"] == r["nfe_planned"] for r in results)
    write_report(tmp_path, RunRecord.make("compare", {}, {}, {}), results)
    table = (tmp_path / "table.md").read_text()
    for result in results:
        own = own_row(result, results) if result["own_solver"] else None
        assert (own is None) == (result["group"] == "restart")
        if own:
            gain = f"{result['fid'] - own['fid']:+.2f} ({own['method']})"
            assert f"| {gain} |" in table and gain != f"+0.00 ({own['method']})"


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = student("00001")
    save_predictor("exps/00001-small/predictor.safetensors", s.predictor, s.record)
    flags = ["-n", "--device=cpu", "--predictors=1", "--ceilings=False", "--budgets=none"]
    done = CliRunner().invoke(
        compare.main, [*flags, "--with=learned-restart", f"--restart_info={INFO}"]
    )
    assert done.exit_code == 0, done.output
    for line in (
        "7 NFE: Restart, AMED-Solver main, heun teacher, M = 1; {",
        "7 NFE: Restart, Heun (polynomial 7.0, no 0), {",
        "9 NFE: Restart, AMED-Solver descents, heun",
        "9 NFE: Restart, Heun (polynomial 7.0), {",
    ):
        assert line in done.output
    for more, sentence in (
        ([], "predictor 00001-small spends none of the budgets none"),
        ([f"--restart_info={INFO}"], "means nothing without --with learned-restart"),
        (["--with=learned-restart", "--restart_info={"], "is not valid JSON"),
    ):
        done = CliRunner().invoke(compare.main, [*flags, "--ceilings=True", *more])
        assert sentence in str(done.exception), done.output
    done = CliRunner().invoke(compare.main, ["-n", "--device=cpu", "--with=learned-restart"])
    assert "has nobody to walk it: give --predictors" in str(done.exception)


@pytest.mark.parametrize("guided", [False, True])
def test_heun_is_guided_as_the_student_is(guided):
    s = student("00001")
    if guided:
        s = replace(s, settings=replace(s.settings, guidance_rate=2.0))
    card = replace(CARD, guidance="cfg")
    rows = learned_restart_rows([s], card, INFO)
    assert {row.sampler.cost for row in rows} == {1 + guided}
    assert [row.budget for row in rows] == [n * (1 + guided) for n in (7, 7, 9, 9, 7)]
