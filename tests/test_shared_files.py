"""Files that others may read, and files that may not be read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from amed.experiments import load_predictor, save_predictor
from checkpoints.snapshots import read_weights
from denoisers.convert import convert
from denoisers.families.diffusers.files import is_diffusers
from metrics.classifiers import load_classifier
from runtime.files import write_text
from tests.processes import finish, start
from tests.sampler_models import trained


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_leaves(mask: int, mode: int, tmp_path: Path) -> None:
    """Whatever writes them; safetensors alone would give all of them 0600."""
    before = os.umask(mask)
    try:
        student = trained()
        save_predictor(tmp_path / "p.safetensors", student.predictor, student.record)
        content = {"all_modules.0.W": torch.zeros(2)}
        convert(content, tmp_path / "x.pt", tmp_path / "w.safetensors")
        write_text(tmp_path / "t.txt", "text")
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {
        name: oct(mode) for name in ("p.safetensors", "w.safetensors", "t.txt")
    }


def deny(path: Path) -> None:
    """What every reader of safetensors says of a file that only its owner may read."""
    if os.geteuid() == 0:
        os.setuid(65534)  # root may read everything
    readers: tuple[Callable[[Path], object], ...] = (
        read_weights,
        load_classifier,
        is_diffusers,
        lambda file: load_predictor(str(file), file.parent),
    )
    for reader in readers:
        try:
            reader(path)
        except PermissionError as error:
            print(error.filename, error.strerror, flush=True)


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        path = folder / "x.safetensors"
        save_file({"a": torch.zeros(1)}, path)
        path.chmod(0)
        process = start(lambda: deny(path), tmp_path / "log")
        assert finish(process, tmp_path / "log").out == f"{path} Permission denied\n" * 4
    finally:
        shutil.rmtree(folder)
