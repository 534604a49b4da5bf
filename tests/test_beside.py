"""A batch is made while the last one is measured; a fake stands in for CUDA's streams."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from evaluation import passes
from evaluation.beside import ahead, beside
from tests.test_passes import Source, always, files, same, summary  # noqa: F401, a fixture

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_one_is_made_while_another_is_worked_on() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    with closing(ahead(items())) as coming:
        assert next(coming) == 0
        assert made[1].wait(10) and not made[2].is_set()
        assert list(coming) == [1, 2]


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    coming = ahead(items())
    assert next(coming) == 1
    with pytest.raises(KeyError, match="two"):
        next(coming)
    assert list(ahead([])) == []


def test_only_on_gpus_and_only_what_measures_has_another_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, waits = threading.local(), []
    here.stream = "default"

    class FakeStream:
        def __init__(self, name: object) -> None:
            self.name = str(name)

        def wait_stream(self, other: FakeStream) -> None:
            waits.append((self.name, other.name))

    @contextmanager
    def stream(chosen: FakeStream) -> Iterator[None]:
        here.stream = chosen.name
        yield
        here.stream = "default"

    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream("default"))
    makers: list[str] = []

    def batches() -> Iterator[int]:
        for i in range(2):
            makers.append(getattr(here, "stream", "default"))
            yield i

    with beside(batches(), CUDA) as coming:
        assert [(i, here.stream) for i in coming] == [(i, "cuda:0") for i in range(2)]
        assert waits == [("cuda:0", "default")]
    assert makers == ["default"] * 2 and here.stream == "default"
    assert waits[1:] == [("default", "cuda:0")]
    plain = batches()
    with beside(plain, CPU) as coming:
        assert coming is plain


@pytest.mark.usefixtures("always")
def test_a_killed_pass_goes_on_and_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is what was measured, not what was made."""
    whole = summary(Source(), tmp_path / "other")
    monkeypatch.setattr(passes, "beside", lambda batches, device: closing(ahead(batches)))
    assert same(summary(Source(), tmp_path / "other"), whole)
    with pytest.raises(KeyboardInterrupt):
        summary(Source(3), tmp_path)
    assert len(files(tmp_path)) == 1
    last = Source()
    assert same(summary(last, tmp_path), whole) and last.read == 50 - 24
