"""Cards of the known models, read from ``cards.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoisers.noise_schedules import DiscreteVP, Flow, LinearVP, NoiseSchedule
from runtime.errors import UserError
from runtime.files import sha256_file
from runtime.typed import read_result
from solvers.grids import TimeMaps

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Card:
    """Everything that is known of a model before its weights are read."""

    name: str  #: the value of ``--dataset_name``
    family: str  #: chooses the loader
    resolution: int  #: height of a sample in pixels, or of latents, and width if that is None
    channels: int
    label_dim: int  #: classes; 0 for an unconditional model
    sigma_min: float  #: the range of noise levels that samplers use
    sigma_max: float
    bottleneck: str = ""  #: module of the network whose channel mean is the feature
    file: str = ""  #: file name: bundled (safetensors) or as published
    url: str | None = None  #: None if bundled, "" if it has to be fetched by hand
    #: of the file; if None, that of the first download is stored and checked afterwards
    sha256: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  #: constructor settings, as published
    #: part of ``config`` that the user gave, since the file of a model of one's own lacks it
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: default plan of the Restart teacher; empty if none is known
    restart_info: Mapping[str, list[float]] = field(default_factory=dict)
    #: cg (classifier), cfg (classifier-free), embedded (told to the network), uncond (none) or None
    guidance: str | None = None
    text: bool = False  #: conditioned on a prompt
    #: a second file, with ``file``, ``url`` and ``sha256``: classifier or first stage
    companion: Mapping[str, str | None] | None = None
    noise_schedule: Mapping[str, Any] | None = None  #: of a model with its own time
    image_resolution: int | None = None  #: height after decoding, if samples are latents
    width: int | None = None  #: of a sample that is no square
    pfgmpp: int | None = None  #: dimensions D that PFGM++ adds to those of the data
    #: published predictor-corrector sampler: ``N`` noise levels, ``n_steps`` of the corrector at
    #: each, and their ``snr``; empty if none is known
    langevin: Mapping[str, float] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        return self.channels, self.resolution, self.width or self.resolution

    @property
    def schedule(self) -> NoiseSchedule | None:
        """The model's own time, or None for a model conditioned on sigma."""
        if self.noise_schedule is None:
            return None
        settings = dict(self.noise_schedule)
        return SCHEDULES[settings.pop("kind")](**settings)

    @property
    def time_maps(self) -> TimeMaps | None:
        """The model's own time, as the ``discrete`` grid takes it; None without one."""
        own = self.schedule
        return None if own is None else TimeMaps(own.sigma, own.sigma_inv)

    @property
    def is_flow(self) -> bool:
        """Whether its process is a rectified flow."""
        return isinstance(self.schedule, Flow)

    @property
    def default_schedule(self) -> str:
        """Of the time grid: that of EDM, and for a flow its own time, in which pipelines step."""
        return "discrete" if self.is_flow else "polynomial"

    def cost(self, guidance_rate: float | None = None) -> int:
        """Network evaluations of one call: guidance without a classifier needs two."""
        mixed = self.guidance == "cfg" and guidance_rate not in (None, 0.0, 1.0)
        return 2 if mixed or "true_cfg_scale" in self.settings else 1

    @property
    def guided(self) -> bool:
        """Whether it takes a rate of guidance."""
        return self.guidance in ("cg", "cfg", "embedded")

    @property
    def bundled(self) -> Path | None:
        """Path of the weights included in this package, or None."""
        return None if self.url is not None else HERE / "bundled" / self.file


#: Kinds of ``noise_schedule``; the other entries are the arguments.
SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear_vp": LinearVP,
    "discrete_vp": DiscreteVP.from_betas,
    "flow": Flow,
}


def card_file(weights: Path) -> Path:
    """Where ``tools.convert`` writes the card of ``weights``."""
    return weights.with_suffix(".card.json")


def check_converted(weights: Path) -> None:
    """Raise UserError if converted ``weights`` are not those that the card beside them is of.

    Weights without such a card pass, and so does the file that they were converted from.
    """
    path, converted = card_file(weights), weights.suffix == ".safetensors" and weights.is_file()
    entries = read_result(dict[str, dict[str, Any]], path) if converted else None
    for entry in (entries or {}).values():
        expected, digest = entry.get("sha256"), sha256_file(weights)
        if digest != expected:
            raise UserError(
                f"{weights} has the SHA-256 {digest[:12]}... where {path.name} beside it says "
                f"{str(expected)[:12]}...: convert the checkpoint again, or delete the card if the "
                "weights were changed on purpose"
            )


def cards() -> dict[str, Card]:
    """All known models by name."""
    entries = json.loads((HERE / "cards.json").read_text(encoding="utf-8"))
    return {name: Card(name=name, **entry) for name, entry in entries.items()}
