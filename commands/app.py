"""The console command ``amed``: every command of the toolkit behind one name.

A command's module is imported only when that command is used, so ``amed --help`` loads neither
torch nor the commands.
"""

from __future__ import annotations

import re
import sys
from copy import copy
from importlib import import_module
from typing import NamedTuple, NoReturn

import click

from commands.help import SETTINGS
from runtime import __version__


class Subcommand(NamedTuple):
    """Where a command is defined."""

    module: str  #: with a click command, or a group, called ``main``
    help: str  #: the first line of that command's help


#: The subcommands of ``amed``.  Underscores in a name are accepted as well as dashes.
COMMANDS: dict[str, Subcommand] = {
    "train": Subcommand(
        "commands.train",
        "Train a few-step student of a pre-trained diffusion model.",
    ),
    "sample": Subcommand(
        "commands.sample", "Sample images, one PNG per seed, with a record of how they were made."
    ),
    "fid": Subcommand(
        "commands.fid", "Quality of images, with the detector's name beside every number."
    ),
    "clip-score": Subcommand(
        "commands.clip_score",
        "Scores of text-to-image models, with the network's name beside every number.",
    ),
    "compare": Subcommand(
        "commands.compare",
        "Compare samplers at matched budgets, on the same seeds, through one FID harness.",
    ),
    "solver-error": Subcommand(
        "commands.solver_error",
        "Measure solver error without a reference: the distance to the exact solution of the ODE.",
    ),
    "visualize": Subcommand(
        "commands.visualize",
        "Sample the same seeds with several samplers: a row of one picture for each.",
    ),
    "nfe-sweep": Subcommand(
        "tools.nfe_sweep",
        "Measure FID against NFE for the ODE, the SDE and Restart on the same seeds.",
    ),
    "plan-search": Subcommand(
        "tools.plan_search",
        "Find the best Restart plan of exactly --nfe evaluations on a model.",
    ),
    "gits": Subcommand(
        "tools.gits",
        "Find the noise levels of a model's grid by geometry-inspired time scheduling (GITS).",
    ),
    "export": Subcommand(
        "tools.export", "Hand a sampler to other programs, which need nothing of this toolkit."
    ),
    "report": Subcommand("tools.report", "Write report.html again from the results in FOLDER."),
    "converged": Subcommand(
        "tools.converged",
        "Sample a model without solver error, by dopri5 on the probability-flow ODE.",
    ),
    "trajectories": Subcommand(
        "tools.trajectories",
        "Compute a teacher's trajectories once, for every student that reads them.",
    ),
    "convert": Subcommand("tools.convert", "Convert the checkpoint SOURCE to TARGET.safetensors."),
    "dataset": Subcommand(
        "tools.dataset_tool", "Convert a published image data set to EDM's layout."
    ),
    "draw-prompts": Subcommand(
        "tools.draw_prompts", "Draw a reproducible subset of the prompts in a file."
    ),
    "fit-masks": Subcommand(
        "tools.fit_masks", "Fit the frequency mask and the space mask of PDS to images."
    ),
    "train-denoiser": Subcommand(
        "tools.train_denoiser",
        "Train a denoiser of the EDM family on images (Karras et al. 2022, arXiv:2206.00364).",
    ),
    "train-detector": Subcommand(
        "tools.train_detector",
        "Train a CIFAR-10 feature detector, a small classifier.",
    ),
    "restart-toy": Subcommand(
        "tools.restart_toy",
        "Run the Restart paper's synthetic experiment (arXiv:2306.14878, section 4.1, figure 2).",
    ),
}


def canonical(name: str) -> str:
    """The spelling of a subcommand's name in `COMMANDS`."""
    return name.replace("_", "-")


def load(name: str) -> click.Command:
    """Import the command or group called ``name`` in `COMMANDS`."""
    command: click.Command = import_module(COMMANDS[name].module).main
    return command


class Toolkit(click.Group):
    """A group whose subcommands are listed in `COMMANDS` and imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the subcommand; None where there is none of this name."""
        name = canonical(cmd_name)
        return as_subcommand(load(name)) if name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and help texts without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def as_subcommand(command: click.Command) -> click.Command:
    """A copy of ``command`` whose help names the subcommands of ``amed`` instead of the scripts."""
    shown = copy(command)
    shown.help = command.help and spell(command.help)
    shown.epilog = command.epilog and spell(command.epilog)
    if isinstance(shown, click.Group):
        shown.commands = {name: as_subcommand(c) for name, c in shown.commands.items()}
    return shown


def spell(text: str) -> str:
    """``text`` with every ``sample.py`` and ``tools.report`` in it as a subcommand of ``amed``."""
    for name, (module, _) in COMMANDS.items():
        package, _, stem = module.partition(".")
        script = f"{stem}.py" if package == "commands" else module
        start = rf"(?<![\w./]){re.escape(script)}(?!\w)"
        text = re.sub(rf"(torchrun .*?)(?:-m )?{start}", rf"\1-m commands {name}", text)
        text = re.sub(rf"(?:python (?:-m )?)?{start}", f"amed {name}", text)
    return text


@click.group(cls=Toolkit, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="amed")
def amed() -> None:
    """Train, sample and compare diffusion samplers of about five network evaluations.

    'amed COMMAND --help' shows the options of a command.  For several processes use
    'torchrun --nproc_per_node=N -m commands COMMAND'.
    """


def main() -> NoReturn:
    """Run ``amed`` and exit; errors and exit codes as in :func:`runtime.cli.run`."""
    if canonical("".join(sys.argv[1:2])) in COMMANDS:
        from runtime import cli  # imports torch

        cli.run(amed)
    sys.exit(amed())
