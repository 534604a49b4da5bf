"""The whole report as one HTML file that needs nothing beside it, neither files nor a network."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from comparison import errors_report, report
from runtime.errors import UserError
from runtime.files import atomic_write

FILE = "report.html"
RESULTS = "results.json"
#: Options whose flag is not their name.
FLAGS = {"detector_path": "detector-path", "extra": "with"}
FIGURES = {
    "fid-nfe.png": "FID against network evaluations; bars are the spread over seed blocks",
    "grid.png": "The same seeds down the columns, a sampler per row",
    "errors-nfe.png": "Distance to the exact solution against network evaluations",
    "errors-local.png": "Error of each interval when it starts from the exact state",
    "trajectories.png": "One seed in the plane of its exact trajectory; right: the end enlarged",
}
STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; margin: 0; color: #1a1a1a; background: #fff; }
main { max-width: 75rem; margin: auto; padding: 0 1rem 3rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
th { border-bottom: 2px solid #888; white-space: nowrap; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { min-width: 14rem; } tr.learned td:first-child { font-weight: 600; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #555; }
pre { overflow-x: auto; background: #f5f5f5; padding: .7rem; font-size: .8rem; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; overflow-wrap: anywhere; }
"""


def write_page(folder: Path) -> Path:
    """Write ``folder/report.html`` from what a comparison, or ``errors.py``, left there.

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
    with atomic_write(folder / FILE) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return folder / FILE


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
    body = [(report.cells(row, rows), row["group"]) for row in rows]
    return f"<h2>At matched budgets</h2>\n<p>{words}</p>\n{_table(report.head(rows), body)}"


def _errors(content: dict[str, Any]) -> str:
    body = [(errors_report.cells(row), row["group"]) for row in content["rows"]]
    out = ["<h2>Solver error alone</h2>", f"<p>{escape(errors_report.sentence(content))}</p>"]
    out.append(_table(errors_report.HEAD, body))
    out += [
        f"<p>Left out: {escape(s['method'])}: {escape(s['why'])}.</p>" for s in content["skipped"]
    ]
    return "\n".join(out)


def _table(head: Sequence[str], body: Sequence[tuple[list[str], str]]) -> str:
    """A table of plain cells; each row has a group, which is its class."""
    kinds = ["text" if name in ("method", "detail") else "n" for name in head]

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>'
            for kind, cell in zip(kinds, cells, strict=True)
        )

    lines = [f'<tr class="{escape(group)}">{row("td", cells)}</tr>' for cells, group in body]
    return (
        f'<div class="wide"><table>\n<thead><tr>{row("th", head)}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
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
        record = content["record"]
        out.append(f"<pre>{escape(command(record))}</pre>\n<dl>")
        facts = {
            "begun": record["created"],
            "commit": record["git_commit"],
            "model": f"{record['model']['name']}, SHA-256 {record['model']['sha256']}",
            **{f"plan: {key}": value for key, value in record["plan"].items()},
            "versions": ", ".join(f"{name} {v}" for name, v in record["versions"].items()),
            "wall time of the rows": _wall_time(content["rows"]),
        }
        for name, value in facts.items():
            text = value if isinstance(value, str) else json.dumps(value)
            out.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
        out.append("</dl>")
    return "\n".join(out)


def command(record: dict[str, Any]) -> str:
    """The command line that gives the options of a record."""
    script, *subcommand = record["command"].split()
    words = ["python", f"{script}.py", *subcommand]
    for key, value in record["options"].items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words.append(f"--{FLAGS.get(key, key)}={one}")
    return shlex.join(words)


def _wall_time(rows: list[dict[str, Any]]) -> str:
    """Per row and in all; rows of an older version do not say."""
    known = [(r["method"], r["nfe_planned"], r["seconds"]) for r in rows if "seconds" in r]
    total = sum(seconds for *_, seconds in known)
    parts = [f"{method} at {nfe} NFE {seconds:.1f} s" for method, nfe, seconds in known]
    return f"{total:.0f} s: {', '.join(parts)}" if known else "unknown"


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
