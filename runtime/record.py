"""The record of a run, stored with every result."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import __version__
from runtime.errors import UserError
from runtime.files import write_text
from runtime.options import Json
from runtime.typed import REMEDY, SCHEMA, from_plain, parse_json

ROOT = Path(__file__).resolve().parent.parent


RECORD = "run.json"  #: name of a record's file in a folder of results


@dataclass(frozen=True)
class RunRecord:
    """Every resolved option of a run, the model and the versions; plain JSON values only."""

    command: str  #: the script: ``train``, ``sample``, ``fid``, ``compare``
    options: dict[str, Any]  #: every option, with defaults filled in
    model: dict[str, Any]  #: card name and SHA-256 of the weights
    plan: dict[str, Any]  #: time grid, solver, planned NFE
    versions: dict[str, str]
    git_commit: str | None  #: ends in ``-dirty`` if files had changed; None outside a checkout
    created: str  #: UTC, ISO 8601
    schema: int

    @classmethod
    def make(
        cls,
        command: str,
        options: Mapping[str, Json],
        model: Mapping[str, Json],
        plan: Mapping[str, Json],
    ) -> RunRecord:
        """A record of a run that starts now.

        Raises:
            TypeError: a value that JSON cannot hold.
        """
        return cls(
            command=command,
            options=_plain("options", options),
            model=_plain("model", model),
            plan=_plain("plan", plan),
            versions=_versions(),
            git_commit=_git_commit(),
            created=utc_now(),
            schema=SCHEMA,
        )

    def to_json(self) -> str:
        """The record as JSON; :meth:`from_json` restores it."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str, source: str = "this run record") -> RunRecord:
        """Read a record; ``source`` names it in errors.

        Raises:
            UserError: not JSON, an unknown or missing key, a wrong type, a newer schema.
        """
        return from_plain(cls, parse_json(text, source), source)

    def write(self, path: str | Path) -> None:
        """Write ``path`` atomically."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Read a record written by :meth:`write`; errors as in :meth:`from_json`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): give the folder of a run"
            ) from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file: {REMEDY}") from None
        return cls.from_json(text, source=str(path))

    def differences(self, other: RunRecord, ignore: tuple[str, ...] = ()) -> list[str]:
        """The differences that prevent this run from continuing the results of ``other``.

        Compares command, options, model and plan; ``ignore`` names options that do not affect
        the result (``batch``, ``device``). A line reads ``options.seeds: '0-9' != '0-4'``.
        """
        lines = (
            []
            if self.command == other.command
            else [f"command: {self.command!r} != {other.command!r}"]
        )
        for part in ("options", "model", "plan"):
            new, old = getattr(self, part), getattr(other, part)
            lines += [
                f"{part}.{key}: {new.get(key)!r} != {old.get(key)!r}"
                for key in sorted(new.keys() | old.keys())
                if new.get(key) != old.get(key) and not (part == "options" and key in ignore)
            ]
        return lines


def utc_now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _plain(part: str, values: Mapping[str, Json]) -> dict[str, Any]:
    """The values as they are after a round trip through JSON, so that a record equals its file."""
    for key, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{part}[{key!r}] = {value!r} cannot go into a record: {error}"
            ) from None
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def _versions() -> dict[str, str]:
    return {
        "amed-toolkit": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _git_commit() -> str | None:
    if not (ROOT / ".git").exists():  # installed: a repository around it is another project's
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        output = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.strip() or None
