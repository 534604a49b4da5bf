"""A teacher's states at its nodes, with the denoised state at each of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from plans.plan import plan_nfe
from plans.process import ForwardProcess
from solvers.driver import Meter, planned_nfe, substeps_total
from solvers.types import Denoised, Denoiser
from teachers.supervision import GridTeacher, OracleTeacher, RestartTeacher, Teacher


class Recorder:
    """A denoiser that keeps the denoised states of the calls with these numbers, from 0."""

    def __init__(self, inner: Denoiser, calls: Collection[int]) -> None:
        self.kept: list[Tensor] = []
        self._inner, self._calls, self._count = inner, calls, 0

    @property
    def cost(self) -> int:
        return self._inner.cost

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        denoised = self._inner(x, sigma)
        if self._count in self._calls:
            self.kept.append(denoised.x0)
        self._count += 1
        return denoised


class WalkStates(NamedTuple):
    """What a teacher's walk leaves at the T kept nodes."""

    x: Tensor  #: (T, B, C, H, W), the states
    x0: Tensor  #: (T, B, C, H, W), the denoised states there
    nfe: int  #: metered, per latent


@dataclass(frozen=True, eq=False)
class TeacherWalk:
    """A teacher on a grid that ends at sigma_min; every ``stride``-th node is kept.

    The denoised state at sigma_min is also the state after an Euler step to 0, so Heun on N nodes
    gives EDM's deterministic sampler (arXiv:2206.00364, algorithm 1) in the same 2 N - 1
    evaluations.  Solvers evaluate at every node anyhow, which leaves only the last one to be
    added; for dopri5, whose steps are its own, and for Restart, which comes by a node several
    times, one evaluation is added per kept node.
    """

    teacher: Teacher
    nodes: Tensor  #: (N,) float64 noise levels; N - 1 is a multiple of ``stride``
    stride: int

    @property
    def times(self) -> Tensor:
        """(T,) float64, the noise levels of the kept nodes."""
        return self.nodes[:: self.stride]

    def nfe(self, cost: int) -> int | None:
        """The planned evaluations per latent, ``cost`` per call; None for dopri5."""
        if isinstance(self.teacher, GridTeacher):
            return planned_nfe(self.teacher.solver, self.nodes, cost=cost) + cost
        if isinstance(self.teacher, RestartTeacher):
            return plan_nfe(self.teacher.plan, cost) + len(self.times) * cost
        assert isinstance(self.teacher, OracleTeacher)
        return None

    def run(self, denoiser: Denoiser, x: Tensor, process: ForwardProcess) -> WalkStates:
        """The walk from the latents ``x`` (B, C, H, W) at the first node."""
        if isinstance(self.teacher, GridTeacher):
            per_node = substeps_total(self.teacher.solver, 1, None)  # calls from node to node
            recorder = Recorder(
                denoiser, range(0, len(self.nodes) * per_node, self.stride * per_node)
            )
            meter = Meter(recorder)
            states = self.teacher.visit(meter, x, process)
            meter(states[-1], self.nodes[-1])
            return WalkStates(states, torch.stack(recorder.kept), meter.nfe)
        meter = Meter(denoiser)
        states = self.teacher.visit(meter, x, process)
        x0 = [meter(state, t).x0 for state, t in zip(states, self.times, strict=True)]
        return WalkStates(states, torch.stack(x0), meter.nfe)
