"""Types shared by all packages.

Time is the noise level ``sigma`` of a variance-exploding process ``x = x0 + sigma * n``
(Karras et al. 2022, arXiv:2206.00364).  A denoiser returns an estimate of ``x0``; the
probability-flow ODE is ``dx/dsigma = (x - D(x; sigma)) / sigma`` (eq. 1 there with s(t) = 1).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Denoised(NamedTuple):
    """The result of a network evaluation."""

    x0: Tensor  #: (B, C, H, W), the estimate of the clean image
    feat: Tensor | None  #: (B, h, w), channel mean of the network's bottleneck


class Denoiser(Protocol):
    """A pre-trained model with its condition and guidance already bound."""

    @property
    def cost(self) -> int:
        """Network evaluations per call: 1, or 2 under classifier-free guidance."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        """Denoise ``x`` (B, C, H, W) at ``sigma``, a 0-d tensor or (B, 1, 1, 1)."""
        ...


class Node(NamedTuple):
    """A point at which the denoiser was evaluated."""

    t: Tensor  #: noise level, 0-d or (B, 1, 1, 1)
    x: Tensor  #: (B, C, H, W), the state
    x0: Tensor  #: (B, C, H, W), the denoised state
    feat: Tensor | None  #: (B, h, w) or None

    @property
    def d(self) -> Tensor:
        """Slope ``dx/dsigma`` of the probability-flow ODE at this node."""
        return (self.x - self.x0) / self.t


class InsertedNode(NamedTuple):
    """Where a guide inserts a node into an interval, and the scales it applies there."""

    r: Tensor | float  #: ``t_mid = t_next**r * t**(1 - r)``, 0 < r <= 1
    c: Tensor | float  #: scale of the direction of the step to the end of the interval
    a: Tensor | float  #: network time is ``a * t_mid``; the slope is divided by ``t_mid``


class Guide(Protocol):
    """Chooses the inserted node: a constant rule or a learned predictor."""

    def __call__(self, node: Node, t_next: Tensor) -> InsertedNode: ...


class Solver(Protocol):
    """A step rule: a pure function of nodes that never calls the network and holds no state."""

    @property
    def max_order(self) -> int: ...

    @property
    def lower_order_final(self) -> bool: ...

    @property
    def guide(self) -> Guide | None:
        """The method's own guide (Heun: r = 1), or None (multistep methods)."""
        ...

    @property
    def stages(self) -> tuple[float, ...]:
        """Inserted nodes as fractions of the guide's ``r``; the last one is 1."""
        ...

    @property
    def kept_nodes(self) -> int:
        """Nodes that are carried from one interval to the next."""
        ...

    def predict(self, nodes: tuple[Node, ...], t: Tensor, order: int) -> Tensor:
        """The state at ``t``, extrapolated from ``nodes`` (newest last)."""
        ...

    def correct(self, nodes: tuple[Node, ...], t: Tensor, order: int, mid: InsertedNode) -> Tensor:
        """The state at the end ``t`` of the interval; ``nodes[-1]`` is the last inserted node."""
        ...

    def revise(self, nodes: tuple[Node, ...], order: int) -> tuple[Node, ...]:
        """``nodes`` with the state of the newest corrected by the evaluation at it.

        ``order`` is that of the step that predicted the state, 0 if no step did.  Only UniPC
        corrects anything.
        """
        ...


class Trajectory(NamedTuple):
    """The states that a solver visited."""

    t: Tensor  #: (T,), noise levels
    x: Tensor  #: (T, B, C, H, W)
    nfe: int  #: network evaluations used
