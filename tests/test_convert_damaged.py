"""Files that are damaged, or something else than was asked for: one sentence says so."""

from __future__ import annotations

import contextlib
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints.pickles.files import read
from checkpoints.snapshots import (
    find_network,
    find_predictor,
    find_tensors,
    read_edm,
    read_predictor,
)  # fmt: skip
from runtime.errors import UserError
from tests.published import network, pickled, predictor, snapshot
from tests.test_convert import saved

FLIPS = 150


def layers() -> dict[str, torch.Tensor]:
    return {"model.enc.conv.weight": torch.ones(2, 3), "model.enc.conv.bias": torch.zeros(2)}


def forms() -> dict[str, bytes]:
    small = {"a": torch.arange(5.0), "b": {"c": [1, "two", None, (3.0, b"four")]}}
    return {
        "snapshot": pickled(snapshot(network("EDMPrecond", {"img_resolution": 8}, layers()))),
        "zip": saved(small),
        "older": saved(small, zipped=False),
        "predictor": predictor({"fc_r.weight": torch.ones(2, 3)}, {"num_steps": 4}),
    }


FINDERS = (find_network, find_predictor, find_tensors)


@pytest.mark.parametrize("form", forms())
def test_truncated_files(form: str, tmp_path: Path) -> None:
    path, data = tmp_path / "x.pkl", forms()[form]
    draw = random.Random(0)
    places = {0, 1, 2, len(data) - 1, len(data) - 2, *draw.choices(range(len(data)), k=60)}
    for place in places:
        path.write_bytes(data[:place])
        with pytest.raises(UserError) as refused:
            read(path)
        sentence = str(refused.value)
        assert "is damaged, cut short or no checkpoint (" in sentence and sentence.isprintable()


@pytest.mark.parametrize("form", forms())
def test_flipped_bytes(form: str, tmp_path: Path) -> None:
    """The archive has check sums; elsewhere a flip may be a different number, but no crash."""
    path, data = tmp_path / "x.pkl", forms()[form]
    draw, whole = random.Random(1), 0
    for _ in range(FLIPS):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 3])):
            # Half of the flips near the ends, where the structure is dense.
            span = draw.choice([len(data), min(len(data), 400)])
            changed[draw.choice([1, -1]) * draw.randrange(1, span)] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            content = read(path)
        except UserError as refused:
            assert str(refused).startswith(str(path)) and str(refused).isprintable()
            continue
        whole += 1
        assert form != "zip" or torch.equal(content["a"], torch.arange(5.0))
        for find in FINDERS:
            with contextlib.suppress(UserError):
                find(content, str(path))
    assert whole < FLIPS / 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"\n <!DOCTYPE html><html>404</html>", "it is a web page or XML"),
        (b"Entry not found", "pickle exhausted|opcode|unknown"),
        (b"PK\x03\x04 no archive", "File is not a zip file"),
        (b"\x80\x04N.more", "it goes on after its end"),
        (b"\x80\x04NN.", "2 values are left at its end"),
    ],
)
def test_files_that_are_something_else(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.pkl is damaged, .*\(.*({reason}).*\)"):
        read(path)
    with pytest.raises(UserError, match="there is no file .*nowhere.pkl; check its"):
        read(tmp_path / "nowhere.pkl")


def test_what_a_file_holds_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(saved({"state_dict": {"w": torch.ones(1)}, "epoch": 1}))
    with pytest.raises(UserError, match=r"no network of the EDM family \(its keys"):
        read_edm(path)
    path.write_bytes(predictor({}, {"num_steps": 4}))
    with pytest.raises(UserError, match=r"no network of the EDM family \(its keys"):
        read_edm(path)
    path.write_bytes(pickled(snapshot(network("EDMPrecond", {}, {}))))
    with pytest.raises(UserError, match=r"holds no predictor \(its keys: ema, loss_fn"):
        read_predictor(path)
    path.write_bytes(pickled(network("EDMPrecond", {"model_type": nn.SiLU()}, {})))
    with pytest.raises(UserError, match="has a Record as the setting 'model_type'"):
        read_edm(path)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("net/data.pkl", b"\x80\x02}.")
        made.writestr("net/constants.pkl", b"\x80\x02).")
    with pytest.raises(UserError, match=r"\(it is a TorchScript program\)"):
        read(path)
