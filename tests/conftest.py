"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import gc
import json
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; children inherit it
os.environ.setdefault("MPLBACKEND", "Agg")

import click
import numpy as np
import pytest
import torch
from hypothesis import settings

from runtime import cli
from tests.golden_nets import draw
from tests.scripts import Done, Script

torch.set_num_threads(1)
# The same examples on every machine, and no time limit: a busy machine is not a defect.
settings.register_profile("project", derandomize=True, deadline=None, database=None)
settings.load_profile("project")

gc.disable()  # imports and collection make a million objects that stay


def pytest_collection_finish() -> None:
    """What is there now stays, so garbage collections need not look at it again."""
    gc.freeze()
    gc.enable()


GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of its own for every test, which finds nothing and leaves nothing."""
    name = f"cache-{secrets.token_hex(8)}"
    monkeypatch.setenv("AMED_CACHE", str(tmp_path_factory.getbasetemp() / name))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """``golden("schedules")`` opens the recorded vectors of that name."""
    return lambda name: np.load(GOLDEN / f"{name}.npz")


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """``golden_json("net_configs")`` reads the JSON file of that name."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def golden_weights(golden: Any, golden_json: Any) -> Callable[[str], dict[str, torch.Tensor]]:
    """``golden_weights("adm")`` gives the state dict of the recorded network of that name."""
    return lambda name: draw(name, golden_json("net_draws")[name], golden("net_constants"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """``script(fid.main, "calc", "--images", path)`` runs a command in this process."""

    def call(command: click.Command, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [f"{command.name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.run(command)
        code = left.value.code
        assert code is None or isinstance(code, int)
        return Done(code or 0, *capsys.readouterr())

    return call
