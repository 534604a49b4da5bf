"""Rows that are taken over from earlier measurements."""

from __future__ import annotations

import csv
import json
from copy import copy
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.kept_rows import BUDGET, DETECTORS, SELECT, bundle
from comparison.job import CompareOptions, prepare
from comparison.kept_rows import BUNDLED, KeptRows, place
from comparison.measure import measure
from comparison.report.table import csv_text, markdown
from comparison.results import ComparisonResults, MeasuredRow
from comparison.rows import Row, ceiling_rows, classic_rows, restart_row
from denoisers.registry import ModelSource
from evaluation.harness import DetectorReference, Harness, HarnessOptions, open_harness
from metrics.detectors import load_detector
from metrics.statistics import Statistics
from metrics.summary import FeatureSummary
from plan_search.objectives import choose_restart
from runtime import typed
from runtime.images import to_uint8_tensor
from runtime.typed import read_result
from tests.comparison_problems import CARD, HERE, MixtureModel, make_harness

SOME = 1  #: images that are made again


def euler() -> Row:
    return classic_rows(3, CARD)[0]


@pytest.fixture
def spent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The samplers that were measured."""
    labels: list[str] = []
    fid = Harness.fid

    def counted(harness: Harness, sampler, *more):
        labels.append(sampler.label)
        return fid(harness, sampler, *more)

    monkeypatch.setattr(Harness, "fid", counted)
    return labels


def test_a_row_is_taken_over_with_its_files(tmp_path: Path, spent: list[str]) -> None:
    harness, kept, row = make_harness(), KeptRows((tmp_path / "kept",)), euler()
    first = measure(row, harness, tmp_path / "a", lambda n: None, kept)
    ticks: list[int] = []
    named = replace(row, method="Euler's", detail="other words")
    found = measure(named, harness, tmp_path / "b", ticks.append, kept)
    assert spent == ["euler"] and ticks == [12]
    assert not first.kept and found.kept
    assert (found.method, found.detail) == ("Euler's", "other words")
    assert (found.fid, found.fid_blocks, found.created) == (
        first.fid, first.fid_blocks, first.created,
    )  # fmt: skip
    for name in ("pictures", "statistics"):
        one, two = (
            (tmp_path / "a" / getattr(first, name)).read_bytes(),
            (tmp_path / "b" / getattr(found, name)).read_bytes(),
        )
        assert one == two
    assert measure(named, harness, tmp_path / "b", lambda n: None) == found  # its own by now
    text = markdown([found])
    assert "| Euler's * |" in text and "*: measured earlier" in text and "--no_cache" in text
    assert " * " not in markdown([first]) and "--no_cache" not in markdown([first])


OTHERS = {
    "sampler": lambda row, h: (classic_rows(3, CARD)[-1], h),
    "seeds": lambda row, h: (row, replace(h, seeds=range(1, 13))),
    "blocks": lambda row, h: (row, replace(h, blocks=3)),
    "dtype": lambda row, h: (row, replace(h, precision="bfloat16")),
    "model": lambda row, h: (row, replace(h, model=OtherModel())),
    "reference": lambda row, h: (row, replace(h, reference=replace_source(h.reference))),
    "group": lambda row, h: (replace(row, group="learned"), h),
}  # fmt: skip


class OtherModel(MixtureModel):
    sha256 = "1" * 64


def other_detector() -> DetectorReference:
    """Its reference is the latents."""
    pixels = load_detector("pixels", device="cpu")
    data = Statistics(pixels.id, "noise")
    data.update(pixels(torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)))
    return DetectorReference(pixels, data)


def test_every_detector_judges_the_same_images(tmp_path: Path) -> None:
    """As a comparison with that detector alone would."""
    other, row, harness = other_detector(), euler(), make_harness()
    both = measure(row, replace(harness, others=(other,)), tmp_path / "a", lambda n: None)
    first = measure(row, harness, tmp_path / "b", lambda n: None)
    alone = replace(harness, detector=other.detector, reference=other.statistics)
    second = measure(row, alone, tmp_path / "c", lambda n: None)
    assert both.fid == first.fid and both.fid_others == pytest.approx((second.fid,), rel=1e-9)
    header, cells = (line.split("|") for line in markdown([both]).splitlines()[2:5:2])
    place = header.index(" FID (pixels) ")
    assert cells[place - 1 : place + 1] == [f" {both.fid:.2f} ", f" {second.fid:.2f} "]
    (line,) = csv.DictReader(csv_text([both]).splitlines())
    assert both.fid_others == (float(line["fid_pixels"]),)


def test_a_row_by_more_detectors_serves_fewer_and_no_others(
    tmp_path: Path, spent: list[str]
) -> None:
    harness, kept, row = make_harness(), KeptRows((tmp_path / "kept",)), euler()
    both = replace(harness, others=(other_detector(),))
    measure(row, harness, tmp_path / "a", lambda n: None, kept)
    full = measure(row, both, tmp_path / "b", lambda n: None, kept)
    assert not full.kept and len(spent) == 2  # the kept row lacked the second
    fewer = measure(row, harness, tmp_path / "c", lambda n: None, kept)
    assert fewer.kept and fewer.fid_others is None and fewer.identity.harness.others is None
    again = measure(row, both, tmp_path / "d", lambda n: None, kept)
    assert again.kept and again.fid_others == full.fid_others and len(spent) == 2
    (other,) = both.others
    changed = DetectorReference(other.detector, replace_source(other.statistics))
    assert not measure(
        row, replace(both, others=(changed,)), tmp_path / "e", lambda n: None, kept
    ).kept


def replace_source(reference: Statistics) -> Statistics:
    other = copy(reference)
    other.source_sha256 = "3" * 64
    return other


@pytest.mark.parametrize("change", OTHERS)
def test_another_row_is_measured(change: str, tmp_path: Path, spent: list[str]) -> None:
    harness, kept, row = make_harness(), KeptRows((tmp_path / "kept",)), euler()
    measure(row, harness, tmp_path / "a", lambda n: None, kept)
    row, harness = OTHERS[change](row, harness)
    assert not measure(row, harness, tmp_path / "b", lambda n: None, kept).kept
    assert len(spent) == 2


def test_rows_of_another_detector_device_or_version_have_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = measure(euler(), make_harness(), tmp_path, lambda n: None).identity
    assert (identity.dtype, identity.device) == ("float32", "cpu")
    here = place(identity, tmp_path)
    assert here == place(replace(identity), tmp_path)
    detector = replace(identity.harness, detector_sha256="2" * 64)
    assert here != place(replace(identity, harness=detector), tmp_path)
    assert here != place(replace(identity, device="cuda"), tmp_path)
    monkeypatch.setattr(typed, "__version__", "99")
    assert here != place(identity, tmp_path)


@pytest.mark.parametrize(
    ("ending", "damage"),
    [*product((".json", ".npz"), (b"", b"{}", None)), (".png", None)],
)
def test_a_damaged_row_is_measured_again(
    ending: str, damage: bytes | None, tmp_path: Path, spent: list[str]
) -> None:
    harness, kept, row = make_harness(), KeptRows((tmp_path / "kept",)), euler()
    first = measure(row, harness, tmp_path / "a", lambda n: None, kept)
    (file,) = (tmp_path / "kept").glob(f"*{ending}")
    file.write_bytes(damage) if damage is not None else file.unlink()
    found = measure(row, harness, tmp_path / "b", lambda n: None, kept)
    assert not found.kept and found.fid == first.fid and len(spent) == 2
    assert measure(row, harness, tmp_path / "c", lambda n: None, kept).kept  # mended


def test_numbers_that_are_not_those_of_the_statistics_are_measured_again(
    tmp_path: Path, spent: list[str]
) -> None:
    harness, kept, row = make_harness(), KeptRows((tmp_path / "kept",)), euler()
    measure(row, harness, tmp_path / "a", lambda n: None, kept)
    (file,) = (tmp_path / "kept").glob("*.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "fid": 1.01 * content["fid"]}))
    assert not measure(row, harness, tmp_path / "b", lambda n: None, kept).kept
    assert len(spent) == 2


def test_a_folder_that_cannot_be_written_costs_the_keeping_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    kept = KeptRows((tmp_path / "file" / "rows",))
    found = measure(euler(), make_harness(), tmp_path / "a", lambda n: None, kept)
    assert read_result(MeasuredRow, tmp_path / "a" / "rows" / "nfe003-euler.json") == found
    assert "Euler is not kept for other comparisons" in capsys.readouterr().err


def test_no_cache_measures_every_row(tmp_path: Path) -> None:
    options = CompareOptions(bundled(), budgets="none", outdir=tmp_path)
    assert prepare(options).kept == KeptRows.of(None)
    assert prepare(replace(options, no_cache=True)).kept == KeptRows()


def bundled() -> HarnessOptions:
    return HarnessOptions(ModelSource("cifar10-small"))


ROWS = [*classic_rows(BUDGET, CARD), *ceiling_rows(CARD)]


@pytest.fixture(scope="module")
def default_run() -> Harness:
    """That of the default run's comparison."""
    return open_harness(replace(bundled(), detector=DETECTORS), range(1500), 4, HERE)


def test_the_bundled_rows_are_those_of_the_bundled_model(
    tmp_path: Path, spent: list[str], default_run: Harness
) -> None:
    """The default run finds them, and their features are those of images made here."""
    kept, images = [], []
    for row in ROWS:
        found = measure(row, default_run, tmp_path, lambda n: None, KeptRows((BUNDLED,)))
        assert found.kept and not spent and found.n == 1500
        summary = FeatureSummary.load(tmp_path / str(found.statistics), default_run.detector)
        assert summary.features is not None
        kept.append(summary.features)
        made = next(default_run.generate(row.sampler, range(SOME), batch=SOME))
        images.append(to_uint8_tensor(made.images))
    again = default_run.detector(torch.cat(images)).split(SOME)
    for features, new in zip(kept, again, strict=True):
        some, others = features[:SOME], features[SOME:]
        assert (new - some).norm() < 0.01 * (some - others.mean(0)).norm()


def test_restarts_plan_in_the_default_run_is_bundled_with_its_row(
    tmp_path: Path, spent: list[str], default_run: Harness
) -> None:
    rounds, folders = [int(n) for n in SELECT.split(",")], (BUNDLED,)
    sampler = choose_restart(BUDGET, default_run, rounds, tmp_path, lambda n: None, folders)
    row = restart_row(BUDGET, sampler)
    found = measure(row, default_run, tmp_path, lambda n: None, KeptRows(folders))
    assert found.kept and not spent


def test_bundling_keeps_the_numbers(tmp_path: Path) -> None:
    """Those of every row of a comparison, and the choice of its plan."""
    seeds, folder, dest = range(320), tmp_path / "a", tmp_path / "kept"
    asked = CompareOptions(
        bundled(), budgets="3", num=len(seeds), blocks=2, select="2", ceilings=False,
        solvers="euler", no_cache=True, outdir=folder,
    )  # fmt: skip
    harness = make_harness(seeds)
    prepare(asked).run(HERE, harness)
    bundle(folder, 3, dest)
    results = read_result(ComparisonResults, folder / "results.json")
    assert results is not None and len(results.rows) == 3
    for row in results.rows:
        found = read_result(MeasuredRow, place(row.identity, dest))
        assert found is not None and (found.fid, found.identity) == (row.fid, row.identity)
        paths = folder / str(row.statistics), dest / str(found.statistics)
        first, second = (FeatureSummary.load(path, harness.detector) for path in paths)
        assert second.moments.fid(harness.reference) == pytest.approx(row.fid, rel=1e-6)
        assert first.features is not None and second.features is not None
        assert torch.allclose(first.features, second.features, rtol=1e-3, atol=1e-4)
        assert paths[1].stat().st_size < 0.6 * paths[0].stat().st_size
    (trace,) = dest.glob("selection-*.json")
    assert trace.read_bytes() == (folder / "selection-3.json").read_bytes()
