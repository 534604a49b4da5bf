"""Logs of a resumed run equal those of an uninterrupted one."""

import time
from contextlib import closing
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.log import (
    JsonLines,
    TextLog,
    progress,
    read_json_lines,
    tensorboard,
    watch_batch,
)


def rows(first: int, last: int) -> list[dict[str, object]]:
    return [{"step": step, "loss": 1 / step, "r": [0.1, step]} for step in range(first, last + 1)]


def test_rows_are_on_disk_when_append_returns(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "run" / "stats.jsonl")
    log.append(rows(1, 1)[0])
    assert read_json_lines(tmp_path / "run" / "stats.jsonl") == rows(1, 1)
    log.close()


@pytest.mark.parametrize("incomplete", [b"", b'{"step": 7, "lo', b'{"step": 7}'])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path, incomplete: bytes) -> None:
    with closing(JsonLines(tmp_path / "whole.jsonl")) as log:
        for row in rows(1, 10):
            log.append(row)
    path = tmp_path / "killed.jsonl"
    with closing(JsonLines(path)) as log:
        for row in rows(1, 6):
            log.append(row)
    path.write_bytes(path.read_bytes() + incomplete)
    assert read_json_lines(path) == rows(1, 6)
    with closing(JsonLines(path, resume_after=4)) as log:
        for row in rows(5, 10):
            log.append(row)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_new_log_starts_empty_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"step": 1}\n')
    JsonLines(path, resume_after=1, enabled=False).append({"step": 2})
    assert read_json_lines(path) == [{"step": 1}]
    JsonLines(path).close()
    assert path.read_bytes() == b""
    JsonLines(tmp_path / "new.jsonl", resume_after=3).close()
    assert (tmp_path / "new.jsonl").read_bytes() == b""


def test_a_line_that_is_not_json_raises(tmp_path: Path) -> None:
    path = tmp_path / "stats.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not valid JSON"):
        read_json_lines(path)


def test_text_goes_to_screen_and_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (True, False):
        TextLog(tmp_path / "log.txt", enabled=enabled)("tick 1")
    TextLog()("not kept")
    assert capsys.readouterr().out == "tick 1\nnot kept\n"
    assert (tmp_path / "log.txt").read_text() == "tick 1\n"


def test_progress_shows_on_the_main_rank_only(capsys: pytest.CaptureFixture[str]) -> None:
    for enabled in (False, True):
        with progress(3, "sampling", unit="img", enabled=enabled) as bar:
            bar.update(3)
        shown = capsys.readouterr().err
        assert ("sampling: 100%" in shown and "3/3" in shown) if enabled else shown == ""


def test_progress_within_a_batch_is_shown_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress(64, "pds", unit="img") as bar:
        watch = watch_batch(bar)
        for state in range(1, 1001):
            now += 0.01
            watch(state, 1000)
    shown = capsys.readouterr().err
    assert 8 <= shown.count("of a batch") <= 11 and "907/1000 of a batch" in shown


def test_resumed_tensorboard_hides_later_steps_of_the_interrupted_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert tensorboard(tmp_path, enabled=False) is None
    for resume_after, value in ((None, 1.0), (2, 5.0)):
        writer = tensorboard(tmp_path, resume_after=resume_after)
        assert writer is not None
        for step in (1, 2, 3, 4) if resume_after is None else (3, 4):
            writer.add_scalar("loss", value, step)
        writer.close()
    seconds = [file.name.split(".")[3] for file in tmp_path.glob("events.*")]
    assert len(set(seconds)) == 2  # TensorBoard reads files in their order, others at random
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 1), (3, 5), (4, 5)]
