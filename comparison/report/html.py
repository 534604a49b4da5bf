"""The whole report as one HTML file that needs nothing beside it, neither files nor a network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from comparison.report import table as report
from comparison.solver_error import report as errors_report
from runtime.errors import UserError
from runtime.files import write_text

FILE = "report.html"
RESULTS = "results.json"
#: How the command of a record is run, where it is not a script of its own name; the last two are
#: the names in older records.
PROGRAMS = {
    "nfe_sweep": "-m tools.nfe_sweep",
    "plan_search": "-m tools.plan_search",
    "sweep figure": "-m tools.nfe_sweep",
    "errors": "solver_error.py",
}
#: Options whose flag is not their name.
FLAGS = {"detector_path": "detector-path", "extra": "with"}
FIGURES = {
    "fid-nfe.png": "FID at each number of network evaluations; bars: the spread over seed blocks",
    "grid.png": "The same seeds down the columns, a sampler per row",
    "errors-nfe.png": "Distance to the exact solution; bars: standard errors",
    "errors-local.png": "Error of each interval when it starts from the exact state",
    "trajectories.png": "One seed in the plane of its exact trajectory; right: the end enlarged",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --dim: #5a5a5a; --page: #fff; --line: #ddd;
  --box: #f4f4f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --dim: #a8a8a8; --page: #17191d; --line: #3b3e44; --box: #23262c; } }
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0; color: var(--ink);
  background: var(--page); }
main { max-width: 75rem; margin: auto; padding: 0 1rem 3rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p, dl { max-width: 52rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; }
th, td { padding: .25rem .6rem; text-align: right; vertical-align: top; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th { vertical-align: bottom; border-bottom: 2px solid var(--dim); white-space: normal; }
td { border-bottom: 1px solid var(--line); }
tbody + tbody tr:first-child td { border-top: 2px solid var(--dim); }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--page);
  text-align: left; white-space: normal; min-width: 11rem; }
td.words { white-space: normal; min-width: 8rem; }
tr.learned td:first-child { font-weight: 600; }
small { display: block; font-size: .75rem; font-weight: 400; color: var(--dim); }
figure { margin: 1.5rem 0; overflow-x: auto; }
img { max-width: max(100%, 45rem); height: auto; background: #fff; }
figcaption { font-size: .875rem; color: var(--dim); position: sticky; left: 0; }
pre { overflow-x: auto; background: var(--box); padding: .7rem; font-size: .8rem; }
pre.command { white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
dl { font-size: .9rem; } dt { font-weight: 600; }
dd { margin: 0 0 .4rem; overflow-wrap: anywhere; }
@media (min-width: 40rem) {
  dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; }
  dd { margin: 0; } }
"""


def write_page(folder: Path) -> Path:
    """Write ``folder/report.html`` from what a comparison, or ``solver_error.py``, left there.

    Raises UserError for a folder without results, and for results that cannot be read.
    """
    results, errors = _load(folder / RESULTS), _load(folder / errors_report.FILE)
    if results is None and errors is None:
        raise UserError(f"{folder} holds no {RESULTS}: give the --outdir of a comparison")
    try:
        content = page(results, errors, folder)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"the results in {folder} are of another version ({error!r} is missing): run the "
            "comparison again, which keeps what it can"
        ) from None
    write_text(folder / FILE, content)
    return folder / FILE


def closing_line(file: Path) -> str:
    """What a command says last."""
    return f"{file}: all of it in one page, for a browser"


def page(results: dict[str, Any] | None, errors: dict[str, Any] | None, folder: Path) -> str:
    """The page of either or both; pictures are read from ``folder`` where they were made."""
    sections = []
    if results is not None:
        sections += [_comparison(results["rows"]), _figures(folder, "fid-nfe.png", "grid.png")]
    if results is not None and errors is not None and not _same_model(results, errors):
        theirs = escape(errors["record"]["model"]["name"])
        sections.append(f"<p>{errors_report.FILE} is of another model ({theirs}): left out.</p>")
        errors = None
    if errors is not None:
        sections.append(_errors(errors))
        names = (name for name in FIGURES if name.startswith(("errors", "trajectories")))
        sections.append(_figures(folder, *names))
    contents = {RESULTS: results, errors_report.FILE: errors}
    sections.append(_runs([c for c in contents.values() if c is not None]))
    sections += [_data(name, content) for name, content in contents.items() if content is not None]
    model = (results or errors or {})["record"]["model"]["name"]
    title = escape(f"Samplers of {model}")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n" + "\n".join(sections) + "\n</main>\n</body>\n</html>\n"
    )


def _same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["record"]["model"]["sha256"] == other["record"]["model"]["sha256"])


def _comparison(rows: list[dict[str, Any]]) -> str:
    words = escape(report.caption(rows).replace("**", ""))
    columns = report.columns(rows)
    table = _table(list(columns), list(zip(*columns.values(), strict=True)), rows)
    return f"<h2>Samplers compared</h2>\n<p>{words}</p>\n{table}"


def _errors(content: dict[str, Any]) -> str:
    rows = content["rows"]
    out = ["<h2>Solver error alone</h2>", f"<p>{escape(errors_report.sentence(content))}</p>"]
    out.append(_table(errors_report.HEAD, [errors_report.cells(row) for row in rows], rows))
    out += [
        f"<p>Left out: {escape(s['method'])}: {escape(s['why'])}.</p>" for s in content["skipped"]
    ]
    return "\n".join(out)


def _table(
    head: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[dict[str, Any]]
) -> str:
    """The cells of each row under ``head``: budgets apart, empty columns left out.

    The detail, which is the last column, stands below the method, the first, to keep tables narrow.
    """
    kept = [i for i in range(1, len(head) - 1) if any(own[i] for own in cells)]

    def line(own: Sequence[str], row: dict[str, Any]) -> str:
        first = f"<td>{escape(own[0])}<small>{escape(own[-1])}</small></td>"
        kinds = [' class="words"' if head[i] == "vs own solver" else "" for i in kept]
        rest = (f"<td{kind}>{escape(own[i])}</td>" for i, kind in zip(kept, kinds, strict=True))
        return f'<tr class="{escape(row["group"])}">{first}{"".join(rest)}</tr>'

    names = "".join(f"<th>{escape(head[i])}</th>" for i in (0, *kept))
    pairs = zip(cells, rows, strict=True)
    bodies = groupby(pairs, key=lambda pair: pair[1]["budget"])
    lines = ["".join(f"{line(*pair)}\n" for pair in body) for _, body in bodies]
    return (
        f'<div class="wide"><table>\n<thead><tr>{names}</tr></thead>\n'
        + "".join(f"<tbody>\n{body}</tbody>\n" for body in lines)
        + "</table></div>"
    )


def _figures(folder: Path, *names: str) -> str:
    """The pictures that there are, inside the page."""
    out = []
    for name in names:
        if not (folder / name).is_file():
            continue
        data = base64.b64encode((folder / name).read_bytes()).decode()
        words = escape(FIGURES[name])
        out.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="{words}">'
            f"<figcaption>{words}</figcaption></figure>"
        )
    return "\n".join(out)


def _runs(contents: Sequence[dict[str, Any]]) -> str:
    """What was run: commands, hashes, versions, and how long it took."""
    out = ["<h2>What was run</h2>"]
    for content in contents:
        record, plan = content["record"], content["record"]["plan"]
        out.append(f'<pre class="command">{escape(command(record))}</pre>\n<dl>')
        facts = {
            "begun": record["created"],
            "commit": record["git_commit"],
            "model": f"{record['model']['name']}, SHA-256 {record['model']['sha256']}",
            **{key.replace("_", " "): plan[key] for key in plan if not key.startswith("model")},
            "versions": ", ".join(f"{name} {v}" for name, v in record["versions"].items()),
            "wall time of the rows": _wall_time(content["rows"]),
        }
        for name, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            out.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
        out += ["</dl>", _seconds(content["rows"])]
    return "\n".join(out)


def command(record: dict[str, Any]) -> str:
    """The command line, from the root of a clone, that gives the options of a record."""
    name = record["command"]
    words = ["python", *PROGRAMS.get(name, f"{name}.py").split()]
    for key, value in record["options"].items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words.append(f"--{FLAGS.get(key, key)}={one}")
    return shlex.join(words)


def _wall_time(rows: list[dict[str, Any]]) -> str:
    """In all; rows of an older version do not say."""
    known = [row["seconds"] for row in rows if "seconds" in row]
    return f"{sum(known):.0f} s" if known else "unknown"


def _seconds(rows: list[dict[str, Any]]) -> str:
    """The wall time of each row."""
    cells = [
        [r["method"], str(r["nfe_planned"]), f"{r['seconds']:.1f}" if "seconds" in r else "",
         r["detail"]]
        for r in rows
    ]  # fmt: skip
    table = _table(("method", "NFE", "seconds", "detail"), cells, rows)
    return f"<details><summary>wall time of each row</summary>\n{table}</details>"


def _data(name: str, content: dict[str, Any]) -> str:
    """A file as it is, to be copied out of the page."""
    text = escape(json.dumps(content, indent=1))
    return f"<details><summary>{escape(name)}</summary><pre>{text}</pre></details>"


def _load(file: Path) -> dict[str, Any] | None:
    """The content of a file, or None where there is none."""
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}): run the comparison again") from None
    return content
