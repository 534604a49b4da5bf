"""How a script ends, and the options the scripts share."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click
import torch

from runtime.dist import environment

F = TypeVar("F", bound=Callable[..., Any])
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


def device_option(function: F) -> F:
    """``--device``: cuda, mps or cpu; the best there is when left out."""
    return click.option("--device", metavar="NAME", help="cuda, mps or cpu  [default: the best]")(
        function
    )


def cache_option(function: F) -> F:
    """``--cache-dir``: see :func:`runtime.files.cache_folder`."""
    return click.option(
        "--cache_dir",
        "--cache-dir",
        "cache_dir",
        metavar="DIR",
        help="for downloads  [default: $AMED_CACHE or ~/.cache/amed-toolkit]",
    )(function)


def model_options(function: F) -> F:
    """Where the weights of ``--dataset_name`` come from, if not from where its card says."""
    for option in (
        cache_option,
        click.option(
            "--companion_path", metavar="FILE", help="own classifier (adm) or first stage (ldm)"
        ),
        click.option(
            "--model_family", metavar="NAME", help="of --model_path  [default: seen from the file]"
        ),
        click.option(
            "--model_path", metavar="PATH",
            help="own weights of the same model, or of one with a name of your own",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def prompt_options(function: F) -> F:
    """Conditions of text models."""
    function = click.option(
        "--prompt_path", type=click.Path(exists=True, dir_okay=False), metavar="FILE",
        help="prompts: a CSV with a column 'text', or a line each; seed i takes row i",
    )(function)  # fmt: skip
    text = "of every image, for text models"
    return click.option("--prompt", metavar="TEXT", help=text)(function)


def mask_options(function: F) -> F:
    """Masks of preconditioned sampling."""
    for kind, default in (("space", "none"), ("freq", "bundled")):
        function = click.option(
            f"--{kind}_mask_path",
            metavar="FILE",
            help=f"pds: .npy, 'bundled' or 'none'  [default: {default}]",
        )(function)
    return function


def guidance_options(function: F) -> F:
    """Strength of the condition."""
    function = click.option(
        "--guidance_rate",
        type=click.FloatRange(0),
        help="1 is none  [default: the predictor's, or none]",
    )(function)
    return click.option(
        "--guidance_type",
        type=click.Choice(["cg", "cfg", "uncond"]),
        help="classifier, classifier-free, none: must be the model's",
    )(function)


def seeds_option(default: str) -> Callable[[F], F]:
    """``--seeds``: text for :func:`runtime.seeds.parse_seeds`."""
    return click.option(
        "--seeds", metavar="LIST", default=default, show_default=True, help="such as 0-9,12,20-29"
    )


def batch_option(default: int) -> Callable[[F], F]:
    """``--batch``: images at once over all processes."""
    return click.option(
        "--batch",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help="images at once, over all processes",
    )


def dry_run_option(function: F) -> F:
    """``-n``/``--dry-run``: print the resolved record and touch nothing."""
    return click.option(
        "-n", "--dry-run", is_flag=True, help="Print what would be done and touch nothing."
    )(function)
