"""Where the files of a model are, after download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """The weights of a model on this machine."""

    main: Path  #: a file or a folder
    companion: Path | None = None  #: adm: the classifier; ldm: the first stage
