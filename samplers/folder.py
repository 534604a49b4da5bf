"""A folder of samples: one PNG per seed and a record; an interrupted run can be continued."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.dist import World
from runtime.errors import UserError
from runtime.images import film_strip, image_grid, read_png, save_png, to_uint8
from runtime.record import RECORD, RunRecord
from runtime.seeds import join_seeds
from runtime.typed import pick
from samplers.generate import SampleBatch

MAX_PICTURE = 256  #: images in an overview picture, rows in a picture of film strips
#: Options that may change when a folder is continued, because they do not affect the images, or
#: by rounding alone: a device, and a network that is compiled for it.
FREE = (
    "seeds", "batch", "device", "world_size", "compile", "grid", "return_inters", "outdir",
    "model_path", "prompt_path",
)  # fmt: skip
_PNG_HEAD, _PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Folder:
    """A folder of images: ``path/000001.png``, or ``path/000000/000001.png`` with ``subdirs``.

    Film strips and overview pictures are stored next to ``path``, because ``fid.py`` reads every
    image below it.
    """

    path: Path
    subdirs: bool = False
    inters: bool = False  #: also store a film strip per seed

    def image(self, seed: int) -> Path:
        """The file of one sample."""
        return self.path / self._name(seed)

    def strip(self, seed: int) -> Path:
        """The file of the film strip of one sample: its states from left to right."""
        return self.sibling("-inters") / self._name(seed)

    def sibling(self, ending: str) -> Path:
        """``path`` with ``ending`` appended to its name."""
        return self.path.with_name(self.path.name + ending)

    def _name(self, seed: int) -> str:
        name = f"{seed:06d}.png"
        return f"{seed - seed % 1000:06d}/{name}" if self.subdirs else name

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of ``seeds`` without a complete image (and film strip, with ``inters``)."""
        return [seed for seed in seeds if not all(is_whole(file) for file in self._files(seed))]

    def _files(self, seed: int) -> tuple[Path, ...]:
        return (self.image(seed), self.strip(seed)) if self.inters else (self.image(seed),)

    def open(self, record: RunRecord, seeds: Sequence[int]) -> tuple[RunRecord, list[int]]:
        """Write the record, or continue an existing one; returns it and the missing seeds.

        Raises:
            UserError: the folder has images of other settings, or images without a record.
        """
        file = self.path / RECORD
        if file.exists():
            record = _continued(record, RunRecord.read(file), self.path)
        elif any(self.image(seed).exists() for seed in seeds):
            raise UserError(
                f"{self.path} holds images but no {RECORD} with their settings: "
                "give another --outdir, or remove them"
            )
        missing = self.missing(seeds)
        if not missing and record.plan["nfe_metered"] is None:
            missing = list(seeds[:1])  # killed before `close`: measure the NFE on one image again
        if missing:
            record.write(file)
        return record, missing

    def open_on_all(
        self, record: RunRecord, seeds: Sequence[int], here: World
    ) -> tuple[RunRecord, list[int]]:
        """What `open` returns on rank 0, on every process; the others do not touch the folder."""
        return here.broadcast_object(self.open(record, seeds) if here.is_main else (record, []))

    def close(self, record: RunRecord, nfe: int) -> None:
        """Write the metered NFE into the record."""
        final = dataclasses.replace(record, plan={**record.plan, "nfe_metered": nfe})
        final.write(self.path / RECORD)

    def save(self, batch: SampleBatch) -> None:
        """Write the images of a batch, each atomically."""
        if self.inters and batch.trajectory is not None:
            for i, seed in enumerate(batch.seeds):
                save_png(self.strip(seed), film_strip(batch.trajectory.x[:, i : i + 1]))
        for seed, pixels in zip(batch.seeds, to_uint8(batch.images), strict=True):
            save_png(self.image(seed), pixels)

    def save_grid(self, seeds: Sequence[int]) -> Path:
        """Write one picture of the first samples, nearly square, next to the folder."""
        images = [read_png(self.image(seed)) for seed in seeds[:MAX_PICTURE]]
        target = self.sibling("-grid.png")
        save_png(target, image_grid(images, columns=math.ceil(math.sqrt(len(images)))))
        return target

    def save_strips(self, seeds: Sequence[int]) -> Path:
        """Write one picture of the first film strips: a row per sample, a column per time."""
        target = self.sibling("-inters.png")
        rows = [read_png(self.strip(seed)) for seed in seeds[:MAX_PICTURE]]
        save_png(target, image_grid(rows, columns=1))
        return target


@dataclasses.dataclass(frozen=True)
class _FolderPlan:
    """What is read of the plan in a folder's record."""

    nfe_metered: int | None


@dataclasses.dataclass(frozen=True)
class _FolderOptions:
    """What is read of the options in a folder's record."""

    seeds: str


def is_whole(path: Path) -> bool:
    """Whether ``path`` is a complete PNG, by its signature and its end marker."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_PNG_HEAD))
            file.seek(max(0, path.stat().st_size - len(_PNG_TAIL)))
            return head == _PNG_HEAD and file.read() == _PNG_TAIL
    except OSError:
        return False


def _continued(record: RunRecord, older: RunRecord, path: Path) -> RunRecord:
    """``record`` with the seeds and the metered NFE of the ``older`` one added."""
    metered = pick(_FolderPlan, older.plan, f"the plan in {path / RECORD}").nfe_metered
    record = dataclasses.replace(record, plan={**record.plan, "nfe_metered": metered})
    differences = [_short(line) for line in record.differences(older, ignore=FREE)]
    if differences:
        more = f" and {len(differences) - 2} more" if len(differences) > 2 else ""
        raise UserError(
            f"{path} holds images of other settings (new != old: "
            f"{'; '.join(differences[:2])}{more}): give another --outdir, or remove that folder"
        )
    earlier = pick(_FolderOptions, older.options, f"the options in {path / RECORD}").seeds
    texts = [str(seeds) for seeds in (earlier, record.options.get("seeds")) if seeds]
    try:
        seeds = join_seeds(*texts)
    except UserError as error:
        raise UserError(f"{path / RECORD}: {error}") from None
    return dataclasses.replace(record, options={**record.options, "seeds": seeds})


def _short(line: str) -> str:
    return line if len(line) <= 90 else f"{line[:87]}..."
