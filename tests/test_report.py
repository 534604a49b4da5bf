"""The excess of a row, and the report as one HTML file."""

from __future__ import annotations

import base64
import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from commands import compare
from commands import solver_error as errors
from comparison.report.html import command, write_page
from comparison.report.table import columns, excess, ordered
from runtime.errors import UserError
from runtime.images import save_png
from runtime.record import RunRecord
from tools import nfe_sweep
from tools import report as tool

HOSTILE = '<script src="http://bad">alert(\'1\')</script> & "co"'
HARNESS = {
    "model": "tiny", "model_sha256": "0" * 64, "detector": "pixels", "detector_sha256": "1" * 64,
    "reference": "r", "reference_n": 50, "seeds": "0-11", "blocks": 2,
}  # fmt: skip


def row(method: str, budget: int | None, fid: float, group: str = "classic") -> dict[str, Any]:
    nfe = budget or 35
    return {
        "method": method, "group": group, "budget": budget, "detail": "polynomial | 6 nodes",
        "own_solver": None, "fid": fid, "fid_block_mean": fid + 1.25, "fid_block_spread": 0.125,
        "fid_blocks": [fid + 1.0, fid + 1.5], "n": 12, "nfe_planned": nfe, "nfe_metered": nfe,
        "images_per_second": 71.9625, "seconds": 3.0625, "detector": "pixels",
        "identity": {"sampler": {"label": method, "times": [80.0, 0.002]}, "harness": HARNESS},
        "pictures": "rows/a.png",
    }  # fmt: skip


ROWS = [
    row("Euler", 5, 30.0),
    row("iPNDM(4) + AFS", 5, 20.0),
    row(HOSTILE, 5, 12.0, "learned"),
    row("Euler", 3, 50.0),
    row("Heun-35", None, 10.0, "ceiling"),
]


def left(rows: list[dict[str, Any]]) -> list[float | None]:
    return [excess(r, rows) for r in rows]


def test_the_excess_is_one_for_the_yardstick_and_measured_by_it() -> None:
    assert left(ROWS) == [2.0, 1.0, pytest.approx(0.2), None, None]
    better = [row("Euler", 5, 9.0), *ROWS[1:]]
    assert excess(better[0], better) == pytest.approx(-0.1)  # below the ceiling


@pytest.mark.parametrize("missing", ["iPNDM(4) + AFS", "Heun-35"])
def test_no_excess_without_both_rows(missing: str) -> None:
    assert set(left([r for r in ROWS if r["method"] != missing])) == {None}


@pytest.mark.parametrize("fid", [10.0, 9.0, math.nan])
def test_no_excess_where_the_yardstick_is_no_worse_than_the_ceiling(fid: float) -> None:
    assert set(left([row("iPNDM(4) + AFS", 5, fid), row("Euler", 5, 30.0), ROWS[-1]])) == {None}


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


def record(**options: Any) -> dict[str, Any]:
    made = RunRecord.make(
        "compare", options, {"name": "tiny", "sha256": "0" * 64}, {"device": "cpu", **HARNESS}
    )
    return json.loads(made.to_json())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    content = {"record": record(budgets="3,5", num=12), "rows": ordered(ROWS)}
    (tmp_path / "results.json").write_text(json.dumps(content))
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
    rows = results["rows"]
    titled = columns(rows)
    assert "excess" in titled and "vs own solver" not in shown  # nobody here refines a solver
    names, *middle, details = titled.values()
    named = [name + detail for name, detail in zip(names, details, strict=True)]
    table = [cell for line in zip(named, *middle, strict=True) for cell in line]
    assert page.cells[: len(table)] == table
    assert page.cells[-2:] == ["35", "3.1"]  # seconds of the last row
    assert page.open == [] and page.tags.count("tbody") == 2 * len({r["budget"] for r in rows})
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
    programs = {
        "compare": ("compare.py", compare.main),
        "solver_error": ("solver_error.py", errors.main),
        "nfe_sweep": ("-m tools.nfe_sweep", nfe_sweep.main),
        "errors": ("solver_error.py", errors.main),  # names in older records
        "sweep figure": ("-m tools.nfe_sweep", nfe_sweep.main),
    }
    for name, (start, main) in programs.items():
        given = ["--outdir=a b", "--device=cpu", "--dataset_name=it's"]
        options = main.make_context(name, given).params
        options.pop("dry_run"), options.pop("device")
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        words = shlex.split(command({**record(**plain), "command": name}))
        flags = len(start.split()) + 1
        assert " ".join(words[:flags]) == f"python {start}"
        again = main.make_context(name, words[flags:]).params
        assert {k: again[k] for k in options} == options


def solver_errors(sha256: str) -> dict[str, Any]:
    one = {
        "method": HOSTILE, "group": "learned", "budget": 5, "detail": "d", "key": "k", "n": 4,
        "nfe_planned": 5, "nfe_metered": 5, "x": 0.12345, "x_error": 0.01, "features": None,
        "features_error": None, "seconds": 1.5, "times": [80.0, 3.0, 0.002], "along": [0, 0.2, 0.3],
        "local": [0.2, 0.1],
    }  # fmt: skip
    exact = {"model": "tiny", "tol": 1e-4, "nfe": 87.0, "seeds": "0-3", "detector": None}
    plane = dict.fromkeys(("one_mean", "both_mean", "both_least", "rest_mean", "off_most"), 0.5)
    made = record()
    made["model"]["sha256"] = sha256
    return {"record": {**made, "command": "solver_error"}, "exact": exact, "rows": [one],
            "plane": {"points": 33, **plane},
            "skipped": [{"method": "<Restart>", "why": "noise"}]}  # fmt: skip


def test_solver_errors_join_the_page_of_the_same_model(folder: Path) -> None:
    (folder / "errors.json").write_text(json.dumps(solver_errors("0" * 64)))
    save_png(folder / "trajectories.png", np.zeros((2, 2, 3), dtype=np.uint8))
    write_page(folder)
    page = read(folder)
    assert "0.1235 +- 0.0100" in page.cells and "0.2000 (to 3)" in page.cells
    assert "Left out: <Restart>: noise." in page.text and len(page.references) == 2
    (folder / "errors.json").write_text(json.dumps(solver_errors("5" * 64)))
    write_page(folder)
    page = read(folder)
    assert "0.1235 +- 0.0100" not in page.cells and "of another model (tiny)" in page.text
    (folder / "results.json").unlink()
    write_page(folder)
    assert "0.1235 +- 0.0100" in read(folder).cells  # a page of its own


def test_one_command_writes_it_anew(folder: Path) -> None:
    done = CliRunner().invoke(tool.main, [str(folder)], catch_exceptions=False)
    assert done.output.strip() == str(folder / "report.html") and read(folder).cells


def test_what_cannot_be_read_is_one_sentence_and_leaves_the_old_page(folder: Path) -> None:
    write_page(folder)
    before = (folder / "report.html").read_bytes()
    for damage, sentence in (("{ torn", "is no JSON"), ('{"rows": []}', "of another version")):
        (folder / "results.json").write_text(damage)
        with pytest.raises(UserError, match=sentence):
            write_page(folder)
        assert (folder / "report.html").read_bytes() == before
    with pytest.raises(UserError, match="holds no results.json: give the --outdir"):
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
    (folder / "errors.json").write_text(json.dumps(solver_errors("0" * 64)))
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
    assert page.tags.count("img") == 3 and page.cells[0] == "Euler" + ROWS[0]["detail"]
    shot = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    assert shot.shape[:2] == (3000, width)
    corner = shot[0, 0].astype(int)
    assert (corner.max() < 50) if dark else (corner == 255).all()
    shown = (np.abs(shot.astype(int) - PINK) < 3).all(-1).sum()
    assert shown > 2 * 0.8 * 300 * width * min(1, width / 720)  # both plots, as wide as the page
    ink = np.abs(shot.astype(int) - corner).max(-1) > 80
    assert (ink[:, : width // 2].sum(1) > 0).mean() > 0.2  # lines of text
