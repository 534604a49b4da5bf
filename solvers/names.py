"""What to answer to an unknown name: other tools have their own for the same things."""

from __future__ import annotations

from collections.abc import Iterable

#: A name in diffusers, k-diffusion or a user interface, and the same thing here.
ELSEWHERE = {
    "ddim": "euler",
    "euler_a": "ddpm",
    "euler_ancestral": "ddpm",
    "k_euler": "euler",
    "k_heun": "heun",
    "heun2": "heun",
    "midpoint": "dpm",
    "dpm2": "dpm",
    "dpm_2": "dpm",
    "dpm_solver": "dpm",
    "dpmsolver": "dpm",
    "dpmpp_2m": "dpmpp with --max_order=2",
    "dpmpp_3m": "dpmpp with --max_order=3",
    "dpm++": "dpmpp",
    "dpm++_2m": "dpmpp with --max_order=2",
    "dpmsolver++": "dpmpp",
    "dpm_solver++": "dpmpp",
    "plms": "ipndm",
    "pndm": "ipndm",
    "uni_pc": "unipc",
    "edm_heun": "edm",
    "karras": "polynomial",
    "edm": "polynomial",
    "exponential": "logsnr",
    "linear": "discrete",
    "leading": "discrete",
    "simple": "discrete",
    "uniform": "discrete",
}


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Refuse ``name`` in a sentence: a ``kind`` (sampler, schedule, ...) that is not ``known``."""
    names = list(known)
    here = ELSEWHERE.get(name.lower().strip().replace("-", "_").replace(" ", "_"), "")
    hint = f" ({here} here)" if here.split(" ")[0] in names else ""
    return f"unknown {kind} {name!r}{hint}; choose one of {', '.join(names)}"
