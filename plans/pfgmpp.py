"""The noise of a jump under PFGM++ (arXiv:2302.04265): Gaussian noise of random variance.

With ``r = sigma sqrt(D)`` a state at level sigma is ``x0 + sqrt(W_r) z`` with standard normal z and
``W_r = r^2 / chi^2_D`` (Student's t).  A jump from r_lo to r_hi adds ``sqrt(V) z'``, where
``W_lo + V`` has the distribution of ``W_hi``.  Such an independent V exists because inverse gamma
distributions are self-decomposable (Halgreen 1979, Z. Wahrscheinlichkeitstheorie 47): W_r is the
time that a Bessel process of dimension 2 - D takes from r to 0, and V its time from r_hi to r_lo.
So the jump turns the marginal at r_lo into that at r_hi *for any data distribution*.  No other
kernel does, because the characteristic function of Student's t has no zeros.

With ``nu = D / 2``, ``c = r_lo / r_hi``, r_hi = 1 and ``q = sqrt(2 s)`` the Laplace transform of V
is ``K_nu(q) / (c^nu K_nu(c q))``; its numerical inversion gives the quantiles.  For D = 1 the jump
is Cauchy noise of width r_hi - r_lo; for D to infinity V is the constant ``(r_hi^2 - r_lo^2) / D``
of the Gaussian jump.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy import interpolate, optimize, special
from torch import Tensor

#: Normal scores are clamped to [-LAST, LAST], which changes one draw in two million.
LAST = 5.0
CLOSEST = 1 - 1e-6  #: the largest ratio; larger ones are clamped to it
KNOTS = 101  #: knots of the interpolated quantile function
#: Abate and Whitt 1992, Queueing Systems 10: the error is e^-A, rounding errors grow as e^(A/2).
A = 23.0
AVERAGED = 20  #: partial sums of the alternating series to average, with binomial weights (Euler)
DEBYE_FROM = 40  #: order from which the uniform expansion of K_nu is accurate to 4e-9
#: Debye's polynomials u_1 to u_4 in p^2, highest power first, and the power of p that multiplies
#: them.
DEBYE = (
    (np.array([-5, 3]) / 24, 1),
    (np.array([385, -462, 81]) / 1152, 2),
    (np.array([-425425, 765765, -369603, 30375]) / 414720, 3),
    (np.array([185910725, -446185740, 349922430, -94121676, 4465125]) / 39813120, 4),
)


def spread(ratio: float, D: int, draw: Tensor) -> Tensor:
    """The factor on the noise of a Gaussian jump, (B, 1, 1, 1) float64 on the CPU.

    ``ratio`` is sigma_lo / sigma_hi, in [0, 1); ``draw`` (B, ...) holds standard normal numbers, of
    which the first of each sample is used.  The square of the factor has the mean ``D / (D - 2)``.
    """
    score = draw.flatten(1)[:, 0].to("cpu", torch.float64).clamp(-LAST, LAST)
    # Rounded, so that all jumps of one churn setting share a cached quantile function.
    factor = np.exp(_log_spread(min(round(ratio, 12), CLOSEST), D)(score.numpy()))
    return torch.from_numpy(factor).reshape(-1, 1, 1, 1)


@lru_cache(maxsize=64)
def _log_spread(c: float, D: int) -> Callable[[np.ndarray], np.ndarray]:
    """``log sqrt(V D / (1 - c^2))`` as a function of V's normal score."""
    if c == 0:  # V equals W_hi
        return lambda score: (math.log(D) - np.log(special.chdtri(D, special.ndtr(score)))) / 2
    # V is between (1 - c)^2 W_hi, the time from r_hi - r_lo to 0, and W_hi, the time from r_hi.
    low = 2 * math.log1p(-c) - math.log(special.chdtri(D, special.ndtr(-LAST))) - 1e-3
    high = -math.log(special.chdtri(D, special.ndtr(LAST))) + 1e-3
    first, last = (
        optimize.brentq(lambda v, end=end: _score(v, c, D) - end, low, high, xtol=1e-6)
        for end in (-LAST, LAST)
    )
    logs = np.linspace(first, last, KNOTS)
    scores = np.array([_score(v, c, D) for v in logs])
    return interpolate.CubicSpline(scores, (logs + math.log(D / ((1 - c) * (1 + c)))) / 2)


def _score(log_v: float, c: float, D: int) -> float:
    """Normal score of V: ``E exp(-s V) / s`` inverted by a Fourier series."""
    v = math.exp(log_v)
    terms = 100 + int(4 * math.sqrt(D)) + np.arange(1 + AVERAGED)
    k = np.arange(terms[-1] + 1)
    s = (A + 2j * np.pi * k) / (2 * v)
    series = (-1.0) ** k * (np.exp(_log_transform(s, c, D)) / s).real
    series[0] /= 2
    sums = np.cumsum(series)[terms] * math.exp(A / 2) / v
    cdf = sums @ special.binom(AVERAGED, np.arange(1 + AVERAGED)) / 2**AVERAGED
    return float(special.ndtri(np.clip(cdf, 1e-9, 1 - 1e-9)))


def _log_transform(s: np.ndarray, c: float, D: int) -> np.ndarray:
    """``log E exp(-s V)`` for Re s > 0, up to multiples of 2 pi i."""
    nu, q = D / 2, np.sqrt(2 * s)
    if nu < DEBYE_FROM:
        below = special.kve(nu, c * q) * c**nu
        return np.log(special.kve(nu, q) / below) - (1 - c) * q
    # K_nu(nu z) ~ sqrt(pi / (2 nu)) e^(-nu eta) (1 + z^2)^(-1/4) S(p), p = (1 + z^2)^(-1/2)
    z2 = 2 * s / nu**2
    high, low = np.sqrt(1 + z2), np.sqrt(1 + c**2 * z2)
    rise = (1 - c) * (1 + c) * z2 / (high + low)  # high - low
    eta = rise - special.log1p(rise / (1 + low))  # np.log1p is inaccurate for complex numbers
    return -nu * eta - np.log(high / low) / 2 + np.log(_debye(1 / high, nu) / _debye(1 / low, nu))


def _debye(p: np.ndarray, nu: float) -> np.ndarray:
    return sum(((-p / nu) ** k * np.polyval(u, p * p) for u, k in DEBYE), start=np.ones_like(p))
