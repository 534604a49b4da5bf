"""The memory of a pass does not grow with the number of images."""

from __future__ import annotations

import sys

import pytest

from tests.processes import python


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is not available")
def test_memory_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """All features would take 29 MiB, four fifths of them after the first measurement."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    size = ["--num=30000", "--dim=256", "--features=1000", "--limit=6"]
    done = python("-m", "benchmarks.metrics", "memory", *size)
    assert done.code == 0, done.out + done.err
    assert "1000 of them kept; all would be 29 MiB" in done.out
