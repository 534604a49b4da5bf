"""Work in processes of its own, forked from the test: nothing is imported again, patches hold."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import click
from tqdm import tqdm

from runtime import cli
from tests.scripts import Done

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
TIMEOUT = 240  #: seconds


def run_command(command: click.Command, *arguments: object) -> NoReturn:
    """Run a script's command as the script does: ends the process."""
    sys.argv = [f"{command.name}.py", *map(str, arguments)]
    cli.run(command)


def finished() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def python(*arguments: object) -> Done:
    """A Python of its own, on the CPU, that finds this project."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment,
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def torchrun(script: object, *arguments: object) -> Done:
    """A script as two processes under the real launcher."""
    return python("-m", "commands.torchrun", "--nproc_per_node=2", script, *arguments)


def start(work: Callable[[], object], log: Path, **environment: str) -> BaseProcess:
    """A process that does ``work`` and writes what it says to ``log``.out and ``log``.err."""
    process = FORK.Process(target=_child, args=(work, log, environment))
    process.start()
    return process


def together(work: Callable[[], object], folder: Path, size: int = 2) -> list[Done]:
    """``work`` in ``size`` processes that form a group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"rank-{rank}" for rank in range(size)]
    ranks = [
        start(work, log, RANK=str(rank), LOCAL_RANK=str(rank), **group)
        for rank, log in enumerate(logs)
    ]
    return [finish(process, log) for process, log in zip(ranks, logs, strict=True)]


def finish(process: BaseProcess, log: Path) -> Done:
    """Wait for a process; its exit code and what it said."""
    process.join(TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
    code = process.exitcode
    assert code is not None
    return Done(code, *(log.with_suffix(end).read_text() for end in (".out", ".err")))


def _child(work: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    tqdm.set_lock(threading.RLock())  # the usual one is shared with the parent: a kill may keep it
    for number, (name, end) in enumerate((("stdout", ".out"), ("stderr", ".err")), start=1):
        file = log.with_suffix(end).open("w", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    work()
