"""Students as rows: what they are compared with, and Restart with Heun in their place."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from commands import compare
from comparison.baselines import completed, own_solver_row
from comparison.measure import measure
from comparison.report.write import write_report
from comparison.rows import classic_rows, distinct
from comparison.students import learned_restart_rows, learned_rows
from plans.plan import Jump
from runtime.record import RunRecord
from tests.comparison_problems import (
    CARD,
    guided_card,
    make_harness,
    save_students,
    small_student,
)

INFO = '{"0": [2, 1, 0.5, 5]}'
WORDS = ["AMED-Solver main", "AMED-Solver descents", "AMED-Solver"]


@pytest.mark.parametrize(
    ("kind", "nodes", "afs", "nfe", "own"),
    [
        ("amed", 4, True, 5, "DPM-Solver-2 + AFS"),
        ("amed", 3, False, 4, "DPM-Solver-2"),
        ("dpm", 4, True, 5, "DPM-Solver-2 + AFS"),
        ("dpm", 3, False, 4, "DPM-Solver-2"),
        ("ipndm", 4, True, 5, "iPNDM(4) + AFS"),
        ("ipndm", 3, False, 4, "iPNDM(4)"),
        ("dpmpp", 4, True, 5, "DPM-Solver++(3) + AFS"),
        ("dpmpp", 3, False, 4, "DPM-Solver++(3)"),
        ("euler", 4, True, 5, "Euler + AFS"),
        ("euler", 3, False, 4, "Euler"),
    ],
)
def test_a_student_is_compared_with_its_solver_with_the_same_first_step(
    kind: str, nodes: int, afs: bool, nfe: int, own: str
) -> None:
    (row,) = learned_rows([small_student("1", kind, nodes, afs)], CARD)
    assert (row.group, row.budget, row.own_solver) == ("learned", nfe, own)
    (other,) = [classic for classic in classic_rows(nfe, CARD) if classic.method == own]
    assert other.sampler.options.afs == afs and other.sampler.nfe == row.sampler.nfe
    assert other.sampler.options.sampler == ("dpm" if kind == "amed" else kind)


def test_each_row_has_heun_on_its_nodes_at_its_nfe() -> None:
    students = [small_student("00001"), small_student("00002", "ipndm")]
    rows = learned_restart_rows(students, CARD, INFO)
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


def test_the_number_of_a_line_is_that_of_the_other_main_walk() -> None:
    rows = learned_restart_rows([small_student("00001")], CARD, f"6 {INFO}")
    nodes = {r.method: r.sampler.options.num_steps for r in rows if r.group == "learned"}
    assert [nodes[f"Restart, {words}"] for words in WORDS] == [4, 6, 4]
    own = learned_restart_rows([small_student("00001")], CARD)  # the model's own intervals
    assert own[0].sampler.options.restart_info == '{"0": [3, 2, 0.14, 0.3]}'


def test_two_students_of_one_kind_share_heun_and_keep_their_files() -> None:
    twins = [small_student("00001"), small_student("00002")]
    rows = distinct(learned_restart_rows(twins, CARD, INFO))
    assert len(rows) == 6 + 2 and len({row.key for row in rows}) == 8
    others = [small_student("00001"), small_student("00003", nodes=5)]
    assert len(learned_restart_rows(others, CARD, INFO)) == 6 + 4  # other nodes


def test_the_table_holds_learned_segments_against_heun(tmp_path) -> None:
    harness = make_harness()
    rows = learned_restart_rows([small_student("00001", nodes=3)], CARD, INFO)
    measured = [measure(row, harness, tmp_path, lambda n: None) for row in rows]
    assert all(r.nfe_metered == r.nfe_planned for r in measured)
    write_report(tmp_path, completed(RunRecord.make("compare", {}, {}, {}), measured))
    table = (tmp_path / "table.md").read_text()
    for row in measured:
        own = own_solver_row(row, measured)
        assert (own is None) == (row.group == "restart")
        if own:
            gain = f"{row.fid - own.fid:+.2f} ({own.method})"
            assert f"| {gain} |" in table and gain != f"+0.00 ({own.method})"


def test_from_the_command_line(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_students(tmp_path / "exps", small_student("00001"))
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
        ([], "predictor 00001-small spends 5 NFE, which is not among --budgets none"),
        ([f"--restart_info={INFO}"], "requires --with learned-restart"),
        (["--with=learned-restart", "--restart_info={"], "is not valid JSON"),
    ):
        done = CliRunner().invoke(compare.main, [*flags, "--ceilings=True", *more])
        assert sentence in str(done.exception), done.output
    done = CliRunner().invoke(compare.main, ["-n", "--device=cpu", "--with=learned-restart"])
    assert "needs --predictors" in str(done.exception)


@pytest.mark.parametrize("rate", [None, 2.0])
def test_heun_is_guided_as_the_student_is(rate: float | None) -> None:
    student = small_student("00001", guidance_rate=rate)
    rows = learned_restart_rows([student], guided_card(), INFO, rate)
    cost = 1 if rate is None else 2
    assert {row.sampler.cost for row in rows} == {cost}
    assert {row.sampler.guidance_rate for row in rows} == {rate}
    assert [row.budget for row in rows] == [n * cost for n in (7, 7, 9, 9, 7)]
