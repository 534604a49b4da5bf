"""Find the noise levels of a model's grid by geometry-inspired time scheduling (GITS)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from commands.help import SETTINGS
from commands.numbers import POSITIVE, nodes
from commands.options import (
    PATH,
    Name,
    batch_option,
    condition_options,
    dataset_option,
    device_option,
    dry_run_option,
    dtype_option,
    model_options,
)
from denoisers.batch import SeededBatch
from denoisers.cards import Card
from denoisers.conditions import ConditionOptions, Conditions
from denoisers.registry import ModelSource
from runtime import cli
from runtime.dist import World
from runtime.errors import UserError
from runtime.job import execute
from runtime.lists import parse_whole_numbers
from runtime.log import progress
from runtime.options import Json, flat_options, parse_options
from runtime.outputs import check_file
from runtime.record import RunRecord
from runtime.seeds import SELECTION_START, seed_ranges, selection_seeds
from runtime.typed import SCHEMA, write_result
from solvers.gits import best_path, euler_errors
from solvers.grids import MOST_NODES, SCHEDULES, Grid

EXAMPLES = """\b
Examples:
  python -m tools.gits --num_steps 6
  python -m tools.gits --num_steps 5,6,7 --dataset_name mine --model_path FILE --dest times.json
  python sample.py --sampler=ipndm --times 80,6.66,2.16,0.68,0.17,0.002
"""


@dataclass(frozen=True)
class GitsOptions:
    """What ``python -m tools.gits`` is asked for, under the names of its flags."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    num_steps: str = "6"
    fine: int = 61
    schedule_type: str = "polynomial"
    number: int = 256
    coefficient: float = 1.15
    batch: int = 64  #: over all processes
    dest: Path | None = None


@dataclass(frozen=True)
class Found:
    """A grid that was found."""

    num_steps: int
    times: tuple[float, ...]
    nodes: tuple[int, ...]  #: of the fine grid

    def __str__(self) -> str:
        return ",".join(f"{t:.6g}" for t in self.times)


@dataclass(frozen=True)
class GitsResult:
    """The file of ``--dest``."""

    record: RunRecord
    grids: tuple[Found, ...]
    schema: int = SCHEMA


@dataclass(frozen=True)
class GitsJob:
    """A search that is laid out; nothing has been loaded or written yet."""

    options: GitsOptions
    card: Card
    conditions: Conditions
    lengths: Sequence[int]  #: numbers of nodes
    ts: Tensor  #: the fine grid

    def record(self, weights_sha256: str | None) -> RunRecord:
        seeds = self._seeds()
        plan: dict[str, Json] = {
            "seeds": seed_ranges(seeds),
            "nfe": len(self.ts) - 1,
            "prompts": self.conditions.describe(),
        }
        model: dict[str, Json] = {"name": self.card.name, "sha256": weights_sha256}
        return RunRecord.make("gits", flat_options(self.options), model, plan)

    def outline(self) -> str:
        """The record, for a dry run."""
        return self.record(self.options.model.known_sha256).to_json()

    def run(self, here: World) -> str:
        """Find the grids; returns their noise levels, a line for each."""
        check_file(self.options.dest, "--dest", here)
        source = self.options.model
        model = source.load(here)
        total, mine = torch.zeros(2 * (len(self.ts),), dtype=torch.float64), self._seeds(here)
        share = here.share(self.options.batch)
        with progress(len(mine), "trajectories", "traj", enabled=here.is_main) as bar:
            for i in range(0, len(mine), share):
                some = mine[i : i + share]
                batch = SeededBatch.open(
                    model, self.conditions, some, source.state_dtype, here.device
                )
                with torch.inference_mode():
                    x = batch.start(float(self.ts[0]))
                    total += len(some) * euler_errors(batch.meter, x, self.ts)
                bar.update(len(some))
        cost = here.sum_(total) / self.options.number
        grids = tuple(self._grid(cost, length) for length in self.lengths)
        if here.is_main and self.options.dest is not None:
            write_result(self.options.dest, GitsResult(self.record(model.sha256), grids))
        return "\n".join(map(str, grids))

    def _grid(self, cost: Tensor, length: int) -> Found:
        path = best_path(cost, length - 1, self.options.coefficient)
        return Found(length, tuple(self.ts[path].tolist()), tuple(path))

    def _seeds(self, here: World | None = None) -> Sequence[int]:
        """Seeds of selections, which no table reports on; those of this process."""
        seeds = selection_seeds(self.options.number)
        return seeds if here is None else here.shard(seeds)


def prepare(options: GitsOptions) -> GitsJob:
    """Resolve every option.

    Raises UserError or ValueError, one sentence with the remedy.
    """
    lengths = parse_whole_numbers("--num_steps", options.num_steps, 2, MOST_NODES)
    if lengths[-1] > options.fine:
        raise UserError(
            f"--num_steps {lengths[-1]} is more than the {options.fine} nodes of --fine: give "
            "fewer, or a finer grid"
        )
    card = options.model.card()
    conditions = options.conditions.resolve(card)
    conditions.check(card, selection_seeds(options.number))
    ts = Grid(options.schedule_type, options.fine).resolve(card).nodes()
    return GitsJob(options, card, conditions, lengths, ts)


@click.command(epilog=EXAMPLES, context_settings=SETTINGS)
@click.option("--num_steps", default="6", metavar="LIST", help="grid nodes, by comma")
@click.option("--fine", type=nodes(3), default=61, help="nodes of the fine grid")
@click.option(
    "--schedule_type",
    type=Name("schedule", SCHEDULES),
    default="polynomial",
    help="of the fine grid",
)
@click.option("--number", type=click.IntRange(1, SELECTION_START), default=256, help="trajectories")
@click.option(
    "--coefficient",
    type=POSITIVE,
    default=1.15,
    help="weight of every step relative to the one before",
)
@click.option("--dest", type=PATH, help="also write the grids to this .json")
@dataset_option
@model_options
@condition_options
@batch_option(64)
@dtype_option
@device_option
@dry_run_option
def main(dry_run: bool, device: str | None, **flags: Any) -> None:
    """Find the noise levels of a model's grid by geometry-inspired time scheduling (GITS).

    Prints the noise levels of each number of nodes, for --times of sample.py and compare.py: the
    path through a fine grid with the smallest sum of errors of Euler steps (arXiv:2405.11326).
    The latents are those of selections, on which no table reports.
    """
    execute(prepare, parse_options(GitsOptions, flags), dry_run, device)


if __name__ == "__main__":
    cli.run(main)
