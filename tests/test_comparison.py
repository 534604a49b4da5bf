"""The comparison: rows spend their budget, choices are made elsewhere, results are kept."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import comparison.job
from commands import compare
from comparison.baselines import completed, ordered, own_solver_row
from comparison.job import CompareOptions
from comparison.job import prepare as prepare_comparison
from comparison.measure import measure
from comparison.report.table import markdown
from comparison.report.write import write_report
from comparison.results import ComparisonResults, MeasuredRow
from comparison.rows import Row, ceiling_rows, classic_rows, distinct, pds_rows, restart_row
from evaluation.harness import SHOWN, Harness
from metrics.fid import block_fid
from metrics.statistics import Statistics
from plan_search.objectives import (
    SELECTION_START,
    Space,
    choose_restart,
    restart_sampler,
    selection_cost,
)
from runtime.errors import UserError
from runtime.images import to_uint8
from runtime.log import progress
from runtime.record import RunRecord
from runtime.typed import read_result
from samplers.generate import generate
from samplers.options import SamplerOptions
from tests.comparison_problems import CARD, HERE, OPTIONS, forbid_loading, make_harness


@pytest.fixture(scope="module")
def harness() -> Harness:
    return make_harness()


RECORD = RunRecord.make("compare", {}, {"name": "mixture", "sha256": "0" * 64}, {})


@pytest.mark.parametrize("budget", [3, 4, 5, 7])
def test_classic_rows_spend_exactly_the_budget(budget):
    rows = classic_rows(budget, CARD)
    assert all(row.sampler.nfe == budget for row in rows)
    dpm = [row.method for row in rows if row.method.startswith("DPM-Solver-2")]
    # two evaluations per interval, one saved by AFS: parity decides which of the two exists
    assert dpm == ["DPM-Solver-2 + AFS" if budget % 2 else "DPM-Solver-2"]
    others = {row.method for row in rows} - set(dpm)
    names = ("Euler", "DPM-Solver++(3)", "iPNDM(4)")
    assert others == {*names, *(f"{name} + AFS" for name in names)}


def test_the_classic_solvers_can_be_chosen():
    chosen = classic_rows(5, CARD, solvers="unipc,deis, ipndm_v,deis")
    assert [(row.method, row.detail) for row in chosen] == [
        ("UniPC(3)", "logsnr, 6 nodes"), ("UniPC(3) + AFS", "logsnr, 7 nodes"),
        ("DEIS(3)", "polynomial, 6 nodes"), ("DEIS(3) + AFS", "polynomial, 7 nodes"),
        ("iPNDM_v(4)", "polynomial, 6 nodes"), ("iPNDM_v(4) + AFS", "polynomial, 7 nodes"),
    ]  # fmt: skip
    assert all(row.sampler.nfe == 5 for row in chosen)
    options = CompareOptions(OPTIONS, budgets="5", solvers="unipc", num=8)
    methods = [row.method for row in prepare_comparison(options).rows[5]]
    assert methods == ["UniPC(3)", "UniPC(3) + AFS"]
    for bad in ("unipc,heun", ""):
        with pytest.raises(UserError, match=f"--solvers '{bad}' is not a list of euler, dpm"):
            classic_rows(5, CARD, solvers=bad)


def test_ceilings_are_the_published_budgets():
    assert [(r.method, r.sampler.nfe) for r in ceiling_rows(CARD)] == [
        ("Heun-35", 35),
        ("Restart-43", 43),
    ]


def test_pds_is_listed_with_and_without_masks_at_its_real_nfe(harness, tmp_path):
    rows = pds_rows([3, 2], CARD)
    assert [(r.method, r.budget, r.detail) for r in rows] == [
        ("predictor-corrector", 6, "3 iterations"), ("PDS", 6, "3 iterations, freq mask"),
        ("predictor-corrector", 4, "2 iterations"), ("PDS", 4, "2 iterations, freq mask"),
    ]  # fmt: skip
    masks = SamplerOptions(freq_mask_path="bundled", space_mask_path="bundled")
    both = pds_rows([4], CARD, masks)[1]
    assert both.sampler.label == "pds-freq-space"
    assert both.detail == "4 iterations, freq mask, space mask"
    measured = [measure(row, harness, tmp_path, lambda n: None) for row in rows]
    assert [r.nfe_metered for r in measured] == [6, 6, 4, 4]
    assert len({r.fid for r in measured}) == 4
    write_report(tmp_path, completed(RECORD, measured))
    assert "| PDS | 6 |" in (tmp_path / "table.md").read_text()


def test_rows_of_one_kind_keep_two_files():
    row = classic_rows(5, CARD)[0]
    twins = [Row(row.method, "learned", 5, row.sampler, "heun teacher") for _ in range(2)]
    assert len({r.key for r in distinct(twins)}) == 2


def test_a_row_is_the_fid_of_its_images(harness, tmp_path):
    row = classic_rows(3, CARD)[0]
    found = measure(row, harness, tmp_path, lambda n: None)
    blocks = []
    for seeds in (range(6), range(6, 12)):
        stats = Statistics(harness.detector.id)
        for made in generate(row.sampler, harness.model, seeds, batch=5, device="cpu"):
            pixels = torch.from_numpy(to_uint8(made.x)).permute(0, 3, 1, 2)
            stats.update(harness.detector(pixels))
        blocks.append(stats)
    truth = block_fid(blocks, harness.reference)
    assert found.fid == pytest.approx(truth.fid, abs=1e-8)
    assert found.fid_blocks == pytest.approx(truth.blocks, abs=1e-8)
    assert found.nfe_metered == found.nfe_planned == 3
    strip = np.asarray(Image.open(tmp_path / found.pictures))
    first = next(generate(row.sampler, harness.model, range(SHOWN), batch=SHOWN, device="cpu"))
    assert np.array_equal(strip, np.concatenate(list(to_uint8(first.x)), axis=1))


def test_a_measured_row_is_kept_and_a_changed_one_measured_again(harness, tmp_path):
    row, other = classic_rows(3, CARD)[:2]
    first = measure(row, harness, tmp_path, lambda n: None)
    file = tmp_path / "rows" / f"{row.key}.json"
    assert read_result(MeasuredRow, file) == first
    content = json.loads(file.read_text())
    assert content["schema"] == 1 and "fid_converged" not in content
    del content["schema"]  # as files of version 1 are
    file.write_text(json.dumps({**content, "fid": -1.0}))
    assert measure(row, harness, tmp_path, lambda n: None).fid == -1.0
    changed = Row(row.method, row.group, row.budget, other.sampler, row.detail)
    assert changed.key == row.key
    assert measure(changed, harness, tmp_path, lambda n: None).fid > 0
    file.write_text("{ torn")
    assert measure(row, harness, tmp_path, lambda n: None).fid == pytest.approx(first.fid)


def test_restart_is_held_against_the_solver_of_its_main_walk():
    titles = {row.method for row in classic_rows(5, CARD)}
    for candidate in Space().field(5, CARD):
        row = restart_row(5, restart_sampler(candidate, CARD))
        own = "iPNDM(4) + AFS" if candidate.label.startswith("ipndm") else None
        assert row.own_solver == own and (own is None or own in titles)


def test_restart_is_chosen_by_fid_on_seeds_of_its_own(harness, tmp_path, monkeypatch):
    asked: dict[str, list] = {}
    original = Harness.fid

    def spy(self, sampler, seeds, blocks, tick):
        result = original(self, sampler, seeds, blocks, tick)
        asked.setdefault(sampler.label, []).append((seeds, result[0].fid))
        return result

    monkeypatch.setattr(Harness, "fid", spy)
    images: list[int] = []
    chosen = choose_restart(3, harness, [4, 8], tmp_path, images.append)
    assert chosen.nfe == 3
    assert sum(images) == selection_cost(3, CARD, None, [4, 8])
    assert min(min(seeds) for runs in asked.values() for seeds, _ in runs) == SELECTION_START
    finals = {label: runs[1][1] for label, runs in asked.items() if len(runs) == 2}
    assert len(finals) == 3 and len(asked) == 12  # a quarter goes on
    opening = sorted((runs[0][1], label) for label, runs in asked.items())
    assert {label for _, label in opening[:3]} == set(finals)
    assert chosen.label == min(finals, key=lambda label: finals[label])
    asked.clear()
    assert choose_restart(3, harness, [4, 8], tmp_path, images.append).label == chosen.label
    assert not asked  # the trace on disk is the selection
    trace = json.loads((tmp_path / "selection-3.json").read_text())
    assert [len(entries) for entries in trace["rounds"]] == [12, 3]
    with pytest.raises(UserError, match="no Restart plan spends exactly 1 NFE"):
        choose_restart(1, harness, [4], tmp_path, images.append)


def _measured(harness, tmp_path) -> list[MeasuredRow]:
    rows = classic_rows(3, CARD)
    own = next(r for r in rows if r.method == "iPNDM(4) + AFS")
    euler = next(r for r in rows if r.method == "Euler + AFS")
    student = Row("AMED plugin on iPNDM", "learned", 3, euler.sampler, "heun teacher, M = 2",
                  "iPNDM(4) + AFS")  # fmt: skip
    listed = [own, euler, student, *ceiling_rows(CARD)[:1]]
    return [measure(row, harness, tmp_path, lambda n: None) for row in listed]


def test_the_report_says_what_was_measured(harness, tmp_path):
    measured = _measured(harness, tmp_path)
    results = completed(RECORD, measured)
    paths = write_report(tmp_path, results)
    assert [p.name for p in paths] == [
        "table.md", "table.csv", "results.json", "fid-nfe.json", "fid-nfe.png", "grid.png",
    ]  # fmt: skip
    rows = list(results.rows)
    assert [r.method for r in rows] == [r.method for r in ordered(measured)]
    assert rows[-1].method == "Heun-35"
    assert [r.fid for r in rows[:-1]] == sorted(r.fid for r in rows[:-1])
    student = next(r for r in rows if r.group == "learned")
    own = own_solver_row(student, rows)
    assert own is not None and own.method == "iPNDM(4) + AFS"
    table = (tmp_path / "table.md").read_text()
    assert table == markdown(rows)
    line = next(text for text in table.splitlines() if "**AMED plugin on iPNDM**" in text)
    assert f"{student.fid - own.fid:+.2f} (iPNDM(4) + AFS)" in line
    assert "detector **cifar10-small**" in table and "N = 12" in table
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [float(r["fid"]) for r in read] == [r.fid for r in rows]
    assert [r["excess"] for r in read] == ["" if r.excess is None else str(r.excess) for r in rows]
    assert {r["detector"] for r in read} == {"cifar10-small"}
    assert list(read[0])[:4] == ["method", "group", "budget", "detail"]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [r["method"] for r in saved["rows"]] == [r.method for r in rows]
    assert saved["record"]["command"] == "compare" and saved["schema"] == 1
    assert read_result(ComparisonResults, tmp_path / "results.json") == results


def test_the_picture_has_the_same_seeds_down_its_columns(harness, tmp_path):
    results = completed(RECORD, _measured(harness, tmp_path))
    write_report(tmp_path, results)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    height, width = 64 * len(results.rows), 64 * SHOWN  # shown at twice their size
    body = grid[grid.shape[0] - height :, grid.shape[1] - width :]
    for i, row in enumerate(results.rows):
        strip = np.asarray(Image.open(tmp_path / row.pictures))
        assert np.array_equal(body[64 * i : 64 * (i + 1) : 2, ::2], strip)


def test_a_job_chooses_measures_and_reports(harness, tmp_path, monkeypatch):
    bars = []

    def watched(*arguments, **more):
        bars.append(progress(*arguments, **more))
        return bars[-1]

    monkeypatch.setattr(comparison.job, "progress", watched)
    options = CompareOptions(
        OPTIONS, budgets="3", num=12, blocks=2, select="4,8", ceilings=False, outdir=tmp_path
    )
    job = prepare_comparison(options)
    said = job.run(HERE, harness)
    results = read_result(ComparisonResults, tmp_path / "results.json")
    assert results is not None and said.splitlines()[-1].startswith(str(tmp_path / "report.html"))
    assert [r.group for r in results.rows].count("restart") == 1
    assert {r.nfe_metered for r in results.rows} == {3}
    assert len(results.rows) == len(job.rows[3]) + 1
    assert bars[0].n == bars[0].total > 12 * 3 * len(results.rows)  # evaluations, equal in time
    record, plan = results.record, results.record.plan
    assert record == RunRecord.read(tmp_path / "run.json")
    assert record.options["num"] == 12 and record.options["detector"] == "cifar10-small"
    assert plan["reference_n"] == 50000 and plan["seeds"]["evaluation"] == "0-11"
    assert (plan["budgets"], plan["device"], plan["world_size"]) == ([3], "cpu", 1)


def test_restart_can_be_left_out(harness, tmp_path):
    """As it has to be at one evaluation, which no plan of Restart spends."""
    options = CompareOptions(
        OPTIONS, budgets="1", num=12, blocks=2, ceilings=False, outdir=tmp_path, solvers="euler"
    )
    with pytest.raises(UserError, match="or give compare.py --select none"):
        prepare_comparison(options)
    job = prepare_comparison(replace(options, select="none"))
    assert "Restart" not in job.outline() and job.selection_nfe == 0
    job.run(HERE, harness)
    results = read_result(ComparisonResults, tmp_path / "results.json")
    assert {(r.group, r.nfe_metered) for r in results.rows} == {("classic", 1)}
    assert results.record.plan["seeds"]["selection"] is None
    assert not list(tmp_path.glob("selection-*.json"))


def test_detectors_do_not_mix(harness, tmp_path):
    other = Statistics(harness.detector.id.__class__("other", "1" * 64, harness.detector.dim))
    other.update(torch.randn(8, harness.detector.dim))
    wrong = replace(harness, reference=other)
    with pytest.raises(ValueError, match="other"):
        measure(classic_rows(3, CARD)[0], wrong, tmp_path, lambda n: None)
    assert not list(Path(tmp_path).glob("rows/*.json"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budgets", "5,x"], "--budgets '5,x' is not a list of whole numbers"),
        (["--budgets", ""], "--budgets '' is not a list of whole numbers"),
        (["--num", "10", "--blocks", "4"], "give --num 8"),
        (
            ["--budgets", "none", "--ceilings", "False"],
            "--budgets none leaves no row: give budgets",
        ),
        (["--iterations", "50"], "--iterations 50 requires --with pds"),
        (
            ["--with", "pds", "--iterations", "1"],
            "--iterations '1' is not a list of whole numbers from 2 to",
        ),
        (
            ["--with", "pds", "--space_mask_path", "no.npy"],
            "--space_mask_path no.npy cannot be read",
        ),
        (["--select", "1"], "--select '1' is not a list of whole numbers from 2 to"),
        (["--select", "64,10000001"], "is not a list of whole numbers from 2 to 10000000"),
        (["--predictors", "no/such/run"], "there is no predictor at no/such/run"),
        (["--dataset_name", "cifar11"], "unknown dataset 'cifar11'"),
        (["--ref", "nothing.npz"], "nothing.npz"),
        (["-n", "--budgets", "1,5"], "no Restart plan spends exactly 1 NFE"),
    ],
)
def test_nonsense_is_one_sentence_and_leaves_nothing(flags, sentence, tmp_path):
    out = tmp_path / "report"
    done = CliRunner().invoke(compare.main, [*flags, "--outdir", str(out), "--device", "cpu"])
    assert isinstance(done.exception, ValueError | OSError), done.output
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not out.exists()


def test_a_dry_run_lists_the_rows_and_loads_nothing(tmp_path, monkeypatch):
    forbid_loading(monkeypatch)
    out = tmp_path / "report"
    flags = ["-n", "--budgets", "5", "--outdir", str(out), "--device", "cpu"]
    done = CliRunner().invoke(compare.main, flags, catch_exceptions=False)
    assert done.exit_code == 0 and not out.exists()
    assert "DPM-Solver-2 + AFS" in done.output and "ceilings: Heun-35, Restart-43" in done.output
    assert "PDS" not in done.output
    seeds = RunRecord.from_json(done.output[: done.output.index("\n}") + 2]).plan["seeds"]
    assert (seeds["evaluation"], seeds["selection"]) == ("0-1999", "10000000-10000255")
    flags = ["-n", "--budgets", "none", "--with", "pds", "--outdir", str(out), "--device", "cpu"]
    done = CliRunner().invoke(compare.main, flags, catch_exceptions=False)
    assert done.exit_code == 0 and not out.exists() and "DPM" not in done.output
    assert "100 NFE: PDS, 50 iterations, freq mask" in done.output
    flags = ["-n", "--dataset_name=imagenet64", "--detector=inception"]  # neither is bundled
    assert CliRunner().invoke(compare.main, flags, catch_exceptions=False).exit_code == 0
