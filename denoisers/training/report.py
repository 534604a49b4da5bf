"""The output of EDM training: statistics, sample grids, the model, and the state to resume from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from denoisers.cards import Card
from denoisers.families.edm import HIGHEST, LOWEST, EDMDenoiser, card_of
from denoisers.training.batches import TrainingBatch
from denoisers.training.trainer import Trainer
from runtime.errors import UserError
from runtime.files import atomic_write, sha256_file, write_json
from runtime.images import image_grid, to_uint8
from runtime.log import JsonLines, TextLog, read_json_lines, tensorboard
from runtime.noise import SeedNoise
from runtime.record import RECORD, RunRecord
from solvers.driver import integrate
from solvers.grids import get_grid
from solvers.registry import make_solver

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE, MODEL, ROWS = "state.pt", "model.safetensors", "stats.jsonl"
GRID = 8  #: rows and columns of a sample grid


Row = dict[str, int | float]  #: statistics by name


@dataclass(frozen=True)
class TrainedNetwork:
    """What a run trains, and on which data."""

    config: Mapping[str, Any]  #: constructor settings of the network
    bottleneck: str
    init: str | None  #: sha256 of the file with the first weights
    images_before: int  #: images that these have seen
    data: str  #: name of the data set

    def identity(self) -> dict[str, object]:
        """The identity of the run in its states."""
        return asdict(self)


def write_model(folder: Path, trainer: Trainer, network: TrainedNetwork, record: RunRecord) -> None:
    """Write ``model.safetensors``, with the averaged weights in float16, and ``card.json``."""
    file = folder / MODEL
    metadata = {
        "config": json.dumps(network.config),
        "bottleneck_module": network.bottleneck,
        "images_seen": str(trainer.images + network.images_before),
        "record": record.to_json(),
    }
    tensors = {k: v.contiguous().cpu() for k, v in trainer.ema.state_dict().items()}
    tensors |= {k: v.half().contiguous().cpu() for k, v in trainer.ema.named_parameters()}
    with atomic_write(file) as temporary:
        save_file(tensors, temporary, metadata)
    standard = {f.name: f.default for f in fields(Card)}
    card = vars(card_of(trainer.ema, network.config, "", "edm", file, sha256_file(file)))
    entry = {k: v for k, v in card.items() if v not in (standard[k], {}) and k != "name"}
    write_json(folder / "card.json", entry)


@torch.no_grad()
def sample_grid(trainer: Trainer) -> np.ndarray:
    """GRID x GRID samples of the averaged weights by Heun at 23 NFE, of seeds 0, 1, ..."""
    net, device = trainer.ema, trainer.world.device
    count = GRID * GRID
    ts = get_grid("polynomial", 12, max(net.sigma_min, LOWEST), min(net.sigma_max, HIGHEST), 7.0)
    labels = None
    if net.label_dim:
        labels = F.one_hot(torch.arange(count) % net.label_dim, net.label_dim).to(device)
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    x = SeedNoise(range(count)).normal("latent", shape, device=device) * ts[0].float()
    out = integrate(make_solver("heun"), EDMDenoiser(net, labels), x, ts).x[-1]
    return image_grid(to_uint8(out), GRID)


def loss_curve(rows: Sequence[Row]) -> Figure:
    """Loss of the training and of the averaged weights on held-out images, over images seen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no global state, no display

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label in (("loss", "training"), ("valid", "held out, averaged weights")):
        points = [(r["step"], r[name]) for r in rows if isinstance(r.get(name), (int, float))]
        if points:
            axes.plot(*zip(*points, strict=True), ".-", label=label)
    axes.set_xlabel("images")
    axes.set_ylabel("loss")
    if axes.lines:
        axes.legend()
    return figure


class Reporter:
    """Writes statistics, samples, the model and the state of a run at every tick."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        network: TrainedNetwork,
        held_out: TrainingBatch | None,
        record: RunRecord,
    ) -> None:
        main = trainer.world.is_main
        self.folder, self.trainer, self.network = folder, trainer, network
        self.held_out, self.record = held_out, record
        if main:
            record.write(folder / RECORD)
        self.say = TextLog(folder / "log.txt", main)
        self.rows = JsonLines(folder / ROWS, trainer.images, main)
        self.board = tensorboard(folder, trainer.images, main)
        self.clear()

    def clear(self) -> None:
        """Begin to collect the statistics of the next tick."""
        trainer = self.trainer
        # the sum and the number of losses
        self.losses = torch.zeros(2, dtype=trainer.recipe.wide, device=trainer.world.device)
        trainer.nonfinite.zero_()
        self.since, self.seen = time.monotonic(), trainer.images

    def tick(self) -> None:
        """Write everything on rank 0; call it on every rank.

        Raises UserError if the loss is not finite.
        """
        trainer = self.trainer
        total, count = trainer.world.sum_(self.losses).tolist()
        row: Row = {
            "step": trainer.images,
            "loss": total / count,
            "lr": trainer.recipe.learning_rate(trainer.images - trainer.recipe.batch),
            "nonfinite": int(trainer.nonfinite),
            "images_per_second": round(
                (trainer.images - self.seen) / (time.monotonic() - self.since), 1
            ),
        }
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss is {row['loss']} after {trainer.images} images; start again in another "
                "folder with a lower --lr or a wider --dtype"
            )
        if trainer.world.is_main:
            self.write(row)
        trainer.world.barrier()
        self.clear()

    def write(self, row: Row) -> None:
        """Write ``row``, samples and model, and last the state.

        A run that is killed before the state is written repeats this tick when it is resumed.
        """
        trainer = self.trainer
        if self.held_out is not None:
            row["valid"] = trainer.validate(self.held_out)
        self.rows.append(row)
        self.say(
            "  ".join(f"{k} {v if isinstance(v, int) else f'{v:.5g}'}" for k, v in row.items())
        )
        assert self.board is not None
        for name in row.keys() - {"step"}:
            self.board.add_scalar(name, row[name], trainer.images)
        grid = sample_grid(trainer)
        self.board.add_image("samples", grid, trainer.images, dataformats="HWC")
        self.board.flush()
        with atomic_write(self.folder / "loss.png") as temporary:
            loss_curve(read_json_lines(self.folder / ROWS)).savefig(temporary, format="png")
        write_model(self.folder, trainer, self.network, self.record)
        trainer.save(self.folder / STATE, self.network.identity())

    def close(self) -> None:
        """Close all files, on every rank."""
        self.rows.close()
        if self.board is not None:
            self.board.close()
