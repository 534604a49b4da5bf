"""Trajectories on disk: reading a set, damaged files, and two runs at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from denoisers.registry import ModelSource
from runtime.errors import UserError
from teachers import trajectory_files
from teachers.trajectories import TrajectoryJob, prepare
from teachers.trajectory_files import SHARD, Shard, TrajectorySet
from tests.sampler_models import MixtureModel
from tests.test_docs import code
from tests.trajectory_problems import HERE, NUMBER, options, shard_bytes, use_mixture


@pytest.fixture(autouse=True)
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mixture(tmp_path, monkeypatch)


def test_reading_opens_one_shard_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = prepare(options(number=NUMBER)).run(HERE)
    whole = torch.cat([batch.x for batch in found.batches(NUMBER)], dim=1)
    inner, now, opened = trajectory_files.safe_open, [0], []

    @contextmanager
    def counted(path: Path, **more: Any) -> Iterator[Any]:
        opened.append(path.stem)
        now[0] += 1
        assert now[0] == 1
        with inner(path, **more) as file:
            yield file
        now[0] -= 1

    monkeypatch.setattr(trajectory_files, "safe_open", counted)
    sizes = []
    for batch in found.batches(SHARD // 2 + 1):
        assert torch.equal(batch.x, whole[:, list(batch.numbers)])
        sizes.append(len(batch.numbers))
    assert sizes == [33, 33, 33, 33, 6]
    assert [int(name) for name in opened] == [0, 0, 64, 64, 64, 128, 128]
    opened.clear()
    order = [NUMBER - 1, 0, SHARD, 3]
    (batch,) = found.batches(10, order)
    assert batch.numbers == tuple(order) and len(opened) == 3
    assert torch.equal(batch.x, whole[:, order])


def test_damaged_and_missing_shards_are_one_sentence() -> None:
    job = prepare(options(number=NUMBER))
    found = job.run(HERE)
    with pytest.raises(UserError, match=f"no trajectory {NUMBER}: .* numbers 0 to {NUMBER - 1}"):
        found.read([0, NUMBER])
    with pytest.raises(UserError, match=f"{NUMBER} of 999 trajectories: .*--number 999"):
        TrajectorySet.open(found.folder, 999)
    path = Shard(found.folder, SHARD).path
    good = path.read_bytes()
    for bad in (good[:-1], b"", b"\0" * 100):
        path.write_bytes(bad)
        for use in (lambda: job.run(HERE), lambda: found.read([SHARD])):
            with pytest.raises(UserError, match=f"{path.name} cannot be read .*: delete it and"):
                use()
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing: compute the trajectories again"):
        found.read([SHARD])
    job.run(HERE)
    assert path.read_bytes() == good
    (found.folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is not valid JSON .*delete it with"):
        job.run(HERE)


@pytest.mark.parametrize(("mine", "others"), [(20, 50), (50, 20)])
def test_two_runs_at_once_do_no_harm(
    mine: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run extends the same shard while this one computes."""
    prepare(options(number=9)).run(HERE)
    inner = TrajectoryJob.states

    def states(*arguments: Any) -> Any:
        monkeypatch.setattr(TrajectoryJob, "states", inner)
        prepare(options(number=others)).run(HERE)
        return inner(*arguments)

    monkeypatch.setattr(TrajectoryJob, "states", states)
    found = prepare(options(number=mine)).run(HERE)
    assert Shard(found.folder, 0).count() == 50
    alone = prepare(options(cache="alone", number=50)).run(HERE)
    assert shard_bytes(found.folder) == shard_bytes(alone.folder)


def test_what_is_not_finite_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    card = replace(MixtureModel().card, sigma_max=1e5)  # float16 ends at 65504
    monkeypatch.setattr(ModelSource, "card", lambda *_: card)
    assert len(prepare(options()).run(HERE, MixtureModel(card))) == 7
    job = prepare(options(store="float16"))
    with pytest.raises(UserError, match="latents 0 to 6 are not all finite in float16: give --st"):
        job.run(HERE, MixtureModel(card))
    assert not shard_bytes(job.folder(job.record(MixtureModel.sha256)))


def test_the_training_page_reads_trajectories() -> None:
    names: dict = {}
    exec(code("docs/training.md", "from denoisers.registry"), names)
    batch, times = names["batch"], names["found"].times
    assert len(names["found"]) == 128 and batch.numbers == tuple(range(96, 128))
    node = names["job"].draw(MixtureModel(), batch.numbers, HERE).meter(batch.x[3], times[3])
    assert torch.allclose(names["slopes"][3].float(), node.d, atol=1e-5)
