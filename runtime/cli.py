"""How a script ends."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import click
import torch

from runtime.dist import environment

HEAD_START = 3.0  #: seconds between the turns of the ranks to report an error


def run(command: click.Command) -> NoReturn:
    """Run a script's command and exit.

    Exit code 0 when it returns, 2 on wrong usage, 130 on Ctrl-C, 1 on an error a person can
    mend, printed as ``error: <one sentence>``. By the rules of the house these are ValueError
    (UserError is one) and OSError; set ``AMED_TRACEBACK=1`` to see where one came from. Other
    exceptions are defects and keep their traceback.
    """
    try:
        code = command.main(standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        _leave("interrupted", 130)
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
    except Exception:  # perhaps only the echo of another rank's failure
        _await_turn(turn=2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _leave(message: str, code: int) -> NoReturn:
    _await_turn()
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def _await_turn(turn: int = 0) -> None:
    """Let the rank that knows the cause report it: torchrun then ends the others, who wait.

    Errors that all ranks share are rank 0's to report, and a lost connection is the last
    thing worth reporting.
    """
    rank, size = environment()
    if size > 1:
        time.sleep(HEAD_START * (turn + (rank > 0)))


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
