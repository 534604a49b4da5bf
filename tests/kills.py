"""Runs that are killed at random moments and continued: ``python -m tests.kills --count 100``.

Every command runs once undisturbed, and then in new folders, where SIGKILL ends it at a random
moment, twice in every other trial, before it may finish.  The results have to be those of the
undisturbed run, and nothing temporary may be left beside them.
"""

from __future__ import annotations

import functools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import load_file

import amed.options
from commands import compare, fid, sample, train
from runtime import cli
from tests.denoiser_problems import SONG, write_zip
from tests.processes import finish, run_command, start
from tests.tiny_model import TinySource
from tools import converged, train_denoiser, trajectories

#: What differs from run to run: when, where and how fast; and the hash of a file that says so.
VOLATILE = {
    "created", "seconds", "images_per_second", "outdir", "result_path", "dest", "cache_dir",
    "data", "valid", "config", "path", "sha256",
}  # fmt: skip
SHORT = "--seeds=0-23 --batch=4 --device=cpu"
COMMANDS: dict[str, tuple[click.Command, str]] = {
    "train": (
        train.main,
        "--dataset_name=tiny --sampler_stu=ipndm --M=2 --batch=4 --total_kimg=0.064 --tick=0.008 "
        "--device=cpu --resume=auto --outdir={}/exps",
    ),
    "sample": (sample.main, f"--sampler=euler --nfe=3 {SHORT} --outdir={{}}/images"),
    "fid": (
        fid.main,
        f"gen --sampler=euler --nfe=3 {SHORT} --json={{}}/fid.json --dest={{}}/fid.npz "
        "--cache_dir={}/cache",
    ),
    "compare": (
        compare.main,
        "--budgets=2 --solvers=euler,ipndm --select=none --ceilings=False --num=8 --blocks=2 "
        "--batch=4 --device=cpu --outdir={}/compare --cache_dir={}/cache",
    ),
    "converged": (converged.main, f"--tol=0.01 {SHORT} --outdir={{}}/ode --cache_dir={{}}/cache"),
    "train_denoiser": (
        train_denoiser.main,
        "--data={}/train.zip --valid={}/train.zip --config={}/song.json --outdir={}/denoiser "
        "--kimg=0.096 --batch=8 --tick=16 --lr=0.01 --workers=0 --device=cpu",
    ),
    "trajectories": (
        trajectories.main,
        "--number=192 --num_steps=3 --batch=16 --device=cpu --cache_dir={}/cache",
    ),
}


def begin(name: str, folder: Path) -> Any:
    """The command in a process of its own."""
    command, flags = COMMANDS[name]
    folder.mkdir(exist_ok=True)
    if name == "train_denoiser" and not (folder / "song.json").exists():
        write_zip(folder / "train.zip", 20)
        (folder / "song.json").write_text(json.dumps(SONG))

    def work() -> None:
        torch.set_num_threads(1)
        if name == "train":
            amed.options.ModelSource = TinySource
        run_command(command, *flags.replace("{}", str(folder)).split())

    return start(work, folder.with_name(f"{folder.name}-log"))


def content(path: Path) -> object:
    """What a result says: pixels, tensors, rows, values; None for pictures of them and logs."""
    if path.suffix == ".safetensors":
        return {k: v.tolist() for k, v in load_file(path).items()}
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {k: arrays[k].tolist() for k in arrays.files}
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [steady(json.loads(line)) for line in lines]
    return path.read_bytes() if path.stem.isdecimal() else None


def steady(value: Any) -> Any:
    """JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in VOLATILE}
    return [steady(v) for v in value] if isinstance(value, list) else value


def results(folder: Path) -> dict[str, object]:
    """The content of every file, by its name; of TensorBoard's logs there may be several."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): content(path)
        for path in files
        if "tfevents" not in path.name
    }


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two results differ by more than the rounding of sums in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{place}/{key}")
            else:
                yield f"{place}/{key} is in one alone"
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{place}[{i}]")
    elif isinstance(one, float) and isinstance(other, float):
        if abs(one - other) > 1e-9 * max(1.0, abs(one)):
            yield f"{place}: {one!r} != {other!r}"
    elif one != other:
        yield f"{place} differs"


def trial(name: str, folder: Path, kills: int, lasts: float, draw: random.Random) -> int:
    """Kill the command up to ``kills`` times and let it finish; how often it was killed."""
    killed = 0
    for _ in range(kills):
        process = begin(name, folder)
        process.join(draw.uniform(0, lasts))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    done = finish(begin(name, folder), folder.with_name(f"{folder.name}-log"))
    assert done.code == 0 and "Traceback" not in done.err, done.err
    return killed


@functools.cache
def undisturbed(name: str, folder: Path) -> tuple[dict[str, object], float]:
    """The results of the command, and the seconds that it takes."""
    began = time.monotonic()
    trial(name, folder, 0, 0.0, random.Random(0))
    return results(folder), time.monotonic() - began


def check(name: str, home: Path, number: int) -> tuple[int, list[str]]:
    """Trial ``number``: how many kills there were, and what was lost or left behind."""
    whole, lasts = undisturbed(name, home / name)
    folder = home / f"{name}-{number}"
    kills = 1 + number % 2
    try:
        killed = trial(name, folder, kills, lasts, random.Random(number))
    except AssertionError as error:  # it did not go on
        return kills, [str(error).strip()]
    found = results(folder)
    shutil.rmtree(folder)
    litter = [f"{file} is litter" for file in found if file.endswith((".tmp", ".lock"))]
    return killed, [*litter, *differences(whole, found)]


@click.command()
@click.option("--count", type=click.IntRange(1), default=100, help="kills")
@click.option("--only", type=click.Choice(list(COMMANDS)), help="this command alone")
def main(count: int, only: str | None) -> None:
    """Kill runs, continue them, and compare the results; exits with 1 if any differ."""
    report: Callable[[str], None] = functools.partial(print, flush=True)
    kills, broken, number = dict.fromkeys([only] if only else COMMANDS, 0), 0, 0
    with tempfile.TemporaryDirectory() as home:
        while sum(kills.values()) < count:
            name = list(kills)[number % len(kills)]
            killed, wrong = check(name, Path(home), number)
            kills[name] += killed
            broken += bool(wrong)
            number += 1
            if wrong:
                report(f"{name}, trial {number}: {'; '.join(wrong[:5])}")
    report(f"{sum(kills.values())} kills ({kills}) in {number} trials, {broken} with a difference")
    sys.exit(bool(broken))


if __name__ == "__main__":
    cli.run(main)
