"""The logs of a training run: JSON lines, text and TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from runtime.images import image_grid, to_uint8
from runtime.log import JsonLines, TextLog, tensorboard


class Sinks:
    """The logs of a run on rank 0; on other ranks every method does nothing."""

    def __init__(self, folder: Path, resume_after: int, enabled: bool) -> None:
        after = resume_after or None
        self._rows = JsonLines(folder / "stats.jsonl", after, enabled)
        self._log = TextLog(folder / "log.txt", enabled)
        self._board = tensorboard(folder, after, enabled)

    def close(self) -> None:
        """Close the files."""
        self._rows.close()
        if self._board is not None:
            self._board.close()

    def write(
        self,
        step: int,
        metrics: dict[str, list],
        lr: float,
        variance: list[float] | None,
        images: Tensor | None,
    ) -> None:
        """Log one tick at ``step`` trajectories; ``metrics`` are lists over intervals."""
        row: dict[str, object] = {"step": step, "lr": lr, **metrics}
        if variance is not None:
            row["teacher/variance_t"] = variance
        self._rows.append(row)
        self._log(_text(step, metrics, variance))
        if self._board is None:
            return
        for name in ("loss", "r", "c", "a"):
            for n, value in enumerate(metrics[name]):
                self._board.add_scalar(f"{name}/interval_{n}", value, step)
        self._board.add_scalar("train/lr", lr, step)
        self._board.add_scalar("train/nonfinite_gradients", metrics["nonfinite"][0], step)
        for n, value in enumerate(variance or ()):
            self._board.add_scalar(f"teacher/variance_t{n}", value, step)
        if images is not None:
            grid = image_grid(list(to_uint8(images)), columns=8)
            self._board.add_image("samples", torch.from_numpy(grid), step, dataformats="HWC")
        self._board.flush()


def _text(step: int, metrics: dict[str, list], variance: list[float] | None) -> str:
    def row(values: list[float], form: str) -> str:
        return " ".join(format(v, form) for v in values)

    text = (
        f"{step:6d} trajectories: loss {row(metrics['loss'], '.3f')}  r {row(metrics['r'], '.3f')}"
        f"  c {row(metrics['c'], '.4f')}  a {row(metrics['a'], '.3f')}"
    )
    if metrics["nonfinite"][0]:
        text += f"  ({metrics['nonfinite'][0]} non-finite gradient entries replaced)"
    if variance is not None:
        text += f"  teacher variance {row(variance, '.2e')}"
    return text
