"""The console command amed, and the modules behind it."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from commands import app
from commands.app import COMMANDS
from runtime import __version__
from tests.processes import finish, python, start
from tests.test_architecture import SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    for room in ("tools", "benchmarks", "examples")
    for path in [*(ROOT / room).glob("*.py"), *(ROOT / room).glob("*/__main__.py")]
    if path.name != "__init__.py"
)


def amed(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "commands", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=120, env={**os.environ, "COLUMNS": "80"},
    )  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says_of_itself(name: str) -> None:
    command = app.load(name)
    assert isinstance(command, click.Command) and command.help
    assert command.help.strip().splitlines()[0] == COMMANDS[name].help


def test_every_script_and_every_tool_is_a_subcommand() -> None:
    found = {entry.module for entry in COMMANDS.values()}
    tools = {name for name in MODULES if name.startswith("tools.") and name.count(".") == 1}
    assert found == {f"commands.{name}" for name in SCRIPTS} | tools


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_run_by_its_name(name: str) -> None:
    """``python -m NAME`` starts its command with the exit codes of all commands."""
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    last = ast.parse(source).body[-1]
    assert ast.unparse(last) == "if __name__ == '__main__':\n    cli.run(main)"
    done = CliRunner().invoke(import_module(name).main, ["--help"])
    assert done.exit_code == 0 and "Usage: " in done.output


def test_help_is_quick_and_lists_every_command() -> None:
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = amed("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    listed = [line.split()[0] for line in done.stdout.splitlines() if line[:3].strip(" ") != ""]
    assert done.returncode == 0 and {*COMMANDS} <= {*listed}
    assert min(spent) < 0.3
    code = "import sys, commands.app; sys.exit('torch' in sys.modules)"
    assert python("-c", code).code == 0


def test_help_of_a_command_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the command itself says (-u hides that nothing but help is asked for)."""
    monkeypatch.setenv("COLUMNS", "80")
    words = ["-m", "tools.gits"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quick = [python(*words, flag) for flag in ("-h", "--help")]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 2 * 0.5
    assert quick[0] == quick[1] == python("-u", *words, "--help")


@pytest.mark.parametrize("command", [["sample.py"], ["-m", "tools.gits"]])
def test_a_python_without_the_packages_is_told_what_to_do(command: list[str]) -> None:
    done = python("-S", *command, "--help")
    assert done.code == 1 and done.err.startswith(f"error: {sys.executable} lacks torch, numpy, ")
    assert done.err.endswith("and source .venv/bin/activate\n") and done.err.count("\n") == 1


def test_names_take_dashes_and_underscores() -> None:
    for name in ("draw-prompts", "draw_prompts"):
        done = CliRunner().invoke(app.amed, [name, "--help"], prog_name="amed")
        assert done.exit_code == 0 and f"Usage: amed {name} [OPTIONS] SOURCE TARGET" in done.output
    assert CliRunner().invoke(app.amed, ["--version"]).output == f"amed, version {__version__}\n"


def test_help_names_subcommands_where_it_names_scripts_otherwise() -> None:
    spelled = {
        "python sample.py --grid": "amed sample --grid",
        "as of sample.py": "as of amed sample",
        "python -m tools.dataset_tool --source x": "amed dataset --source x",
        "the --outdir of tools.nfe_sweep.": "the --outdir of amed nfe-sweep.",
        "torchrun --standalone --nproc_per_node=2 clip_score.py calc": (
            "torchrun --standalone --nproc_per_node=2 -m commands clip-score calc"
        ),
        "torchrun --nproc_per_node=2 -m tools.converged --dest x": (
            "torchrun --nproc_per_node=2 -m commands converged --dest x"
        ),
        "resample.py train.python tests/sample.py": "resample.py train.python tests/sample.py",
    }
    assert {text: app.spell(text) for text in spelled} == spelled
    page = CliRunner().invoke(app.amed, ["report", "--help"]).output
    assert "amed report samples/compare" in page and "amed compare" in page
    original = app.load("report")
    assert "python -m tools.report" in (original.epilog or "")  # and is left as it was


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "Error: No such command 'nonsense'."),
        (["solver_error", "--budgets"], 2, "Error: Option '--budgets' requires an argument."),
        (["report", "nowhere"], 1, "error: nowhere holds no results.json: give the --outdir of"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    def work() -> None:
        sys.argv = ["amed", *arguments]
        app.main()

    done = finish(start(work, tmp_path / "log"), tmp_path / "log")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1].startswith(message), done.err
