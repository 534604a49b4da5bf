"""The memory of a pass does not grow with the number of images."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is not available")
def test_memory_does_not_grow() -> None:
    """All features would take 59 MiB, four fifths of them after the first measurement."""
    size = ["--num=60000", "--dim=256", "--features=1000", "--limit=12"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.metrics", "memory", *size],
        capture_output=True, text=True, timeout=500, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 of them kept; all would be 59 MiB" in done.stdout
