"""The modules of the project import each other in one direction: their graph has no cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"exps", "samples", "build", "data", "cache"}  # what runs leave behind


def modules() -> dict[str, Path]:
    """The file of every module in the project, by its dotted name."""
    files = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0].startswith(".") or parts[0] in SKIPPED:
            continue
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported(tree: ast.AST, package: str, known: Mapping[str, object]) -> Iterator[str]:
    """The modules among ``known`` that a module of ``package`` imports, anywhere in its code.

    Imports inside functions and under ``TYPE_CHECKING`` count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parts if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                if name in known or base in known:
                    yield name if name in known else base


def import_graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """What every module imports of the others."""
    graph = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = set(imported(tree, package, files)) - {name}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """One of the cycles, its first module repeated at the end; empty if there is none."""
    finished: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for other in sorted(graph[name]):
            if found := search(other, [*path, name]):
                return found
        finished.add(name)
        return []

    return next(filter(None, (search(name, []) for name in sorted(graph))), [])


def test_no_module_is_imported_back() -> None:
    graph = import_graph(modules())
    assert {"denoisers.conditions", "runtime.errors"} < set(graph)
    assert "denoisers.protocol" in graph["denoisers.conditions"]
    assert cycle(graph) == []


def test_a_cycle_is_found_wherever_the_import_stands() -> None:
    sources = {
        "a": "import b.c",
        "b": "",
        "b.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .d import x",
        "b.d": "def f():\n    from a import y",
        "e": "from b import c, d",
    }
    graph = {
        name: set(imported(ast.parse(source), name.rpartition(".")[0], sources))
        for name, source in sources.items()
    }
    assert graph == {"a": {"b.c"}, "b": set(), "b.c": {"b.d"}, "b.d": {"a"}, "e": {"b.c", "b.d"}}
    assert cycle(graph) == ["a", "b.c", "b.d", "a"]
    assert cycle({**graph, "b.d": set()}) == []
