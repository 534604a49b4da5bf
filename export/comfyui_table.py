"""A sampler that is a table of numbers, as nodes of ComfyUI.

Copy this file into ComfyUI's folder ``custom_nodes``.  Two nodes appear under "sampling/table":
connect "Table sampler" to the SAMPLER input of SamplerCustom and "Table sigmas" to its SIGMAS
input.  `TABLE` says for which model and which guidance (cfg) the numbers were made.

    x_k = R[k][0] x_T + R[k][1] D_1 + ... + R[k][k-1] D_(k-1),    D_k = D(x_k; s_k),    k = 1 .. K

gives the states and, by the last row, the image (Shaul et al. 2024, arXiv:2403.01329).  With fewer
sigmas (SplitSigmas, for an image as the latent) that image takes the place of the calls before
them.  The models are those whose state is the image plus sigma times noise: Stable Diffusion 1,
2 and XL, not flows.
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


def sigmas() -> torch.Tensor:
    """The levels that the network is told, and 0."""
    first, *others = TABLE["times"]
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
    times, rows = TABLE["times"], TABLE["rows"]
    left_out = len(times) + 1 - len(sigmas)
    if not 0 <= left_out < len(times):
        raise ValueError(f"this table has {len(times)} calls: connect its own sigmas")
    image = model.latent_image if left_out else None
    noise = (x if image is None else x - image) / float(sigmas[0])
    made: list[torch.Tensor] = []  # denoised images

    def state(row: list[float]) -> torch.Tensor:
        weights = row[1 + left_out :]
        total = row[0] * TABLE["start"] * noise
        for weight, denoised in zip(weights, made):  # noqa: B905
            total = total + weight * denoised
        return total if image is None else total + (1 - sum(weights)) * image

    for call in range(left_out, len(times)):
        x = state(rows[call])
        made.append(model(x, x.new_full((len(x),), times[call]), **(extra_args or {})))
        if callback is not None:
            at = {"sigma": times[call], "sigma_hat": times[call]}
            callback({"x": x, "i": call - left_out, "denoised": made[-1], **at})
    return state(rows[-1])


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
