"""Training runs through the command line, on a model in closed form."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import amed.job
import amed.options
import amed.trainer
from amed.batches import Data, TaughtBatches
from amed.experiments import load_predictor
from amed.job import prepare
from amed.options import TrainOptions
from amed.settings import StudentSettings
from amed.trainer import Loop
from commands import train
from denoisers.conditions import Conditions
from denoisers.registry import ModelSource
from runtime import cli
from runtime.dist import World
from runtime.log import read_json_lines
from runtime.noise import SeedNoise
from runtime.outputs import LOCK
from runtime.record import RunRecord
from teachers.build import build_teacher
from tests.locks import held
from tests.tiny_model import TinySource, tiny_model

CPU = torch.device("cpu")
#: Five updates, a report after each.
SHORT = (
    *("--num_steps=3", "--batch=4", "--total_kimg=0.02", "--tick=0", "--dtype=float64"),
    *("--scale_dir=0.01", "--scale_time=0.2", "--afs=True", "--device=cpu"),
)
RESTART = ("--sampler_tea=restart", '--restart_info={"0": [3, 2, 0.06, 4]}')


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def folder(self) -> Path:
        return Path(self.out.splitlines()[-1])


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., Result]:
    """``command("--seed=1", ...)`` runs train.py in this process; its outdir is tmp_path/exps."""
    monkeypatch.setattr(amed.options, "ModelSource", TinySource)

    def run(*arguments: str, dataset: str = "tiny") -> Result:
        fixed = (f"--dataset_name={dataset}", f"--outdir={tmp_path / 'exps'}")
        monkeypatch.setattr("sys.argv", ["train.py", *fixed, *SHORT, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(train.main)
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "predictor.safetensors")


def rows(folder: Path) -> list[dict[str, Any]]:
    return read_json_lines(folder / "stats.jsonl")


def assert_bit_equal(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    assert rows(one) == rows(other)
    states = [torch.load(f / "training-state.pt", weights_only=True) for f in (one, other)]
    assert states[0]["done"] == states[1]["done"]
    for mine, theirs in zip(
        states[0]["optimizer"]["state"].values(),
        states[1]["optimizer"]["state"].values(),
        strict=True,
    ):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def shifted(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_a_run_leaves_a_record_a_predictor_and_its_figures(command, tmp_path):
    done = command(*RESTART, "--desc=mine", "--snap=2")
    assert done.code == 0
    folder = done.folder
    assert folder.name == "00001-tiny-3-3-amed-restart-1-polynomial-afs-mine"
    assert [row["step"] for row in rows(folder)] == [4, 8, 12, 16, 20]
    kept = sorted(path.name for path in (folder / "snapshots").iterdir())
    assert kept == ["predictor-00000008.safetensors", "predictor-00000016.safetensors"]
    found = {p.name for p in folder.iterdir() if not p.name.startswith("events")}
    assert found == {
        "run.json",
        "predictor.safetensors",
        "stats.jsonl",
        "log.txt",
        "training-state.pt",
        "snapshots",
    }
    record = RunRecord.read(folder / "run.json")
    assert record.command == "train" and record.model == {"name": "tiny", "sha256": "0" * 64}
    assert record.plan["nfe"] == 3 and record.plan["parameters"] == 8971
    assert record.plan["times"] == pytest.approx([80.0, 2.515218976, 0.002])
    assert json.loads(record.options["restart_info"]) == {"0": [3, 2, 0.06, 4]}
    for row in rows(folder):
        assert row["lr"] == 0.005 and row["nonfinite"] == [0]
        assert [len(row[key]) for key in ("loss", "r", "c", "a")] == [2, 2, 2, 2]
        assert all(0 < r < 1 for r in row["r"]) and all(0.99 < c < 1.01 for c in row["c"])
        assert row["teacher/variance_t"][0] == 0 < row["teacher/variance_t"][1]
    variances = [row["teacher/variance_t"] for row in rows(folder)]
    assert len({v[1] for v in variances}) == 5  # fresh draws every tick
    assert len((folder / "log.txt").read_text().splitlines()) == 5


def test_a_predictor_is_found_by_number_folder_and_file(command, tmp_path):
    folder = command("--sampler_stu=ipndm", "--max_order=2", "--M=3").folder
    stored = weights(folder)
    for spec in ("1", str(folder), str(folder / "predictor.safetensors")):
        student = load_predictor(spec, tmp_path / "exps")
        predictor, settings, record = student.predictor, student.settings, student.record
        state = predictor.state_dict()
        assert all(torch.equal(state[k], stored[k]) for k in stored) and set(state) == set(stored)
        assert state["fc_r.weight"].dtype == torch.float64  # nothing lost of a float64 run
        assert not any(p.requires_grad for p in predictor.parameters())
        assert record == RunRecord.read(folder / "run.json")
        assert (settings.sampler_stu, settings.M, settings.num_steps) == ("ipndm", 3, 3)
        assert settings.afs and settings.solver().max_order == 2
        assert settings.nfe() == record.plan["nfe"] == 3


def test_metrics_are_means_over_the_tick(command):
    every, once = (rows(command(f"--tick={tick}").folder) for tick in (0, 1))
    assert [row["step"] for row in once] == [20]
    for key in ("loss", "r", "c", "a"):
        means = torch.tensor([row[key] for row in every], dtype=torch.float64).mean(0)
        assert once[0][key] == pytest.approx(means.tolist(), rel=1e-12)


def test_a_portion_size_changes_nothing(command):
    whole, portions = command().folder, command("--batch-gpu=3").folder
    assert shifted(whole, portions) < 1e-12
    for a, b in zip(rows(whole), rows(portions), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-10)


def test_seeds_and_classes_matter(command):
    folder = command().folder
    assert shifted(folder, command("--seed=1").folder) > 1e-3
    assert_bit_equal(folder, command().folder)
    conditional = command(dataset="tiny-classes").folder
    assert shifted(folder, conditional) > 1e-4
    assert shifted(conditional, command("--batch-gpu=1", dataset="tiny-classes").folder) < 1e-12


def test_a_sample_is_known_by_its_number_alone():
    bound: list[list[int]] = []
    model = tiny_model("tiny-classes")

    def bind(noise, stream):
        bound.append(noise.integers((*stream, "class"), 3).tolist())
        return Conditions().bind(model, noise, CPU, stream)

    data = Data(bind, model.card, 5, torch.float64, CPU)
    drawn = data.draw([7, 3, 11])
    x = drawn.start(80.0)
    for i, number in enumerate([7, 3, 11]):
        own = data.draw([number])
        assert torch.equal(own.start(80.0)[0], x[i]) and bound[-1] == [bound[0][i]]
        assert torch.equal(own.normal(("restart", 0, 1))[0], drawn.normal(("restart", 0, 1))[i])
    assert len({label for labels in bound for label in labels}) > 1
    assert not torch.equal(data.draw([7], "variance").start(80.0)[0], x[0])
    other = Data(bind, model.card, 6, torch.float64, CPU)
    assert not torch.equal(other.draw([7]).start(80.0)[0], x[0])
    sampled = SeedNoise([7]).normal("latent", model.card.shape, torch.float64)
    assert not torch.equal(80 * sampled[0], x[0])  # never a latent that a sampler starts from
    assert float(x.std()) == pytest.approx(80, rel=0.2)


@pytest.mark.parametrize("size", [1, 3])
def test_every_trajectory_is_drawn_once(monkeypatch, size):
    """Over updates, ranks and portions: 0, 1, 2, ..."""
    drawn: list[int] = []
    model = tiny_model("tiny")
    data = Data(lambda noise, stream: model.bind(), model.card, 0, torch.float64, CPU)
    real = Data.draw

    def noted(numbers):
        drawn.extend(numbers)
        return numbers

    monkeypatch.setattr(Data, "draw", lambda self, n: real(self, noted(n)))
    student = StudentSettings("tiny", "amed", 3, 0.002, 80.0)
    batches = TaughtBatches(data, build_teacher("heun", *student.grid.refined(student.M)))
    loop = Loop(total=18, batch=5, micro=2, tick=100, snap=0, lr=1e-3)
    assert loop.iterations == 4  # rounded up
    for it in range(loop.iterations):
        for rank in range(size):
            amed.trainer._micros(batches, loop, World(rank, size, CPU), it)
        assert sorted(drawn) == list(range(5 * (it + 1)))


# Interrupted runs


class Killed(BaseException):
    """Ends the run at once, as a kill would."""


@pytest.mark.parametrize(
    ("place", "after", "teacher"),
    [("train_batch", 1, ()), ("_save", 1, ())]
    + [
        (place, n, RESTART) for place, last in (("train_batch", 3), ("_save", 2)) for n in (0, last)
    ],
)
def test_a_killed_run_resumes_bit_equal(command, monkeypatch, tmp_path, teacher, place, after):
    """Killed between two saved states, and between a row of metrics and its state."""
    whole = command(*teacher, "--tick=0.008", f"--outdir={tmp_path / 'whole'}").folder
    arguments = (*teacher, "--tick=0.008", "--resume=auto")
    real, calls = getattr(amed.trainer, place), []

    def stop(*args: Any, **kw: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise Killed
        return real(*args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(amed.trainer, place, stop)
        with pytest.raises(Killed):
            command(*arguments)
    done = command(*arguments)
    assert done.code == 0 and "already trained" not in done.err
    assert list((tmp_path / "exps").iterdir()) == [done.folder]
    assert_bit_equal(done.folder, whole)


def test_resume_auto_leaves_a_finished_run_alone(command):
    folder = command().folder
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = command("--resume=auto")
    assert again.code == 0 and again.folder == folder
    assert f"already trained: {folder}" in again.err
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_a_finished_run_can_be_made_longer(command, tmp_path):
    """Bit-equal to one that was as long from the start; a shorter one is refused."""
    short, long = ("--tick=0.008", "--total_kimg=0.016"), ("--tick=0.008", "--total_kimg=0.032")
    whole = command(*long, f"--outdir={tmp_path / 'whole'}").folder
    folder = command(*short).folder
    again = command(*long, "--resume=1")
    assert again.code == 0 and again.folder == folder and "already trained" not in again.err
    assert_bit_equal(folder, whole)
    assert RunRecord.read(folder / "run.json").options["total_kimg"] == 0.032
    refused = command(*short, "--resume=1")
    assert refused.code == 1 and "options.total_kimg: 0.032 != 0.016" in refused.err


def test_resume_auto_starts_anew_where_options_differ(command):
    first = command().folder
    assert command("--resume=auto", "--lr=0.001").folder != first
    assert command("--resume=auto", "--batch-gpu=2").folder == first  # which changes no result


def test_resume_refuses_other_options_and_names_them(command, tmp_path):
    folder = command().folder
    before = weights(folder)
    refused = command("--resume=1", "--lr=0.001", "--seed=3")
    assert refused.code == 1
    assert f"{folder} was started with other options" in refused.err
    assert "options.lr: 0.005 != 0.001; options.seed: 0 != 3" in refused.err
    assert len(list((tmp_path / "exps").iterdir())) == 1
    after = weights(folder)
    assert all(torch.equal(before[k], after[k]) for k in before)
    by_path = command(f"--resume={folder}")
    assert by_path.code == 0 and by_path.folder == folder


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 torn"])
def test_a_damaged_state_is_one_sentence(command, content):
    folder = command().folder
    (folder / "training-state.pt").write_bytes(content)
    refused = command("--resume=auto")
    assert refused.code == 1 and refused.out == ""
    assert refused.err.startswith(f"error: {folder / 'training-state.pt'} cannot be read")
    assert refused.err.endswith("; delete it to start that run from the beginning\n")
    assert refused.err.count("\n") == 1


def test_restart_intervals_are_recorded_however_they_were_given(command, tmp_path):
    file = tmp_path / "intervals.txt"
    file.write_text('{"3": [3, 2, 0.06, 4.0]}\n')
    first = command(*RESTART).folder
    same = command("--sampler_tea=restart", f"--restart_info={file}", "--resume=auto")
    assert same.folder == first and "already trained" in same.err


def test_a_note_if_a_restart_teacher_equals_a_heun_teacher(command):
    flow = command("--sampler_tea=restart")  # the default interval ends far below 2.515
    assert flow.code == 0 and flow.err.startswith("note: ")
    assert "t_max above 2.52" in flow.err
    assert shifted(flow.folder, command().folder) == 0.0
    assert "note:" not in command(*RESTART).err
    dry = command("--sampler_tea=restart", "--dry-run")
    assert dry.err.splitlines()[0] == flow.err.splitlines()[0] and RunRecord.from_json(dry.out)
    trajectory = command("--sampler_tea=restart", "--restart_target=trajectory")
    assert "note:" not in trajectory.err
    assert shifted(flow.folder, trajectory.folder) > 1e-6


def test_a_run_is_continued_by_one_process_at_a_time(command, tmp_path):
    folder = command().folder
    for resume in ("--resume=auto", "--resume=1"):
        with held(folder / LOCK, tmp_path):
            refused = command(resume)
        assert refused.code == 1 and f"error: {folder} is in use by another run" in refused.err
    assert command("--resume=auto").folder == folder


def test_an_unwritable_parent_is_found_out_first(command, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(TinySource, "load", lambda *_: pytest.fail("loaded"))
    refused = command(f"--outdir={tmp_path / 'file' / 'exps'}")
    assert refused.code == 1 and f"{tmp_path / 'file'}: Not a directory" in refused.err


def test_a_run_that_diverges_at_once_saves_nothing(command, monkeypatch, tmp_path):
    real = amed.job._loop
    monkeypatch.setattr(amed.job, "_loop", lambda *a: dataclasses.replace(real(*a), lr=1e300))
    done = command()
    assert done.code == 1 and done.out == ""
    assert "error: the training diverged: its loss is not finite after 4 traj" in done.err
    (folder,) = (tmp_path / "exps").iterdir()
    assert not list(folder.glob("predictor*")) and not list(folder.glob("*state*"))
    assert rows(folder) == []


@pytest.mark.parametrize("what", ["loss", "predictor", "preview"])
def test_a_run_that_diverges_keeps_its_last_good_state(command, monkeypatch, tmp_path, what):
    whole = command(f"--outdir={tmp_path / 'whole'}").folder
    real, calls = amed.trainer.train_batch, []

    def diverge(predictor: Any, *args: Any) -> Any:
        calls.append(1)
        results = real(predictor, *args)
        if len(calls) == 4 and what == "loss":
            return [results[0]._replace(loss=float("nan")), *results[1:]]
        if len(calls) == 4:
            bad = math.inf if what == "predictor" else 1e300
            for parameter in predictor.parameters():
                parameter.data.normal_().mul_(bad)  # 1e300: sums of both signs overflow to NaN
        return results

    with monkeypatch.context() as patch:
        patch.setattr(amed.trainer, "train_batch", diverge)
        done = command()
    assert done.code == 1
    (folder,) = (tmp_path / "exps").iterdir()
    assert f"its {what} is not finite after 16 trajectories; give a smaller --lr" in done.err
    assert [row["step"] for row in rows(folder)] == [4, 8, 12]
    assert torch.load(folder / "training-state.pt", weights_only=True)["done"] == 3
    assert_bit_equal(command("--resume=auto").folder, whole)  # once the cause is gone


# Dry run and refusals


def test_a_dry_run_prints_the_record_and_touches_nothing(command, tmp_path):
    done = command("--dry-run", "--resume=auto")
    assert done.code == 0 and list(tmp_path.iterdir()) == []
    record = RunRecord.from_json(done.out)
    assert record.plan["nfe"] == 3 and record.plan["teacher_nfe"] == 8
    assert record.options["schedule_rho"] == 7.0 and record.options["lr"] == 0.005
    real = RunRecord.read(command().folder / "run.json")
    assert real.differences(record) == []


def test_more_processes_than_trajectories_are_refused():
    options = TrainOptions(ModelSource("cifar10-small"), batch=3)
    with pytest.raises(ValueError, match="--batch=3 .*--batch 4 or more"):
        prepare(options).run(World(0, 4, CPU))
