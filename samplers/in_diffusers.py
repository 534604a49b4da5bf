"""Our walks inside the pipelines of ``diffusers``: a trained predictor as their scheduler.

A predictor chooses every inserted time from the bottleneck, for each image by itself, so the
pipeline's list of times cannot be written down beforehand.  The scheduler therefore hangs two
hooks on the U-Net: one reads the mid block, the other replaces the time that the pipeline passes.
All else stays the pipeline's own: prompts, guidance, adapters, decoding, the safety checker.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from amed.experiments import load_predictor
from denoisers.families.diffusers.model import Bottleneck, Prediction
from plans.plan import Solve
from runtime.errors import UserError
from solvers.driver import integrate, planned_nfe
from solvers.grids import TimeMaps
from solvers.types import Denoised

TOLERANCE = 1e-2  #: by which a grid may leave the levels that the model was trained on


def use_predictor(pipe: Any, spec: str | Path, root: str | Path = "exps") -> WalkScheduler:
    """Make a trained predictor the scheduler of ``pipe``, a pipeline of ``diffusers``.

    ``spec`` is the number of a run below ``root``, its folder, or a file.  Call the pipeline with
    ``num_inference_steps`` as the returned scheduler says, and with the ``guidance_scale`` that
    the predictor was trained with.  Raises UserError for a predictor of another model.
    """
    student = load_predictor(str(spec), root)
    settings = student.settings
    schedule = Prediction.of(pipe.scheduler.config, type(pipe).__name__).schedule
    grid = replace(settings.grid, time_maps=TimeMaps(schedule.sigma, schedule.sigma_inv))
    walk = Solve(settings.solver(), grid.nodes(), student.predictor, settings.afs)
    return WalkScheduler.install(pipe, walk)


class _NeedsNetwork(Exception):
    """Where a replayed walk stands when it asks for what is not known yet."""

    def __init__(self, x: Tensor, sigma: Tensor) -> None:
        self.x, self.sigma = x, sigma


class _Replay:
    """A denoiser that gives back known evaluations in turn."""

    cost = 1

    def __init__(self, known: Iterable[Denoised]) -> None:
        self.known = iter(known)

    def __call__(self, x: Tensor, sigma: Tensor) -> Denoised:
        for denoised in self.known:
            return denoised
        raise _NeedsNetwork(x, sigma)


class WalkScheduler:
    """A scheduler for pipelines that scale their network's input: one network call per step.

    The pipeline calls the network, not we, so the driver cannot run through.  After every call it
    starts again from the latents with all evaluations so far, and stops at the first that is
    missing: nobody writes the algebra of a walk a second time, and repeating it costs a few
    microseconds beside a network.  The state is kept in float32 at least, whatever the latents'
    dtype.  A pipeline that changes the latents between steps (inpainting) is refused.  It is not
    saved with the pipeline, and serves one call at a time.
    """

    order = 1  #: network calls per step

    def __init__(self, pipe: Any, walk: Solve) -> None:
        """For ``pipe``, whose scheduler's settings say what its network predicts."""
        kind = type(pipe).__name__
        if pipe.components.get("controlnet") is not None:
            raise UserError(f"{kind}: a ControlNet would not be told the walk's times; go without")
        self.config = pipe.scheduler.config
        self.prediction = Prediction.of(self.config, kind)
        self.walk = walk
        self.num_inference_steps = planned_nfe(walk.solver, walk.ts, walk.guide, walk.afs)
        self.init_noise_sigma = float(walk.ts[0])  #: unit noise times this is the start
        self.timesteps = torch.zeros(0)
        self._check_levels()
        self._pipe = pipe
        self._bottleneck = Bottleneck(pipe.unet)
        self._hook = pipe.unet.register_forward_pre_hook(self._tell_time, with_kwargs=True)
        self._begin()

    @classmethod
    def install(cls, pipe: Any, walk: Solve) -> WalkScheduler:
        """Make a walk the scheduler of ``pipe``, in place of any other."""
        scheduler = cls(pipe, walk)
        if isinstance(pipe.scheduler, WalkScheduler):
            pipe.scheduler.remove()
        pipe.scheduler = scheduler
        return scheduler

    def remove(self) -> None:
        """Take the hooks off the network."""
        self._hook.remove()
        self._bottleneck.remove()

    def _check_levels(self) -> None:
        low, high = self.prediction.schedule.sigma(torch.tensor([1e-3, 1.0])).tolist()
        first, last = float(self.walk.ts[0]), float(self.walk.ts[-1])
        if first > high * (1 + TOLERANCE) or 0 < last < low * (1 - TOLERANCE):
            raise UserError(
                f"the walk goes from sigma {first:.4g} to {last:.4g}, but this pipeline knows "
                f"{high:.4g} to {low:.4g}: the predictor was trained for another model"
            )

    def _begin(self) -> None:
        self._start: Tensor | None = None
        self._known: list[Denoised] = []
        self._asked: _NeedsNetwork | None = None
        self._given: Tensor | None = None  #: what the pipeline got from the last step

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Begin a walk; UserError for a number of steps that is not the walk's."""
        if num_inference_steps not in (None, self.num_inference_steps):
            raise UserError(
                f"this walk calls the network {self.num_inference_steps} times, not "
                f"{num_inference_steps}: give num_inference_steps={self.num_inference_steps}"
            )
        # places in the walk, not times: those are told to the network by the hook
        self.timesteps = torch.arange(self.num_inference_steps - 1, -1, -1, device=device)
        if isinstance(self.walk.guide, nn.Module):
            self.walk.guide.to(device)
        self._begin()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input at the state (B, C, H, W), once or, under guidance, twice (2 B)."""
        if self._start is None:
            self._set_start(sample)
        asked = self._expected()
        inputs = self.prediction.scale(asked.x, _like(asked.sigma, asked.x))
        return inputs.repeat(len(sample) // len(inputs), 1, 1, 1).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """The state behind this network call, from the guided ``model_output`` (B, C, H, W).

        Nothing is drawn, so a ``generator`` only serves the pipeline's first latents.
        """
        if self._start is None:
            raise UserError(
                f"{type(self._pipe).__name__} does not scale its network's input by the scheduler, "
                "so no walk can run in it; sample with sample.py"
            )
        if self._given is None:
            self._set_start(sample)  # under guidance the first scaling has seen it twice
        elif sample is not self._given and not torch.equal(sample, self._given):
            raise UserError(
                "the pipeline changed the latents between two steps, which a walk with a memory "
                "cannot follow; leave inpainting and callbacks that edit latents out"
            )
        asked = self._expected()
        sigma = _like(asked.sigma, asked.x)
        x0 = self.prediction.x0(asked.x, sigma, model_output.to(asked.x))
        self._known.append(Denoised(x0, self._bottleneck.take(len(sample))))
        self._given = self._replay().to(sample.dtype)
        return SimpleNamespace(prev_sample=self._given) if return_dict else (self._given,)

    def add_noise(self, *args: Any) -> Tensor:
        """What a pipeline asks for that begins with an image: UserError."""
        raise UserError(
            f"{type(self._pipe).__name__} begins in the middle of a walk, and ours begins with "
            "noise; use a text-to-image pipeline"
        )

    def _set_start(self, sample: Tensor) -> None:
        self._start = sample.to(torch.promote_types(sample.dtype, torch.float32))
        if isinstance(self.walk.guide, nn.Module):
            self.walk.guide.to(self._start.dtype)
        self._replay()

    def _expected(self) -> _NeedsNetwork:
        if self._asked is None:
            raise UserError("the walk is over: call set_timesteps before another one")
        return self._asked

    def _replay(self) -> Tensor:
        """Walk as far as the known evaluations reach; the state there."""
        walk, start = self.walk, self._start
        assert start is not None
        try:
            end = integrate(walk.solver, _Replay(self._known), start, walk.ts, walk.guide, walk.afs)
        except _NeedsNetwork as asked:
            self._asked = asked
            return asked.x
        self._asked = None
        return end.x[-1]

    def _tell_time(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Replace the pipeline's time by that of every image, (rows,)."""
        if self._asked is None or self._pipe.scheduler is not self:
            return None
        sample = args[0] if args else kwargs["sample"]
        x = self._asked.x
        time = self.prediction.network_time(self._asked.sigma).to(x.dtype).to(sample.device)
        time = time.expand(len(x)).repeat(len(sample) // len(x))
        if len(args) > 1:
            return (sample, time, *args[2:]), kwargs
        return args, {**kwargs, "timestep": time}


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.to(x.dtype).to(x.device)  # cast first: MPS has no float64
