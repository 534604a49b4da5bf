"""One prompt, class or list of seeds through several samplers, side by side in one picture."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from commands import sample
from commands.help import SETTINGS
from commands.numbers import blocks
from commands.options import PATH
from runtime.errors import UserError
from runtime.job import execute
from runtime.options import flag_names, parse_options
from samplers.job import SampleOptions
from samplers.options import SamplerOptions
from samplers.side_by_side import SampledRow, SideBySideOptions, prepare

EXAMPLES = """\b
Examples:
  python visualize.py --row 'heun --nfe 18' --row 'ipndm --nfe 5 --afs True' --row 'restart'
  python visualize.py --row 'iPNDM: ipndm --nfe 5' --row 'learned: --predictor_path=1' --seeds 0-9
  python visualize.py --dataset_name=ms_coco --prompt 'a red apple' --guidance_rate=5 \\
      --row 'DDIM: euler --schedule_type=discrete --nfe=100' \\
      --row 'DDPM: ddpm --schedule_type=discrete --nfe=100'
"""
#: Options of a row: its sampler. Everything else is the same for all rows.
OF_A_ROW = {*flag_names(SamplerOptions), "predictor_path"}
SHARED = [
    option
    for option in sample.main.params
    if option.name == "guidance_rate" or option.name not in OF_A_ROW | {"outdir"}
]
NAMED = re.compile(r"([^:'\"]+):\s+(.*)", re.DOTALL)


def read_row(text: str, guidance_rate: float | None) -> SampledRow:
    """``[NAME:] SAMPLER [FLAG...]`` or ``[NAME:] --predictor_path=RUN``, flags as of sample.py.

    Raises UserError, naming the row, for a flag that is unknown, or is not for one row alone.
    """
    named = NAMED.fullmatch(text.strip())
    try:
        words = shlex.split(named[2] if named else text)
        if words and not words[0].startswith("-"):
            words.insert(0, "--sampler")
        context = sample.main.make_context("--row", words)
    except (click.ClickException, ValueError) as error:
        why = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise UserError(f"--row {text!r}: {why.rstrip('.')}; see sample.py --help") from None
    given = context.params
    for name in given:
        typed = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if typed and name not in OF_A_ROW:
            raise UserError(f"--row {text!r}: --{name} is the same for all rows: give it outside")
    del given["dry_run"], given["device"]
    asked = parse_options(SampleOptions, given)
    sampler = asked.sampler
    if sampler.guidance_rate is None:
        sampler = replace(sampler, guidance_rate=guidance_rate)
    return SampledRow(named[1].strip() if named else None, sampler, asked.predictor_path)


@click.command(
    epilog=EXAMPLES,
    params=SHARED,
    context_settings={**SETTINGS, "default_map": {"seeds": "0-7"}},
)
@click.option(
    "--row",
    "rows",
    multiple=True,
    required=True,
    metavar="'[NAME:] SAMPLER FLAGS'",
    help="a sampler with its flags as sample.py has them; give one for each row",
)
@click.option("--columns", type=blocks(1), default=8, help="seeds in the picture")
@click.option(
    "--outdir",
    type=PATH,
    default=Path("samples/visualize"),
    help="a folder of images for every row, and the picture",
)
def main(
    dry_run: bool,
    device: str | None,
    rows: tuple[str, ...],
    columns: int,
    outdir: Path,
    guidance_rate: float | None,
    **flags: Any,
) -> None:
    """Sample the same seeds with several samplers: a row of one picture for each.

    Every row is a run of sample.py with a folder and a record of its own, so a killed command
    continues where it stopped.
    """
    asked = tuple(read_row(text, guidance_rate) for text in rows)
    shared = parse_options(SampleOptions, flags)
    execute(prepare, SideBySideOptions(asked, shared, columns, outdir), dry_run, device)
