"""Detectors beside the sampler: on a GPU one batch is made while the last one is measured."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The items in order; a thread makes the next one while the caller works on one.

    An exception of ``items`` is raised in the place of the item.  Whoever stops early waits for the
    item that is being made.
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(list, _first(source))
        while made := coming.result():
            coming = thread.submit(list, _first(source))
            yield made[0]


def _first(source: Iterator[T]) -> Iterator[T]:
    """The next item, if there is one."""
    for item in source:
        yield item
        return


@contextmanager
def beside(batches: Iterator[T], device: torch.device) -> Iterator[Iterator[T]]:
    """``with beside(batches, device) as batches:`` measures them on a CUDA stream of its own.

    The next batch is made on the device's default stream meanwhile, by a thread: kernels of both
    run together where there is room, and neither waits for the other's copies.  Batches are on the
    CPU, so while both work they share nothing on the device; each stream waits for what the other
    did before.  On other devices nothing changes.
    """
    if device.type != "cuda":
        yield batches
        return
    usual, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    own.wait_stream(usual)
    with torch.cuda.stream(own), closing(ahead(batches)) as made:
        yield made
    usual.wait_stream(own)
