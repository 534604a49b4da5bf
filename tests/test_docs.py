"""What the documents point at exists, and their code runs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch

from commands import app
from denoisers.analytic import MixtureDenoiser
from metrics import detectors
from tests.scripts import Script

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "exps/README.md", *sorted((ROOT / "docs").glob("*.md"))]
MEANS = 0.5 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_test_named_in_the_table_of_tolerances_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs/precision.md").read_text())
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"def {name}(" not in (ROOT / "tests" / file).read_text()
    ]
    assert not missing


#: What a tolerance looks like in a test.
TOLERANCE = re.compile(
    r"\b(?:abs|rel|atol|rtol)=(?!0\b)[\d.(]|< \d*\.?\d*e-\d|< [\d.]+ \* (?:error|bias)|\berror\b.*<"
)


def test_every_tolerance_of_the_metrics_is_in_the_table() -> None:
    table = (ROOT / "docs/precision.md").read_text()
    kinds = ("test_metrics_*", "test_fid*", "test_comparison*", "test_converged_*", "test_clip_*")
    unlisted, found = [], 0
    for file in sorted(path for kind in kinds for path in (ROOT / "tests").glob(f"{kind}.py")):
        source = file.read_text()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            if TOLERANCE.search(ast.get_source_segment(source, node) or ""):
                found += 1
                name = f"{file.name}::{node.name}"
                unlisted += [name] if f"`{name}`" not in table else []
    assert found > 40 and not unlisted


LINK = re.compile(r"\]\(([^)#\s]*)#?([^)\s]*)\)")
BY_NAME = re.compile(r"\]\[\w[^\]]*\]|^\[[^\]]+\]: .*", re.M)  #: a form that pages do not use


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_documents_lead_somewhere() -> None:
    broken, found = [], 0
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        broken += [f"{page.name}: {name}" for name in BY_NAME.findall(prose)]
        for target, anchor in LINK.findall(page.read_text()):
            if target.startswith("http"):
                continue
            found += 1
            other = page.parent / target if target else page
            if not other.exists() or (anchor and anchor not in anchors(other)):
                broken.append(f"{page.name}: {target}#{anchor}")
    assert found > 60 and not broken


def test_every_page_can_be_reached_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [
        page.name for page in PAGES if page.parent.name == "docs" if page.name not in text
    ] == []


#: A file or a folder of the repository, in backticks.
NAMED = re.compile(r"`((?:[a-z_]+/)+(?:[\w.-]+\.(?:py|json|md|npz|safetensors))?)`")
MADE = ("exps/", "samples/", "data/", "rows/", "exact/", "snapshots/")  #: by commands


def test_files_that_pages_name_exist() -> None:
    missing, found = [], 0
    for page in PAGES:
        for name in NAMED.findall(page.read_text()):
            if not name.startswith(MADE) and "NAME" not in name:
                found += 1
                missing += [] if (ROOT / name).exists() else [f"{page.name}: {name}"]
    assert found > 60 and not missing


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the shell blocks of a page."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
        yield from typed(block)


def typed(text: str) -> Iterator[list[str]]:
    """The words of every line that starts a Python."""
    for line in text.replace("\\\n", " ").splitlines():
        if re.match(r" *(python|torchrun) ", line):
            yield shlex.split(line, comments=True)


def parse(words: list[str]) -> None:
    """Let the command read its arguments, as if it were started; click.ClickException if wrong."""
    ours = ("tools.", "benchmarks.", "pds")
    at = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith(ours))
    module = words[at] if not words[at].endswith(".py") else f"commands.{words[at][:-3]}"
    command, arguments = import_module(module).main, words[at + 1 :]
    context = command.make_context(words[at], list(arguments))
    if isinstance(command, click.Group):
        name, chosen, rest = command.resolve_command(context, arguments)
        chosen.make_context(name, rest, parent=context)


#: Files that a page tells the reader to bring, and commands that say "..." or are not ours.
BROUGHT = ("captions.csv", "prompts.txt", "MS-COCO_val2014_30k_captions.csv")
OTHERS = ("...", "examples.stable_diffusion")


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BROUGHT:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("newcomer")
def test_commands_of_the_pages_can_be_typed() -> None:
    found = [words for page in PAGES for words in commands(page) if not {*OTHERS} & {*words}]
    assert len(found) > 70
    for words in found:
        parse(words)


@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize("name", app.COMMANDS)
def test_examples_of_the_help_can_be_typed(name: str) -> None:
    examples = list(typed(app.load(name).epilog or ""))
    assert examples
    for words in examples:
        parse(words)


@pytest.mark.usefixtures("newcomer")
@pytest.mark.parametrize(
    "line",
    [
        "python train.py --dataset_name=cifar10-small --num_step=4",
        "torchrun --standalone -m tools.converged --seed 3",
        "python fid.py make --seeds 0-3",
        "python solver_error.py --budgets 5 (into its report)",
        "python sample.py --schedule_type=karras",
    ],
)
def test_what_cannot_be_typed_is_found(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line.split())


def test_the_readmes_commands_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    """As typed, save for their sizes; the comparison says what it would do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(detectors, "CHUNK", 8)  # images at once, filled up
    smaller = {
        "train.py": ["--batch=2", "--total_kimg=0.002"],
        "sample.py": ["--seeds=0,1"],
        "fid.py": ["--seeds=0-3"],
        "compare.py": ["--dry-run"],
    }
    for words in commands(ROOT / "README.md"):
        main = import_module(f"commands.{words[1].removesuffix('.py')}").main
        done = script(main, *words[2:], *smaller.pop(words[1]), "--device=cpu")
        assert done.code == 0, done.err
    assert not smaller and "AMED-Solver, Restart (chosen)\n" in done.out


def code(page: str, first: str) -> str:
    """The Python block of ``page`` that begins with ``first``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return next(block for block in blocks if block.startswith(first))


def test_the_readme_samples_with_your_own_denoiser() -> None:
    denoiser = MixtureDenoiser(MEANS, 0.1)
    names: dict = {"my_network": lambda x, sigma: denoiser(x, sigma).x0}
    exec(code("README.md", "import amed"), names)
    walk = names["walk"]
    assert walk.nfe == 4
    nearest = torch.cdist(names["images"].flatten(1), MEANS.flatten(1)).min(1).values
    assert float(nearest.max()) < 0.3 * MEANS[0].numel() ** 0.5  # each at one of the components


def test_the_restart_page_samples_by_a_published_plan() -> None:
    names: dict = {"denoiser": MixtureDenoiser(MEANS, 0.1)}
    exec(code("docs/restart.md", "from functools import partial"), names)
    nearest = torch.cdist(names["images"].flatten(1), MEANS.flatten(1)).min(1).values
    assert sum(segment.nfe() for segment in names["plan"]) == 43
    assert float(nearest.max()) < 0.3 * MEANS[0].numel() ** 0.5


def test_the_training_page_trains_for_your_own_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    denoiser = MixtureDenoiser(MEANS, 0.1)
    names: dict = {
        "MyDenoiser": lambda: denoiser,
        "noise": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    }
    exec(code("docs/training.md", "import torch").replace("total=1024", "total=96"), names)
    assert names["walk"].nfe == 5
    rows = [json.loads(line) for line in (names["folder"] / "stats.jsonl").open()]
    assert rows[-1]["step"] == 96 and names["settings"].sampler_stu == "ipndm"
