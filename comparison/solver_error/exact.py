"""The exact solutions of the probability-flow ODE that belong to given seeds, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comparison.solver_error.results import ConditionsIdentity, SolutionsIdentity
from denoisers.batch import SeededBatch
from denoisers.conditions import Conditions
from denoisers.protocol import Model
from runtime.files import atomic_write, require_readable
from solvers.driver import Meter
from solvers.oracle import dopri5


@dataclass(frozen=True, eq=False)
class Problem:
    """One initial-value problem per seed: a model, its conditions, and where its latents start."""

    model: Model
    conditions: Conditions
    start: float  #: noise level of the latents
    dtype: torch.dtype  #: of the state
    device: torch.device

    def begin(self, seeds: Sequence[int]) -> tuple[Meter, Tensor]:
        """The metered denoiser of ``seeds``, and their latents (B, C, H, W)."""
        batch = SeededBatch.open(self.model, self.conditions, seeds, self.dtype, self.device)
        return batch.meter, batch.start(self.start)


@dataclass(frozen=True, eq=False)
class Exact:
    """Solutions by dopri5 at ``times``, a file for each group of seeds that is solved together.

    dopri5 controls its step for a group as a whole, so the group is part of a file's identity.  It
    steps regardless of ``times`` and interpolates, so they are not: a file that lacks one of them
    is made again and then holds all of them.  A time of 0 is one Euler step from the smallest time
    above it, which is how samplers end a walk at 0.
    """

    problem: Problem
    tol: float  #: relative and absolute, of dopri5
    times: tuple[float, ...]  #: noise levels, decreasing, the start first
    folder: Path

    def identity(self, groups: Sequence[Sequence[int]]) -> SolutionsIdentity:
        """What decides the solutions of these groups of seeds."""
        problem, given = self.problem, self.problem.conditions
        prompts = given.describe()
        conditions = None
        if given.label is not None or prompts is not None:
            sha256 = None if prompts is None else str(prompts["sha256"])
            conditions = ConditionsIdentity(given.label, sha256)
        return SolutionsIdentity(
            problem.model.card.name,
            problem.model.sha256,
            given.guidance_rate,
            problem.start,
            str(problem.dtype).removeprefix("torch."),
            self.tol,
            tuple(tuple(group) for group in groups),
            conditions,
        )

    def file(self, seeds: Sequence[int]) -> Path:
        """Where the solutions of one group lie."""
        digest = hashlib.sha256(self._identity(seeds).encode()).hexdigest()
        return self.folder / f"{seeds[0]:06d}-{seeds[-1]:06d}-{digest[:12]}.safetensors"

    @torch.inference_mode()
    def solve(self, seeds: Sequence[int]) -> int:
        """Write the file of ``seeds``, unless it is there; returns the NFE of each image."""
        file, known = self.file(seeds), self._known(seeds)
        if known is not None and set(self.times) <= set(known[0]):
            return known[1]
        times = sorted({*self.times, *(known[0] if known else ())}, reverse=True)
        ts = torch.tensor(times, dtype=torch.float64)
        meter, x = self.problem.begin(seeds)
        states = dopri5(meter, x, ts[ts > 0], rtol=self.tol, atol=self.tol).x
        if times[-1] == 0:
            states = torch.cat([states, meter(states[-1], ts[ts > 0][-1]).x0[None]])
        tensors = {"t": ts, "x": states.contiguous().cpu()}
        with atomic_write(file) as temporary:
            about = {"identity": self._identity(seeds), "nfe": str(meter.nfe)}
            save_file(tensors, temporary, metadata=about)
        return meter.nfe

    def states(self, seeds: Sequence[int], times: Sequence[float]) -> Tensor:
        """Solutions at some of ``times``, (len(times), B, C, H, W) on the device."""
        require_readable(self.file(seeds))
        with safe_open(self.file(seeds), "pt") as file:
            index = {t: i for i, t in enumerate(file.get_tensor("t").tolist())}
            states = file.get_slice("x")
            chosen = torch.cat([states[index[t] : index[t] + 1] for t in times])
        return chosen.to(self.problem.device)

    def _known(self, seeds: Sequence[int]) -> tuple[list[float], int] | None:
        """Times and NFE of an earlier file, or None where there is none that can be read."""
        try:
            with safe_open(self.file(seeds), "pt") as file:
                about = file.metadata()
                if about["identity"] != self._identity(seeds):
                    return None
                return file.get_tensor("t").tolist(), int(about["nfe"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def _identity(self, seeds: Sequence[int]) -> str:
        """Of one file, as JSON; without conditions it is that of files of version 1."""
        plain = asdict(self.identity([]))
        del plain["groups"]
        if plain["conditions"] is None:
            del plain["conditions"]
        return json.dumps({**plain, "seeds": list(seeds)})
