"""``torchrun --standalone`` that ends as our commands do: a sentence or nothing, never a traceback.

    python -m commands.torchrun --nproc_per_node=2 train.py --dataset_name=cifar10-small

The processes report their own errors; the launcher's report of them, some forty lines, adds
nothing.  The exit code is that of the process that failed first.
"""

from __future__ import annotations

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: list[str]) -> int:
    """Start the processes, wait for them, and return the exit code."""
    logging.disable(logging.ERROR)
    try:
        main(["--standalone", *arguments])
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException as error:
        if error.sigval != signal.SIGINT:  # which rank 0 reports
            print("terminated", file=sys.stderr)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
