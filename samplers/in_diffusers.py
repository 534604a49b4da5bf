"""A trained predictor as the scheduler of a pipeline of ``diffusers``.

A predictor chooses every inserted time from the bottleneck features, separately for each image, so
the pipeline's list of times is not known in advance.  The scheduler therefore registers two hooks
on the U-Net: one reads the mid block, the other replaces the time that the pipeline passes.
Everything else is done by the pipeline: prompts, guidance, adapters, decoding, the safety checker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from denoisers.families.diffusers.files import INDEX, sha256_pipeline
from denoisers.families.diffusers.model import Bottleneck, Prediction
from ns.experiments import TrainedTable, load_student
from plans.plan import Solve
from runtime.errors import UserError
from runtime.log import note_once
from solvers.driver import integrate, planned_nfe
from solvers.grids import TimeMaps
from solvers.types import Denoised

TOLERANCE = 1e-2  #: relative distance by which a grid may exceed the model's noise levels


def use_predictor(pipe: Any, spec: str | Path, root: str | Path = "exps") -> WalkScheduler:
    """Make a trained predictor the scheduler of ``pipe``, a pipeline of ``diffusers``.

    ``spec`` is the number of a run below ``root``, its folder, or a file.  Call the pipeline with
    the ``num_inference_steps`` of the returned scheduler, and with the ``guidance_scale`` that the
    predictor was trained with.  A note says if it was trained on other weights than those in the
    folder that the pipeline came from.  Raises UserError for a predictor of another model.
    """
    student = load_student(str(spec), root)
    if isinstance(student, TrainedTable):
        raise UserError(
            f"{student.label} is a table, which this scheduler cannot walk: give an AMED "
            "predictor, or sample with sample.py"
        )
    note_once(student.note_on(_weights_sha256(pipe)))
    settings = student.settings
    schedule = Prediction.of(pipe.scheduler.config, type(pipe).__name__).schedule
    grid = replace(settings.grid, time_maps=TimeMaps(schedule.sigma, schedule.sigma_inv))
    walk = Solve(settings.solver(), grid.nodes(), student.predictor, settings.afs)
    return WalkScheduler.install(pipe, walk)


def _weights_sha256(pipe: Any) -> str:
    """The hash of the weights in the folder that ``pipe`` was loaded from.

    Empty if they are not known: of a pipeline from the hub or of a variant (fp16), whose files are
    not those of a training.
    """
    folder = Path(pipe.name_or_path or "")
    if not (folder / INDEX).is_file():
        return ""
    try:
        return sha256_pipeline(folder)
    except UserError:
        return ""


class _NeedsNetwork(Exception):
    """The next evaluation that a replay needs."""

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        self.x, self.sigma = x, sigma


class _Replay:
    """A denoiser that returns stored evaluations in order, then raises `_NeedsNetwork`."""

    cost = 1

    def __init__(self, evaluations: Iterable[Denoised]) -> None:
        self.evaluations = iter(evaluations)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        for denoised in self.evaluations:
            return denoised
        raise _NeedsNetwork(x, sigma)


class WalkScheduler:
    """A scheduler for pipelines that scale their network's input: one network call per step.

    The network is called by the pipeline, so the driver cannot run in one go.  After every call it
    is run again from the latents with the evaluations so far, and stops at the first missing one.
    This reuses the solvers as they are and takes microseconds per step.  The state is kept in
    float32 at least, whatever the latents' dtype.  Pipelines that change the latents between steps
    (inpainting) are rejected.  The scheduler is not saved with the pipeline, and serves one call
    at a time.
    """

    order = 1  #: network calls per step

    def __init__(self, pipe: Any, walk: Solve) -> None:
        """A scheduler for ``pipe``; the network's prediction type is that of its old scheduler."""
        kind = type(pipe).__name__
        if pipe.components.get("controlnet") is not None:
            raise UserError(f"{kind}: a ControlNet would not get the times of the walk; remove it")
        self.config = pipe.scheduler.config
        self.prediction = Prediction.of(self.config, kind)
        self.walk = walk
        self.num_inference_steps = planned_nfe(walk.solver, walk.ts, walk.guide, walk.afs)
        self.init_noise_sigma = float(walk.ts[0])  #: scale of the initial latents
        self.timesteps = torch.zeros(0)
        self._check_levels()
        self._pipe = pipe
        self._bottleneck = Bottleneck(pipe.unet)
        self._hook = pipe.unet.register_forward_pre_hook(self._replace_time, with_kwargs=True)
        self._reset()

    @classmethod
    def install(cls, pipe: Any, walk: Solve) -> WalkScheduler:
        """Make ``walk`` the scheduler of ``pipe``, replacing any other."""
        scheduler = cls(pipe, walk)
        if isinstance(pipe.scheduler, WalkScheduler):
            pipe.scheduler.remove()
        pipe.scheduler = scheduler
        return scheduler

    def remove(self) -> None:
        """Remove the hooks from the network."""
        self._hook.remove()
        self._bottleneck.remove()

    def _check_levels(self) -> None:
        low, high = self.prediction.schedule.sigma(torch.tensor([1e-3, 1.0])).tolist()
        first, last = float(self.walk.ts[0]), float(self.walk.ts[-1])
        if first > high * (1 + TOLERANCE) or 0 < last < low * (1 - TOLERANCE):
            raise UserError(
                f"the grid goes from sigma {first:.4g} to {last:.4g}, but this pipeline has "
                f"{high:.4g} to {low:.4g}: give a predictor that was trained for this model"
            )

    def _reset(self) -> None:
        self._start: Tensor | None = None
        self._evaluations: list[Denoised] = []
        self._next: _NeedsNetwork | None = None
        self._returned: Tensor | None = None  #: the result of the last `step`

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Start a new walk; UserError for another number of steps than the walk has."""
        if num_inference_steps not in (None, self.num_inference_steps):
            raise UserError(
                f"this predictor needs {self.num_inference_steps} network calls, not "
                f"{num_inference_steps}: give num_inference_steps={self.num_inference_steps}"
            )
        # indices, not times: the hook passes the times to the network
        self.timesteps = torch.arange(self.num_inference_steps - 1, -1, -1, device=device)
        if isinstance(self.walk.guide, nn.Module):
            self.walk.guide.to(device)
        self._reset()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input for the state (B, C, H, W), repeated under guidance (2 B)."""
        if self._start is None:
            self._set_start(sample)
        call = self._next_call()
        inputs = self.prediction.scale(call.x, _like(call.sigma, call.x))
        return inputs.repeat(len(sample) // len(inputs), 1, 1, 1).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The next state, from the guided ``model_output`` (B, C, H, W) of this network call.

        The walk draws no noise, so ``generator`` is not used.
        """
        if self._start is None:
            raise UserError(
                f"{type(self._pipe).__name__} does not scale its network's input by the scheduler, "
                "so a predictor cannot be used in it; sample with sample.py"
            )
        if self._returned is None:
            self._set_start(sample)  # under guidance `scale_model_input` got it repeated
        elif sample is not self._returned and not torch.equal(sample, self._returned):
            raise UserError(
                "the pipeline changed the latents between two steps, which this scheduler does not "
                "support; use no inpainting and no callbacks that edit latents"
            )
        call = self._next_call()
        sigma = _like(call.sigma, call.x)
        x0 = self.prediction.x0(call.x, sigma, model_output.to(call.x))
        self._evaluations.append(Denoised(x0, self._bottleneck.take(len(sample))))
        self._returned = self._replay().to(sample.dtype)
        return SimpleNamespace(prev_sample=self._returned) if return_dict else (self._returned,)

    def add_noise(self, *args: Any) -> Tensor:
        """Raise UserError: image-to-image pipelines, which call this, are not supported."""
        raise UserError(
            f"{type(self._pipe).__name__} starts from an image, but the predictor starts from "
            "noise; use a text-to-image pipeline"
        )

    def _set_start(self, sample: Tensor) -> None:
        self._start = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if isinstance(self.walk.guide, nn.Module):
            self.walk.guide.to(self._start.dtype)
        self._replay()

    def _next_call(self) -> _NeedsNetwork:
        if self._next is None:
            raise UserError("the walk has ended: call set_timesteps to start another one")
        return self._next

    def _replay(self) -> Tensor:
        """Integrate as far as the stored evaluations allow, and return the last state."""
        walk, start, replay = self.walk, self._start, _Replay(self._evaluations)
        assert start is not None
        try:
            end = integrate(walk.solver, replay, start, walk.ts, walk.guide, walk.afs)
        except _NeedsNetwork as call:
            self._next = call
            return call.x
        self._next = None
        return end.x[-1]

    def _replace_time(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Replace the pipeline's time with that of every image, (rows,)."""
        if self._next is None or self._pipe.scheduler is not self:
            return None
        sample = args[0] if args else kwargs["sample"]
        x = self._next.x
        time = self.prediction.network_time(self._next.sigma).to(x.dtype).to(sample.device)
        time = time.expand(len(x)).repeat(len(sample) // len(x))
        if len(args) > 1:
            return (sample, time, *args[2:]), kwargs
        return args, {**kwargs, "timestep": time}


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.dtype).to(x.device)  # cast first: MPS has no float64
