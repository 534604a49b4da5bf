"""The measured rows of a comparison: one type from the measurement to every report and file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from evaluation.harness import HarnessIdentity
from metrics.paired import Gap
from runtime.record import RunRecord
from runtime.typed import OPTIONAL, SCHEMA

#: What `samplers.sampler.Sampler.describe` gives; JSON values.
SamplerDescription = Mapping[str, object]


@dataclass(frozen=True)
class RowIdentity:
    """What decides the numbers of a row: with an equal identity it is not measured again."""

    sampler: SamplerDescription
    harness: HarnessIdentity
    #: Of the network, and the kind of device; older files lack both.
    dtype: str | None = field(default=None, metadata=OPTIONAL)
    device: str | None = field(default=None, metadata=OPTIONAL)


def of_features(identity: RowIdentity) -> RowIdentity:
    """The identity of a row's images and features, which no other reference or detector changes."""
    return replace(identity, harness=replace(identity.harness, converged=None, others=None))


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """One line of the table: what was measured, and its numbers.

    ``rows/KEY.json`` holds one row, ``results.json`` all of them.  What depends on the other rows
    (``excess``, ``to_best``, ``to_own``) is None until the comparison is complete.
    """

    method: str
    group: str
    budget: int | None  #: None for a ceiling
    detail: str
    own_solver: str | None  #: method of the classic row that this one is compared with
    fid: float  #: to the data
    #: to the model's own converged samples
    fid_converged: float | None = field(default=None, metadata=OPTIONAL)
    #: to the data, by each of the other detectors
    fid_others: tuple[float, ...] | None = field(default=None, metadata=OPTIONAL)
    fid_block_mean: float
    fid_block_spread: float  #: standard deviation over the blocks
    fid_blocks: tuple[float, ...]
    n: int  #: images
    nfe_planned: int
    nfe_metered: int
    images_per_second: float  #: of sampling alone
    seconds: float | None = None  #: wall time of the row; older files lack it
    detector: str
    identity: RowIdentity
    pictures: str  #: PNG of the first seeds, relative to the comparison's folder
    statistics: str | None = None  #: .npz of moments and features; older files lack it
    excess: float | None = None  #: see :func:`comparison.baselines.excess`
    to_best: Gap | None = None  #: to the best row of the budget
    to_own: Gap | None = None  #: to the row of ``own_solver``
    created: str | None = field(default=None, metadata=OPTIONAL)  #: UTC, when it was measured
    kept: bool = False  #: whether it was measured for another report; see `comparison.kept_rows`
    schema: int = SCHEMA


@dataclass(frozen=True, kw_only=True)
class ComparisonResults:
    """The content of ``results.json``."""

    schema: int = SCHEMA
    record: RunRecord
    rows: tuple[MeasuredRow, ...]  #: by budget, the best of each first; ceilings last
