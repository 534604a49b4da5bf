"""Measuring a row: images of the shared seeds, block by block, through one detector."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from comparison.rows import Row
from denoisers.protocol import Model
from evaluation.converged import Converged
from metrics.detectors import Detector
from metrics.fid import BlockFid, block_fid
from metrics.measures import KEPT
from metrics.statistics import Statistics
from metrics.summary import Collector, FeatureSummary, Requirements, joined
from runtime.dist import World
from runtime.files import atomic_write, read_earlier, write_json
from runtime.images import image_grid, save_png, to_uint8
from samplers.generate import generate
from samplers.sampler import Sampler

SHOWN = 10  #: images of each row in the picture


class Measured(NamedTuple):
    """What one pass over the images of a sampler gives."""

    fid: BlockFid  #: to the data
    converged: BlockFid | None  #: to the model's own converged samples
    nfe: int  #: metered
    images_per_second: float  #: of sampling alone
    summary: FeatureSummary  #: with features, of at most `KEPT` images, in the order of the seeds


@dataclass(frozen=True)
class Harness:
    """One model, one detector, the same references, one list of seeds for every row."""

    model: Model
    detector: Detector
    reference: Statistics
    seeds: Sequence[int]
    blocks: int  #: disjoint, equal blocks of seeds, for the spread
    batch: int  #: images at once on one process
    dtype: torch.dtype  #: of the state
    world: World
    converged: Converged | None = None  #: the second reference, where there is one

    def describe(self) -> dict[str, Any]:
        """What two figures must share to be compared."""
        second = {} if self.converged is None else {"converged": self.converged.describe()}
        return {
            "model": self.model.card.name,
            "model_sha256": self.model.sha256,
            "detector": self.detector.name,
            "detector_sha256": self.detector.sha256,
            "reference": self.reference.source,
            "reference_n": self.reference.n,
            "reference_sha256": self.reference.source_sha256,
            "seeds": f"{self.seeds[0]}-{self.seeds[-1]}",
            "blocks": self.blocks,
            **second,
        }

    def fid(
        self, sampler: Sampler, seeds: Sequence[int], blocks: int, tick: Callable[[int], object]
    ) -> Measured:
        """FID of ``seeds`` in blocks to each reference, by one pass."""
        per_block = len(seeds) // blocks
        keep = Requirements(KEPT // blocks)
        parts, nfe, seconds = [], 0, 0.0
        for b in range(blocks):
            collector = Collector(self.detector, keep, per_block, source=sampler.label)
            mine = self.world.shard(range(per_block))
            begin = time.perf_counter()
            for made in generate(
                sampler,
                self.model,
                [seeds[b * per_block + place] for place in mine],
                batch=self.batch,
                device=self.world.device,
                dtype=self.dtype,
            ):
                pixels = to_uint8(made.images)  # waits for the device
                seconds += time.perf_counter() - begin
                nfe = made.nfe
                now, mine = mine[: len(pixels)], mine[len(pixels) :]
                collector.update(torch.from_numpy(pixels).permute(0, 3, 1, 2), now)
                tick(len(pixels) * self.world.size)
                begin = time.perf_counter()
            parts.append(collector.finish())
        slowest = seconds / max(1, len(seeds) // self.world.size)
        moments, second = [part.moments for part in parts], None
        if self.converged is not None:
            second = block_fid(moments, self.converged.statistics)
        rate = 1 / slowest * self.world.size
        return Measured(block_fid(moments, self.reference), second, nfe, rate, joined(parts))

    def pictures(self, sampler: Sampler) -> np.ndarray:
        """The first few seeds of a sampler, (SHOWN, H, W, C) uint8."""
        shown = self.seeds[:SHOWN]
        made = generate(
            sampler,
            self.model,
            shown,
            batch=len(shown),
            device=self.world.device,
            dtype=self.dtype,
        )
        return np.concatenate([to_uint8(b.images) for b in made])


def measure(
    row: Row, harness: Harness, folder: Path, tick: Callable[[int], object]
) -> dict[str, Any]:
    """The figures of one row; read from ``folder`` if the same row was measured before.

    A row is one JSON file, written whole at its end, so a killed comparison loses one row at most.
    Its statistics and features lie beside it (`FeatureSummary.load`): what else may be asked of the
    row needs no sampling.
    """
    file = folder / "rows" / f"{row.key}.json"
    identity = json.loads(
        json.dumps({"sampler": row.sampler.describe(), "harness": harness.describe()})
    )
    found = read_earlier(file)
    if found is not None and found["identity"] != identity:
        found = _held_anew(found, identity, harness, folder)
        if found is not None and harness.world.is_main:
            write_json(file, found)
    if found is not None:
        tick(len(harness.seeds))
        return found
    begin = time.perf_counter()
    made = harness.fid(row.sampler, harness.seeds, harness.blocks, tick)
    fid, converged = made.fid, made.converged
    second = {} if converged is None else {"fid_converged": converged.fid}
    result = {
        "method": row.method,
        "group": row.group,
        "budget": row.budget,
        "detail": row.detail,
        "own_solver": row.own_solver,
        "fid": fid.fid,
        **second,
        "fid_block_mean": fid.mean,
        "fid_block_spread": fid.spread,
        "fid_blocks": list(fid.blocks),
        "n": fid.n,
        "nfe_planned": row.sampler.nfe,
        "nfe_metered": made.nfe,
        "images_per_second": made.images_per_second,
        "seconds": time.perf_counter() - begin,
        "detector": harness.detector.name,
        "identity": identity,
        "pictures": f"rows/{row.key}.png",
        "statistics": f"rows/{row.key}.npz",
    }
    if harness.world.is_main:
        images = harness.pictures(row.sampler)
        save_png(file.with_suffix(".png"), image_grid(images, columns=len(images)))
        with atomic_write(file.with_suffix(".npz")) as temporary:
            made.summary.save(temporary)
        write_json(file, result)
    return result


def _held_anew(
    found: dict[str, Any], identity: dict[str, Any], harness: Harness, folder: Path
) -> dict[str, Any] | None:
    """An earlier result of the same images, held against the second reference of now.

    None where more than that reference differs, and where the statistics that were kept of the
    images are not those of the result.
    """
    if _without_second(found["identity"]) != _without_second(identity):
        return None
    try:
        moments = FeatureSummary.load(folder / found["statistics"], harness.detector).moments
        fid = moments.fid(harness.reference)
    except (OSError, KeyError, ValueError):
        return None
    if not math.isclose(fid, found["fid"], rel_tol=1e-6, abs_tol=1e-6):  # of another run
        return None
    result: dict[str, Any] = {}
    for key, value in found.items():
        if key != "fid_converged":
            result[key] = value
        if key == "fid" and harness.converged is not None:  # its neighbour in every table
            result["fid_converged"] = moments.fid(harness.converged.statistics)
    return {**result, "identity": identity}


def _without_second(identity: dict[str, Any]) -> dict[str, Any]:
    harness = {k: v for k, v in identity.get("harness", {}).items() if k != "converged"}
    return {**identity, "harness": harness}
