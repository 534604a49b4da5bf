"""Settings of a network that its file does not hold and the user gives (``--model_settings``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import sha256_file

EXAMPLE = '{"image_size": 64, "num_head_channels": 64, "attention": "legacy"}'


def parse_settings(text: str | None) -> dict[str, Any]:
    """The JSON object of ``--model_settings``, empty if there is none; UserError for other text."""
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(
            f"--model_settings {text[:80]} is not a JSON object of settings: write it as "
            f"'{EXAMPLE}'"
        )
    return settings


def completed(own: Mapping[str, Any], given: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The settings that ``source`` holds, completed by ``given`` ones.

    Raises UserError if both name one with different values.
    """
    for name, value in given.items():
        if name in own and own[name] != value:
            raise UserError(
                f"--model_settings has {name} = {value!r} where {source} has {own[name]!r}: leave "
                "it out"
            )
    return {**own, **given}


def weights_sha256(path: Path, given: Mapping[str, Any]) -> str:
    """The SHA-256 of a file of weights; with settings ``given``, of both.

    They make another network of the same weights, whose results are not comparable.
    """
    return with_settings(sha256_file(path), given)


def with_settings(digest: str, given: Mapping[str, Any]) -> str:
    """The hash of weights and settings; ``digest`` itself without any."""
    if not given:
        return digest
    return hashlib.sha256(f"{digest} {json.dumps(given, sort_keys=True)}".encode()).hexdigest()
