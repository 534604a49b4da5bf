"""The learned solvers, and one import for programs that use the toolkit.

``import amed`` is quick: each name of `NAMES` is imported from the module that defines it when it
is first used, so ``amed.load_model`` is ``denoisers.registry.load_model``.  docs/api.md lists them.
The submodules hold what is learned: predictor, settings, trainer and experiment folders.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from runtime import __version__ as __version__

#: Public names in alphabetical order, and where each is defined.
NAMES: dict[str, str] = {
    "build_sampler": "samplers.build:build",
    "Conditions": "denoisers.conditions:Conditions",
    "Denoised": "solvers.types:Denoised",
    "generate": "samplers.generate:generate",
    "get_grid": "solvers.grids:get_grid",
    "Grid": "solvers.grids:Grid",
    "integrate": "solvers.driver:integrate",
    "Jump": "plans.plan:Jump",
    "load_model": "denoisers.registry:load_model",
    "load_predictor": "amed.experiments:load_predictor",
    "load_student": "ns.experiments:load_student",
    "make_solver": "solvers.registry:make_solver",
    "parse_restart_info": "restart.intervals:parse_restart_info",
    "restart_plan": "restart.build:restart_plan",
    "run_plan": "plans.plan:run_plan",
    "run_table": "solvers.table:run_table",
    "SamplerOptions": "samplers.options:SamplerOptions",
    "SeedNoise": "runtime.noise:SeedNoise",
    "Solve": "plans.plan:Solve",
    "Table": "solvers.table:Table",
    "tabulate": "plans.table:tabulate",
    "use_predictor": "samplers.in_diffusers:use_predictor",
    "UserError": "runtime.errors:UserError",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562).  Raises AttributeError for any other name."""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = NAMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """Names of the module, the public ones included."""
    return sorted({*globals(), *NAMES})
