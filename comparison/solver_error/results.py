"""What a measurement of solver errors leaves on disk: its rows, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from comparison.results import SamplerDescription
from runtime.record import RunRecord
from runtime.typed import OPTIONAL, SCHEMA

Point = tuple[float, float]  #: in the plane of a trajectory


@dataclass(frozen=True)
class ConditionsIdentity:
    """What the images are conditioned on, guidance aside."""

    label: int | None
    prompts_sha256: str | None


@dataclass(frozen=True)
class SolutionsIdentity:
    """What decides the exact solutions."""

    model: str
    model_sha256: str
    guidance_rate: float | None
    start: float  #: noise level of the latents
    dtype: str  #: of the state
    tol: float  #: relative and absolute, of dopri5
    groups: tuple[tuple[int, ...], ...]  #: seeds that are solved together
    #: None without class and prompts
    conditions: ConditionsIdentity | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class ErrorIdentity:
    """What decides the numbers of a row: with an equal identity it is not measured again."""

    sampler: SamplerDescription
    exact: SolutionsIdentity
    detector_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class SolverErrorRow:
    """The errors of one sampler: one file in ``errors/``, one line of the table.

    Errors in x are root mean squares over the values of an image, means over the images.
    """

    method: str
    group: str
    budget: int | None  #: None for a ceiling
    detail: str
    key: str  #: its file's name
    n: int  #: images
    nfe_planned: int
    nfe_metered: int
    x: float  #: at the end of the walk
    x_error: float  #: standard error of that
    features: float | None  #: Euclidean distance at the end; None without a detector
    features_error: float | None
    seconds: float | None = None  #: wall time of the row
    times: tuple[float, ...]  #: noise levels that the walk visits, the start included
    along: tuple[float, ...]  #: the error at each of them
    local: tuple[float, ...]  #: of each interval when it starts from the exact state
    identity: ErrorIdentity
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not 0 < len(self.local) == len(self.times) - 1 == len(self.along) - 1:
            raise ValueError(
                f"{len(self.times)} times with {len(self.along)} errors and {len(self.local)} of "
                "intervals are no walk"
            )
        if (self.features is None) != (self.features_error is None):
            raise ValueError("features and features_error go together")


@dataclass(frozen=True)
class SkippedRow:
    """A row without an exact counterpart."""

    method: str
    why: str


@dataclass(frozen=True)
class SolutionsSummary:
    """The exact solutions: how they were computed and what they cost."""

    model: str
    model_sha256: str
    guidance_rate: float | None
    start: float
    dtype: str
    tol: float
    nfe: float  #: per image, on average
    seeds: str
    detector: str | None
    detector_sha256: str | None
    feature_scale: float | None  #: root mean square distance of two exact images

    def __post_init__(self) -> None:
        if (self.detector is None) != (self.feature_scale is None):
            raise ValueError("detector and feature_scale go together")


@dataclass(frozen=True)
class PlaneSummary:
    """How close exact trajectories are to a line and to a plane."""

    points: int  #: of each trajectory
    one_mean: float  #: share of the variance along one line, mean over the trajectories
    both_mean: float  #: share of the variance in the plane
    rest_mean: float  #: the plane's share of what the line leaves
    both_least: float
    off_most: float  #: largest distance from the plane, over that of the end from the start


@dataclass(frozen=True)
class ShownTrajectory:
    """The first seed's trajectories in the plane of its exact one."""

    seed: int
    times: tuple[float, ...]  #: of the points of ``exact``
    explained: tuple[float, float]
    rest: float
    off: float
    exact: tuple[Point, ...]
    rows: Mapping[str, tuple[Point, ...]]  #: by key


@dataclass(frozen=True, kw_only=True)
class SolverErrorResults:
    """The content of ``errors.json``."""

    schema: int = SCHEMA
    record: RunRecord
    exact: SolutionsSummary
    plane: PlaneSummary
    rows: tuple[SolverErrorRow, ...]  #: by budget, the smallest error first; ceilings last
    skipped: tuple[SkippedRow, ...]
    trajectory: ShownTrajectory
