"""A name means one thing: classes, command lines and options are each defined in one place."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.test_architecture import TOP, File, project

#: Packages and scripts that may be run; all others are only imported.
RUNNABLE = {"tools", "benchmarks", "examples", "tests"}


def library() -> list[File]:
    return [file for file in project() if file.package != "tests"]


def classes(file: File) -> list[str]:
    return [node.name for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)]


def test_no_class_name_is_defined_twice() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file in library():
        for name in classes(file):
            places[name].append(file.path)
    assert len(places) > 150
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def is_run(file: File) -> bool:
    """Whether the file is a program: it tests for ``__main__``, or is a ``__main__.py``."""
    named = any(
        isinstance(node, ast.Compare) and ast.unparse(node.left) == "__name__"
        for node in ast.walk(file.tree)
    )
    return named or file.path.endswith("__main__.py")


def test_packages_have_no_command_lines_of_their_own() -> None:
    programs = {file.path for file in library() if is_run(file)}
    assert "train.py" in programs and "tools/convert.py" in programs
    inside = {path for path in programs if "/" in path and path.split("/")[0] not in RUNNABLE}
    assert inside == {"commands/__main__.py", "commands/torchrun.py"}


def loose_options(file: File) -> list[str]:
    """Functions that take their options as a mapping with unchecked names and types."""
    loose = []
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if argument.arg in ("options", "flags", "settings") and "[str, Any]" in kind:
                loose.append(f"{file.path}: {node.name}")
    return loose


def test_options_are_typed_below_the_command_lines() -> None:
    below = [file for file in library() if file.package not in TOP]
    assert [place for file in below for place in loose_options(file)] == []
    broken = File("amed/a.py", "def f(options: Mapping[str, Any]) -> None: ...")
    assert loose_options(broken) == ["amed/a.py: f"]
