"""Classes, prompts and guidance: a function of the seed, and refused where they mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from denoisers.cards import Card, cards
from denoisers.conditions import ConditionOptions, Conditions
from image_data.prompts import read_prompts
from runtime.errors import UserError
from runtime.noise import SeedNoise
from runtime.seeds import SELECTION_START

CPU = torch.device("cpu")
PLAIN = cards()["cifar10-small"]
CLASSES = replace(PLAIN, name="classes", label_dim=5, guidance="cg")
TEXT = replace(PLAIN, name="text", text=True, guidance="cfg")
ROWS = ("a cat", "two dogs", "a boat, far away", "rain")


@dataclass
class Asked:
    """A model that remembers what it was bound to."""

    card: Card
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def bind(
        self,
        labels: Tensor | None = None,
        guidance_rate: float | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Any:
        self.calls.append((labels, guidance_rate, prompts))


def asked(card: Card, conditions: Conditions, seeds: Sequence[int], stream: tuple = ()) -> tuple:
    model = Asked(card)
    conditions.bind(model, SeedNoise(seeds), CPU, stream)  # type: ignore[arg-type]
    return model.calls[0]


def test_classes_belong_to_seeds_and_streams() -> None:
    seeds = list(range(200))
    drawn = asked(CLASSES, Conditions(), seeds)[0]
    assert set(drawn.tolist()) == set(range(5))
    assert asked(CLASSES, Conditions(), [7, 3])[0].tolist() == drawn[[7, 3]].tolist()
    trained = asked(CLASSES, Conditions(), seeds, ("train", 0))[0]
    other = asked(CLASSES, Conditions(), seeds, ("train", 1))[0]
    assert len({tuple(t.tolist()) for t in (drawn, trained, other)}) == 3
    assert asked(CLASSES, Conditions(label=2), [4, 9])[0].tolist() == [2, 2]
    assert asked(PLAIN, Conditions(), [1]) == (None, None, None)


def test_prompts_are_rows_of_seeds_when_sampling_and_drawn_when_training() -> None:
    many = Conditions(prompts=ROWS, guidance_rate=7.5)
    assert asked(TEXT, many, [2, 0]) == (None, 7.5, ("a boat, far away", "a cat"))
    assert asked(TEXT, many, [SELECTION_START + 2, SELECTION_START]) == asked(TEXT, many, [2, 0])
    numbers = list(range(400))
    drawn = asked(TEXT, many, numbers, ("train", 0))[2]
    assert set(drawn) == set(ROWS) and drawn != asked(TEXT, many, numbers, ("train", 1))[2]
    assert asked(TEXT, many, [17], ("train", 0))[2] == (drawn[17],)
    assert asked(TEXT, Conditions(prompts=("one",)), [5, 6])[2] == ("one", "one")
    assert asked(TEXT, Conditions(), [5, 6])[2] == ("", "")


@pytest.mark.parametrize(
    ("card", "conditions", "seeds", "sentence"),
    [
        (PLAIN, Conditions(label=0), [], "'cifar10-small' has no classes: leave --class 0 out"),
        (CLASSES, Conditions(label=5), [], "--class 5 is not one of the 5 classes"),
        (PLAIN, Conditions(prompts=("x",)), [], "'cifar10-small' takes no text"),
        (TEXT, Conditions(prompts=ROWS), [SELECTION_START + 4], "10000004 .* here row 4"),
        (TEXT, Conditions(prompts=ROWS), [0, 4], "seed 4 has no prompt: --prompt_path has 4 rows"),
        (TEXT, Conditions(guidance_type="cg"), [], "'text' has --guidance_type cfg, not 'cg'"),
        (PLAIN, Conditions(guidance_type="cfg"), [], "has no guidance, not 'cfg'"),
        (PLAIN, Conditions(guidance_rate=2.0), [], "no guidance: leave --guidance_rate 2 out"),
    ],
)
def test_what_a_model_does_not_take(
    card: Card, conditions: Conditions, seeds: list[int], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        conditions.check(card, seeds)


def test_what_a_model_takes() -> None:
    Conditions(label=4, guidance_rate=3.0, guidance_type="cg").check(CLASSES, [9999])
    Conditions(prompts=ROWS, guidance_rate=7.5, guidance_type="cfg").check(TEXT, [3])
    Conditions(prompts=ROWS[:1]).check(TEXT, [9999])  # one prompt is every image's


def test_options_become_conditions(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(ROWS) + "\n", encoding="utf-8")
    assert ConditionOptions(prompt_path=str(file), guidance_rate=2.0).resolve(TEXT) == Conditions(
        None, ROWS, 2.0
    )
    assert ConditionOptions(prompt="a cat").resolve(TEXT).prompts == ("a cat",)
    with pytest.raises(UserError, match=r"--prompt 'a' and --prompt_path .* are both prompts"):
        ConditionOptions(prompt="a", prompt_path=str(file)).resolve(TEXT)
    with pytest.raises(UserError, match="takes no text"):
        ConditionOptions(prompt_path=str(tmp_path / "never-read")).resolve(PLAIN)
    hashes = [Conditions(prompts=p).describe() for p in (ROWS, ROWS[::-1], ("a cattwo dogs",))]
    assert len({str(h) for h in hashes}) == 3 and Conditions().describe() is None


def test_guidance_costs_where_the_network_is_called_twice() -> None:
    rates = (None, 0.0, 1.0, 7.5)
    assert [TEXT.cost(rate) for rate in rates] == [1, 1, 1, 2]
    assert [CLASSES.cost(rate) for rate in rates] == [1, 1, 1, 1]


def test_prompts_from_csv_and_text(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text('﻿id,text\n1,"a boat, far\naway"\n2,rain\n', encoding="utf-8")
    assert read_prompts(table) == ("a boat, far\naway", "rain")
    plain = tmp_path / "prompts.txt"
    plain.write_text("a cat\nà la carte\n", encoding="utf-8")
    assert read_prompts(plain) == ("a cat", "à la carte")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", b"id,caption\n1,x\n", "has the columns id, caption and none called 'text'"),
        ("a.csv", b"", "has the columns none and none called 'text'"),
        ("a.csv", b"id,text\n1,x\n2,\n", r"row 1 \(from 0\) is an empty prompt"),
        ("a.txt", b"x\n  \ny\n", r"row 1 \(from 0\) is an empty prompt"),
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b"\xff\xfe\x00x", "is no text in UTF-8"),
    ],
)
def test_files_that_hold_no_prompts(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_takes_the_place_of_the_empty_one() -> None:
    """It reaches the model, is part of every record, and needs guidance to lead away from it."""
    bound: list[dict[str, object]] = []

    class Text(Asked):
        def bind(self, *given: Any, **more: Any) -> Any:
            bound.append(more)

    options = ConditionOptions(prompt="a cat", negative_prompt="a dog", guidance_rate=3.0)
    conditions = options.resolve(TEXT)
    for each in (conditions, replace(conditions, negative=None)):
        each.bind(Text(TEXT), SeedNoise((0, 1)), CPU)  # type: ignore[arg-type]
    assert bound == [{"negative": "a dog"}, {}]
    known, plain = conditions.describe(), replace(conditions, negative=None).describe()
    assert known == {**(plain or {}), "negative": "a dog"}
    alone = replace(conditions, prompts=()).describe()
    assert alone is not None and (alone["count"], alone["negative"]) == (0, "a dog")
    for card, rate in ((TEXT, None), (TEXT, 1.0), (PLAIN, 3.0)):
        with pytest.raises(UserError, match="--negative_prompt 'a dog' takes the place of"):
            ConditionOptions(negative_prompt="a dog", guidance_rate=rate).resolve(card)
