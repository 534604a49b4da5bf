"""train.py: killed runs, two processes, invalid options; and run folders."""

from __future__ import annotations

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch

import amed.experiments
import amed.options
from amed.experiments import create_run, list_runs, load_predictor, save_predictor
from amed.options import TrainOptions
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from commands import train
from denoisers.cards import cards
from ns.options import NsOptions
from runtime import cli
from runtime.log import read_json_lines
from runtime.options import flat_options, parse_options
from runtime.record import RunRecord
from runtime.typed import SCHEMA
from tests.processes import finish, run_command, start, together, torchrun
from tests.scripts import Done
from tests.tiny_model import TinySource

ROOT = Path(__file__).resolve().parent.parent


def tiny(*arguments: object) -> None:
    """train.py on a model in closed form."""
    amed.options.ModelSource = TinySource
    run_command(train.main, *arguments, "--device=cpu")


def trained(done: Done) -> Path:
    """The folder that a run printed last."""
    assert done.code == 0, done.err
    return Path(done.out.splitlines()[-1])


def same_to(folder: Path, other: Path, tol: float) -> None:
    """Predictors and metrics agree to ``tol``, relative; 0 means bit-equal."""
    one, two = (safetensors.torch.load_file(f / "predictor.safetensors") for f in (folder, other))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tol, atol=tol)
    rows = [read_json_lines(f / "stats.jsonl") for f in (folder, other)]
    assert len(rows[0]) == len(rows[1]) > 0
    for a, b in zip(*rows, strict=True):
        assert set(a) == set(b)
        for key in a:
            assert a[key] == (pytest.approx(b[key], rel=tol, abs=tol) if tol else b[key]), key


# Killed, and on two processes


def test_a_killed_process_resumes_bit_equal(tmp_path):
    arguments = (
        *("--dataset_name=tiny", "--sampler_stu=ipndm", "--M=2"),
        *("--batch=4", "--total_kimg=0.048", "--tick=0.008"),
    )

    def begin(name: str, *more: str) -> BaseProcess:
        flags = (*arguments, f"--outdir={tmp_path / name}", *more)
        return start(lambda: tiny(*flags), tmp_path / f"log-{name}")

    victim = begin("killed")
    stats = tmp_path / "killed" / "00001-tiny-4-6-ipndm-heun-2-polynomial" / "stats.jsonl"
    while victim.is_alive() and not (stats.exists() and stats.read_text().count("\n") >= 3):
        time.sleep(0.005)
    victim.kill()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    done = torch.load(stats.parent / "training-state.pt", weights_only=True)["done"]
    assert 0 < done < 12
    resumed = trained(finish(begin("killed", "--resume=auto"), tmp_path / "log-killed"))
    assert resumed == stats.parent
    same_to(resumed, trained(finish(begin("whole"), tmp_path / "log-whole")), 0.0)
    assert [row["step"] for row in read_json_lines(stats)] == list(range(8, 49, 8))


def test_two_processes_train_what_one_trains(tmp_path):
    """Uneven shares, uneven portions, classes and a stochastic teacher, in float64."""
    arguments = (
        *("--dataset_name=tiny-classes", "--sampler_stu=ipndm", "--batch=5", "--total_kimg=0.03"),
        *("--tick=0.01", "--dtype=float64", "--afs=True", "--scale_dir=0.05", "--scale_time=0.2"),
        *("--sampler_tea=restart", '--restart_info={"0": [3, 1, 0.06, 2]}'),
    )
    (one,) = together(lambda: tiny(*arguments, f"--outdir={tmp_path / 'one'}"), tmp_path, size=1)
    flags = (*arguments, f"--outdir={tmp_path / 'two'}", "--batch-gpu=2")
    two, other = together(lambda: tiny(*flags), tmp_path)
    same_to(trained(two), trained(one), 1e-9)
    assert other.code == 0 and other.out == "" and len(list((tmp_path / "two").iterdir())) == 1


def test_torchrun_runs_the_script(tmp_path):
    """And what all processes find wrong is one sentence."""
    done = torchrun("train.py", "--dataset_name=cifar10-small", "--M=0", f"--outdir={tmp_path}")
    assert done.code == 1 and done.err.startswith("error: M = 0 "), done.err
    assert done.err.count("\n") == 1 and not any(tmp_path.iterdir())


def test_two_processes_train_the_bundled_model(tmp_path, script):
    arguments = (
        *("--dataset_name=cifar10-small", "--num_steps=2", "--batch=2"),
        *("--total_kimg=0.002", "--dtype=float64", "--scale_dir=0.01", "--device=cpu"),
    )
    one = trained(script(train.main, *arguments, f"--outdir={tmp_path / 'one'}"))
    both = (*arguments, f"--outdir={tmp_path / 'two'}")
    folder = trained(together(lambda: run_command(train.main, *both), tmp_path)[0])
    same_to(folder, one, 1e-9)
    assert folder.name == "00001-cifar10-small-2-2-amed-heun-1-polynomial"
    (row,) = read_json_lines(folder / "stats.jsonl")
    untrained = AMEDPredictor(0.01, seed=0).state_dict()
    learned = safetensors.torch.load_file(folder / "predictor.safetensors")
    assert row["step"] == 2 and row["nonfinite"] == [0] and min(row["loss"]) > 0
    assert (untrained["fc_r.weight"] - learned["fc_r.weight"]).abs().max() > 1e-3


# Invalid options

OUTSIDE = '--restart_info={"0": [3, 2, 0.06, 100]}'
REFUSED = [
    (["--dataset_name=cifar11"], 1, "'cifar11'"),
    (["--M=0"], 1, "M = 0 "),
    (["--desc=a/b"], 1, "--desc 'a/b' cannot name folders"),
    (["--desc=" + 300 * "x"], 1, "cannot name folders of results: give up to 100"),
    (["--schedule_type=discrete", "--schedule_rho=1"], 1, "'discrete'"),
    (["--sampler_stu=dpmpp", "--max_order=4"], 1, "max_order = 4"),
    (["--sampler_tea=dpmpp", "--max_order=4"], 1, "max_order = 4"),
    (["--sampler_stu=dpmpp", "--thresholding=True", "--predict_x0=False"], 1, "predict_x0=True"),
    (["--num_steps=2", "--afs=True"], 1, "--afs "),
    (["--guidance_type=cfg"], 1, "'cfg'"),
    (["--guidance_rate=7.5"], 1, "--guidance_rate"),
    (["--prompt_path=train.py"], 1, "leave --prompt"),
    (["--sampler_tea=restart", "--restart_info=often"], 1, "'often'"),
    (["--sampler_tea=restart", '--restart_info={"0": [3, 2, 0.06]}'], 1, "[3, 2, 0.06];"),
    (["--sampler_tea=restart", OUTSIDE], 1, "[3, 2, 0.06, 100] lies outside"),
    ([OUTSIDE], 1, "the teacher is heun"),
    (["--resume=7"], 1, "no run 7 in "),
    (["--resume=nowhere"], 1, "nowhere/run.json"),
    (["--device=abacus"], 1, "'abacus'"),
    (["--resume="], 1, "--resume is empty"),
    (["--schedule_type=logsnr", "--schedule_rho=7"], 1, "--schedule_rho 7 is not an option"),
    (["--schedule_rho=0.001"], 1, "schedule_rho = 0.001 is too small"),
    (["--max_order=3"], 1, "--max_order 3 is an option neither of"),
    (["--sampler_stu=ipndm", "--thresholding=True"], 1, "--thresholding True is an option neither"),
    (["--predict_x0=True"], 1, "--predict_x0 True is an option neither"),
    (["--sampler_tea=ipndm", "--lower_order_final=False"], 1, "--lower_order_final False is"),
    (["--S_noise=1.003"], 1, "--S_noise 1.003 was given, but the teacher is heun"),
    (["--restart_target=flow"], 1, "--restart_target flow was given, but the teacher is heun"),
    (["--restart_info="], 1, "the teacher is heun"),
    (["--sampler_tea=restart", "--restart_info="], 1, "restart_info ''"),
    (["--sampler_tea=dopri5", "--M=2"], 1, "--M 2 is not an option of the teacher dopri5"),
    (["--lr=inf"], 2, "'--lr'"),
    (["--lr=nan"], 2, "'--lr'"),
    (["--lr=1e30"], 2, "'--lr'"),
    (["--total_kimg=inf"], 2, "'--total_kimg'"),
    (["--total_kimg=nan"], 2, "'--total_kimg'"),
    (["--tick=inf"], 2, "'--tick'"),
    (["--tick=nan"], 2, "'--tick'"),
    (["--seed=99999999999999999999"], 2, "'--seed'"),
    (["--max_order=5"], 2, "'--max_order'"),
    (["--num_steps=1"], 2, "'--num_steps'"),
    (["--batch=0"], 2, "'--batch'"),
    (["--total_kimg=0"], 2, "'--total_kimg'"),
    (["--scale_dir=1"], 2, "'--scale_dir'"),
    (["--sampler_stu=heun"], 2, "'--sampler_stu'"),
    (["--sampler_tea=amed"], 2, "'--sampler_tea'"),
    (["--restart_target=states"], 2, "'--restart_target'"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED]
)
def test_invalid_options_end_in_one_sentence(
    arguments, code, message, tmp_path, monkeypatch, capsys
):
    outdir = tmp_path / "exps"
    fixed = ["train.py", "--dataset_name=cifar10-small", f"--outdir={outdir}", "--device=cpu"]
    short = ["--batch=1", "--total_kimg=0.001"]  # a short run, in case it is not refused
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [*fixed, *short, *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(train.main)
    out, err = capsys.readouterr()
    assert ended.value.code == code and out == ""
    last = err.splitlines()[-1]
    assert last.lower().startswith("error: ") and message in last, err
    assert code == 2 or len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# Folders


def test_runs_that_start_together_take_different_numbers(tmp_path):
    together, each = 8, 10
    barrier = threading.Barrier(together)

    def work(who: int) -> list[str]:
        barrier.wait()
        return [create_run(tmp_path, f"run{who}-{n}").name for n in range(each)]

    with ThreadPoolExecutor(together) as pool:
        names = [name for part in pool.map(work, range(together)) for name in part]
    numbers = sorted(int(name[:5]) for name in names)
    assert numbers == list(range(1, together * each + 1))
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_named_leaves_no_number_behind(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        create_run(tmp_path, "a/b")
    assert list(tmp_path.iterdir()) == []


def _claim(root: Path, who: int) -> None:
    for n in range(10):
        create_run(root, f"process{who}-{n}")


def test_processes_that_start_together_take_different_numbers(tmp_path):
    logs = {tmp_path / str(who): partial(_claim, tmp_path / "runs", who) for who in range(4)}
    processes = [(start(work, log), log) for log, work in logs.items()]
    assert [finish(process, log).code for process, log in processes] == [0] * 4
    numbers = [int(path.name[:5]) for path in (tmp_path / "runs").iterdir()]
    assert sorted(numbers) == list(range(1, 41))


@pytest.mark.parametrize("there", ["00001", "00001-first"])
def test_a_number_taken_in_the_meantime_is_left_alone(tmp_path, monkeypatch, there):
    """Another process creates the folder, or also renames it, after we listed the runs."""
    (tmp_path / there).mkdir()
    looks = []

    def stale(root):
        looks.append(root)
        return {} if len(looks) == 1 else list_runs(root)

    monkeypatch.setattr(amed.experiments, "list_runs", stale)
    assert create_run(tmp_path, "second").name == "00002-second" and len(looks) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [there, "00002-second"]


def test_numbers_go_on_after_the_largest(tmp_path):
    for name in ("00007-old", "notes", "12-short", "100000-many"):
        (tmp_path / name).mkdir()
    (tmp_path / "00009-file").touch()
    assert sorted(list_runs(tmp_path)) == [7, 100000]
    assert create_run(tmp_path, "new").name == "100001-new"
    assert create_run(tmp_path / "fresh" / "root", "new").name == "00001-new"


# Invalid predictors


def settings() -> StudentSettings:
    return StudentSettings("tiny", "amed", 4, 0.002, 80.0, scale_dir=0.01)


def test_settings_survive_the_record(tmp_path):
    full = StudentSettings(
        *("tiny", "dpmpp", 5, 0.01, 50.0, "ipndm", 3, "time_uniform", 1.5, True, 0.05, 0.3, 2),
        *(False, False, False, "cfg", 7.5),
    )
    record = RunRecord.make("train", full.to_options() | {"lr": 1.0}, {}, {})
    assert StudentSettings.from_options(RunRecord.from_json(record.to_json()).options) == full
    for solver in (full.solver(), full.teacher_solver()):
        assert solver.max_order == 2
    assert not full.solver().predict_x0 and not full.solver().lower_order_final
    assert full.run_name(cost=2) == "tiny-5-14-dpmpp-ipndm-3-time_uniform-afs"


def write(path: Path, command: str = "train", predictor: AMEDPredictor | None = None, **options):
    record = RunRecord.make(command, settings().to_options() | options, {}, {})
    save_predictor(path, predictor or AMEDPredictor(0.01), record)
    return path


def newer(path: Path) -> None:
    record = json.loads(RunRecord.make("train", settings().to_options(), {}, {}).to_json())
    record["schema"] = SCHEMA + 1
    weights = AMEDPredictor(0.01).state_dict()
    safetensors.torch.save_file(weights, path, metadata={"record": json.dumps(record)})


INVALID = {
    "a missing file": (lambda path: None, "no predictor at .*file.safetensors;"),
    "a text file": (lambda path: path.write_text("hello"), "file.safetensors is not a readable"),
    "an empty file": (lambda path: path.touch(), "file.safetensors is not a readable"),
    "a folder without one": (lambda path: path.mkdir(), "no predictor at .*file.safetensors/pred"),
    "a denoiser": (
        lambda path: path.write_bytes(cards()["cifar10-small"].bundled.read_bytes()),
        "written by train_denoiser.py",
    ),
    "weights without a record": (
        lambda path: safetensors.torch.save_file({"w": torch.zeros(1)}, path),
        "no run record",
    ),
    "a record of samples": (lambda path: write(path, "sample"), "written by sample.py"),
    "other heads": (
        lambda path: write(path, predictor=AMEDPredictor(0.01, 0.2)),
        "file.safetensors do not fit",
    ),
    "a newer schema": (newer, "file.safetensors has schema"),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_predictors_raise(what, tmp_path):
    make, message = INVALID[what]
    path = tmp_path / "file.safetensors"
    make(path)
    with pytest.raises(ValueError, match=message):
        load_predictor(str(path), tmp_path)


def test_an_unknown_number_lists_the_known_ones(tmp_path):
    write(create_run(tmp_path, "mine") / "predictor.safetensors")
    assert load_predictor("1", tmp_path).settings == settings()
    with pytest.raises(ValueError, match=r"no run 2 .*\(runs: 1\)"):
        load_predictor("2", tmp_path)


# Help


def test_the_defaults_in_the_help_are_those_of_the_options() -> None:
    """Flags that are not given leave the options' own defaults in place."""
    shown = train.main.make_context("train.py", ["--dataset_name=x"]).params
    amed = flat_options(parse_options(TrainOptions, {"dataset_name": "x"}))
    table = flat_options(parse_options(NsOptions, {"dataset_name": "x"}))
    assert amed.pop("label", table.pop("label")) is None  # a class, which has no flag here
    assert len(amed) > 30 and {name: shown[name] for name in amed} == amed
    own = {name for name in table if shown[name] != table[name]}
    assert own == {"batch", "lr", "trajectories"}  # named in the text above the flags
