"""Everything that sizes work has an upper bound, which is found before anything is made."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import save_file

from amed.settings import StudentSettings
from commands.app import COMMANDS
from denoisers.families.edm import make_network
from denoisers.noise_schedules import DiscreteVP
from denoisers.recognise import describe
from plan_search import objectives
from plan_search.objectives import Space
from restart.intervals import parse_restart_info
from runtime.bounds import MOST_SEED
from runtime.errors import UserError
from runtime.lists import parse_whole_numbers
from samplers.build import build
from samplers.options import SamplerOptions
from solvers.grids import MOST_NODES, SCHEDULES, Grid, get_grid
from tests.sampler_models import make_card
from tests.test_convert_bombs import peak


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for key, inner in command.commands.items():
            yield from commands(inner, f"{name} {key}")


def whole_numbers() -> list[tuple[str, click.Parameter, click.ParamType]]:
    """Every option of every command that is a whole number, or several."""
    found = []
    for name, entry in COMMANDS.items():
        for label, command in commands(import_module(entry.module).main, name):
            for option in command.params:
                kinds = option.type.types if isinstance(option.type, click.Tuple) else [option.type]
                found += [
                    (label, option, kind) for kind in kinds if kind.name.startswith("integer")
                ]
    return found


def test_every_whole_number_on_a_command_line_has_an_upper_bound() -> None:
    found = whole_numbers()
    assert len(found) > 60
    free = [f"{name} --{o.name}" for name, o, kind in found if getattr(kind, "max", None) is None]
    assert free == []
    for name, option, kind in found:
        values = option.default if isinstance(option.default, tuple) else (option.default,)
        for value in values:
            if isinstance(value, int):
                assert kind.min <= value <= kind.max <= MOST_SEED, (name, option.name)


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    began, before = time.process_time(), peak()
    yield
    assert time.process_time() - began < 10 and peak() - before < 300


STUDENT = {"dataset_name": "tiny", "sampler_stu": "amed", "sigma_min": 0.01, "sigma_max": 80.0}
ENDLESS = 3 * 10**8


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("changes", [{"num_steps": ENDLESS}, {"num_steps": 4, "M": ENDLESS}])
def test_a_student_with_endless_grids_is_refused(schedule: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"a grid of \d+ nodes is longer than any sampler needs"):
        settings = StudentSettings(**{**STUDENT, "schedule_type": schedule, **changes})
        settings.grid.refined(settings.M)


def test_grids_have_an_upper_bound_and_reach_it() -> None:
    assert len(Grid("logsnr", MOST_NODES, None, 0.01, 80.0).nodes()) == MOST_NODES
    with pytest.raises(ValueError, match=f"give {MOST_NODES} or fewer"):
        get_grid("polynomial", MOST_NODES + 1, 0.01, 80.0)
    with pytest.raises(ValueError, match=f"give {MOST_NODES} or fewer"):
        Grid("discrete", ENDLESS)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"0": [3, 300000000, 0.1, 1]}', "descents have more than 10000 nodes; give fewer"),
        ('{"0": [300000000, 1, 0.1, 1]}', "descents have more than 10000 nodes; give fewer"),
        ('300000000 {"0": [3, 2, 0.1, 1]}', "has 300000000 main node.s.; give at least 2, and at"),
        ("9" * 5000 + ' {"0": [3, 2, 0.1, 1]}', "main node.s.; give at least 2, and at most"),
        (json.dumps({str(i): [3, 1, 0.1, 1] for i in range(10**5)}), "100000 intervals; give 100"),
        ("{" + '"0": 1,' * 10**5 + '"0": 1}', 'has interval "0" twice; number them'),
    ],
    ids=["K", "N", "main", "digits", "intervals", "repeated"],
)
def test_endless_restarts_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_restart_info(text)


def test_a_budget_is_reached_without_trying_every_length() -> None:
    """As found one by one: the length and the two nearest budgets."""
    for name, nfe, steps in (("heun", 9998, 5000), ("euler", 9999, 10000), ("dpm3", 3000, 1001)):
        sampler = build(SamplerOptions(sampler=name, nfe=nfe), make_card())
        assert sampler.options.num_steps == steps and sampler.nfe == nfe
    with pytest.raises(UserError, match="dpm cannot use exactly 5001 NFE: give 5000 or 5002"):
        build(SamplerOptions(sampler="dpm", nfe=5001), make_card())


def test_a_search_over_too_many_plans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "MOST_PLANS", 100)
    with pytest.raises(UserError, match="more than 100 Restart plans spend exactly 20 NFE: give"):
        Space(most=3).field(20, make_card())


@pytest.mark.parametrize("text", ["5,201", "0", "9" * 5000, "5.0", "²", "-1", "1e3", ""])
def test_lists_of_whole_numbers_are_bounded(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a list of whole numbers from 1 to 200; give --n"):
        parse_whole_numbers("--nfe", text, 1, 200)
    assert parse_whole_numbers("--nfe", "200, 1", 1, 200) == [1, 200]


UNET = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
PLAIN = {"class_name": "EDMPrecond", "img_resolution": 16, "img_channels": 3}
SONG, FLAT = {**PLAIN, **UNET, "model_type": "SongUNet"}, {**PLAIN, "model_type": "MLP"}


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({**SONG, "num_blocks": 10**9}, "num_blocks is 1000000000, where networks have 1 to 100"),
        ({**SONG, "channel_mult": [1] * 900}, "where networks have 1 to 16"),
        ({**SONG, "class_name": "iDDPMPrecond", "M": 10**6}, "M is 1000000, where networks have"),
        ({**SONG, "class_name": "VPPrecond", "M": float("nan")}, "M is nan, where"),
        ({**FLAT, "layers": 10**9}, "layers is 1000000000, where networks"),
        ({**SONG, "model_channels": 10**5}, r"would have \d+ weights, more than the file can hold"),
        ({**FLAT, "img_resolution": 5000}, "weights, more than the file can hold"),
        ({**SONG, "model_channels": 10**10}, "make no network"),
        (
            {**SONG, "img_resolution": 10**6},
            "img_resolution is 1000000, where networks have 1 to 81",
        ),
        ({**SONG, "img_resolution": 0}, "img_resolution is 0, where"),
    ],
)
def test_a_network_larger_than_its_file_is_refused(
    config: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(500)}, path, {"config": json.dumps(config)})
    with pytest.raises(UserError, match=sentence):
        describe("mine", path)


def test_a_network_of_its_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(50_000)}, path)
    assert make_network(SONG, None, path).img_resolution == 16


def test_a_process_of_endless_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="a process of 1000000000 steps is none: give 2 to 10000"):
        DiscreteVP.from_betas(1e-4, 0.02, 10**9)
