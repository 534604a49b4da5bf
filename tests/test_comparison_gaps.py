"""Which rows of a comparison differ: from kept features to the cells of the table."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from comparison.baselines import completed, ordered
from comparison.measure import measure
from comparison.report.html import write_page
from comparison.report.table import columns
from comparison.report.write import write_report
from comparison.results import ComparisonResults, MeasuredRow
from comparison.rows import Row
from comparison.significance import with_gaps
from evaluation.harness import Harness
from metrics.detectors import Detector
from metrics.fid import gather
from metrics.paired import LEVEL, Gap, gap, influences
from metrics.statistics import DetectorId, Statistics
from metrics.summary import FeatureSummary
from runtime.images import to_uint8
from runtime.record import RunRecord
from runtime.typed import from_plain, read_result, to_plain
from samplers.build import build
from samplers.generate import generate
from samplers.options import SamplerOptions
from tests.comparison_problems import harness_of
from tests.sampler_models import GaussianModel

CPU = torch.device("cpu")
N = 24
DETECTOR = Detector(
    DetectorId("means", "1" * 64, 3), lambda x: x.float().mean((2, 3)) / 255, CPU
)  # fmt: skip
MODEL = GaussianModel()


def batches(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 150 + 40 * torch.randn(count, 3, 4, 4, generator=generator)
    return x.clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def harness() -> Harness:
    reference = gather([batches(500)], DETECTOR, "data")
    return harness_of(MODEL, DETECTOR, reference, range(N), 5, dtype=torch.float64)


def row(name: str, nfe: int = 4, method: str | None = None, own: str | None = None) -> Row:
    sampler = build(SamplerOptions(sampler=name, nfe=nfe), MODEL.card)
    return Row(method or name, "learned" if own else "classic", 4, sampler, "d", own)


@pytest.fixture(scope="module")
def measured(
    harness: Harness, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[MeasuredRow]]:
    folder = tmp_path_factory.mktemp("rows")
    rows = [row("euler"), row("ipndm"), row("euler", method="twin", own="euler")]
    return folder, [measure(r, harness, folder, lambda n: None) for r in rows]


def side(harness: Harness, name: str) -> tuple[float, np.ndarray]:
    """FID and influences of images that are made anew, at once and in the order of the seeds."""
    (made,) = generate(row(name).sampler, MODEL, range(N), batch=N, device="cpu",
                       dtype=torch.float64)  # fmt: skip
    features = DETECTOR(torch.from_numpy(to_uint8(made.images)).permute(0, 3, 1, 2))
    stats = Statistics(DETECTOR.id)
    stats.update(features)
    return stats.fid(harness.reference), influences(features, stats, harness.reference)


def test_a_row_keeps_its_features_in_the_order_of_its_seeds(
    harness: Harness, measured: tuple[Path, list[MeasuredRow]]
) -> None:
    folder, results = measured
    kept = FeatureSummary.load(folder / str(results[0].statistics), DETECTOR)
    (made,) = generate(row("euler").sampler, MODEL, range(N), batch=N, device="cpu",
                       dtype=torch.float64)  # fmt: skip
    wanted = DETECTOR(torch.from_numpy(to_uint8(made.images)).permute(0, 3, 1, 2))
    assert kept.features is not None and torch.equal(kept.features, wanted)
    assert kept.moments.fid(harness.reference) == pytest.approx(results[0].fid, rel=1e-10)


def test_rows_are_held_against_the_best_and_their_own_solver(
    harness: Harness, measured: tuple[Path, list[MeasuredRow]]
) -> None:
    folder, results = measured
    euler, ipndm, twin = with_gaps(results, harness, folder)
    by_hand = gap(side(harness, "euler"), side(harness, "ipndm"), N)
    sign = 1 if euler.fid > ipndm.fid else -1
    worse, best = (euler, ipndm) if sign > 0 else (ipndm, euler)
    found = worse.to_best
    assert best.to_best is None and found is not None
    assert found.difference == pytest.approx(sign * by_hand.difference, rel=1e-8)
    assert found.error == pytest.approx(by_hand.error, rel=1e-6) and by_hand.error > 0
    # two rows were compared with the best: the smaller p counts twice
    assert found.p == pytest.approx(min(1.0, 2 * by_hand.p), rel=1e-6)
    assert twin.to_own == Gap(0.0, 0.0, 1.0) and euler.to_own is None
    assert from_plain(MeasuredRow, json.loads(json.dumps(to_plain(worse))), "row") == worse


def test_the_own_solver_of_another_budget_is_another_row(
    harness: Harness, measured: tuple[Path, list[MeasuredRow]]
) -> None:
    folder, (euler, ipndm, twin) = measured
    own = replace(ipndm, method="euler", budget=3)
    at_3 = replace(twin, budget=3)
    *_, first, second = with_gaps([own, euler, twin, at_3], harness, folder)
    assert first.to_own == Gap(0.0, 0.0, 1.0)
    assert second.to_own is not None
    assert second.to_own.difference == pytest.approx(euler.fid - ipndm.fid) != 0
    *_, alone = with_gaps([own, twin], harness, folder)
    assert alone.to_own is None


def test_the_table_says_which_rows_are_told_apart(
    harness: Harness, measured: tuple[Path, list[MeasuredRow]]
) -> None:
    folder, results = measured
    model = {"name": "tiny", "sha256": "0" * 64}
    record = RunRecord.make("compare", {}, model, to_plain(harness.identity))
    write_report(folder, completed(record, with_gaps(results, harness, folder)))
    whole = read_result(ComparisonResults, folder / "results.json")
    assert whole is not None
    cells = columns(whole.rows)["to best"]
    assert cells[0] == "best"
    for r, text in zip(whole.rows[1:], cells[1:], strict=True):
        found = r.to_best
        same = " =" if found is not None and found.p >= LEVEL else ""
        wanted = f"{found.difference:+.2f} +- {found.error:.2f}{same}" if found else "best"
        assert text == wanted
    own = columns(whole.rows)["vs own solver"]
    by_method = dict(zip((r.method for r in whole.rows), own, strict=True))
    assert by_method["twin"] == "+0.00 +- 0.00 = (euler)"
    table = (folder / "table.md").read_text()
    assert "these 24 images cannot tell the two apart (p >= 0.05;" in table
    with open(folder / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    for r, line in zip(whole.rows, read, strict=True):
        parts = [line[f"to_best_{part}"] for part in ("difference", "error", "p")]
        gap_ = r.to_best
        assert parts == (["", "", ""] if gap_ is None else [
            str(gap_.difference), str(gap_.error), str(gap_.p)])  # fmt: skip
    assert not {"statistics", "to_best", "identity", "schema", "fid_converged"} & set(read[0])
    assert "cannot tell the two apart" in write_page(folder).read_text()


@pytest.mark.parametrize("lack", ["file", "key", "images"])
def test_what_cannot_be_tested_is_left_blank(
    lack: str, harness: Harness, tmp_path: Path
) -> None:  # fmt: skip
    """Rows of an older version, which kept nothing; and fewer images than two a feature."""
    seeds = range(4) if lack == "images" else range(N)
    fewer = replace(harness, seeds=seeds)
    results = [measure(row(n), fewer, tmp_path, lambda n: None) for n in ("euler", "ipndm")]
    if lack == "file":
        (tmp_path / str(results[0].statistics)).unlink()
    if lack == "key":
        results[0] = replace(results[0], statistics=None)
    rows = ordered(with_gaps(results, fewer, tmp_path))
    assert [(r.to_best, r.to_own) for r in rows] == [(None, None)] * 2
    assert "to best" not in columns(rows)
    write_report(tmp_path, completed(RunRecord.make("compare", {}, {}, {}), rows))
    assert "too few images to say which rows differ" in (tmp_path / "table.md").read_text()


def test_another_reference_of_the_same_name_is_measured_anew(
    harness: Harness, tmp_path: Path
) -> None:
    """Known by the hash of its images."""
    other = gather([batches(500, 1)], DETECTOR, "data")
    other.source_sha256 = "ab" * 32
    changed = replace(harness, reference=other)
    rows = [measure(row("euler"), h, tmp_path, lambda n: None) for h in (harness, changed, changed)]
    assert rows[0].fid != rows[1].fid and rows[1] == rows[2]
    assert rows[1].identity.harness.reference_sha256 == "ab" * 32
