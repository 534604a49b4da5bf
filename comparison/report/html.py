"""The whole report as one self-contained HTML file: it needs no other files and no network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

from comparison.report import table as comparison_table
from comparison.report.listing import ReportedRow
from comparison.report.write import RESULTS
from comparison.results import ComparisonResults
from comparison.solver_error import report as errors_report
from comparison.solver_error.results import SolverErrorResults
from runtime.errors import UserError
from runtime.files import write_text
from runtime.record import RunRecord
from runtime.typed import pick, read_result

FILE = "report.html"
ERRORS = errors_report.FILE
STYLE = Path(__file__).with_name("report.css")
#: Options whose flag is not their name.
FLAGS = {"detector_path": "detector-path", "extra": "with", "label": "class"}
#: How the command of a record is run, where it is not a script of its own name; the last two are
#: the names in older records.
PROGRAMS = {
    "nfe_sweep": "-m tools.nfe_sweep",
    "plan_search": "-m tools.plan_search",
    "sweep figure": "-m tools.nfe_sweep",
    "errors": "solver_error.py",
}
PICTURES = {
    "fid-nfe.png": "FID at each number of network evaluations; bars: the spread over seed blocks",
    "grid.png": "The same seeds down the columns, a sampler per row",
}
ERROR_PICTURES = {
    "errors-nfe.png": "Distance to the exact solution; bars: standard errors",
    "errors-local.png": "Error of each interval when it starts from the exact state",
    "trajectories.png": "One seed in the plane of its exact trajectory; right: the end enlarged",
}


def write_page(folder: Path) -> Path:
    """Write ``folder/report.html`` from what a comparison, or ``solver_error.py``, left there.

    Raises UserError for a folder without results, and for results that cannot be read.
    """
    results = read_result(ComparisonResults, folder / RESULTS)
    errors = read_result(SolverErrorResults, folder / ERRORS)
    if results is None and errors is None:
        raise UserError(f"{folder} holds no {RESULTS}: give the --outdir of a comparison")
    for name, found in ((RESULTS, results), (ERRORS, errors)):
        if found is not None:
            pick(_ReportedModel, found.record.model, f"the model in the record of {folder / name}")
    write_text(folder / FILE, page(results, errors, folder))
    return folder / FILE


@dataclass(frozen=True)
class _ReportedModel:
    """What is read of the model in a record."""

    name: str
    sha256: str


def closing_line(file: Path) -> str:
    """The last line that a command prints."""
    return f"{file}: self-contained HTML report"


def page(results: ComparisonResults | None, errors: SolverErrorResults | None, folder: Path) -> str:
    """The page of either or both; pictures are read from ``folder`` where they exist."""
    sections: list[str] = []
    runs: dict[str, tuple[RunRecord, Sequence[ReportedRow]]] = {}
    if results is not None:
        sections += [_comparison(results), _pictures(folder, PICTURES)]
        runs[RESULTS] = results.record, results.rows
    if errors is not None and results is not None and not _same_model(results, errors):
        name = escape(str(errors.record.model["name"]))
        sections.append(f"<p>{ERRORS} is of another model ({name}): left out.</p>")
        errors = None
    if errors is not None:
        sections += [_errors(errors), _pictures(folder, ERROR_PICTURES)]
        runs[ERRORS] = errors.record, errors.rows
    sections.append("<h2>What was run</h2>")
    sections += [_run(record, rows) for record, rows in runs.values()]
    sections += [_data(folder / name) for name in runs]
    record, _ = next(iter(runs.values()))
    return _document(f"Samplers of {record.model['name']}", sections)


def _document(title: str, sections: Iterable[str]) -> str:
    title, style = escape(title), STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _same_model(results: ComparisonResults, errors: SolverErrorResults) -> bool:
    return bool(results.record.model["sha256"] == errors.record.model["sha256"])


def _comparison(results: ComparisonResults) -> str:
    rows = results.rows
    words = escape(comparison_table.caption(rows).replace("**", ""))
    columns = comparison_table.columns(rows)
    table = _table(list(columns), list(zip(*columns.values(), strict=True)), rows)
    return f"<h2>Samplers compared</h2>\n<p>{words}</p>\n{table}"


def _errors(errors: SolverErrorResults) -> str:
    rows = errors.rows
    table = _table(errors_report.HEAD, [errors_report.cells(row) for row in rows], rows)
    words = f"<p>{escape(errors_report.caption(errors))}</p>"
    skipped = [f"<p>{escape(line)}</p>" for line in errors_report.left_out(errors)]
    return "\n".join(["<h2>Solver error alone</h2>", words, table, *skipped])


def _table(head: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[ReportedRow]) -> str:
    """The cells of each row under ``head``: budgets separated, empty columns left out.

    The detail, the last column, is shown below the method, the first, to keep tables narrow.
    """
    kept = [i for i in range(1, len(head) - 1) if any(own[i] for own in cells)]

    def line(own: Sequence[str], row: ReportedRow) -> str:
        first = f"<td>{escape(own[0])}<small>{escape(own[-1])}</small></td>"
        kinds = [' class="words"' if head[i] == "vs own solver" else "" for i in kept]
        rest = (f"<td{kind}>{escape(own[i])}</td>" for i, kind in zip(kept, kinds, strict=True))
        return f'<tr class="{escape(row.group)}">{first}{"".join(rest)}</tr>'

    names = "".join(f"<th>{escape(head[i])}</th>" for i in (0, *kept))
    pairs = zip(cells, rows, strict=True)
    bodies = groupby(pairs, key=lambda pair: pair[1].budget)
    lines = ["".join(f"{line(*pair)}\n" for pair in body) for _, body in bodies]
    return (
        f'<div class="wide"><table>\n<thead><tr>{names}</tr></thead>\n'
        + "".join(f"<tbody>\n{body}</tbody>\n" for body in lines)
        + "</table></div>"
    )


def _pictures(folder: Path, captions: Mapping[str, str]) -> str:
    """The pictures that exist, inside the page."""
    out = []
    for name, words in captions.items():
        if not (folder / name).is_file():
            continue
        data = base64.b64encode((folder / name).read_bytes()).decode()
        words = escape(words)
        out.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{words}">'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return "\n".join(out)


def _run(record: RunRecord, rows: Sequence[ReportedRow]) -> str:
    """What was run: command, hashes, versions, and how long it took."""
    plan = record.plan
    facts = {
        "started": record.created,
        "commit": record.git_commit,
        "model": f"{record.model['name']}, SHA-256 {record.model['sha256']}",
        **{key.replace("_", " "): plan[key] for key in plan if not key.startswith("model")},
        "versions": ", ".join(f"{name} {v}" for name, v in record.versions.items()),
        "wall time of the rows": _wall_time(rows),
    }
    out = [f'<pre class="command">{escape(command(record))}</pre>', "<dl>"]
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        out.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
    return "\n".join([*out, "</dl>", _seconds(rows)])


def command(record: RunRecord) -> str:
    """The command line, from the root of a clone, that gives the options of a record."""
    name = record.command
    words = ["python", *PROGRAMS.get(name, f"{name}.py").split()]
    for key, value in record.options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words.append(f"--{FLAGS.get(key, key)}={one}")
    return shlex.join(words)


def _wall_time(rows: Sequence[ReportedRow]) -> str:
    """Of all rows; those of an older version do not say."""
    known = [row.seconds for row in rows if row.seconds is not None]
    return f"{sum(known):.0f} s" if known else "unknown"


def _seconds(rows: Sequence[ReportedRow]) -> str:
    """The wall time of each row."""
    cells = [
        [
            row.method,
            str(row.nfe_planned),
            "" if row.seconds is None else f"{row.seconds:.1f}",
            row.detail,
        ]
        for row in rows
    ]
    table = _table(("method", "NFE", "seconds", "detail"), cells, rows)
    return f"<details><summary>wall time of each row</summary>\n{table}</details>"


def _data(file: Path) -> str:
    """A file as it is, to be copied out of the page."""
    text = escape(file.read_text(encoding="utf-8"))
    return f"<details><summary>{escape(file.name)}</summary><pre>{text}</pre></details>"
