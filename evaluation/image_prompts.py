"""Which prompt each image on disk was made to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from denoisers.conditions import Conditions
from evaluation.images import ImagePassOptions
from image_data.prompts import read_prompts
from image_data.sources import ImageSource
from metrics.draws import choose
from runtime.errors import UserError
from runtime.record import RECORD, RunRecord
from runtime.typed import OPTIONAL, pick


@dataclass(frozen=True)
class PromptSource:
    """Where prompts come from, under the names of the flags; neither means the images' record."""

    prompt: str | None = None  #: of every image
    prompt_path: str | None = None

    def check(self) -> None:
        """Raise UserError where both are given."""
        if self.prompt is not None and self.prompt_path is not None:
            raise UserError(
                f"--prompt {self.prompt!r} and --prompt_path {self.prompt_path} both say what the "
                "images show: give one"
            )


@dataclass(frozen=True)
class PromptedImages:
    """The images that are scored, each with its prompt."""

    names: tuple[str, ...]  #: of files, below the folder or in the zip
    prompts: tuple[str, ...]  #: of each image; all empty where none is needed


def pair_images(
    path: Path, reading: ImagePassOptions, source: PromptSource | None
) -> PromptedImages:
    """The images at ``path`` with their prompts; with empty ones where ``source`` is None.

    Prompts come from ``source``, or else from what the record of ``sample.py`` beside the images
    names.  A single prompt is that of every image.  Of several prompts, an image that ``sample.py``
    made has that of its seed; of other images the i-th, by name, has the i-th.

    Raises:
        UserError: no prompts, not those that the images were made from, or not one for each image.
    """
    with ImageSource(path) as files:
        chosen, names = choose(len(files), reading.num, reading.seed), tuple(files.names)
    if source is None:
        prompts: tuple[str, ...] = ("",) * len(names)
    else:
        record = _sampling_record(path)
        prompts = _distribute(_read(source, record, path), names, path, record is not None)
    return PromptedImages(tuple(names[i] for i in chosen), tuple(prompts[i] for i in chosen))


@dataclass(frozen=True)
class PromptsIdentity:
    """Which prompts."""

    count: int
    sha256: str
    negative: str | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def of(cls, conditions: Conditions) -> PromptsIdentity | None:
        """The prompts of ``conditions``; None where there are none."""
        known = conditions.describe()
        if known is None:
            return None
        return cls(int(known["count"]), str(known["sha256"]), conditions.negative)


@dataclass(frozen=True)
class _RecordedPrompts:
    """What a record of sample.py says about prompts."""

    prompt: str | None = None
    prompt_path: str | None = None
    prompts: PromptsIdentity | None = None


def _sampling_record(path: Path) -> RunRecord | None:
    """The record of sample.py in a folder, or None."""
    file = path / RECORD
    record = RunRecord.read(file) if file.is_file() else None
    return record if record is not None and record.command == "sample" else None


def _read(source: PromptSource, record: RunRecord | None, path: Path) -> tuple[str, ...]:
    """All prompts, checked to be those that the images were made from."""
    source.check()
    options = {} if record is None else record.options
    recorded = pick(_RecordedPrompts, options, f"the options in {path / RECORD}")
    prompt, file = source.prompt, source.prompt_path
    if prompt is None and file is None:
        prompt, file = recorded.prompt, recorded.prompt_path
        if file is not None and not Path(file).is_file():
            raise UserError(
                f"{file}, which the prompts of {path} were read from, does not exist: give "
                "--prompt_path"
            )
    if prompt is not None:
        prompts: tuple[str, ...] = (prompt,)
    elif file is not None:
        prompts = read_prompts(file)
    else:
        raise UserError(
            f"nothing says what the images in {path} show: give --prompt_path, a prompt for each"
        )
    known = recorded.prompts
    asked = PromptsIdentity.of(Conditions(prompts=prompts))
    if known is not None and replace(known, negative=None) != asked:
        raise UserError(
            f"the images in {path} were made from other prompts than {file or repr(prompt)}: give "
            f"those ({known.count}, SHA-256 {known.sha256[:12]}...)"
        )
    return prompts


def _distribute(
    prompts: tuple[str, ...], names: Sequence[str], path: Path, by_seed: bool
) -> tuple[str, ...]:
    """The prompt of each image."""
    if len(prompts) == 1:
        return prompts * len(names)
    if not by_seed:
        if len(prompts) != len(names):
            raise UserError(
                f"{path} holds {len(names)} images, but there are {len(prompts)} prompts: image i "
                "(in the order of names) shows prompt i, so give as many"
            )
        return prompts
    seeds = [Path(name).stem for name in names]
    strange = [n for n, s in zip(names, seeds, strict=True) if not s.isdecimal()]
    if strange:
        raise UserError(
            f"{strange[0]} in {path} is not an image of sample.py, whose names are seeds: remove it"
        )
    last = max(map(int, seeds))
    if last >= len(prompts):
        raise UserError(
            f"the image of seed {last} in {path} has no prompt: there are {len(prompts)}, and that "
            "of seed i has number i (from 0); give all of them"
        )
    return tuple(prompts[int(seed)] for seed in seeds)
