"""The training loop around `amed.step`: reports, saving and resuming."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from amed.batches import Batches
from amed.experiments import PREDICTOR, save_predictor
from amed.predictor import AMEDPredictor
from amed.sinks import Sinks
from amed.step import IntervalResult, MicroBatch, Student, train_batch
from checkpoints.states import read_state, restore
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.log import progress
from runtime.record import RunRecord

STATE = "training-state.pt"
SAVED = {"done": int, "predictor": dict, "optimizer": dict}  #: entries of the state


@dataclass(frozen=True)
class Loop:
    """The length of the training and the sizes of its batches."""

    total: int  #: trajectories
    batch: int  #: trajectories per update, over all ranks
    micro: int  #: trajectories at a time on one rank
    tick: int  #: trajectories between reports, which also save the state
    snap: int  #: ticks between kept predictors; 0 keeps only the last one
    lr: float

    @property
    def iterations(self) -> int:
        return -(-self.total // self.batch)

    @property
    def iterations_per_tick(self) -> int:
        return max(1, self.tick // self.batch)


class Preview(Protocol):
    """Samples with the current predictor: images (B, C, H, W)."""

    def __call__(self, predictor: AMEDPredictor) -> Tensor: ...


def train(
    predictor: AMEDPredictor,
    student: Student,
    batches: Batches,
    loop: Loop,
    world: World,
    folder: Path,
    record: RunRecord,
    preview: Preview | None = None,
) -> None:
    """Train on ``loop.total`` trajectories, continuing from the last saved state if there is one.

    At every tick rank 0 writes the predictor, the state to resume from and the metrics.  On one
    CPU rank, a run that was killed and resumed is bit-equal to an uninterrupted one.
    """
    optimizer = torch.optim.Adam(predictor.parameters(), lr=loop.lr)
    first = _load_state(folder / STATE, predictor, optimizer)
    total, done = loop.iterations * loop.batch, first * loop.batch
    with (
        closing(Sinks(folder, done, world.is_main)) as sinks,
        progress(total, "training", "traj", done, world.is_main) as bar,
    ):
        window: list[list[IntervalResult]] = []
        for it in range(first, loop.iterations):
            micros = _micros(batches, loop, world, it)
            results = train_batch(predictor, optimizer, student, micros, loop.batch, world.sum_)
            _check_finite("loss", torch.tensor([r.loss for r in results]), it, loop)
            window.append(results)
            bar.update(loop.batch)
            if (it + 1) % loop.iterations_per_tick and it + 1 < loop.iterations:
                continue
            metrics = _metrics(window, loop, world)
            variance = batches.variance(it)
            window = []
            bar.set_postfix(loss=f"{sum(metrics['loss']):.3f}")
            if world.is_main:
                _check_finite("predictor", parameters_to_vector(predictor.parameters()), it, loop)
                images = preview(predictor) if preview else None
                if images is not None:
                    _check_finite("preview", images, it, loop)
                sinks.write((it + 1) * loop.batch, metrics, loop.lr, variance, images)
                _save(folder, predictor, optimizer, record, it + 1, loop)
            world.barrier()


def _check_finite(what: str, values: Tensor, it: int, loop: Loop) -> None:
    """Raise UserError, before anything is saved, if iteration ``it`` of the training diverged."""
    if not bool(values.isfinite().all()):
        raise UserError(
            f"the training diverged: its {what} is not finite after {(it + 1) * loop.batch} "
            f"trajectories; give a smaller --lr than {loop.lr:g} (the last good state is kept)"
        )


def _micros(batches: Batches, loop: Loop, world: World, it: int) -> list[MicroBatch]:
    """This rank's share of batch ``it`` with its supervision, as micro-batches."""
    numbers = world.shard(range(it * loop.batch, (it + 1) * loop.batch))
    portions = range(0, len(numbers), loop.micro)
    return [batches.micro(numbers[i : i + loop.micro]) for i in portions]


def _metrics(window: list[list[IntervalResult]], loop: Loop, world: World) -> dict[str, list]:
    """Means over the tick and all ranks, per interval."""
    rows = torch.tensor(
        [[[r.loss, *r.mid] for r in batch] for batch in window], dtype=torch.float64
    ).mean(0)  # (N - 1, 4)
    world.sum_(rows)
    rows[:, 1:] /= loop.batch
    loss, r, c, a = rows.T.tolist()
    nonfinite = sum(r.nonfinite for batch in window for r in batch)
    return {"loss": loss, "r": r, "c": c, "a": a, "nonfinite": [nonfinite]}


def _save(
    folder: Path,
    predictor: AMEDPredictor,
    optimizer: torch.optim.Optimizer,
    record: RunRecord,
    done: int,
    loop: Loop,
) -> None:
    if loop.snap and done % (loop.snap * loop.iterations_per_tick) == 0:
        name = f"predictor-{done * loop.batch:08d}.safetensors"
        save_predictor(folder / "snapshots" / name, predictor, record)
    save_predictor(folder / PREDICTOR, predictor, record)
    state = {
        "done": done,
        "predictor": predictor.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_write(folder / STATE) as temporary:
        torch.save(state, temporary)


def _load_state(path: Path, predictor: AMEDPredictor, optimizer: torch.optim.Optimizer) -> int:
    """Restore predictor and optimizer from a saved state, if any; the iterations done so far."""
    state = read_state(path, SAVED)
    if not state:
        return 0
    restore({"predictor": predictor, "optimizer": optimizer}, state, path)
    return int(state["done"])


def is_finished(folder: Path, loop: Loop) -> bool:
    """Whether the run in ``folder`` is complete."""
    return updates_done(folder) >= loop.iterations


def updates_done(folder: Path) -> int:
    """The updates of the run in ``folder`` so far."""
    return int(read_state(folder / STATE, SAVED).get("done", 0))
