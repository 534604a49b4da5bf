"""What the documents point at exists, and their code runs."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from denoisers.analytic import MixtureDenoiser

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
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.S)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(python|torchrun) ", line):
                yield shlex.split(line, comments=True)


def known_options() -> dict[str, set[str]]:
    """The options of every command by its title, from the generated page."""
    sections = (ROOT / "docs/options.md").read_text().split("\n## `")[1:]
    return {
        section.partition("`")[0]: set(re.findall(r"`(-[\w-]+)", "".join(cells(section))))
        for section in sections
    }


def cells(section: str) -> list[str]:
    """The first cell of each row of a table."""
    return [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]


def misspelt(words: list[str], known: dict[str, set[str]]) -> list[str]:
    """What the command has that its section does not; a module that is not ours has none."""
    at = next((i for i, word in enumerate(words) if word.endswith(".py") or "tools." in word), None)
    if at is None:
        return []
    title = f"python {'-m ' if words[at].startswith('tools.') else ''}{words[at]}"
    subcommand = f"{title} {' '.join(words[at + 1 : at + 2])}"
    title = subcommand if subcommand in known else title
    given = {word.partition("=")[0] for word in words[at + 1 :] if re.match(r"--?[a-z]", word)}
    return sorted(given - known[title]) if title in known else [title]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    known = known_options()
    assert [f"{words}: {bad}" for words in commands(page) if (bad := misspelt(words, known))] == []


def test_a_misspelt_option_is_found() -> None:
    known = known_options()
    assert sum(len(list(commands(page))) for page in PAGES) > 70
    assert len(known) > 15 and not misspelt(["python", "fid.py", "gen", "--seeds"], known)
    for line, bad in {
        "python train.py --num_step=4": ["--num_step"],
        "torchrun --standalone -m tools.converged --seed 3": ["--seed"],
        "python fid.py make --seeds 0-3": ["python fid.py"],
        "python errors.py --budgets 5": ["python errors.py"],
    }.items():
        assert misspelt(line.split(), known) == bad


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
