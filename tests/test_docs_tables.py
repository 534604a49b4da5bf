"""Generated tables of the documentation: up to date, and replaced without touching the rest."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from denoisers.cards import cards
from runtime.errors import UserError
from tools.docs_tables import __main__ as tool
from tools.docs_tables import models, options, pages
from tools.docs_tables.__main__ import ROOT, TABLES


@pytest.mark.parametrize("name", sorted({*TABLES} - {"orders", "api"}))  # these have their own
def test_a_table_is_what_the_code_says(name: str) -> None:
    page, make = TABLES[name]
    assert pages.current(ROOT / page, name) == make(), f"run python -m tools.docs_tables {name}"


def test_a_table_is_replaced_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter <!-- b:begin -->\n")
    pages.replace(page, "a", "| new |")
    assert pages.current(page, "a") == "| new |"
    assert page.read_text() == (
        "before\n<!-- a:begin -->\n| new |\n<!-- a:end -->\nafter <!-- b:begin -->\n"
    )
    for name in ("b", "c"):
        with pytest.raises(UserError, match=rf"no place for this table: add the lines <!-- {name}"):
            pages.replace(page, name, "| new |")


def test_the_tool_writes_what_is_outdated_and_checks_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "TABLES", {"api": tool.PageTable("a.md", lambda: "| x |")})
    page = tmp_path / "a.md"
    page.write_text("<!-- api:begin -->\n<!-- api:end -->\n")
    done = CliRunner().invoke(tool.main, ["--check", "api"])
    assert isinstance(done.exception, UserError) and "api in a.md" in str(done.exception)
    assert "x" not in page.read_text()
    assert CliRunner().invoke(tool.main, []).output == "wrote api in a.md\n"
    assert "| x |" in page.read_text()
    assert CliRunner().invoke(tool.main, ["--check"]).output == "all tables are up to date\n"


@click.command(context_settings={"default_map": {"seeds": "0-7"}})
@click.argument("folder")
@click.option("--seeds", default="0-63", metavar="A|B", help="such as 0-9")
@click.option("--kind", type=click.Choice(["a", "b"]), help="of it  [default: <the model's>]")
@click.option("--size", type=int, multiple=True, default=(1, 2))
@click.option("--flip/--no-flip", default=True, help="mirror\n  them")
@click.option("--quiet", is_flag=True)
@click.option("-o", "--out", required=True)
def command() -> None: ...


def test_options_are_those_of_the_command() -> None:
    assert [options.row(parameter, command) for parameter in command.params] == [
        ("`FOLDER`", "required", ""),
        ("`--seeds A|B`", "`0-7`", "such as 0-9"),
        ("`--kind`", "\\<the model's>", "of it; one of `a`, `b`"),
        ("`--size`", "`1` `2`", ""),
        ("`--flip`, `--no-flip`", "`True`", "mirror them"),
        ("`--quiet`", "", ""),
        ("`-o`, `--out`", "required", ""),
    ]
    assert (
        pages.markdown(["a", "b"], [["`A|B`", "c"]]) == "| a | b |\n| --- | --- |\n| `A\\|B` | c |"
    )


def test_every_option_of_every_command_is_on_the_page() -> None:
    text = options.table()
    for part in ("## `python fid.py gen`", "`--no-flip`", "## `python -m tools.converged`"):
        assert part in text
    gen = text.split("## `python fid.py gen`")[1].split("\n## ")[0]
    assert "| `--seeds LIST` | `0-1999` |" in gen


def test_models_are_those_of_the_cards() -> None:
    lines = models.table().splitlines()[2:]
    assert [line.split("`")[1] for line in lines] == list(cards())
    (coco,) = (line for line in lines if "`ms_coco`" in line)
    assert "latents 4 x 64 x 64, images of 512 pixels, prompts" in coco
    assert "| `cfg` | 1, or 2 with guidance | `hub:" in coco
