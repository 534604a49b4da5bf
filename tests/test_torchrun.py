"""The launcher of several processes: how it ends, and what it lets through."""

from __future__ import annotations

import signal

import click
import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser

from commands import app, torchrun

FAILED = {0: ProcessFailure(0, 7, 1, "/none"), 1: ProcessFailure(1, 8, -15, "/none")}


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (None, 0, ""),
        (ChildFailedError("train.py", {0: FAILED[0]}), 1, ""),
        (ChildFailedError("train.py", {1: FAILED[1]}), 143, ""),
        (SignalException("got 2", signal.SIGINT), 130, ""),
        (SignalException("got 15", signal.SIGTERM), 143, "terminated\n"),
    ],
)
def test_the_launcher_ends_as_its_processes_do(
    raised: Exception | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def start(arguments: list[str]) -> None:
        assert arguments == ["--standalone", "--nproc_per_node=2", "train.py"]
        if raised:
            raise raised

    monkeypatch.setattr(torchrun, "main", start)
    assert torchrun.run(["--nproc_per_node=2", "train.py"]) == code
    assert capsys.readouterr().err == message


PARALLEL = [
    *("train", "sample", "fid", "clip-score", "compare", "solver-error", "visualize", "converged"),
    *("nfe-sweep", "plan-search", "train-denoiser", "train-detector"),
]


@pytest.mark.parametrize("name", PARALLEL)
def test_every_option_can_be_given_through_torchrun(name: str) -> None:
    """torchrun refuses what abbreviates two options of its own, even behind a script's name."""
    theirs = [o for action in get_args_parser()._actions for o in action.option_strings]
    main = app.load(name)
    for command in main.commands.values() if isinstance(main, click.Group) else [main]:
        for option in command.params:
            passes = [o for o in option.opts if not any(t.startswith(o) for t in theirs)]
            assert passes, f"{command.name}: {option.opts}"
