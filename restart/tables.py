"""Published Restart configurations (`tables.json`), with their published NFE and FID."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from plans.plan import Plan
from plans.walk import Churn, WalkSpec
from restart.build import restart_plan
from restart.intervals import Interval, parse_restart_info
from runtime.errors import UserError
from solvers.grids import Grid

_FILE = Path(__file__).with_name("tables.json")


@dataclass(frozen=True)
class Configuration:
    """A row of a published table."""

    name: str  #: ``<model>-<nfe>``
    model: str  #: dataset name of the model that it was published for
    n_main: int  #: nodes of the main grid, not counting the final 0
    intervals: tuple[Interval, ...]
    S_noise: float
    restart_gamma: float
    S_min: float
    S_max: float
    nfe: int  #: as published; a guided call counts once
    fid: float | None  #: as published; None if uncertain
    source: str
    note: str  #: which parts of this entry were checked
    main_solver: str = "heun"
    schedule_type: str = "polynomial"  #: schedule of the main grid

    @property
    def churn(self) -> Churn:
        return Churn(S_min=self.S_min, S_max=self.S_max, S_noise=self.S_noise)

    def plan(self) -> Plan:
        """The plan as published, on EDM's grid with a final 0, with descents by Heun.

        Rows of another schedule need the model's grid: use ``--restart_config`` for these.
        """
        return restart_plan(
            published_grid(self.n_main),
            self.intervals,
            WalkSpec.by(self.main_solver),
            churn=self.churn,
            restart_gamma=self.restart_gamma,
        )


def published_grid(n_main: int) -> Tensor:
    """The main grid of Restart and of EDM's sampler: ``n_main`` polynomial nodes, then 0."""
    return Grid("polynomial", n_main, rho=7.0, sigma_min=0.002, sigma_max=80.0).closed()


@cache
def configurations() -> Mapping[str, Configuration]:
    """All published configurations by name, in the order of the file."""
    rows = json.loads(_FILE.read_text(encoding="utf-8"))["configurations"]
    return MappingProxyType({row["name"]: _read(row) for row in rows})


def configuration(name: str) -> Configuration:
    """The configuration ``name`` (``imagenet64-203``); UserError if it is unknown."""
    known = configurations()
    if name not in known:
        raise UserError(
            f"unknown restart configuration {name!r}; choose one of {', '.join(known)}, or give "
            "custom intervals, or a line of a file, as --restart_info"
        )
    return known[name]


def _read(row: dict) -> Configuration:
    info = json.dumps(row.pop("restart_info"))
    S_max = row.pop("S_max")
    return Configuration(
        **row,
        intervals=parse_restart_info(info),
        S_max=math.inf if S_max is None else S_max,
    )
