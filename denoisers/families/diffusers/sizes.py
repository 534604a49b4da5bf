"""Bounds of the settings by which ``diffusers`` and ``transformers`` build a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from runtime.bounds import MOST_LAYERS
from runtime.errors import UserError

MOST_SIZE = 1_000_000  #: of any setting; a vocabulary has 50,000 words
MOST_ENTRIES = 1000  #: of a list or an object among the settings
MOST_LEVELS = 8  #: of a first stage, each of half the resolution
#: Settings that list the levels of a first stage, and how often it halves for so many.
LEVELS: dict[str, Callable[[int], int]] = {
    "temperal_downsample": lambda count: count,  # so spelled by diffusers: Qwen-Image's
    "encoder_block_out_channels": lambda count: count - 1,  # AutoencoderDC, Sana's
    "block_out_channels": lambda count: count - 1,
}
#: How the names end of settings by which blocks are repeated, or parts of a block.
DEPTHS = ("layers_per_block'", "layers'")


def check_sizes(value: Any, what: str) -> None:
    """Raise UserError for a number or a list by which the library would build without an end."""
    if isinstance(value, (dict, list)):
        if len(value) > MOST_ENTRIES:
            raise UserError(f"{what} have {len(value)} entries; copy it anew")
        for key, part in value.items() if isinstance(value, dict) else ((None, p) for p in value):
            check_sizes(part, what if key is None else f"{what}: '{key}'")
    most = MOST_LAYERS if what.endswith(DEPTHS) else MOST_SIZE
    if isinstance(value, (int, float)) and value > most:
        raise UserError(f"{what} is {value}, more than any network's {most}; copy it anew")


def whole(network: Mapping[str, Any], what: str, most: int, source: str) -> int:
    """A setting of a network; UserError unless it is a whole number from 1 to ``most``."""
    value = network.get(what)
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(
            f"{source}: the network's {what} = {value!r} is no whole number from 1 to {most}"
        )
    return value


def upsampling(stage: Mapping[str, Any], source: str) -> int:
    """The resolution of images over that of latents, of any kind of first stage."""
    for name, count in LEVELS.items():
        blocks = stage.get(name)
        if isinstance(blocks, list | tuple) and 1 <= len(blocks) <= MOST_LEVELS:
            return int(2 ** count(len(blocks)))
    raise UserError(
        f"{source}: the first stage has none of {', '.join(LEVELS)} as a list of 1 to {MOST_LEVELS}"
    )
