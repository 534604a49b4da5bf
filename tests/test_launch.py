"""launch.sh prints the right commands, and every flag in them exists."""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path

import click
import pytest

from benchmarks import kept_rows
from commands import visualize
from denoisers.cards import cards
from restart.tables import configuration
from samplers.build import build
from samplers.side_by_side import row_folder

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = "--gpus N, --model_path PATH, --try, --dry-run"
TRAINING = ["default", "full", "cifar10", "ffhq", "imagenet64", "lsun_bedroom_ldm", "ms_coco"]


def launch(
    *arguments: str, cwd: Path = ROOT, script: Path = ROOT / "launch.sh", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(*arguments: str) -> list[list[str]]:
    """What a dry run would run, without the steps that make the virtual environment."""
    done = launch(*arguments, "--dry-run")
    assert done.returncode == 0 and done.stderr == ""
    lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
    return [line for line in lines if line and not {"venv", "pip"} & set(line)]


def scripts(*arguments: str) -> Iterator[tuple[str, list[str]]]:
    """(script or module, its arguments) of every command that starts one of ours."""
    for command in commands(*arguments):
        place = [i for i, word in enumerate(command) if word.endswith(".py")]
        place += [i + 1 for i, word in enumerate(command[:-1]) if word == "-m"]
        if place and command[max(place)] != "commands.torchrun":
            yield command[max(place)], command[max(place) + 1 :]


def flags(arguments: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in arguments if word.startswith("--"))


def test_syntax() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "launch.sh"]).returncode == 0
    assert os.access(ROOT / "launch.sh", os.X_OK) and os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("recipe", [*TRAINING, "sd_restart", "toy"])
def test_every_flag_of_every_recipe_exists_and_takes_its_value(recipe: str) -> None:
    for script, arguments in scripts(recipe):
        command = importlib.import_module(script.removesuffix(".py")).main
        if isinstance(command, click.Group):
            command = command.commands[arguments[0]]
        options = {name: option for option in command.params for name in option.opts}
        for flag, value in flags(arguments).items():
            assert flag in options, f"{script} has no {flag}"
            if not isinstance(options[flag].type, click.Path):  # the files come with the model
                options[flag].type.convert(value, options[flag], click.Context(command))


PLUGIN = {
    "--sampler_stu": "ipndm",
    "--sampler_tea": "ipndm",
    "--num_steps": "4",
    "--M": "2",
    "--afs": "True",
    "--scale_dir": "0.01",
    "--scale_time": "0.2",
    "--max_order": "4",
}
AMED = {
    "--sampler_stu": "amed",
    "--sampler_tea": "heun",
    "--num_steps": "4",
    "--M": "1",
    "--afs": "True",
    "--scale_dir": "0.01",
    "--scale_time": "0",
    "--schedule_type": "time_uniform",
    "--schedule_rho": "1",
}
PIXELS = {**PLUGIN, "--schedule_type": "polynomial", "--schedule_rho": "7"}
LENGTH = {"--batch": "128", "--total_kimg": "10"}


@pytest.mark.parametrize("dataset", ["cifar10", "ffhq", "imagenet64"])
def test_published_settings_of_pixel_models(dataset: str) -> None:
    ran = list(scripts(dataset))
    trained = [flags(arguments) for script, arguments in ran if script == "train.py"]
    for expected, found in zip([AMED, PIXELS], trained, strict=True):
        resolved = {"--dataset_name": dataset, "--resume": "auto", **LENGTH, **expected}
        assert found == resolved
    student = ["sample.py", "fid.py"]
    order = ["train.py", "fid.py", *student, "train.py", *student]  # a missing model fails first
    assert [script for script, _ in ran] == order
    for script, arguments in ran[2:]:
        if script == "sample.py":
            assert flags(arguments)["--seeds"] == "0-49999"
        if script == "fid.py":
            assert arguments[0] == "calc" and flags(arguments)["--detector"] == "inception"


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (
            "lsun_bedroom_ldm",
            {**PLUGIN, "--schedule_type": "discrete", "--guidance_type": "uncond"},
        ),
        (
            "ms_coco",  # published as 00027-ms_coco-6-20-dpmpp-dpmpp-2-discrete
            {
                "--sampler_stu": "dpmpp",
                "--sampler_tea": "dpmpp",
                "--num_steps": "6",
                "--M": "2",
                "--afs": "False",
                "--scale_dir": "0.01",
                "--scale_time": "0",
                "--schedule_type": "discrete",
                "--max_order": "2",
                "--predict_x0": "True",
                "--lower_order_final": "True",
                "--guidance_type": "cfg",
                "--guidance_rate": "7.5",
            },
        ),
    ],
)
def test_published_settings_of_latent_models(dataset: str, expected: dict[str, str]) -> None:
    (_, arguments), (sampled, _), (last, made), *scored = scripts(dataset)
    assert expected.items() <= flags(arguments).items() and sampled == "sample.py"
    assert (last, made[0], flags(made)["--detector"]) == ("fid.py", "ref", "inception")
    assert [script for script, _ in scored] == ["clip_score.py"] * (dataset == "ms_coco")
    assert all(flags(a)["--images"] == flags(made)["--data"] for _, a in scored)


@pytest.mark.parametrize("recipe", TRAINING[2:])
def test_a_try_is_short_and_takes_own_weights(recipe: str) -> None:
    for script, arguments in scripts(recipe, "--try", "--model_path=/my models/own.pkl"):
        given = flags(arguments)
        assert given.get("--total_kimg", "0.008") == "0.008"
        assert given.get("--seeds", "0-7") == "0-7"
        assert given.get("--model_path") == (None if script == "fid.py" else "/my models/own.pkl")


#: AMED's students of each main job: solver and teacher.
STUDENTS = {
    "default": [("amed", "heun"), ("ipndm", "restart")],
    "full": [("amed", "heun"), ("amed", "restart"), ("ipndm", "heun"), ("ipndm", "restart")]
    + [("ipndm", "ipndm")],
}


@pytest.mark.parametrize(
    ("recipe", "grids"),
    [
        ("default", [("4", "True")]),
        ("full", [(n, afs) for n in "3456" for afs in ("True", "False")]),
    ],
)
def test_main_job_trains_and_compares(recipe: str, grids: list[tuple[str, str]]) -> None:
    *trained, (compared, arguments), (judged, exactly) = scripts(recipe)
    every = [flags(a) for _, a in trained]
    tables = [k for k in every if k["--sampler_stu"] == "ns"]
    budgets = [str(2 * int(n) - 2 - (afs == "True")) for n, afs in grids]
    assert [k["--nfe"] for k in tables] == budgets
    kinds = [k for k in every if k not in tables]
    assert {
        ((k["--num_steps"], k["--afs"]), k["--sampler_stu"], k["--sampler_tea"]) for k in kinds
    } == {(grid, student, teacher) for grid in grids for student, teacher in STUDENTS[recipe]}
    # Heun's trajectories are those of the table; the teachers of `full` walk along, as published
    kept = {"256"} if recipe == "default" else {None}
    assert {k.get("--trajectories") for k in kinds} == kept
    assert {k["--dataset_name"] for k in every} == {"cifar10-small"}
    assert (compared, judged) == ("compare.py", "solver_error.py")
    given, same = flags(arguments), {"--predictors", "--budgets", "--dtype", "--outdir"}
    if recipe == "default":
        assert {k["--trajectories"] for k in tables} == kept and every[0] in tables
        kept_with = {"--detector": kept_rows.DETECTORS.detector, "--select": kept_rows.SELECT}
        assert {**kept_with, "--dtype": "float32", "--num_images": "1500"}.items() <= given.items()
    assert {given[name] == flags(exactly)[name] for name in same} == {True}
    assert given["--predictors"].split(",") == ["exps/<run>"] * len(trained)
    assert given["--budgets"].split(",") == budgets


@pytest.mark.parametrize(("tries", "nfe", "number"), [([], 132, 5000), (["--try"], 12, 2)])
def test_the_guidance_sweep_spends_one_budget_on_every_row(
    tries: list[str], nfe: int, number: int
) -> None:
    commands = scripts("sd_restart", *tries, "--model_path=/my sd")
    (tool, drawn), (script, arguments), *scored = commands
    assert (tool, drawn[-1]) == ("tools.draw_prompts", f"--number={number}")
    given = flags(arguments)
    assert script == "visualize.py" and given["--model_path"] == "/my sd"
    assert given["--prompt_path"] == drawn[1] and given["--seeds"] == f"0-{number - 1}"
    rows = [visualize.read_row(w[6:], None) for w in arguments if w.startswith("--row=")]
    samplers = [build(row.sampler, cards()["ms_coco"]) for row in rows]
    made = [s.describe() for s in samplers]
    assert {(s.nfe, s.cost) for s in samplers} == {(nfe, 2)}
    assert {d["schedule_type"] for d in made} == {"discrete"}
    assert [row.title for row in rows] == [
        f"{name} w={rate:g}"
        for rate in (2, 3, 5, 8)
        for name in ("DDIM", "DDPM", "Heun", "Restart")
    ]
    for row, sampler in zip(rows, samplers, strict=True):
        assert f"w={sampler.guidance_rate:g}" in row.title
    folders = {str(row_folder(Path(given["--outdir"]), row.title)) for row in rows}
    assert {flags(a)["--images"] for _, a in scored} == (set() if tries else folders)
    assert {d["main_solver"] for d in made[3::4]} == {"euler"}
    if not tries:
        for rate, restart in zip((3, 5, 8), made[7::4], strict=True):
            known = configuration(f"ms_coco-w{rate}-66")
            assert restart["num_steps"] == known.n_main
            assert restart["restart_info"] == {"0": [*astuple(known.intervals[0])]}


def test_no_recipe_is_the_default_one() -> None:
    assert commands() == commands("default")


def test_small_recipes_use_every_core_of_a_machine_without_gpus(tmp_path: Path) -> None:
    def first(**environment: str) -> str:
        done = launch("--dry-run", **environment)
        return next(line for line in done.stdout.splitlines() if " train.py " in line)

    cores = f"echo {3 if os.cpu_count() != 3 else 2}"
    (tmp_path / "getconf").write_text(f"#!/bin/sh\n{cores}\n")
    (tmp_path / "getconf").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert f"--nproc_per_node={cores.split()[1]} train.py" in first(PATH=path)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "nproc" not in first(PATH=path)


def test_tests_are_lint_format_types_and_pytest() -> None:
    found = [" ".join(command[1:]) for command in commands("test")]
    assert found[:3] == ["-m ruff check .", "-m ruff format --check .", "-m mypy"]
    assert found[3].startswith("-m pytest -q -n ")


@pytest.mark.parametrize("option", [["--gpus", "3"], ["--gpus=3"]])
def test_several_gpus_go_through_torchrun(option: list[str]) -> None:
    single, several = commands("cifar10"), commands("cifar10", *option)
    runner = ["-m", "commands.torchrun", "--nproc_per_node=3"]
    for one, many in zip(single, several, strict=True):
        assert many == (one if "-c" in one else [one[0], *runner, *one[1:]])
    assert commands("cifar10", "--gpus=1") == single


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["cifar"],
            "unknown recipe 'cifar': choose one of default full cifar10 ffhq imagenet64 "
            "lsun_bedroom_ldm ms_coco sd_restart toy test help",
        ),
        (["--gpu=2"], f"unknown option '--gpu=2': there are {OPTIONS}"),
        (
            ["full", "--try"],
            "'full' takes no --try or --model_path: they belong to published recipes",
        ),
        (["--gpus", "two"], "--gpus 'two' is no number of processes: give 1 or more"),
        (["--gpus=0"], "--gpus '0' is no number of processes: give 1 or more"),
        (["--gpus"], "--gpus 'none' is no number of processes: give 1 or more"),
        (["test", "full"], "one recipe at a time, but there are 'test' and 'full'"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments: list[str], message: str) -> None:
    done = launch(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_help_lists_every_recipe() -> None:
    done = launch("help")
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert done.returncode == 0
    assert set(listed) >= {*TRAINING, "sd_restart", "toy", "test", "help", "--gpus"}
    assert launch("--help").stdout == done.stdout


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A checkout with a pretended Python that notes what it is asked to do."""
    house = tmp_path / "a checkout"
    house.mkdir()
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, house)
    python = tmp_path / "python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return house


PYTHON = """#!/usr/bin/env bash
case "$(echo "$*" | sed 's/^-m commands.torchrun --nproc_per_node=[0-9]* //')" in
    -V) echo "Python 3.9.6" ;;
    "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    -c*version_info*) exit "${OLD:-0}" ;;
    *pip*) echo "installs ${!#}" >> said ;;
    train.py*) [ -z "${HANG:-}" ] || { touch hangs; exec sleep 60; }
        echo "tick 1"; [[ "$*" = *"$BROKEN"* ]] && echo "error: no" >&2 && exit 1
        echo trained >> trained; echo "exps/$(grep -c . trained)" ;;
    compare.py*) echo "$@" >> said ;;
esac
"""


def test_dry_run_touches_nothing_from_any_folder(elsewhere: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(elsewhere))
    done = launch("--dry-run", cwd=tmp_path, script=elsewhere / "launch.sh")
    assert done.returncode == 0 and sorted(os.listdir(elsewhere)) == before
    assert done.stdout.splitlines()[:2] == [
        "python3 -m venv --clear .venv",
        ".venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e .",
    ]


def test_setup_installs_once_and_folders_reach_the_comparison(
    elsewhere: Path, tmp_path: Path
) -> None:
    python = str(tmp_path / "python3")
    said = elsewhere / "said"
    for installs in (["installs ."], []):
        done = launch(cwd=tmp_path, script=elsewhere / "launch.sh", PYTHON=python, BROKEN="nothing")
        assert done.returncode == 0, done.stderr
        *installed, compared = said.read_text().splitlines()
        assert installed == installs
        assert " --predictors=exps/1,exps/2,exps/3 " in compared
        assert "tick 1" in done.stderr
        said.unlink()
        (elsewhere / "trained").unlink()
    (elsewhere / "constraints.txt").write_text("")
    launch(cwd=tmp_path, script=elsewhere / "launch.sh", PYTHON=python, BROKEN="nothing")
    assert said.read_text().startswith("installs .\n")


def test_a_failed_training_ends_the_recipe(elsewhere: Path, tmp_path: Path) -> None:
    python = str(tmp_path / "python3")
    done = launch(script=elsewhere / "launch.sh", PYTHON=python, BROKEN="tea=restart")
    assert done.returncode == 1 and "\nerror: no\n" in done.stderr
    assert "compare.py" not in done.stderr


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_running_ends_with_the_script(
    signum: int, code: int, elsewhere: Path, tmp_path: Path
) -> None:
    script = subprocess.Popen(
        ["bash", elsewhere / "launch.sh"], stderr=subprocess.PIPE,
        env={**os.environ, "PYTHON": str(tmp_path / "python3"), "HANG": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # as in a terminal
    )  # fmt: skip
    while not (elsewhere / "hangs").exists():
        time.sleep(0.01)
        assert script.poll() is None
    script.send_signal(signum)
    _, said = script.communicate(timeout=20)  # until nothing holds the other end any more
    assert script.returncode == code and b" train.py " in said.splitlines()[-1]


def test_an_old_python_is_named(elsewhere: Path, tmp_path: Path) -> None:
    python = str(tmp_path / "python3")
    done = launch(script=elsewhere / "launch.sh", PYTHON=python, OLD="1")
    assert (done.returncode, done.stderr) == (
        1,
        f"error: {python} is Python 3.9.6, but 3.10 or newer is needed: set PYTHON to its path\n",
    )
    done = launch(script=elsewhere / "launch.sh", PYTHON="python3.0")
    assert (done.returncode, done.stderr) == (
        1,
        "error: python3.0 was not found: install Python 3.10 or newer, or set PYTHON to its path\n",
    )
    assert not (elsewhere / ".venv").exists()
