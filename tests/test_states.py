"""Training states and weights of detectors: read as data by the one reader, checked as they are."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpoints.states import read_state, restore
from metrics.clip import load_head
from metrics.inception import load_inception
from runtime.errors import UserError
from tests.test_convert_bombs import doubled, peak
from tests.test_convert_hostile import archive, called, glob, put

KINDS: dict[str, type] = {"done": int, "net": dict, "optimizer": dict, "schedule": dict}
#: Each under 1 kB.  With ``torch.load(weights_only=True)`` the first takes years to hash its key,
#: the second 5.4 GB.
BOMBS = {
    "time": b"}" + doubled(60) + b"Ns",
    "memory": called(glob("builtins", "bytearray"), put(5_400_000_000)),
}
READERS: dict[str, Callable[[Path], object]] = {
    "state": lambda path: read_state(path, KINDS),
    "inception": load_inception,
    "aesthetic": load_head,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_fizzle_in_every_reader(reader: str, bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    archive(BOMBS[bomb], path)
    assert path.stat().st_size < 1000
    began, before = time.process_time(), peak()
    with pytest.raises(UserError, match=f"^{path} "):
        READERS[reader](path)
    assert time.process_time() - began < 3 and peak() - before < 100


class Parts:
    """A module, its optimizer and its schedule after some steps."""

    def __init__(self, steps: int = 0) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.run(steps)

    def run(self, steps: int) -> list[list[float]]:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.net(torch.ones(1, 3)).square().sum().backward()
            self.optimizer.step()
            self.schedule.step()
        return self.net.weight.tolist()

    @property
    def all(self) -> dict[str, Any]:
        return {"net": self.net, "optimizer": self.optimizer, "schedule": self.schedule}

    def state(self) -> dict[str, Any]:
        return {"done": 2, **{name: part.state_dict() for name, part in self.all.items()}}


def saved(path: Path, **changes: Any) -> Path:
    torch.save({**Parts(2).state(), **changes}, path)
    return path


def test_a_restored_run_goes_on_as_it_would_have(tmp_path: Path) -> None:
    path, again = saved(tmp_path / "s.pt"), Parts()
    state = read_state(path, KINDS)
    restore(again.all, state, path)
    assert state["done"] == 2 and again.run(3) == Parts().run(5)
    assert read_state(tmp_path / "none.pt", KINDS) == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"done": "2"}, "is no training state .'done' is wrong: 2.; delete it"),
        ({"done": -1}, "is no training state .'done' is wrong: -1.; delete it"),
        ({"done": True}, "is no training state .'done' is wrong: True.; delete it"),
        ({"net": None}, "is no training state .'net' is missing.; delete it"),
        ({"net": {0: 1}}, "is no training state .'net' is wrong"),
        ({"net": {}}, "does not fit this run .'net': .*Missing key.*; delete it"),
        ({"net": nn.Linear(4, 2).state_dict()}, "does not fit this run .'net': .*size mismatch"),
        ({"optimizer": {}}, "does not fit this run .'optimizer': .*; delete it"),
        (
            {"optimizer": {"state": {}, "param_groups": [{"lr": "x"}]}},
            "its settings have other names",
        ),
        ({"schedule": {}}, "does not fit this run .'schedule': .*other names.*; delete it"),
    ],
)
def test_states_that_do_not_fit_are_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "s.pt", **changes)
    with pytest.raises(UserError, match=sentence):
        restore(Parts().all, read_state(path, KINDS), path)


def test_moments_of_another_shape_are_found_before_the_next_step(tmp_path: Path) -> None:
    optimizer = Parts(2).optimizer.state_dict()
    optimizer["state"][0]["exp_avg"] = torch.zeros(7)
    path = saved(tmp_path / "s.pt", optimizer=optimizer)
    with pytest.raises(UserError, match="'optimizer': exp_avg of parameter 0 is of another shape"):
        restore(Parts().all, read_state(path, KINDS), path)


@pytest.mark.parametrize("kept", [0, 1], ids=["none", "one"])
def test_an_optimizer_without_all_its_moments_does_not_start_afresh(
    kept: int, tmp_path: Path
) -> None:
    optimizer = Parts(2).optimizer.state_dict()
    optimizer["state"] = {n: optimizer["state"][n] for n in range(kept)}
    path = saved(tmp_path / "s.pt", optimizer=optimizer)
    with pytest.raises(UserError, match="'optimizer': some of its parameters have no moments"):
        restore(Parts().all, read_state(path, KINDS), path)
