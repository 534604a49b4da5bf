"""Another process that has an output locked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from runtime.outputs import locked
from tests.processes import start


def hold(path: Path) -> None:
    with locked(path, path):
        path.with_name(f"{path.name}.held").touch()
        time.sleep(60)


@contextmanager
def held(path: Path, logs: Path) -> Iterator[Callable[[], None]]:
    """Another process has the lock; yields how to kill it."""
    process = start(partial(hold, path), logs / "holder")
    sign = path.with_name(f"{path.name}.held")
    while process.is_alive() and not sign.exists():
        time.sleep(0.005)
    sign.unlink()

    def kill() -> None:
        process.kill()
        process.join()  # until the system has let go of the lock

    try:
        yield kill
    finally:
        kill()
