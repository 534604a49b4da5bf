"""Run a command: exit codes and error messages."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import NoReturn

import click
import torch

from runtime import __version__
from runtime.dist import environment
from runtime.errors import reason

HEAD_START = 3.0  #: seconds that other ranks wait before they report an error


def run(command: click.Command) -> NoReturn:
    """Run a script's command and exit.

    The exit code is 0 on success, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM, and 1
    for an error that the user can correct, printed as ``error: <one sentence>``: a ValueError (such
    as UserError) or an OSError.  Set ``AMED_TRACEBACK=1`` to see its traceback.  Other exceptions
    are defects and keep theirs.  SIGTERM ends a process of torchrun at once, without a word.
    """
    try:
        if environment()[1] == 1:  # a process of several may be waiting for the others
            signal.signal(signal.SIGTERM, _terminated)
        if sys.argv[1:] == ["--version"]:
            click.echo(f"{command.name}, version {__version__}")
            sys.exit(0)
        code = command.main(standalone_mode=False)
    except _Terminated:
        _leave("terminated", 128 + signal.SIGTERM)
    except (click.Abort, KeyboardInterrupt):
        _leave("interrupted" if environment()[0] == 0 else "", 130)
    except click.ClickException as error:
        _await_turn()
        error.show()
        sys.exit(error.exit_code)
    except torch.OutOfMemoryError:
        _leave("error: the GPU ran out of memory: use a smaller --batch", 1)
    except (ValueError, OSError) as error:
        if os.environ.get("AMED_TRACEBACK"):
            raise
        _leave(f"error: {_sentence(error)}", 1)
    except Exception as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            _leave("error: the memory is full: use a smaller --batch, or smaller files", 1)
        _await_turn(turn=2)  # perhaps only the echo of another rank's failure
        raise
    sys.exit(code if isinstance(code, int) else 0)


class _Terminated(BaseException):
    """SIGTERM, which unwinds as Ctrl-C does."""


def _terminated(*_: object) -> NoReturn:
    raise _Terminated


def _leave(message: str, code: int) -> NoReturn:
    _await_turn()
    if message:
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _await_turn(turn: int = 0) -> None:
    """Wait, so that the rank that knows the cause reports it first; torchrun then ends the others.

    Rank 0 reports errors that all ranks share; a lost connection is reported last.
    """
    rank, size = environment()
    if size > 1:
        time.sleep(HEAD_START * (turn + (rank > 0)))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return reason(error)
