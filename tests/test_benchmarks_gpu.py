"""The benchmark for GPUs, rehearsed on the CPU with a few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from tests.scripts import Script


def test_a_rehearsal_measures_what_a_cpu_has(script: Script, tmp_path: Path) -> None:
    dest = tmp_path / "gpu.json"
    small = ("--images=5", "--batch=2", "--rounds=1", "--dtype=float32", f"--dest={dest}")
    parts = ("--only=sampling", "--only=graphs", "--only=images")
    done = script(gpu.main, *small, *parts)
    assert done.code == 0, done.err
    assert "there are none on device 'cpu'" in done.err and "FID" in done.err
    content = json.loads(dest.read_text())
    assert content["device"] == "cpu" and content["settings"]["images"] == 5
    named = {figure["what"]: figure["value"] for figure in content["figures"]}
    assert len(done.out.splitlines()) == 2 + len(named) == 9
    whole = "5 images and their FID, 5 NFE: "
    assert named[f"{whole}images per second"] * named[f"{whole}seconds"] == pytest.approx(5)
    assert named["network evaluations per second, 2 images"] > 0
