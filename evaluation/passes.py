"""One pass over numbered images through all detectors; a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from torch import Tensor
from tqdm import tqdm

from metrics.detectors import Detector
from metrics.summary import Collector, FeatureSummary, Gathers, Requirements, collect
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.log import progress

T = TypeVar("T")
SAVE_EVERY = 60.0  #: seconds of work that a kill may cost
FOLDER = "passes"  #: in the cache: what unfinished passes have gathered


@dataclass(frozen=True)
class ImageStream:
    """Images by number, whatever they come from.

    ``batches(start, bar)`` yields uint8 (B, 3, H, W) from number ``start`` on: those of this
    rank, which are every ``world.size``-th; B is ``share`` in all batches but the last.
    """

    name: str  #: of the statistics, and on the progress bar
    total: int  #: over all ranks
    share: int  #: images in a batch, on each rank
    identity: Mapping[str, Any]  #: what makes these images what they are; JSON values
    batches: Callable[[int, tqdm[Any]], Iterator[Tensor]]


@dataclass(frozen=True)
class Kept:
    """The file that holds what an unfinished pass has gathered, of all ranks; rank 0's.

    Its name is a hash of all that the sums depend on: a pass over other images, or for other
    needs, never finds it.
    """

    file: Path
    collectors: Sequence[Gathers]
    world: World

    def load(self) -> int:
        """Take up what the file holds; how many images that is of, 0 without a file."""
        done = self._read() if self.world.is_main and self.file.is_file() else 0
        return self.world.broadcast_object(done)

    def _read(self) -> int:
        try:
            with np.load(self.file, allow_pickle=False) as content:
                for i, collector in enumerate(self.collectors):
                    names = [n for n in content.files if n.startswith(f"{i}/")]
                    collector.restore({n.removeprefix(f"{i}/"): content[n] for n in names})
                return int(content["done"])
        except (OSError, EOFError, KeyError, ValueError, BadZipFile) as error:
            raise UserError(
                f"{self.file}, kept of a pass that was killed, cannot be read ({error}): delete it"
            ) from error

    def save(self, done: int) -> None:
        """Write what all ranks hold after ``done`` images; call it on every rank."""
        states = [collector.state() for collector in self.collectors]
        if self.world.is_main:
            named: dict[str, Any] = {"done": done}
            named |= {f"{i}/{n}": part for i, s in enumerate(states) for n, part in s.items()}
            with atomic_write(self.file) as temporary, open(temporary, "wb") as file:
                np.savez(file, **named)


def gathered(
    stream: ImageStream,
    detectors: Sequence[Detector],
    needs: Requirements,
    seed: int,
    world: World,
    cache: Path,
) -> AbstractContextManager[list[FeatureSummary]]:
    """``with gathered(...) as summaries:`` what each detector makes of a stream; see `resumed`."""
    collectors = [Collector(d, needs, stream.total, seed, stream.name) for d in detectors]
    detected = [asdict(d.id) for d in detectors]
    identity = {**stream.identity, "needs": asdict(needs), "seed": seed, "detectors": detected}
    return resumed(replace(stream, identity=identity), collectors, world, cache)


@contextmanager
def resumed(
    stream: ImageStream, collectors: Sequence[Gathers[T]], world: World, cache: Path
) -> Iterator[list[T]]:
    """``with resumed(...) as made:`` what each collector makes of a stream, over all ranks.

    Every minute what they have goes to a file in ``cache``, and a killed pass goes on from there,
    on any number of ranks. The file is removed when the block ends without an exception, so write
    the results in the block.
    """
    identity = {**stream.identity, "total": stream.total}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    kept = Kept(cache / FOLDER / f"{name[:32]}.npz", collectors, world)
    yield _run(stream, collectors, kept, world)
    if world.is_main:
        kept.file.unlink(missing_ok=True)


def _run(
    stream: ImageStream, collectors: Sequence[Gathers[T]], kept: Kept, world: World
) -> list[T]:
    start = kept.load()
    if start and world.is_main:
        tqdm.write(f"going on after {start} of {stream.total} images", file=sys.stderr)
    with progress(stream.total, stream.name, "img", start, enabled=world.is_main) as bar:
        watched = _watched(stream, kept, world, start, bar)
        return collect(watched, collectors, (world.rank, world.size), start)


def _watched(
    stream: ImageStream, kept: Kept, world: World, start: int, bar: tqdm[Any]
) -> Iterator[Tensor]:
    """The batches; between two of them all ranks have seen the same number of images."""
    done, saved = start, time.monotonic()

    def save() -> None:
        nonlocal saved
        if world.broadcast_object(time.monotonic() > saved + SAVE_EVERY):
            kept.save(done)
            saved = time.monotonic()

    for images in stream.batches(start, bar):
        yield images  # the collectors have them when the next ones are asked for
        before, done = done, min(done + stream.share * world.size, stream.total)
        bar.update(done - before)
        if done < stream.total:  # else not all ranks may be here
            save()
    done = stream.total
    save()
