"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import json
import os
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
from tests.scripts import Done, Script

torch.set_num_threads(1)
# The same examples on every machine, and no time limit: a busy machine is not a defect.
settings.register_profile("house", derandomize=True, deadline=None, database=None)
settings.load_profile("house")

GOLDEN = Path(__file__).resolve().parent.parent.parent / "shared" / "golden"


def _golden_file(name: str) -> Path:
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"recorded vectors {name} are not on this machine")
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """``golden("schedules")`` opens the recorded vectors of that name; skips where absent."""
    return lambda name: np.load(_golden_file(f"{name}.npz"))


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """``golden_json("net_configs")`` reads the JSON file of that name; skips where absent."""
    return lambda name: json.loads(_golden_file(f"{name}.json").read_text())


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
