"""A sampler as files of other programs: what is written, and from what."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoisers.cards import Card
from denoisers.conditions import ConditionOptions
from denoisers.families.diffusers.files import component_folder, read_json, settings_folder
from denoisers.families.diffusers.kinds import KINDS
from denoisers.families.diffusers.process import Prediction
from denoisers.noise_schedules import Flow
from denoisers.registry import ModelSource
from plans.table import tabulate
from runtime.errors import UserError
from runtime.files import write_json, write_text
from runtime.options import Json, flat_options
from runtime.outputs import check_writable
from runtime.record import RunRecord
from samplers.job import SampleOptions, SamplingJob
from samplers.job import prepare as prepare_sampling
from samplers.options import SamplerOptions
from solvers.table import Table

HERE = Path(__file__).resolve().parent
#: Settings from which a pipeline computes the shift of its images.
SHIFTING = (
    "use_dynamic_shifting", "time_shift_type", "base_image_seq_len", "max_image_seq_len",
    "base_shift", "max_shift",
)  # fmt: skip
#: What ComfyUI calls our solvers with one evaluation for each level, by name and order.
IN_COMFYUI = {
    ("euler", None): "euler",
    ("ipndm", 4): "ipndm",
    ("dpmpp", 2): "dpmpp_2m",
    ("deis", 3): "deis",
}


@dataclass(frozen=True)
class ExportOptions:
    """Which sampler, of which model, under the names of the flags of ``sample.py``."""

    model: ModelSource = field(default_factory=ModelSource)
    conditions: ConditionOptions = field(default_factory=ConditionOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)
    predictor_path: str | None = None
    dest: Path | None = None


@dataclass(frozen=True)
class Export:
    """A sampler as a table, and the model that it is for."""

    options: ExportOptions
    job: SamplingJob
    table: Table

    @classmethod
    def of(cls, options: ExportOptions) -> Export:
        """The sampler that the options name.

        Raises UserError for one that is no table: stochastic, or with a predictor.
        """
        job = prepare_sampling(
            SampleOptions(
                options.model,
                options.conditions,
                options.sampler,
                options.predictor_path,
                seeds="0",
            )
        )
        return cls(options, job, tabulate(job.sampler.plan))

    @property
    def card(self) -> Card:
        return self.job.card

    @property
    def name(self) -> str:
        return f"{self.job.sampler.label}, {self.table.calls} calls, {self.card.name}"

    def record(self) -> RunRecord:
        """How the table was made, and for which weights."""
        model: dict[str, Json] = {
            "name": self.card.name,
            "sha256": self.job.source.known_sha256,
        }
        plan = self.job.sampler.describe()
        return RunRecord.make("export", flat_options(self.options), model, plan)


def write_scheduler(export: Export) -> str:
    """A folder with ``scheduler_config.json`` and the one file that reads it; says where.

    Raises UserError for a model that is no pipeline of ``diffusers``.
    """
    _require_first_noise(export)
    folder = destination(export)
    settings = _scheduler_settings(export)
    prediction, table = Prediction.of(settings, export.card.name), export.table
    write_json(
        folder / "scheduler_config.json",
        {
            "_class_name": "TableScheduler",
            "start": table.start,
            "times": table.times.tolist(),
            "rows": table.ragged,
            "network_times": prediction.network_time(table.times).tolist(),
            "prediction_type": prediction.kind,
            "clip_sample": prediction.clip,
            "num_train_timesteps": settings.get("num_train_timesteps", 1000),
            **_shifting(export.card, settings),
            "guidance_scale": export.job.sampler.guidance_rate,
            "made_for": json.dumps(export.record().model),
        },
    )
    script = folder / "table_scheduler.py"
    write_text(script, (HERE / script.name).read_text(encoding="utf-8"))
    return (
        f"wrote {folder} ({table.calls} calls); in your program, with {script.name} beside it:\n"
        "    from table_scheduler import TableScheduler\n"
        f"    pipe.scheduler = TableScheduler.from_pretrained({str(folder)!r})\n"
        f"    pipe(..., num_inference_steps={table.calls}{_scale(export)})"
    )


def _require_first_noise(export: Export) -> None:
    """Raise UserError for a table of a flow that does not begin as its pipelines do."""
    table = export.table
    first = float(table.rows[0, 0]) * (1 + table.start) / (1 + float(table.times[0]))
    if export.card.is_flow and abs(first - 1) > 1e-6:
        raise UserError(
            f"{export.job.sampler.label} does not begin with a network call on pure noise, as "
            "pipelines of flows do: leave --afs out, or train a table (train.py --sampler_stu=ns)"
        )


def write_node(export: Export) -> str:
    """A file for the folder ``custom_nodes`` of ComfyUI; says how to connect its nodes."""
    _require_pipeline(export)
    file = destination(export)
    table, rate = export.table, export.job.sampler.guidance_rate
    content = {
        "made_for": export.name,
        "cfg": rate,
        "flow": export.card.is_flow,
        "start": table.start,
        "times": table.times.tolist(),
        "rows": table.ragged,
    }
    text = (HERE / "comfyui_table.py").read_text(encoding="utf-8")
    write_text(file, text.replace("@TABLE@", json.dumps(content)).replace("@NAME@", export.name))
    cfg = "" if rate is None else f", with cfg {rate:g}"
    return f'wrote {file}: connect "Table sampler" and "Table sigmas" to SamplerCustom{cfg}'


def sigma_string(export: Export) -> str:
    """The noise levels of the calls and of the image, for programs that take no weights."""
    levels = ", ".join(f"{t:.6g}" for t in [*export.table.times.tolist(), export.table.end])
    chosen = export.job.sampler.options
    name = IN_COMFYUI.get((str(chosen.sampler), chosen.max_order))
    say = (
        f"choose the solver {name!r} beside them"
        if name
        else "no solver of another program has the weights of this table; ipndm, dpmpp_2m or deis "
        "come near"
    )
    return f"{levels}\n# {say}"


def markdown(export: Export) -> str:
    """The table for a page or a paper: a line for each call, and one for the image."""
    table = export.table
    head = ["call", "noise level", "x_T", *(f"D_{k}" for k in range(1, table.calls + 1))]
    lines = [f"| {' | '.join(head)} |", f"|{'---:|' * len(head)}"]
    names = [*map(str, range(1, table.calls + 1)), "image"]
    levels = [*(f"{t:.5g}" for t in table.times.tolist()), f"{table.end:.5g}"]
    for name, level, row in zip(names, levels, table.ragged, strict=True):
        weights = [f"{weight:.6g}" for weight in row]
        weights += [""] * (len(head) - 2 - len(weights))
        lines.append(f"| {' | '.join([name, level, *weights])} |")
    return "\n".join(lines)


def destination(export: Export) -> Path:
    """``--dest``; UserError where it cannot be written."""
    assert export.options.dest is not None
    check_writable(export.options.dest, "--dest")
    return export.options.dest


def _require_pipeline(export: Export) -> None:
    if export.card.family != "diffusers":
        raise UserError(
            f"{export.card.name!r} is no pipeline of diffusers: export its table or its noise "
            "levels instead (python -m tools.export table)"
        )


def _shifting(card: Card, scheduler: Mapping[str, Any]) -> dict[str, object]:
    """What pipelines compute a shift from, and that of the images of the table."""
    if not isinstance(card.schedule, Flow) or not scheduler.get("use_dynamic_shifting"):
        return {}
    shift = card.schedule.shift
    mu = shift if scheduler.get("time_shift_type") == "linear" else math.log(shift)
    known = {name: scheduler[name] for name in SHIFTING if scheduler.get(name) is not None}
    return {"mu": mu, **known}


def _scheduler_settings(export: Export) -> dict[str, Any]:
    """The settings of the pipeline's own scheduler."""
    _require_pipeline(export)
    folder = settings_folder(export.job.source.files(export.card).main)
    return read_json(component_folder(folder, "scheduler") / "scheduler_config.json")


def _scale(export: Export) -> str:
    """The arguments of a pipeline for the guidance of the table."""
    kind = KINDS.get(export.card.config.get("pipeline", ""))
    rate, name = export.job.sampler.guidance_rate, "guidance_scale"
    if kind is not None and not kind.embedded:
        name, rate = kind.rate, (1.0 if rate is None else rate) - kind.offset
    return "" if rate is None else f", {name}={rate:g}"
