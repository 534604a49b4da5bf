"""One pass over numbered images through all detectors; an interrupted one can be continued."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from checkpoints.arrays import read_npz, require_like
from evaluation.beside import beside
from metrics.detectors import Detector
from metrics.summary import Collector, FeatureSummary, Gathers, Requirements, collect
from runtime.dist import World
from runtime.errors import UserError, reason
from runtime.files import atomic_write, remove_leftovers
from runtime.log import note, progress

T = TypeVar("T")
SAVE_EVERY = 60.0  #: seconds of work that an interruption may cost
FOLDER = "passes"  #: in the cache: what unfinished passes have gathered


@dataclass(frozen=True)
class ImageStream:
    """Images by number, whatever their source.

    ``batches(start, bar)`` yields uint8 (B, 3, H, W) from number ``start`` on: those of this
    rank, which are every ``size``-th; B is ``share`` in all batches but the last.
    """

    name: str  #: of the statistics, and on the progress bar
    total: int  #: images over all ranks
    share: int  #: images in a batch, on each rank
    identity: Mapping[str, Any]  #: what determines these images; JSON values
    batches: Callable[[int, tqdm[Any]], Iterator[Tensor]]


@dataclass(frozen=True)
class UnfinishedPass:
    """The file that holds what a pass has gathered so far on all ranks; rank 0 owns it.

    Its name is a hash of all that the sums depend on: a pass over other images, or with other
    requirements, never finds it.
    """

    file: Path
    collectors: Sequence[Gathers]
    total: int  #: images of the whole pass
    here: World

    def load(self) -> int:
        """Restore what the file holds; returns its number of images, 0 without a file."""
        if self.here.is_main:
            remove_leftovers(self.file)
        done = self._read() if self.here.is_main and os.path.isfile(self.file) else 0
        return self.here.broadcast_object(done)

    def _read(self) -> int:
        try:
            content = read_npz(self.file)
            require_like(content, {"done": np.array(0)})
            done = int(content["done"])
            if not 0 <= done <= self.total:
                raise ValueError(f"{done} of {self.total} images")
            for i, collector in enumerate(self.collectors):
                names = [n for n in content if n.startswith(f"{i}/")]
                collector.restore({n.removeprefix(f"{i}/"): content[n] for n in names})
            return done
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.file}, the state of an interrupted pass, cannot be read ({error}): delete "
                "it and run again"
            ) from error

    def save(self, done: int) -> bool:
        """Write what all ranks hold after ``done`` images; call it on every rank.

        Where the cache cannot be written, rank 0 prints a note and returns False: a pass works
        without one.
        """
        states = [collector.state() for collector in self.collectors]
        if self.here.is_main:
            named: dict[str, Any] = {"done": done}
            named |= {f"{i}/{n}": part for i, s in enumerate(states) for n, part in s.items()}
            try:
                with atomic_write(self.file) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **named)
            except (OSError, UserError) as error:
                note(
                    f"note: the state of this pass cannot be kept in {self.file.parent} "
                    f"({reason(error)}): if it is interrupted, it begins anew"
                )
                return False
        return True

    def remove(self) -> None:
        """Remove the file on rank 0, with a note if it cannot be removed."""
        if not (self.here.is_main and os.path.isfile(self.file)):
            return
        try:
            self.file.unlink()
        except OSError as error:
            note(f"note: {self.file} cannot be removed ({reason(error)})")


def gather_features(
    stream: ImageStream,
    detectors: Sequence[Detector],
    needs: Requirements,
    seed: int,
    here: World,
    cache: Path,
) -> AbstractContextManager[list[FeatureSummary]]:
    """``with gather_features(...) as summaries:`` the features of a stream in each detector.

    ``seed`` draws the images whose features are kept.  See `resumable_pass`.
    """
    collectors = [Collector(d, needs, stream.total, seed, stream.name) for d in detectors]
    identity = {
        **stream.identity,
        "needs": asdict(needs),
        "seed": seed,
        "detectors": [asdict(d.id) for d in detectors],
    }
    return resumable_pass(replace(stream, identity=identity), collectors, here, cache)


@contextmanager
def resumable_pass(
    stream: ImageStream, collectors: Sequence[Gathers[T]], here: World, cache: Path
) -> Iterator[list[T]]:
    """``with resumable_pass(...) as results:`` what each collector gathers of a stream.

    Once a minute the sums of all ranks are saved to a file in ``cache``, and an interrupted pass
    continues from there, on any number of ranks.  The file is removed when the block ends without
    an exception, so write the results inside the block.
    """
    identity = {**stream.identity, "total": stream.total}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    state = UnfinishedPass(cache / FOLDER / f"{name[:32]}.npz", collectors, stream.total, here)
    yield _run(stream, state, here)
    state.remove()


def _run(stream: ImageStream, state: UnfinishedPass, here: World) -> list[Any]:
    start = state.load()
    if start and here.is_main:
        tqdm.write(f"continuing after {start} of {stream.total} images", file=sys.stderr)
    with (
        progress(stream.total, stream.name, "img", start, enabled=here.is_main) as bar,
        beside(stream.batches(start, bar), here.device) as batches,
    ):
        batches = _save_between_batches(batches, stream, state, here, start, bar)
        return collect(batches, state.collectors, (here.rank, here.size), start)


def _save_between_batches(
    batches: Iterator[Tensor],
    stream: ImageStream,
    state: UnfinishedPass,
    here: World,
    start: int,
    bar: tqdm[Any],
) -> Iterator[Tensor]:
    """The batches; between two of them all ranks have seen the same number of images."""
    done, saved = start, time.monotonic()

    def save() -> None:
        nonlocal saved
        if here.broadcast_object(time.monotonic() > saved + SAVE_EVERY):
            saved = time.monotonic() if state.save(done) else math.inf

    for images in batches:
        yield images  # the collectors have them when the next ones are asked for
        before, done = done, min(done + stream.share * here.size, stream.total)
        bar.update(done - before)
        if done < stream.total:  # else not all ranks may be here
            save()
    done = stream.total
    save()
