"""Scripts end with one sentence and the right exit code."""

import errno
import os
import signal
import sys
import time

import click
import pytest
import torch

from commands.help import SETTINGS
from commands.options import batch_option, device_option, dry_run_option, seeds_option
from runtime import __version__, cli
from runtime.errors import UserError


@click.command(context_settings=SETTINGS)
@device_option
@seeds_option("0-63")
@batch_option(64)
@dry_run_option
@click.option("--raise", "name", default="nothing")
def command(device: str | None, seeds: str, batch: int, dry_run: bool, name: str) -> None:
    click.echo(f"{device} {seeds} {batch} {dry_run}")
    if name in ERRORS:
        raise ERRORS[name]


ERRORS: dict[str, BaseException] = {
    "user": UserError("budget 4 does not fit:\n use 3 or 5"),
    "value": ValueError("rho is 0: use a positive one"),
    "empty": ValueError(),
    "file": FileNotFoundError("no run 7 in exps: train one first"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "exps/1/run.json"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "reading": MemoryError(),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "ctrl-c": KeyboardInterrupt(),
    "bug": TypeError("a defect"),
}


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(command)
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nothing", 0, ""),
        ("user", 1, "error: budget 4 does not fit: use 3 or 5\n"),
        ("value", 1, "error: rho is 0: use a positive one\n"),
        ("empty", 1, "error: ValueError\n"),
        ("file", 1, "error: no run 7 in exps: train one first\n"),
        ("disk", 1, "error: exps/1/run.json: No space left on device\n"),
        ("memory", 1, "error: the GPU ran out of memory: use a smaller --batch\n"),
        ("reading", 1, "error: the memory is full: use a smaller --batch, or smaller files\n"),
        ("cpu", 1, "error: the memory is full: use a smaller --batch, or smaller files\n"),
        ("ctrl-c", 130, "interrupted\n"),
    ],
)
def test_one_sentence_and_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    code: int,
    message: str,
) -> None:
    assert start(monkeypatch, "--raise", name) == code
    captured = capsys.readouterr()
    assert captured.out.strip() == "None 0-63 64 False"
    assert captured.err.strip("\n") == message.strip("\n")


def test_sigterm_is_said_and_unwinds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = []

    @click.command()
    def waiting() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            left.append("cleaned up")

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(waiting)
    assert (ended.value.code, capsys.readouterr().err) == (143, "terminated\n")
    assert left == ["cleaned up"]


def test_several_processes_keep_the_systems_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's handler would wait as long as a process waits for the others."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(signal, "signal", None)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit) as ended:
        cli.run(click.Command("nothing"))
    assert ended.value.code == 0


def test_wrong_usage_is_2_and_help_is_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, "--batch=0") == 2
    assert "'--batch'" in capsys.readouterr().err
    assert start(monkeypatch, "--help") == 0
    assert "0-63" in capsys.readouterr().out
    assert start(monkeypatch, "--device=cpu", "--seeds=3", "--batch=2", "-n") == 0
    assert capsys.readouterr().out == "cpu 3 2 True\n"


def test_short_help_version_and_both_spellings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(monkeypatch, "-h") == 0
    assert "Usage: " in capsys.readouterr().out
    assert start(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"command, version {__version__}\n"
    for spelling in ("--dry-run", "--dry_run"):
        assert start(monkeypatch, spelling, "--seeds=1") == 0
        assert capsys.readouterr().out == "None 1 64 True\n"


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "--raise", "bug"])
    with pytest.raises(TypeError):
        cli.run(command)
    monkeypatch.setattr(sys, "argv", ["script.py", "--raise", "value"])
    monkeypatch.setenv("AMED_TRACEBACK", "1")
    with pytest.raises(ValueError, match="rho is 0"):
        cli.run(command)


@pytest.mark.parametrize(
    ("rank", "name", "turns"),
    [("0", "user", 0), ("1", "user", 1), ("2", "ctrl-c", 1), ("0", "bug", 2), ("1", "bug", 3)],
)
def test_ranks_take_turns_to_report(
    monkeypatch: pytest.MonkeyPatch, rank: str, name: str, turns: int
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("runtime.cli.time.sleep", waits.append)
    monkeypatch.setattr(sys, "argv", ["script.py", "--raise", name])
    with pytest.raises((SystemExit, TypeError)):
        cli.run(command)
    assert waits == []  # a process without peers never waits
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises((SystemExit, TypeError)):
        cli.run(command)
    assert waits == [turns * cli.HEAD_START]
