"""Refinement of a table: gradient steps on the error of the image, through all network calls."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from checkpoints.states import read_state, restore
from ns.coordinates import WhitenedTable
from ns.losses import Loss
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.log import JsonLines, TextLog, progress, tensorboard
from runtime.noise import shuffled
from solvers.table import Table
from solvers.types import Denoised, Denoiser

STATE = "refine-state.pt"
NUMBERS = {"done": int, "error": float, "best_error": float}
PARTS = ("current", "average", "best", "optimizer", "schedule")
SAVED = {**NUMBERS, **dict.fromkeys(PARTS, dict)}  #: entries of the state
CLIP = 1.0  #: largest norm of a gradient in whitened coordinates
BETAS = (0.9, 0.99)  #: of Adam: runs are of hundreds of updates
AVERAGE = 0.9  #: decay of the exponential moving average of the coordinates


class Pair(NamedTuple):
    """Latents, the teacher's images of them, and the denoiser that is bound to these samples."""

    latents: Tensor  #: (B, C, H, W) at the table's start
    images: Tensor  #: (B, C, H, W)
    denoiser: Denoiser


@dataclass(frozen=True)
class RefineLoop:
    """The length of a refinement and its steps."""

    updates: int
    batch: int  #: pairs per update, over all processes
    report: int  #: updates between reports, which also save the state
    lr: float  #: of Adam at the start; it falls to 0 along a cosine
    checkpointed: bool = False  #: recompute each call in the backward pass: memory flat in calls
    seed: int = 0


#: The pairs with these numbers, in batches.
Pairs = Callable[[Sequence[int]], Iterator[Pair]]


def refine(
    start: WhitenedTable,
    pairs: Pairs,
    numbers: Sequence[int],
    judge: Callable[[Table], float],
    loss: Loss,
    loop: RefineLoop,
    folder: Path,
    here: World,
    save: Callable[[Table], object],
) -> Table:
    """Refine ``start`` on the pairs of ``numbers``; the best table by ``judge`` is returned.

    ``judge`` gives the error on latents that are not among ``numbers``.  At every report rank 0
    calls ``save`` with the best table so far and writes the state, from which a killed run goes on
    to the same result.
    """
    run = _Run(start, loop, judge(start.table()))
    run.restore(folder / STATE)
    log = TextLog(folder / "log.txt", here.is_main)
    if here.is_main and not run.done:
        save(start.table())
        run.save(folder / STATE)
    with (
        closing(JsonLines(folder / "stats.jsonl", run.done or None, here.is_main)) as rows,
        closing(_Board(folder, run.done, here.is_main)) as board,
        progress(loop.updates, "refining", "update", run.done, here.is_main) as bar,
    ):
        losses: list[float] = []
        while run.done < loop.updates:
            positions = range(run.done * loop.batch, (run.done + 1) * loop.batch)
            chosen = [numbers[i] for i in shuffled(positions, len(numbers), loop.seed)]
            losses.append(run.update(pairs(here.shard(chosen)), loss, here))
            bar.update(1)
            if run.done % loop.report and run.done < loop.updates:
                continue
            run.compare(judge)
            mean, losses = sum(losses) / len(losses), []
            bar.set_postfix(loss=f"{mean:.3g}", held_out=f"{run.error:.4f}")
            if here.is_main:
                row = {
                    "step": run.done,
                    "loss": mean,
                    "held_out": run.error,
                    "best": run.best_error,
                }
                rows.append({**row, "times": run.average.table().times.tolist()})
                board.write(row)
                log(f"{run.done:6d} updates: loss {mean:.4g}  held out {run.error:.5f}")
                save(run.best.table())
                run.save(folder / STATE)
            here.barrier()
    return _detached(run.best.table())


class _Run:
    """What a refinement carries from update to update."""

    def __init__(self, start: WhitenedTable, loop: RefineLoop, error: float) -> None:
        self.loop, self.done = loop, 0
        self.current = start
        self.average, self.best = copy.deepcopy(start), copy.deepcopy(start)
        self.error = self.best_error = error
        self.optimizer = torch.optim.Adam(start.parameters(), lr=loop.lr, betas=BETAS)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, loop.updates)

    def update(self, pairs: Iterator[Pair], loss: Loss, here: World) -> float:
        """One step on this rank's pairs of a batch; the loss over all ranks."""
        parameters = list(self.current.parameters())
        total = torch.zeros((), dtype=torch.float64)
        flat = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for pair in pairs:
            denoiser = Recomputed(pair.denoiser) if self.loop.checkpointed else pair.denoiser
            *_, image = self._table().states(denoiser, pair.latents)
            errors = loss(image, pair.images, denoiser).to(torch.float64)
            mean = errors.sum() / self.loop.batch
            gradients = torch.autograd.grad(mean, parameters)
            flat += torch.cat([g.flatten() for g in gradients])
            total += mean.detach().cpu()
        here.sum_(flat)
        here.sum_(total)
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = piece.view_as(p).clone()
        if not bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, CLIP))):
            raise self._diverged()
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), parameters, strict=True):
                mean.lerp_(p, 1 - AVERAGE)
        self.done += 1
        return float(total)

    def _table(self) -> Table:
        try:
            return self.current.table()
        except ValueError:  # a weight or a time that is not finite
            raise self._diverged() from None

    def _diverged(self) -> UserError:
        return UserError(
            f"update {self.done + 1} finds no finite table or gradient: give a smaller --lr than "
            f"{self.loop.lr:g}; the last saved table is kept"
        )

    def compare(self, judge: Callable[[Table], float]) -> None:
        """Judge the averaged table, and keep it if it is the best so far."""
        self.error = judge(_detached(self.average.table()))
        if self.error < self.best_error:
            self.best_error = self.error
            self.best.load_state_dict(self.average.state_dict())

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in NUMBERS}
        state |= {name: getattr(self, name).state_dict() for name in PARTS}
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    def restore(self, path: Path) -> None:
        """Continue from a saved state, if there is one."""
        state = read_state(path, SAVED)
        if not state:
            return
        for name in NUMBERS:
            setattr(self, name, state[name])
        parts = {name: getattr(self, name) for name in PARTS}
        restore(parts, state, path, begun=self.done > 0)


class _Board:
    """TensorBoard on rank 0."""

    def __init__(self, folder: Path, done: int, enabled: bool) -> None:
        self._writer = tensorboard(folder, done or None, enabled)

    def write(self, row: dict[str, Any]) -> None:
        if self._writer is not None:
            for name in ("loss", "held_out", "best"):
                self._writer.add_scalar(f"refine/{name}", row[name], row["step"])
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True, eq=False)
class Recomputed:
    """A denoiser whose calls are recomputed in the backward pass instead of being kept."""

    inner: Denoiser

    @property
    def cost(self) -> int:
        return self.inner.cost

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        denoised: Denoised = checkpoint(self.inner, x, sigma, use_reentrant=False)
        return denoised


def _detached(table: Table) -> Table:
    return Table(table.start, table.end, table.times.detach(), table.rows.detach())
