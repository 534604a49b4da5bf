"""A sampler that is a table of numbers, as nodes of ComfyUI.

Copy this file into ComfyUI's folder ``custom_nodes``.  Two nodes appear under "sampling/table":
connect "Table sampler" to the SAMPLER input of SamplerCustom and "Table sigmas" to its SIGMAS
input.  `TABLE` says for which model and which guidance (cfg) the numbers were made.

    x_k = R[k][0] x_T + R[k][1] D_1 + ... + R[k][k-1] D_(k-1),    D_k = D(x_k; s_k),    k = 1 .. K

gives the states and, by the last row, the image (Shaul et al. 2024, arXiv:2403.01329).  With fewer
sigmas (SplitSigmas, for an image as the latent) that image takes the place of the calls before
them.  Models have states ``image + sigma noise`` (Stable Diffusion 1, 2 and XL), or are flows with
``(1 - s) image + s noise`` at ``s = sigma / (1 + sigma)``, which ComfyUI calls their sigma (SD3,
FLUX, Qwen-Image); `TABLE` says which.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy.samplers import KSAMPLER

TABLE: dict[str, Any] = json.loads(r"""@TABLE@""")
#: Below the first level by this factor, as ComfyUI scales noise at a model's highest level
#: differently.
BELOW = 1 - 1e-4


def told(sigma: float) -> float:
    """What ComfyUI calls the level ``sigma`` of the image in a state."""
    return sigma / (1 + sigma) if TABLE["flow"] else sigma


def sigmas() -> torch.Tensor:
    """The levels that the network is told, and 0."""
    first, *others = map(told, TABLE["times"])
    return torch.tensor([first * BELOW, *others, 0.0])


def walk(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = None,
) -> torch.Tensor:
    """The image, from the state ``x`` (B, C, H, W) at ``sigmas[0]``."""
    times, rows, flow = TABLE["times"], TABLE["rows"], TABLE["flow"]
    left_out = len(times) + 1 - len(sigmas)
    if not 0 <= left_out < len(times):
        raise ValueError(f"this table has {len(times)} calls: connect its own sigmas")
    image = model.latent_image if left_out else None
    first = float(sigmas[0])
    noise = (x if image is None else x - (1 - first if flow else 1) * image) / first
    start = TABLE["start"] + (1 if flow else 0)  # the scale of noise at the start
    made: list[torch.Tensor] = []  # denoised images

    def state(row: list[float], sigma: float) -> torch.Tensor:
        weights = row[1 + left_out :]
        total = row[0] * start * noise
        for weight, denoised in zip(weights, made):  # noqa: B905
            total = total + weight * denoised
        if image is not None:
            total = total + (1 - sum(weights)) * image
        return total / (1 + sigma) if flow else total

    for call in range(left_out, len(times)):
        x, level = state(rows[call], times[call]), told(times[call])
        made.append(model(x, x.new_full((len(x),), level), **(extra_args or {})))
        if callback is not None:
            at = {"sigma": level, "sigma_hat": level}
            callback({"x": x, "i": call - left_out, "denoised": made[-1], **at})
    return state(rows[-1], 0.0)


class TableSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get"
    CATEGORY = "sampling/table"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def get(self) -> tuple[Any]:
        return (KSAMPLER(walk),)


class TableSigmas(TableSampler):
    RETURN_TYPES = ("SIGMAS",)

    def get(self) -> tuple[Any]:
        return (sigmas(),)


NODE_CLASS_MAPPINGS = {"TableSampler": TableSampler, "TableSigmas": TableSigmas}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TableSampler": "Table sampler: @NAME@",
    "TableSigmas": "Table sigmas: @NAME@",
}
