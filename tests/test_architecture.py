"""The rules of the code base, checked on the syntax trees of every file.

Each rule is a function from a file to its violations; each is also fed a source that breaks it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, TEST_LINES, SCRIPT_LINES, FUNCTION_LINES = 320, 400, 10, 65

#: The scripts in the root, which only start a command.
SCRIPTS = ("train", "sample", "fid", "clip_score", "compare", "solver_error", "visualize")
_BASE = {"solvers", "runtime", "plans"}
_SAMPLING = _BASE | {"denoisers", "restart", "pds"}
_MEASURING = _SAMPLING | {"amed", "ns", "samplers", "metrics", "image_data", "evaluation"}
#: Which packages of ours a package may import besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "solvers": set(),
    "runtime": set(),
    "checkpoints": {"runtime"},
    "metrics": {"checkpoints"},  # weights and statistics of others have one reader
    "image_data": {"runtime", "checkpoints", "metrics"},
    "plans": {"solvers", "runtime"},
    "restart": _BASE,
    "pds": _BASE | {"checkpoints"},  # masks are files of others
    "denoisers": _BASE | {"checkpoints", "image_data"},
    "teachers": _SAMPLING,
    "amed": _SAMPLING | {"checkpoints", "teachers"},
    "ns": _SAMPLING | {"amed", "checkpoints", "teachers"},
    "samplers": _SAMPLING | {"amed", "ns"},
    "export": _SAMPLING | {"ns", "samplers"},
    "evaluation": _MEASURING | {"checkpoints"},
    "plan_search": _MEASURING,
    "comparison": _MEASURING | {"plan_search"},
    "toy": _BASE | {"denoisers", "restart"},
    **dict.fromkeys(SCRIPTS, {"commands", "runtime"}),
}
#: Import any package.
TOP = {"commands", "tools", "benchmarks", "examples", "tests"}
#: Imported only by each other: commands/app.py and tests reach tools by name.
FREE = TOP - {"commands"}
OURS = {*MAY_IMPORT, *TOP}
#: Where a module may be imported by a name that is only known at run time.
LAZY = {"commands/app.py", "amed/__init__.py"}
#: The numerical core stands on torch alone; the oracle needs an adaptive solver.
CORE = {"solvers": {"torch"}, "solvers/oracle.py": {"torch", "torchdiffeq"}}
ALONE = "export/table_scheduler.py"  # runs in programs that have diffusers, without us
EXTRAS = {"diffusers", "transformers", "accelerate"}  # of the extra [diffusion]
PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


@dataclass(frozen=True)
class File:
    path: str  #: relative to the root, with forward slashes
    source: str

    @property
    def package(self) -> str:
        """The top folder, or the name of a script in the root."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def tree(self) -> ast.Module:
        return parsed(self.source)


Rule = Callable[[File], Iterator[str]]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top module) of every import, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]


def imports_point_one_way(file: File) -> Iterator[str]:
    allowed = MAY_IMPORT.get(file.package)
    for line, module in imports(file.tree):
        if module in SCRIPTS or (module in FREE and file.package not in FREE):
            yield f"line {line}: {module} must not be imported"
        elif allowed is not None and module in OURS - allowed - {file.package}:
            yield f"line {line}: {file.package} may not import {module}"


def modules_are_found_by_their_names(file: File) -> Iterator[str]:
    """No changes of the search path; imports by a computed name only in the lazy tables."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path":
            yield f"line {node.lineno}: sys.path: run it as a module from the root instead"
        if isinstance(node, ast.Call) and file.package != "tests" and file.path not in LAZY:
            name = ast.unparse(node.func).split(".")[-1]
            if name in {"import_module", "__import__"}:
                yield f"line {node.lineno}: {name} hides what is imported"


def core_stands_on_torch(file: File) -> Iterator[str]:
    allowed = CORE.get(file.path, CORE.get(file.package))
    if allowed is not None:
        for line, module in imports(file.tree):
            if module not in allowed | {"solvers"} | sys.stdlib_module_names:
                yield f"line {line}: the core may not import {module}"


def extras_are_imported_where_used(file: File) -> Iterator[str]:
    for line, module in imports(file.tree):
        if module == "torchvision":
            yield f"line {line}: torchvision is no dependency"
    for statement in file.tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for line, module in imports(ast.Module([statement], [])):
                if module in EXTRAS and file.path != ALONE:
                    yield f"line {line}: {module} is an extra, import it where it is used"


def no_pickles(file: File) -> Iterator[str]:
    if file.package == "tests":
        return
    for line, module in imports(file.tree):
        if module in PICKLES:
            yield f"line {line}: {module} may run code from a file"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not is_false(node):
            yield f"line {node.value.lineno}: allow_pickle may run code from a file"


def torch_load_is_for_tests(file: File) -> Iterator[str]:
    """It takes all memory for small files even with ``weights_only``; `checkpoints` reads them."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            if file.package != "tests":
                yield f"line {node.lineno}: torch.load where checkpoints should read"
                continue
            given = {k.arg: k.value for k in node.keywords}.get("weights_only")
            if not (isinstance(given, ast.Constant) and given.value is True):
                yield f"line {node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.ImportFrom) and (node.module, "load") in {
            ("torch", alias.name) for alias in node.names
        }:
            yield f"line {node.lineno}: call it torch.load, so that it is found"


def is_false(node: ast.keyword) -> bool:
    return isinstance(node.value, ast.Constant) and node.value.value is False


def no_default_device(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.arguments):
            values = [*node.defaults, *node.kw_defaults]
        elif isinstance(node, ast.AnnAssign | ast.keyword) and (
            isinstance(node, ast.AnnAssign) or node.arg == "default"
        ):
            values = [node.value]
        for value in values:
            for part in ast.walk(value) if value is not None else ():
                if isinstance(part, ast.Constant) and str(part.value).startswith("cuda"):
                    yield f"line {part.lineno}: the default device is {part.value!r}"


def no_guessing_by_attribute(file: File) -> Iterator[str]:
    if file.package == "tests":
        return
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            yield f"line {node.lineno}: hasattr decides what a protocol should"


def files_and_functions_are_short(file: File) -> Iterator[str]:
    lines = len(file.source.splitlines())
    kinds = {"tests": TEST_LINES, **dict.fromkeys(SCRIPTS, SCRIPT_LINES)}
    most = kinds.get(file.package, FILE_LINES)
    if lines > most:
        yield f"{lines} lines, at most {most}"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                too = f"{node.name} has {length} lines, at most {FUNCTION_LINES}"
                yield f"line {node.lineno}: {too}"


RULES: list[Rule] = [
    imports_point_one_way,
    modules_are_found_by_their_names,
    core_stands_on_torch,
    extras_are_imported_where_used,
    no_pickles,
    torch_load_is_for_tests,
    no_default_device,
    no_guessing_by_attribute,
    files_and_functions_are_short,
]


@cache
def project() -> list[File]:
    folders = [ROOT / package for package in sorted(OURS - {*SCRIPTS})]
    paths = [
        *sorted(ROOT.glob("*.py")),
        *(p for folder in folders for p in sorted(folder.rglob("*.py"))),
    ]
    return [File(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_follows_the_rules(rule: Rule) -> None:
    assert [f"{file.path}, {broken}" for file in project() for broken in rule(file)] == []


def test_every_package_is_known_and_seen() -> None:
    """A new package has to be given its place above, and a file must not escape the walk."""
    packages = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert packages == OURS - {*SCRIPTS}, "add the new package to MAY_IMPORT"
    assert {path.stem for path in ROOT.glob("*.py")} == {*SCRIPTS}
    seen = {file.path for file in project()}
    assert {"runtime/cli.py", "solvers/types.py", "tests/test_architecture.py"} <= seen
    assert {f"{script}.py" for script in SCRIPTS} <= seen


LONG = "\n".join(["x = 1"] * (SCRIPT_LINES + 1))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (imports_point_one_way, "solvers/a.py", "import runtime.errors"),
        (imports_point_one_way, "metrics/a.py", "def f():\n    from runtime.errors import x"),
        (imports_point_one_way, "runtime/a.py", "from solvers import types"),
        (imports_point_one_way, "denoisers/nets/a.py", "from restart.build import x"),
        (imports_point_one_way, "restart/a.py", "import torch, teachers"),
        (imports_point_one_way, "teachers/a.py", "from amed.settings import x"),
        (imports_point_one_way, "amed/a.py", "import samplers.builders.classic as b"),
        (imports_point_one_way, "samplers/a.py", "import comparison"),
        (imports_point_one_way, "amed/a.py", "import train"),
        (imports_point_one_way, "amed/__init__.py", "from samplers.generate import generate"),
        (imports_point_one_way, "comparison/a.py", "from tools import x"),
        (imports_point_one_way, "comparison/a.py", "from commands.options import x"),
        (imports_point_one_way, "commands/app.py", "def f():\n    from tools import convert"),
        (imports_point_one_way, "tests/a.py", "from sample import main"),
        (imports_point_one_way, "train.py", "import tests.conftest"),
        (imports_point_one_way, "train.py", "from amed.trainer import train"),
        (modules_are_found_by_their_names, "examples/a.py", "sys.path.insert(0, '..')"),
        (modules_are_found_by_their_names, "tests/a.py", "x = sys.path"),
        (modules_are_found_by_their_names, "amed/a.py", "importlib.import_module('tools.x')"),
        (modules_are_found_by_their_names, "commands/a.py", "__import__(name)"),
        (core_stands_on_torch, "solvers/a.py", "import numpy as np"),
        (core_stands_on_torch, "solvers/a.py", "from torchdiffeq import odeint"),
        (core_stands_on_torch, "solvers/oracle.py", "import scipy"),
        (extras_are_imported_where_used, "denoisers/a.py", "import transformers"),
        (extras_are_imported_where_used, "denoisers/a.py", "def f():\n    import torchvision"),
        (no_pickles, "denoisers/convert.py", "import pickle"),
        (no_pickles, "tools/a.py", "def f():\n    from pickle import load"),
        (no_pickles, "metrics/a.py", "np.load(f, allow_pickle=True)"),
        (torch_load_is_for_tests, "amed/a.py", "torch.load(path, weights_only=True)"),
        (torch_load_is_for_tests, "tests/a.py", "torch.load(p, weights_only=False)"),
        (torch_load_is_for_tests, "amed/a.py", "from torch import load"),
        (no_default_device, "amed/a.py", "def f(x, *, device='cuda'): ..."),
        (no_default_device, "amed/a.py", "def f(device=torch.device('cuda:0')): ..."),
        (no_default_device, "train.py", "@option('--device', default='cuda')\ndef f(): ..."),
        (no_default_device, "amed/a.py", "class A:\n    device: str = 'cuda'"),
        (no_guessing_by_attribute, "amed/a.py", "y = hasattr(x, 'guide')"),
        (files_and_functions_are_short, "train.py", LONG),
        (files_and_functions_are_short, "amed/a.py", "\n" * (FILE_LINES + 1)),
        (files_and_functions_are_short, "tests/a.py", "\n" * (TEST_LINES + 1)),
        (
            files_and_functions_are_short,
            "amed/a.py",
            "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
        ),
    ],
)
def test_every_rule_catches_its_violation(rule: Rule, path: str, source: str) -> None:
    assert len(list(rule(File(path, source)))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("amed/a.py", "import torch\nfrom teachers.build import x\nfrom amed.b import y"),
        ("metrics/a.py", "import numpy\nfrom metrics.b import y\nfrom . import c"),
        ("solvers/oracle.py", "import math\nfrom torchdiffeq import odeint"),
        ("tests/convert.py", "import pickletools\ntorch.load(p, weights_only=True)"),
        ("denoisers/sd.py", "def f():\n    import diffusers"),
        ("tools/a.py", "import amed, samplers, comparison\nnp.load(p, allow_pickle=False)"),
        ("tests/test_a.py", "import pickle, tools.convert\nhasattr(x, 'y')\nimport_module(y)"),
        ("commands/app.py", "import amed, plan_search\nimport_module('tools.convert')"),
        ("sample.py", "from commands.sample import main\nfrom runtime import cli"),
        ("amed/a.py", "def f(x, device='cpu', kind=None): return x.type == 'cuda'"),
        ("amed/a.py", "x = 1\n" * FILE_LINES),
    ],
)
def test_no_rule_minds_what_is_right(path: str, source: str) -> None:
    assert [broken for rule in RULES for broken in rule(File(path, source))] == []
