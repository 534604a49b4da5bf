"""The shape of a command that samples or measures: options -> job -> outline or result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import click

from runtime.dist import World, choose_device, environment, world
from runtime.errors import UserError

Options = TypeVar("Options")


class Job(Protocol):
    """Work that is planned in full: every option resolved, nothing loaded or written yet."""

    def outline(self) -> str:
        """What would be done, in words and as a record: what a dry run prints."""
        ...

    def run(self, here: World) -> object:
        """Do the work on all processes; the main one prints ``str`` of the result."""
        ...


class NotFetched(UserError):
    """What a plan needs to know is in a file that was never downloaded; ``fetch`` gets it."""

    def __init__(self, sentence: str, fetch: Callable[[], object]) -> None:
        super().__init__(sentence)
        self.fetch = fetch


def execute(
    prepare: Callable[[Options], Job], options: Options, dry_run: bool, device: str | None
) -> None:
    """Run a command's job, or print its outline, which needs neither files nor a network."""
    if dry_run:
        choose_device(device)  # an unknown one is an error here too
        if environment()[0] == 0:
            click.echo(prepare(options).outline())
        return
    with world(device) as here:
        result = str(_prepared(prepare, options, here).run(here))
        if here.is_main and result:
            click.echo(result)


def _prepared(prepare: Callable[[Options], Job], options: Options, here: World) -> Job:
    """The job, once the main process has downloaded what its plan needs."""
    if not here.is_main:
        here.barrier()
    try:
        job = prepare(options)
    except NotFetched as missing:
        missing.fetch()
        job = prepare(options)
    if here.is_main:
        here.barrier()
    return job
