"""Many images: memory that does not grow with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is asked of the system")
def test_four_fifths_more_images_take_no_more_memory() -> None:
    """All features would be 59 MiB, of which four fifths would come late."""
    script = ["-m", "benchmarks.metrics", "memory"]
    size = ["--num", 60_000, "--dim", 256, "--features", 1000, "--limit", 12]
    done = subprocess.run(
        [sys.executable, *map(str, [*script, *size])], capture_output=True, text=True, timeout=500,
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1000 of them kept; all would be 59 MiB" in done.stdout
