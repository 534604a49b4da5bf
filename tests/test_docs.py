"""What the documents point at exists, and their code runs."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import torch

import amed.experiments
import amed.predictor
import amed.settings
import amed.step
import amed.trainer
import runtime.dist
import runtime.record
import solvers.driver
import teachers.build
from denoisers.analytic import MixtureDenoiser
from denoisers.cards import Card

ROOT = Path(__file__).resolve().parent.parent
MEANS = 0.5 * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
IMPORTS = [
    (amed.settings, "StudentSettings"),
    (teachers.build, "build_teacher"),
    (amed.step, "Student"),
    (amed.predictor, "AMEDPredictor"),
    (amed.trainer, "Data"),
    (amed.trainer, "Loop"),
    (amed.trainer, "train"),
    (runtime.record, "RunRecord"),
    (amed.experiments, "create_run"),
    (amed.experiments, "load_predictor"),
    (runtime.dist, "world"),
    (solvers.driver, "integrate"),
]


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


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http") and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken


def code(page: str, first: str) -> str:
    """The Python block of ``page`` that begins with ``first``."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    return next(block for block in blocks if block.startswith(first))


def test_the_readme_samples_with_ones_own_denoiser() -> None:
    denoiser = MixtureDenoiser(MEANS, 0.1)
    names: dict = {"my_network": lambda x, sigma: denoiser(x, sigma).x0}
    exec(code("README.md", "import torch"), names)
    walk = names["walk"]
    assert walk.nfe == 4
    nearest = torch.cdist(walk.x[-1].flatten(1), MEANS.flatten(1)).min(1).values
    assert float(nearest.max()) < 0.3 * MEANS[0].numel() ** 0.5  # each at one of the components


def test_the_training_page_trains_for_ones_own_model(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    denoiser = MixtureDenoiser(MEANS, 0.1)
    names = {
        "MyDenoiser": lambda: denoiser,
        "noise": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
        "torch": torch,
        "Card": Card,
        **{name: getattr(module, name) for module, name in IMPORTS},
    }
    exec(code("docs/training.md", "settings = ").replace("total=1024", "total=96"), names)
    assert names["walk"].nfe == 5
    rows = [json.loads(line) for line in (names["folder"] / "stats.jsonl").open()]
    assert rows[-1]["step"] == 96 and names["settings"].sampler_stu == "ipndm"
