"""The shape of a command that samples or measures: options -> job -> outline or result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import click

from runtime.dist import World, choose_device, environment, world
from runtime.errors import UserError
from runtime.log import note

Options = TypeVar("Options")


class Job(Protocol):
    """Work that is planned in full: every option resolved, nothing loaded or written yet."""

    def outline(self) -> str:
        """What would be done, in words and as a record: what a dry run prints."""
        ...

    def run(self, here: World) -> object:
        """Do the work on all processes; the main one prints ``str`` of the result."""
        ...


AnyJob = TypeVar("AnyJob", bound=Job)


class NotFetched(UserError):
    """What a plan needs to know is in a file that was never downloaded; ``fetch`` gets it."""

    def __init__(self, sentence: str, fetch: Callable[[], object]) -> None:
        super().__init__(sentence)
        self.fetch = fetch


def execute(
    prepare: Callable[[Options], AnyJob],
    options: Options,
    dry_run: bool,
    device: str | None,
    outlook: Callable[[AnyJob, World], str] | None = None,
) -> None:
    """Run a command's job, or print its outline, which needs neither files nor a network.

    ``outlook`` says what else is known of a long job, in a dry run; it may need its model.
    """
    if dry_run:
        chosen = choose_device(device)  # an unknown one is an error here too
        if environment()[0] == 0:
            job = prepare(options)
            click.echo(job.outline())
            note(outlook(job, World(0, 1, chosen)) if outlook else None)
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
