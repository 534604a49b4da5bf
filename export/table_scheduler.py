"""A sampler that is a table of numbers, as a scheduler of ``diffusers``.

This file stands alone: copy it beside your program.  It needs torch and diffusers, nothing else.

    from diffusers import DiffusionPipeline
    from table_scheduler import TableScheduler

    pipe = DiffusionPipeline.from_pretrained("...")
    pipe.scheduler = TableScheduler.from_pretrained("folder with scheduler_config.json")
    image = pipe("a prompt", num_inference_steps=pipe.scheduler.calls, guidance_scale=...).images[0]

A table has K network times ``s_1 .. s_K``, noise levels sigma, and rows of weights:

    x_k = R[k][0] x_T + R[k][1] D_1 + ... + R[k][k-1] D_(k-1),    D_k = D(x_k; s_k),    k = 1 .. K

and the image by the last row; ``x = x0 + sigma n`` is the state in units in which the image keeps
its size, and D the denoised image (Shaul et al. 2024, arXiv:2403.01329, in data predictions).
Pipelines hold x itself, or under a flow ``x / (1 + sigma) = (1 - s) x0 + s n`` at
``s = sigma / (1 + sigma)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

FLOW = "flow_prediction"
PREDICTIONS = ("epsilon", "v_prediction", "sample", FLOW)


class TableScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """The number of network calls is that of the table; other numbers of steps are refused.

    A pipeline whose shift depends on the size of the images (FLUX, Qwen-Image) hands ``mu`` over at
    every call.  Where it is not the ``mu`` that the table was made for, all noise levels are
    multiplied by the ratio of the two shifts; the weights stay.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        start: float,  # noise level of the initial state x_T
        times: Sequence[float],  # s_1 .. s_K, as noise levels
        rows: Sequence[Sequence[float]],  # of 1 to K + 1 weights
        network_times: Sequence[float],  # what the network is told at s_1 .. s_K
        prediction_type: str = "epsilon",  # one of PREDICTIONS
        clip_sample: float | None = None,  # bound of the denoised image
        num_train_timesteps: int = 1000,
        guidance_scale: float | None = None,  # that the table was made for
        made_for: str | None = None,  # model, and the hash of its weights
        mu: float | None = None,  # of the images that the table was made for
        use_dynamic_shifting: bool = False,  # these are read by pipelines, which compute mu
        time_shift_type: str = "exponential",
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            raise ValueError(
                f"prediction_type {prediction_type!r} is not one of {', '.join(PREDICTIONS)}"
            )
        lengths = [len(row) for row in rows]
        if not times or lengths != [*range(1, len(times) + 2)] or len(network_times) != len(times):
            raise ValueError(f"{len(times)} times and rows of {lengths} weights are no table")
        self.flow = prediction_type == FLOW
        self.init_noise_sigma = 1.0 if self.flow else start * rows[0][0]  # of the first state
        self.timesteps = torch.tensor(list(network_times), dtype=torch.float32)
        self.set_timesteps()

    @property
    def calls(self) -> int:
        """Network calls, K: the ``num_inference_steps`` of a pipeline."""
        return len(self.config["times"])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a walk; ValueError for another number of steps than the table has.

        Of ``sigmas``, those that a pipeline makes up by itself, only the number is read.
        """
        steps = num_inference_steps if sigmas is None else len(sigmas)
        if steps not in (None, self.calls):
            raise ValueError(
                f"this table has {self.calls} network calls: give num_inference_steps={self.calls}"
            )
        self.num_inference_steps = self.calls
        self._scale = self._shifted(mu)
        if self.flow:
            levels = torch.tensor(self.config["times"], dtype=torch.float64) * self._scale
            self.timesteps = (1000 * levels / (1 + levels)).float()
        self.timesteps = self.timesteps.to(device)
        self._call = self._first = 0
        self._begin: Tensor | None = None  # x_T
        self._image: Tensor | None = None  # in the place of calls that are left out
        self._denoised: list[Tensor] = []

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this call: image-to-image with a strength below 1, see `add_noise`."""
        self._call = self._first = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the state with unit variance, or that of the flow."""
        return sample if self.flow else sample / (1 + self._sigma**2) ** 0.5

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The state at a later call, of an image and noise: image-to-image.

        The image takes the place of what a shorter walk leaves out, with the weight that makes the
        weights of all denoised images 1: a network that returns it gives it back.
        """
        self._image, self._begin = original_samples.float(), self._noisiest(noise.float())
        distance = (self.timesteps.to(timesteps.device) - timesteps.flatten()[0]).abs()
        self.set_begin_index(int(distance.argmin()))
        return self._state().to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """What pipelines of flows call `add_noise`."""
        return self.add_noise(sample, noise, timestep)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state of the next call, or the image, from the guided output of this call."""
        state = sample.float()
        if self._begin is None:
            first = self.config["rows"][0][0]
            self._begin = self._noisiest(state) if self.flow else state / first
        self._denoised.append(self._data(model_output.float(), state))
        self._call += 1
        following = self._state().to(sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    @property
    def _sigma(self) -> float:
        """The noise level of this call; 0 after the last one, since the last row is the image."""
        levels = [*self.config["times"], 0.0]
        return float(levels[self._call]) * self._scale

    def _shifted(self, mu: float | None) -> float:
        """The ratio of the shift by ``mu`` to that of the table."""
        made = self.config["mu"]
        if mu is None or made is None:
            return 1.0
        linear = self.config["time_shift_type"] == "linear"
        return float(mu / made) if linear else math.exp(mu - made)

    def _noisiest(self, noise: Tensor) -> Tensor:
        """``x_T``, from noise of unit variance."""
        start = self.config["start"] * self._scale
        return (1 + start) * noise if self.flow else start * noise

    def _state(self) -> Tensor:
        """The state of a pipeline at this call."""
        assert self._begin is not None
        row = self.config["rows"][self._call]
        if self.flow and self._call == 0:  # noise itself, at any shift
            row = [(1 + self._sigma) / (1 + self.config["start"] * self._scale)]
        state, weights = row[0] * self._begin, row[1 + self._first :]
        for weight, denoised in zip(weights, self._denoised):  # noqa: B905
            state = state + weight * denoised
        if self._image is not None:
            state = state + (1 - sum(weights)) * self._image
        return state / (1 + self._sigma) if self.flow else state

    def _data(self, output: Tensor, state: Tensor) -> Tensor:
        """The denoised image from the network's output and the state of the pipeline."""
        sigma, kind = self._sigma, self.config["prediction_type"]
        if kind == FLOW:
            output = state - sigma / (1 + sigma) * output
        elif kind == "epsilon":
            output = state - sigma * output
        elif kind == "v_prediction":
            output = state / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * output
        bound = self.config["clip_sample"]
        return output if bound is None else output.clamp(-bound, bound)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])
