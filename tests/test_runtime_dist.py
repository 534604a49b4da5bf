"""Several processes give the result of one, and fail with one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.dist import World, choose_device, world
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def torchrun(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script as two processes on the CPU."""
    path = tmp_path / "script.py"
    path.write_text(script)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [sys.executable, *launcher, str(path), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


SUM = """
import json, sys, torch
from runtime.dist import world
with world() as w:
    tensor = torch.tensor([1.0, 2.0**-50], dtype=torch.float64) if w.is_main else (
        torch.tensor([2.0**-50, -(2.0**-80)], dtype=torch.float64))
    same = w.sum_(tensor) is tensor
    w.barrier()
    result = dict(sum=[v.hex() for v in tensor.tolist()], same=same, shard=w.shard(range(5))[:],
        size=w.size, device=str(w.device), box=w.broadcast_object({"from": w.rank}))
    result["shard"] = list(result["shard"])
with open(f"{sys.argv[1]}/{w.rank}.json", "w") as file:
    json.dump(result, file)
assert not torch.distributed.is_initialized()
"""


def test_two_processes_sum_float64_exactly(tmp_path: Path) -> None:
    done = torchrun(tmp_path, SUM, str(tmp_path))
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for result in ranks:
        assert result["sum"] == [(1 + 2.0**-50).hex(), (2.0**-50 - 2.0**-80).hex()]
        assert result["same"] and result["size"] == 2 and result["device"] == "cpu"
        assert result["box"] == {"from": 0}
    assert [result["shard"] for result in ranks] == [[0, 2, 4], [1, 3]]


FAIL = """
import click, torch
from runtime import cli
from runtime.dist import world
from runtime.errors import UserError
@click.command()
@click.argument("ranks")
def main(ranks):
    with world("cpu") as w:
        if str(w.rank) in ranks:
            raise UserError(f"sentence of rank {w.rank}")
        w.sum_(torch.zeros(1))
cli.run(main)
"""


@pytest.mark.parametrize(("ranks", "speaker"), [("01", 0), ("0", 0), ("1", 1)])
def test_a_failure_is_one_sentence_and_an_exit_code(
    tmp_path: Path, ranks: str, speaker: int
) -> None:
    done = torchrun(tmp_path, FAIL, ranks)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == [f"error: sentence of rank {speaker}"]
    assert f'File "{tmp_path}' not in done.stderr  # no traceback of the script


def test_one_process_needs_no_group() -> None:
    with world("cpu") as alone:
        tensor = torch.ones(2)
        assert alone == World(rank=0, size=1, device=torch.device("cpu")) and alone.is_main
        assert alone.sum_(tensor) is tensor and tensor.tolist() == [1, 1]
        assert alone.broadcast_object("x") == "x" and list(alone.shard([1, 2])) == [1, 2]
        alone.barrier()
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "'gpu' is unknown"),
        ("meta", "'meta' is not supported"),
        ("cuda:1", "'cuda:1' does not exist"),
    ],
)
def test_unavailable_devices_raise(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(UserError, match=message):
        choose_device(name)


def test_the_best_device_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    assert choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device() == torch.device("mps")
    pretend_gpus(monkeypatch, 1)
    assert choose_device() == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "process 2 .* --nproc_per_node=2"),
        ("cuda:0", "'cuda:0' cannot be shared"),
    ],
)
def test_each_process_needs_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, message: str
) -> None:
    pretend_gpus(monkeypatch, 2)
    for key, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message), world(device):
        pass


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
