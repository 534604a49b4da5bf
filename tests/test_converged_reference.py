"""A model's own converged samples as a second reference: the error of the model is set aside."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from comparison.baselines import completed
from comparison.measure import measure
from comparison.report.html import write_page
from comparison.report.write import write_report
from comparison.results import MeasuredRow
from comparison.rows import Row, classic_rows
from denoisers.analytic import GaussianDenoiser
from denoisers.cards import cards
from denoisers.conditions import Conditions
from evaluation.converged import Converged, open_converged
from evaluation.harness import Harness
from evaluation.ode_samples import solve_ode
from metrics import detectors, references
from metrics.detectors import Detector
from metrics.statistics import DetectorId, Statistics
from metrics.summary import Collector, Requirements
from plan_search.objectives import choose_restart
from runtime.errors import UserError
from runtime.images import to_uint8
from runtime.record import RunRecord
from runtime.seeds import CONVERGED_START, parse_seeds
from runtime.typed import to_plain
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.types import Denoiser
from tests.comparison_problems import harness_of
from tests.sampler_models import SHAPE, Counted, GaussianModel

CPU = torch.device("cpu")
GREY = 127.5  #: grey levels in a unit of x
DATA, LEARNT, DEVIATION = 0.2, -0.1, 0.15
N = 600


@dataclass(eq=False)
class Wrong(GaussianModel):
    """The data are N(DATA, DEVIATION^2); the model has learnt another mean."""

    def bind(self, labels=None, guidance_rate=None, prompts=None) -> Denoiser:
        return Counted(GaussianDenoiser(LEARNT, DEVIATION**2), 1, self.calls)


def means(images: Tensor) -> Tensor:
    return images.float().mean((2, 3))


DETECTOR = Detector(DetectorId("means", "1" * 64, 3), means, CPU)
MODEL = Wrong()


def gathered(x: Tensor, source: str) -> Statistics:
    collector = Collector(DETECTOR, Requirements(), len(x), source=source)
    collector.update(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2), range(len(x)))
    return collector.finish().moments


def second(seeds: str = f"{CONVERGED_START}-{CONVERGED_START + N - 1}", **model: str) -> Converged:
    first, last = map(int, seeds.split("-"))
    numbers = tuple(range(first, last + 1))
    x = solve_ode(MODEL, Conditions(), numbers, 1e-5, torch.float64, CPU).images
    made = {"name": "tiny", "sha256": MODEL.sha256, **model}
    record = RunRecord.make("converged", {"seeds": seeds}, made, {"solver": "dopri5", "tol": 1e-5})
    return Converged(gathered(x, "own"), record)


@pytest.fixture(scope="module")
def reference() -> Converged:
    return second()


@pytest.fixture(scope="module")
def harness(reference: Converged) -> Harness:
    x = torch.randn(5000, *SHAPE, generator=torch.Generator().manual_seed(0))
    data = gathered(DATA + DEVIATION * x, "data")
    return harness_of(
        MODEL, DETECTOR, data, range(N), 300, dtype=torch.float64, converged=reference
    )


def exact() -> Row:
    sampler = build(SamplerOptions(sampler="edm", num_steps=40), MODEL.card)
    return Row("Heun-79", "ceiling", None, sampler)


def euler() -> Row:
    return next(r for r in classic_rows(5, MODEL.card) if r.method == "Euler")


def test_the_error_of_the_model_is_set_aside(harness: Harness, tmp_path: Path) -> None:
    best, plain = (measure(row, harness, tmp_path, lambda n: None) for row in (exact(), euler()))
    model_error = 3 * (GREY * (DATA - LEARNT)) ** 2  # the distance of the means, in grey levels
    assert best.fid == pytest.approx(model_error, rel=0.02)
    assert best.fid_converged < 1e-3 * best.fid
    # of two sets of N images that differ by chance alone: about the trace of S (1 / N + 1 / N)
    variance = 3 * (GREY * DEVIATION) ** 2 / 16
    assert best.fid_converged < 10 * variance * 2 / N
    # Euler shrinks the spread of the samples; its mean is right to (start to end of the noise)
    assert plain.fid_converged > 20 * best.fid_converged
    assert plain.fid == pytest.approx(model_error + plain.fid_converged, rel=0.05)


def test_one_pass_gives_both_figures(harness: Harness, tmp_path: Path) -> None:
    before, row = len(MODEL.calls), euler()
    found = measure(row, harness, tmp_path, lambda n: None)
    batches = 2 + 1  # of 300 in each block, and one for the pictures
    assert len(MODEL.calls) - before == 5 * batches
    alone = replace(harness, reference=harness.converged.statistics, converged=None)
    assert found.fid_converged == alone.fid(row.sampler, range(N), 2, lambda n: None).fid.fid


def test_rows_are_held_against_another_reference_without_sampling(
    harness: Harness, tmp_path: Path
) -> None:
    row, alone = euler(), replace(harness, converged=None)

    def measured(harness: Harness, folder: Path = tmp_path) -> tuple[MeasuredRow, int]:
        before = len(MODEL.calls)
        return measure(row, harness, folder, lambda n: None), len(MODEL.calls) - before

    first, spent = measured(alone)
    assert spent > 0 and first.fid_converged is None
    assert first.identity.harness.converged is None
    fresh, _ = measured(harness, tmp_path / "fresh")
    found, spent = measured(harness)
    assert spent == 0 and found.fid_converged == pytest.approx(fresh.fid_converged, rel=1e-9)
    assert found.identity == fresh.identity
    assert measured(harness) == (found, 0)
    other = second(f"{CONVERGED_START + 7}-{CONVERGED_START + 300}")
    another, spent = measured(replace(harness, converged=other))
    assert spent == 0 and abs(another.fid_converged - found.fid_converged) > 1e-3
    assert measured(alone) == (first, 0)


def test_rows_whose_statistics_are_not_theirs_are_measured_again(
    harness: Harness, tmp_path: Path
) -> None:
    row, alone = euler(), replace(harness, converged=None)
    first = measure(row, alone, tmp_path, lambda n: None)
    file, kept = (tmp_path / "rows" / f"{row.key}.{ending}" for ending in ("json", "npz"))
    whole = kept.read_bytes()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "fid": -1.0}))
    assert measure(row, alone, tmp_path, lambda n: None).fid == -1.0  # nothing new is asked
    for damage in (whole, whole[:100], None):
        fid = -1.0 if damage == whole else first.fid
        file.write_text(json.dumps({**content, "fid": fid}))
        kept.write_bytes(damage) if damage else kept.unlink()
        before = len(MODEL.calls)
        found = measure(row, harness, tmp_path, lambda n: None)
        assert len(MODEL.calls) > before
        assert found.fid == first.fid and found.fid_converged > 0


def test_plans_are_chosen_by_the_data_alone(harness: Harness, tmp_path: Path) -> None:
    """So that selections of before go on, whatever tables are held against."""
    chosen = choose_restart(3, harness, [4, 8], tmp_path, lambda n: None)
    file = tmp_path / "selection-3.json"
    trace = file.read_bytes()
    assert b"converged" not in trace
    before = len(MODEL.calls)
    alone = replace(harness, converged=None)
    assert choose_restart(3, alone, [4, 8], tmp_path, lambda n: None).label == chosen.label
    assert len(MODEL.calls) == before and file.read_bytes() == trace


def table(harness: Harness, folder: Path) -> tuple[list[str], str]:
    """The head of the table and of the CSV, and the page."""
    rows = [measure(row, harness, folder, lambda n: None) for row in (exact(), euler())]
    model = {"name": "tiny", "sha256": MODEL.sha256}
    record = RunRecord.make("compare", {}, model, to_plain(harness.identity))
    write_report(folder, completed(record, rows))
    write_page(folder)
    lines = (folder / "table.md").read_text().splitlines()
    titles = next(line for line in lines if line.startswith("| method"))
    columns = (folder / "table.csv").read_text().splitlines()[0]
    return [titles, columns], (folder / "report.html").read_text()


def test_the_columns_are_neighbours_in_every_table(harness: Harness, tmp_path: Path) -> None:
    (titles, columns), page = table(harness, tmp_path)
    assert "| FID | FID to converged |" in titles and ",fid,fid_converged," in columns
    assert "<th>FID</th><th>FID to converged</th>" in page
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    for text in ((tmp_path / "table.md").read_text(), page):
        assert "against 600 samples of the model itself by dopri5 at a tolerance of 1e-05" in text
        assert f"(seeds {CONVERGED_START}-{CONVERGED_START + N - 1})" in text
    for row in rows:
        assert f"<td>{row['fid']:.2f}</td><td>{row['fid_converged']:.2f}</td>" in page


def test_the_column_is_absent_where_there_is_no_reference(harness: Harness, tmp_path: Path) -> None:
    heads, page = table(replace(harness, converged=None), tmp_path)
    assert not any("converged" in text for text in heads)
    assert "FID to converged" not in page
    for text in ((tmp_path / "table.md").read_text(), page):
        assert "no FID to the model's own converged samples: no statistics of those" in (
            text.replace("&#x27;", "'")
        )


def test_a_reference_comes_back_with_its_record(reference: Converged, tmp_path: Path) -> None:
    reference.save(tmp_path / "own.npz")
    read = Converged.load(tmp_path / "own.npz")
    assert read.identity == reference.identity and read.record == reference.record
    assert Statistics.load(tmp_path / "own.npz").n == N  # fid.py calc --ref own.npz
    other = second(f"{CONVERGED_START + 7}-{CONVERGED_START + 300}")
    assert other.identity.sha256 != read.identity.sha256


@pytest.fixture
def own(reference: Converged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundled reference of the model."""
    path = tmp_path / "tiny-converged.npz"
    monkeypatch.setitem(references.REFERENCES, ("tiny-converged", DETECTOR.name), path)
    reference.save(path)
    return path


def opened(text: str | None, **changes: Any) -> Converged | None:
    given: dict[str, Any] = {"model": MODEL, "detector": DETECTOR, "seeds": range(N), **changes}
    return open_converged(text, **given)


def test_the_default_is_that_of_the_models_name_where_it_fits(own: Path) -> None:
    found = opened(None)
    assert found is not None and found.statistics.n == N
    assert opened("tiny-converged") is not None and opened(str(own)) is not None
    assert opened("none") is None
    others = Detector(replace(DETECTOR.id, sha256="2" * 64), means, CPU)
    assert opened(None, detector=others) is None  # another detector
    assert opened(None, model=Wrong(sha256="5" * 64)) is None  # weights of one's own
    own.unlink()
    assert opened(None) is None


def test_what_was_asked_for_and_does_not_fit_is_one_sentence(own: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.npz"
    gathered(torch.rand(5, *SHAPE), "plain").save(plain)
    others = Detector(replace(DETECTOR.id, sha256="2" * 64), means, CPU)
    trials: list[tuple[str, dict[str, Any], str]] = [
        ("tiny-converged", {"model": Wrong(sha256="5" * 64)}, "are of the model tiny (SHA-256 00"),
        ("tiny-converged", {"detector": others}, "were made with detector means (111111111111"),
        (
            "tiny-converged",
            {"seeds": range(5, CONVERGED_START + 1, 5)},
            "are of the same seeds, such as 2000",
        ),
        ("tiny-converged", {"conditions": Conditions(guidance_rate=2.0)}, "another guidance_rate"),
        (str(plain), {}, "do not say which model made their images"),
        ("nowhere.npz", {}, "nowhere.npz is not a file of statistics"),
    ]
    for text, changes, sentence in trials:
        with pytest.raises(UserError) as caught:
            opened(text, **changes)
        assert sentence in str(caught.value) and "python -m tools.converged --dest" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10-small", "cifar10-small-resnet"])
def test_the_bundled_reference_is_of_the_bundled_model(name: str) -> None:
    path = references.REFERENCES["cifar10-small-converged", name]
    found, card = Converged.load(path), cards()["cifar10-small"]
    bundled = detectors.load_detector(name, device="cpu")
    assert found.misfit(Wrong(card, str(card.sha256)), bundled, range(10_000)) is None
    assert found.statistics.n == 10_000
    assert min(parse_seeds(found.record.options["seeds"])) >= CONVERGED_START
