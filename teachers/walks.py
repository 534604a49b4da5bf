"""A teacher's states at its nodes, with the denoised state at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from plans.plan import plan_nfe
from plans.process import ForwardProcess
from solvers.driver import Meter, planned_nfe
from solvers.types import Denoiser
from teachers.supervision import GridTeacher, OracleTeacher, Recorder, RestartTeacher, Teacher


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
            recorder = Recorder(denoiser, self.teacher.calls)
            meter = Meter(recorder)
            states = self.teacher.visit(meter, x, process)
            x0 = [denoised.x0 for denoised in recorder.kept]
            x0.append(meter(states[-1], self.nodes[-1]).x0)
            return WalkStates(states, torch.stack(x0), meter.nfe)
        meter = Meter(denoiser)
        states = self.teacher.visit(meter, x, process)
        x0 = [meter(state, t).x0 for state, t in zip(states, self.times, strict=True)]
        return WalkStates(states, torch.stack(x0), meter.nfe)
