"""The excess of a row, and the report as one HTML file."""

from __future__ import annotations

import base64
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from commands import compare, solver_error
from comparison.baselines import completed, excess, ordered, own_solver_row
from comparison.job import CompareOptions
from comparison.report.html import command, write_page
from comparison.report.table import caption, columns
from comparison.results import MeasuredRow
from comparison.series import NfeSweepOptions
from comparison.solver_error.job import SolverErrorOptions
from comparison.solver_error.results import (
    ErrorIdentity,
    PlaneSummary,
    ShownTrajectory,
    SkippedRow,
    SolutionsIdentity,
    SolutionsSummary,
    SolverErrorResults,
    SolverErrorRow,
)
from runtime.errors import UserError
from runtime.images import save_png
from runtime.options import flat_options, parse_options
from runtime.record import RunRecord
from runtime.typed import to_plain, write_result
from tests.comparison_problems import IDENTITY, measured_row
from tools import nfe_sweep
from tools import report as tool

HOSTILE = '<script src="http://bad">alert(\'1\')</script> & "co"'
ROWS = [
    measured_row("Euler", 5, 30.0),
    measured_row("iPNDM(4) + AFS", 5, 20.0),
    measured_row(HOSTILE, 5, 12.0, "learned"),
    measured_row("Euler", 3, 50.0),
    measured_row("Heun-35", None, 10.0, "ceiling"),
]


def left(rows: Sequence[MeasuredRow]) -> list[float | None]:
    return [excess(row, rows) for row in rows]


def test_the_excess_is_one_for_the_yardstick_and_measured_by_it() -> None:
    assert left(ROWS) == [2.0, 1.0, pytest.approx(0.2), None, None]
    better = [measured_row("Euler", 5, 9.0), *ROWS[1:]]
    assert excess(better[0], better) == pytest.approx(-0.1)  # below the ceiling
    whole = completed(RECORD, ROWS).rows
    assert [row.fid for row in whole] == [50.0, 12.0, 20.0, 30.0, 10.0]
    assert [row.excess for row in whole] == [None, pytest.approx(0.2), 1.0, 2.0, None]


def test_the_ceiling_of_guided_rows_is_heun_at_twice_the_evaluations() -> None:
    guided = [*ROWS[:-1], replace(ROWS[-1], method="Heun-70")]
    assert left(guided) == left(ROWS)
    assert "distance from Heun-70 that is left" in caption(completed(RECORD, guided).rows)


@pytest.mark.parametrize("missing", ["iPNDM(4) + AFS", "Heun-35"])
def test_no_excess_without_both_rows(missing: str) -> None:
    assert set(left([r for r in ROWS if r.method != missing])) == {None}


@pytest.mark.parametrize("fid", [10.0, 9.0, math.nan])
def test_no_excess_where_the_yardstick_is_no_worse_than_the_ceiling(fid: float) -> None:
    few = [measured_row("iPNDM(4) + AFS", 5, fid), measured_row("Euler", 5, 30.0), ROWS[-1]]
    assert set(left(few)) == {None}


def test_a_row_is_compared_with_its_own_solver_at_its_own_budget() -> None:
    """Both budgets have that solver, and the other one's row comes first."""
    own = "iPNDM(4) + AFS"
    rows = ordered(
        [
            measured_row(own, 3, 40.0),
            measured_row(own, 5, 20.0),
            measured_row("plugin", 5, 18.5, "learned", own_solver=own),
            measured_row("plugin", 3, 44.0, "learned", own_solver=own),
            measured_row("plugin", 7, 10.0, "learned", own_solver=own),
        ]
    )
    found = [own_solver_row(row, rows) for row in rows]
    assert [row and row.fid for row in found] == [None, 40.0, 20.0, None, None]
    gains = columns(rows)["vs own solver"]
    assert gains == ["", f"+4.00 ({own})", f"-1.50 ({own})", "", ""]


class Page(HTMLParser):
    """Tags, references and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.body: dict[str, str | None] = {}
        self.references: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "body":
            self.body = dict(attrs)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "action")]
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are nested"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "td" in self.open:
            self.cells[-1] += data


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for one in value.values():
            yield from leaves(one)
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one)
    elif value is not None:
        yield value


def record(sha256: str = "0" * 64, command: str = "compare", **options: Any) -> RunRecord:
    model = {"name": "tiny", "sha256": sha256}
    return RunRecord.make(command, options, model, {"device": "cpu", **to_plain(IDENTITY)})


RECORD = record(budgets="3,5", num=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_result(tmp_path / "results.json", completed(RECORD, ROWS))
    save_png(tmp_path / "grid.png", np.full((4, 6, 3), 7, dtype=np.uint8))
    return tmp_path


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_figure_is_in_the_page_and_nothing_points_outside(folder: Path) -> None:
    assert write_page(folder) == folder / "report.html"
    page, results = read(folder), json.loads((folder / "results.json").read_text())
    for value in leaves(results):
        shown = value if isinstance(value, str) else json.dumps(value)
        assert shown in page.text or json.dumps(shown)[1:-1] in page.text
    rows = completed(RECORD, ROWS).rows
    titled = columns(rows)
    assert "excess" in titled and "vs own solver" not in titled  # no row here refines a solver
    names, *middle, details = titled.values()
    named = [name + detail for name, detail in zip(names, details, strict=True)]
    table = [cell for line in zip(named, *middle, strict=True) for cell in line]
    assert page.cells[: len(table)] == table
    assert page.cells[-2:] == ["35", "3.1"]  # seconds of the last row
    assert page.open == [] and page.tags.count("tbody") == 2 * len({r.budget for r in rows})
    assert "wall time" in page.text and "15 s" in page.text  # five rows of 3.0625 s
    assert "compare.py --budgets=3,5 --num=12" in page.text
    (data,) = page.references  # the only picture that was made
    kind, _, encoded = data.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(encoded) == (folder / "grid.png").read_bytes()
    source = (folder / "report.html").read_text()
    assert "url(" not in source and "@import" not in source
    assert [name for name in folder.iterdir() if name.suffix == ".tmp"] == []


def test_a_hostile_name_is_only_shown(folder: Path) -> None:
    write_page(folder)
    page = read(folder)
    assert "script" not in page.tags and page.cells.count(f"{HOSTILE}polynomial | 6 nodes") == 2
    assert "<script" not in (folder / "report.html").read_text()


def test_the_command_gives_the_options_of_the_record() -> None:
    programs: dict[str, tuple[str, click.Command, type]] = {
        "compare": ("compare.py", compare.main, CompareOptions),
        "solver_error": ("solver_error.py", solver_error.main, SolverErrorOptions),
        "nfe_sweep": ("-m tools.nfe_sweep", nfe_sweep.main, NfeSweepOptions),
        "errors": ("solver_error.py", solver_error.main, SolverErrorOptions),  # in older records
        "sweep figure": ("-m tools.nfe_sweep", nfe_sweep.main, NfeSweepOptions),
    }
    for name, (start, main, kind) in programs.items():

        def parsed(arguments: list[str], main: click.Command = main, kind: type = kind) -> Any:
            flags = main.make_context("it", arguments).params
            flags.pop("dry_run"), flags.pop("device")
            return parse_options(kind, flags)

        given = parsed(["--outdir=a b", "--device=cpu", "--dataset_name=it's"])
        words = shlex.split(command(record(command=name, **flat_options(given))))
        first = ["python", *start.split()]
        assert words[: len(first)] == first and parsed(words[len(first) :]) == given


def solver_errors(sha256: str) -> SolverErrorResults:
    exact = SolutionsIdentity("tiny", sha256, None, 80.0, "float32", 1e-4, ((0, 1, 2, 3),))
    row = SolverErrorRow(
        method=HOSTILE,
        group="learned",
        budget=5,
        detail="d",
        key="k",
        n=4,
        nfe_planned=5,
        nfe_metered=5,
        x=0.12345,
        x_error=0.01,
        features=None,
        features_error=None,
        seconds=1.5,
        times=(80.0, 3.0, 0.002),
        along=(0.0, 0.2, 0.3),
        local=(0.2, 0.1),
        identity=ErrorIdentity({}, exact, None),
    )
    return SolverErrorResults(
        record=record(sha256, "solver_error"),
        exact=SolutionsSummary(
            "tiny", sha256, None, 80.0, "float32", 1e-4, 87.0, "0-3", None, None, None
        ),
        plane=PlaneSummary(33, 0.5, 0.5, 0.5, 0.5, 0.5),
        rows=(row,),
        skipped=(SkippedRow("<Restart>", "stochastic"),),
        trajectory=ShownTrajectory(0, (80.0, 0.002), (0.9, 0.05), 0.5, 0.1, ((0.0, 0.0),), {}),
    )


def test_solver_errors_join_the_page_of_the_same_model(folder: Path) -> None:
    write_result(folder / "errors.json", solver_errors("0" * 64))
    save_png(folder / "trajectories.png", np.zeros((2, 2, 3), dtype=np.uint8))
    write_page(folder)
    page = read(folder)
    assert "0.1235 +- 0.0100" in page.cells and "0.2000 (to 3)" in page.cells
    assert "Left out: <Restart>: stochastic." in page.text and len(page.references) == 2
    write_result(folder / "errors.json", solver_errors("5" * 64))
    write_page(folder)
    page = read(folder)
    assert "0.1235 +- 0.0100" not in page.cells and "of another model (tiny)" in page.text
    (folder / "results.json").unlink()
    write_page(folder)
    assert "0.1235 +- 0.0100" in read(folder).cells  # a page of its own


def test_one_command_writes_it_anew(folder: Path) -> None:
    done = CliRunner().invoke(tool.main, [str(folder)], catch_exceptions=False)
    assert done.output.strip() == str(folder / "report.html") and read(folder).cells


def test_results_of_version_1_are_read(folder: Path) -> None:
    """Before files had a schema; the first ones lacked times and statistics, too."""
    write_page(folder)
    before = read(folder)
    content = json.loads((folder / "results.json").read_text())
    del content["schema"]
    for row in content["rows"]:
        del row["schema"], row["seconds"], row["statistics"]
    (folder / "results.json").write_text(json.dumps(content))
    write_page(folder)
    page = read(folder)
    titles = len(columns(completed(RECORD, ROWS).rows)) - 1
    assert page.cells[: 5 * titles] == before.cells[: 5 * titles] and "unknown" in page.text


def test_what_cannot_be_read_is_one_sentence_and_leaves_the_old_page(folder: Path) -> None:
    write_page(folder)
    before = (folder / "report.html").read_bytes()
    content = json.loads((folder / "results.json").read_text())
    for damage, sentence in (
        ("{ torn", "results.json is not valid JSON"),
        ('{"rows": []}', "record is missing"),
        (json.dumps({**content, "schema": 2}), "update the toolkit"),
    ):
        (folder / "results.json").write_text(damage)
        with pytest.raises(UserError, match=sentence):
            write_page(folder)
        assert (folder / "report.html").read_bytes() == before
    with pytest.raises(UserError, match=r"holds no results\.json"):
        write_page(folder / "nowhere")


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PINK = (200, 30, 90)
#: What only a browser knows, into the page itself.
MEASURE = """<script>onload = () => { const all = document.documentElement, body = document.body;
body.dataset.sideways = all.scrollWidth - all.clientWidth;
body.dataset.broken = [...document.images].filter(i => !i.naturalWidth).length;
body.dataset.requests = performance.getEntriesByType("resource")
  .filter(r => !r.name.startsWith("data:")).length; }</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "dark"), [(420, False), (1200, True)])
def test_it_looks_right_in_a_browser(folder: Path, tmp_path: Path, width: int, dark: bool) -> None:
    write_result(folder / "errors.json", solver_errors("0" * 64))
    for name in ("fid-nfe.png", "trajectories.png"):
        save_png(folder / name, np.full((300, 1200, 3), PINK, dtype=np.uint8))
    source = write_page(folder).read_text()
    (tmp_path / "page.html").write_text(source.replace("</body>", MEASURE))
    done = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         f"--screenshot={tmp_path / 'shot.png'}", f"--window-size={width},3000",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []),
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = Page(done.stdout)
    assert page.body == {"data-sideways": "0", "data-broken": "0", "data-requests": "0"}
    for part in ("Samplers compared", "Solver error alone", "What was run", "results.json"):
        assert part in page.text
    assert page.tags.count("img") == 3 and page.cells[0] == "Euler" + ROWS[0].detail
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert shot.shape[:2] == (3000, width)
    corner = shot[0, 0].astype(int)
    assert (corner.max() < 50) if dark else (corner == 255).all()
    shown = (np.abs(shot.astype(int) - PINK) < 3).all(-1).sum()
    assert shown > 2 * 0.8 * 300 * width * min(1, width / 720)  # both plots, as wide as the page
    ink = np.abs(shot.astype(int) - corner).max(-1) > 80
    assert (ink[:, : width // 2].sum(1) > 0).mean() > 0.2  # lines of text
