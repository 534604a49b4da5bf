"""Several processes give the result of one, and fail with one sentence."""

import json
from pathlib import Path

import click
import pytest
import torch

from runtime import cli
from runtime.dist import World, choose_device, world
from runtime.errors import UserError
from tests.processes import run_command, together


def sum_and_share(folder: Path) -> None:
    with world() as w:
        mine = [1.0, 2.0**-50] if w.is_main else [2.0**-50, -(2.0**-80)]
        tensor = torch.tensor(mine, dtype=torch.float64)
        same = w.sum_(tensor) is tensor
        w.barrier()
        result = {
            "sum": [value.hex() for value in tensor.tolist()], "same": same, "size": w.size,
            "shard": list(w.shard(range(5))), "device": str(w.device),
            "box": w.broadcast_object({"from": w.rank}),
        }  # fmt: skip
    (folder / f"{w.rank}.json").write_text(json.dumps(result))
    assert not torch.distributed.is_initialized()


def test_two_processes_sum_float64_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    done = together(lambda: sum_and_share(tmp_path), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for result in ranks:
        assert result["sum"] == [(1 + 2.0**-50).hex(), (2.0**-50 - 2.0**-80).hex()]
        assert result["same"] and result["size"] == 2 and result["device"] == "cpu"
        assert result["box"] == {"from": 0}
    assert [result["shard"] for result in ranks] == [[0, 2, 4], [1, 3]]


@click.command()
@click.argument("ranks")
def fails(ranks: str) -> None:
    with world("cpu") as w:
        if str(w.rank) in ranks:
            raise UserError(f"sentence of rank {w.rank}")
        w.sum_(torch.zeros(1))


def test_rank_0_is_the_first_to_report_what_all_ranks_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So torchrun, which ends the others then, leaves one sentence."""
    monkeypatch.setattr(cli, "HEAD_START", 0.5)
    done = together(lambda: run_command(fails, "01"), tmp_path)
    assert [rank.code for rank in done] == [1, 1]
    assert [rank.err for rank in done] == [f"error: sentence of rank {r}\n" for r in (0, 1)]
    spoke = [(tmp_path / f"rank-{rank}.err").stat().st_mtime for rank in (0, 1)]
    assert spoke[1] - spoke[0] > 0.3


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


def test_float32_is_not_tf32_in_any_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with world("cpu"):
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.conv.fp32_precision != "tf32"
