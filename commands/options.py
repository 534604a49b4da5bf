"""The options that several commands share, each under one name with one meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from commands.numbers import BATCH, NOT_NEGATIVE, SEED, THREADS, images
from denoisers.cards import cards
from denoisers.precision import DTYPES
from metrics.detectors import DETECTORS
from metrics.measures import METRICS
from runtime.bounds import MOST_IMAGES
from runtime.lists import parse_files, parse_numbers, parse_sources
from solvers.grids import SCHEDULES
from solvers.names import unknown

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


class Name(click.Choice):
    """One of several names; a name of another tool is answered with ours."""

    def __init__(self, kind: str, names: Iterable[str]) -> None:
        super().__init__(list(names))
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(unknown(self.kind, str(value), self.choices), param, ctx)


def combine(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator made of several; ``--help`` lists them in this order."""

    def add(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return add


# How a command runs

device_option = click.option(
    "--device", metavar="NAME", help="cuda, mps or cpu  [default: the best available]"
)
#: ``-n``/``--dry-run``: print the resolved record and touch nothing.
dry_run_option = click.option(
    "-n", "--dry-run", is_flag=True, help="Print what would be done and touch nothing."
)
#: See :func:`runtime.files.cache_folder`.
cache_option = click.option(
    "--cache_dir",
    metavar="DIR",
    help="for downloads  [default: $AMED_CACHE or ~/.cache/amed-toolkit]",
)
dtype_option = click.option(
    "--dtype", type=click.Choice(list(DTYPES)), default="float32", help="dtype of the network"
)
compile_option = click.option(
    "--compile",
    type=bool,
    is_flag=False,
    flag_value="True",
    default=False,
    help="network and walks, for one size of batch; on GPUs only",
)
json_option = click.option("--json", "result_path", type=PATH, help="write the result to this file")

threads_option = click.option(
    "--threads", type=THREADS, help="CPU threads  [default: torch's choice]"
)


def batch_option(default: int) -> Callable[[F], F]:
    """``--batch``: images at once over all processes."""
    return click.option(
        "--batch",
        type=BATCH,
        default=default,
        show_default=True,
        help="images at once, over all processes",
    )


def seeds_option(default: str) -> Callable[[F], F]:
    """``--seeds``: text for :func:`runtime.seeds.parse_seeds`."""
    return click.option(
        "--seeds", metavar="LIST", default=default, show_default=True, help="such as 0-9,12,20-29"
    )


# The model and what its images are conditioned on

#: The weights of ``--dataset_name``, where they are not those that its card names.
model_options: Callable[[F], F] = combine(
    click.option(
        "--model_path",
        metavar="PATH",
        help="own weights of the same model, or of one with a name of your own",
    ),
    click.option(
        "--model_family",
        metavar="NAME",
        help="of --model_path  [default: recognised from the file]",
    ),
    click.option(
        "--model_settings",
        metavar="JSON",
        help="of the network of --model_path, where its file does not hold them",
    ),
    click.option(
        "--companion_path", metavar="FILE", help="own classifier (adm) or first stage (ldm)"
    ),
    cache_option,
)
dataset_option = click.option(
    "--dataset_name", default="cifar10-small", help=f"model: {', '.join(cards())}"
)
class_option = click.option(
    "--class",
    "label",
    type=click.IntRange(0, MOST_IMAGES),
    help="class of every image  [default: by seed]",
)
#: Prompts of text models.
prompt_options: Callable[[F], F] = combine(
    click.option("--prompt", metavar="TEXT", help="of every image, for text models"),
    click.option(
        "--prompt_path",
        type=click.Path(exists=True, dir_okay=False),
        metavar="FILE",
        help="prompts: a CSV with a column 'text', or a line each; seed i takes row i",
    ),
)
#: Strength of the condition.
guidance_options: Callable[[F], F] = combine(
    click.option(
        "--guidance_type",
        type=click.Choice(["cg", "cfg", "uncond"]),
        help="classifier, classifier-free, none: must be the model's",
    ),
    click.option(
        "--guidance_rate",
        type=NOT_NEGATIVE,
        help="1 is none  [default: the predictor's, or none]",
    ),
    click.option(
        "--negative_prompt", metavar="TEXT", help="what guidance leads away from  [default: empty]"
    ),
)
condition_options: Callable[[F], F] = combine(class_option, prompt_options, guidance_options)


def mask_options(function: F) -> F:
    """Masks of preconditioned sampling."""
    for kind, default in (("space", "none"), ("freq", "bundled")):
        function = click.option(
            f"--{kind}_mask_path",
            metavar="FILE",
            help=f"pds: .npy, 'bundled' or 'none'  [default: {default}]",
        )(function)
    return function


def times_option(help: str) -> Callable[[F], F]:
    """``--times``: noise levels one by one."""

    def parse(context: click.Context, option: click.Parameter, text: str | None) -> object:
        return None if text is None else parse_numbers("--times", text)

    return click.option("--times", metavar="LIST", callback=parse, help=help)


# What is measured


def classic_options(function: F) -> F:
    """The classic rows of a table: ``--solvers``, ``--schedule_type``, ``--times``."""
    from comparison.rows import DEFAULT_SOLVERS, LISTED  # only for commands that compare

    return combine(
        click.option(
            "--solvers",
            default=DEFAULT_SOLVERS,
            metavar="LIST",
            help=f"classic rows, of {', '.join(LISTED)}",
        ),
        click.option(
            "--schedule_type",
            type=Name("schedule", SCHEDULES),
            help="of all classic rows  [default: own]",
        ),
        times_option("classic rows on these noise levels too, such as those of tools.gits"),
    )(function)


def _sources(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> object:
    return parse_sources(texts)


def _statistics(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> object:
    return parse_files(texts, ".npz") or None


predictors_option = click.option(
    "--predictors",
    multiple=True,
    callback=_sources,
    metavar="RUNS",
    help="numbers, folders or files, by comma or repeated",
)
#: References of several detectors, and the statistics to write for them.
references_option = click.option(
    "--ref",
    multiple=True,
    callback=_sources,
    default=("cifar10-small",),
    help="bundled name for all detectors, or name or .npz for each, by comma or repeated; in calc "
    "also a folder or zip of images, in gen also 'none'",
)


def statistics_option(required: bool) -> Callable[[F], F]:
    """``--dest``: files of statistics to write."""
    return click.option(
        "--dest",
        multiple=True,
        callback=_statistics,
        required=required,
        help=".npz to write; one for each detector, by comma or repeated",
    )


detector_path_option = click.option(
    "--detector-path",
    "detector_path",
    type=PATH,
    help="file of a detector that is not bundled",
)
#: What ``fid.py`` measures, with one detector or several.
metric_options: Callable[[F], F] = combine(
    click.option(
        "--detector",
        default="cifar10-small",
        metavar="LIST",
        help=f"{', '.join(DETECTORS)}, a TorchScript file, or name=path; by comma",
    ),
    detector_path_option,
    click.option(
        "--metrics", default="fid", metavar="LIST", help=f"of {', '.join(METRICS)}, by comma"
    ),
    click.option(
        "--features",
        type=images(2),
        metavar="N",
        help="of at most N images, for fid_inf, kid, pr and dc  [default: 10000]",
    ),
    click.option("--seed", type=SEED, default=0, help="draws the N images, and subsets"),
)
#: How many images of a folder or zip; torchrun takes --num for a prefix of its own options, hence
#: the longer name.
num_option = click.option("--num", "--num_images", "num", type=images(2), help="use N images")
