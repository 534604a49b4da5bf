"""visualize.py: rows are runs of sample.py, and the picture is made of their images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import samplers.side_by_side
from amed.experiments import save_predictor
from commands import visualize
from denoisers.cards import cards
from denoisers.registry import ModelSource
from runtime.errors import UserError
from runtime.images import to_uint8
from runtime.record import RunRecord
from samplers.build import build
from samplers.generate import generate
from samplers.options import SamplerOptions
from tests.sampler_models import GaussianModel, trained
from tests.scripts import Script

SMALL = "cifar10-small"


@pytest.fixture
def model() -> GaussianModel:
    """A closed form that is guided, in the place of the network."""
    return GaussianModel(dataclasses.replace(cards()[SMALL], guidance="cfg"))


@pytest.fixture
def run(tmp_path, monkeypatch, script, model) -> Script:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    monkeypatch.setattr(ModelSource, "card", lambda _: model.card)
    return lambda *arguments: script(visualize.main, *arguments)


ROWS = (
    "--row=Euler: euler --nfe=8 --afs=True",
    "--row=ddpm --nfe=8 --eta=0.5",
    """--row=Restart: restart --nfe=21 --guidance_rate=1 --restart_info='{"0": [3, 1, 0.1, 2]}'""",
)


def test_the_picture_shows_the_images_that_sample_would_make(
    run: Script, tmp_path: Path, model: GaussianModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict = {}
    real = samplers.side_by_side.image_grid
    monkeypatch.setattr(
        samplers.side_by_side, "image_grid", lambda *a, **k: said.update(k) or real(*a, **k)
    )
    code, out, err = run(*ROWS, "--seeds=5,2,9", "--columns=2", "--guidance_rate=4", "--outdir=x")
    assert code == 0, err
    folders = ["euler", "ddpm-eta0.5", "restart"]
    assert {path.name for path in (tmp_path / "x").iterdir()} == {*folders, "side-by-side.png"}
    assert said["labels"] == ["seed 5", "seed 2"]
    assert said["row_labels"] == [
        "Euler: 8 NFE = 4 guided calls",
        "ddpm-eta0.5: 8 NFE = 4 guided calls",
        "Restart: 21 NFE",
    ]
    with Image.open(tmp_path / "x/side-by-side.png") as image:
        page = np.asarray(image)[-3 * 128 :, -2 * 128 :]
    for row, folder in enumerate(folders):
        record = RunRecord.read(tmp_path / "x" / folder / "run.json")
        assert record.plan["nfe_metered"] == record.plan["nfe_planned"] == (21 if row == 2 else 8)
        assert record.options["outdir"] == f"x/{folder}"
        for column, seed in enumerate([5, 2]):
            with Image.open(tmp_path / "x" / folder / f"{seed:06d}.png") as image:
                cell = page[128 * row :, 128 * column :][:128:4, :128:4]
                assert np.array_equal(cell, np.asarray(image))
    options = SamplerOptions(sampler="ddpm", nfe=8, eta=0.5, guidance_rate=4.0)
    (made,) = generate(build(options, model.card), model, [9], batch=1, device="cpu")
    with Image.open(tmp_path / "x/ddpm-eta0.5/000009.png") as image:
        assert np.array_equal(np.asarray(image), to_uint8(made.images)[0])


def test_a_learned_sampler_is_a_row_like_any_other(run: Script, tmp_path: Path) -> None:
    student = trained(SMALL, num_steps=3)
    path = tmp_path / "exps/00004-mine/predictor.safetensors"
    save_predictor(path, student.predictor, student.record)
    rows = ["--row=--predictor_path=4", "--row=Once more: --predictor_path=4"]
    code, out, err = run(*rows, "--row=euler --nfe=4", "--seeds=0-1", "--outdir=x")
    assert code == 0, err
    learned, again, euler = (
        (tmp_path / "x" / name / "000001.png").read_bytes()
        for name in ("amed-00004", "once-more", "euler")
    )
    assert learned == again != euler
    assert "amed-00004: x/amed-00004: 2 images made, 4 NFE each" in out


def test_a_killed_command_goes_on_where_it_stopped(run: Script, tmp_path: Path) -> None:
    assert run(*ROWS, "--seeds=0-2", "--outdir=x")[0] == 0
    before = (tmp_path / "x/side-by-side.png").read_bytes()
    for name in ("x/side-by-side.png", "x/restart/000001.png"):
        (tmp_path / name).unlink()
    _, out, _ = run(*ROWS, "--seeds=0-2", "--outdir=x")
    assert [line.split(" images")[0] for line in out.splitlines()[:3]] == [
        "Euler: x/euler: 0",
        "ddpm-eta0.5: x/ddpm-eta0.5: 0",
        "Restart: x/restart: 1",
    ]
    assert (tmp_path / "x/side-by-side.png").read_bytes() == before
    code, _, err = run("--row=Euler: heun --nfe=8", "--outdir=x")
    assert code == 1 and "x/euler holds images of other settings" in err


def test_a_dry_run_prints_plans_and_touches_nothing(run: Script, tmp_path: Path) -> None:
    code, out, _ = run(*ROWS, "--guidance_rate=3", "--dry-run")
    assert code == 0 and list(tmp_path.iterdir()) == []
    assert out.count('"nfe_planned"') == 3 and "\nEuler: 8 NFE = 4 guided calls\n" in out


@pytest.mark.parametrize(
    ("text", "title", "expected"),
    [
        ("heun", None, {"sampler": "heun", "guidance_rate": 2.0}),
        ("A b: --sampler=heun --guidance_rate 7", "A b", {"sampler": "heun", "guidance_rate": 7.0}),
        ("restart --restart_info='{\"0\": [3, 1, 0.1, 2]}'", None,
         {"sampler": "restart", "restart_info": '{"0": [3, 1, 0.1, 2]}', "guidance_rate": 2.0}),
        ("R: restart --restart_info=f.txt:3", "R",
         {"sampler": "restart", "restart_info": "f.txt:3", "guidance_rate": 2.0}),
    ],
)  # fmt: skip
def test_a_row_has_the_flags_of_sample(text: str, title: str | None, expected: dict) -> None:
    spec = visualize.read_row(text, 2.0)
    assert (spec.title, spec.sampler) == (title, SamplerOptions(**expected))
    assert spec.predictor_path is None
    assert visualize.read_row(f"{text} --predictor_path=3", 2.0).predictor_path == "3"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("euler --steps=5", r"--row 'euler --steps=5': No such option.*see sample.py --help"),
        ("euler --nfe=few", "'few' is not a valid integer"),
        ("euler '--nfe=5", "No closing quotation"),
        ("euler --seeds=0-3", "--seeds is the same for all rows: give it outside"),
        ("euler --batch=64", "--batch is the same for all rows"),
        ("euler heun", "unexpected extra argument"),
    ],
)
def test_a_bad_row_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        visualize.read_row(text, None)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--row {text!r}")


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["euler --nfe=5", "euler --nfe=6"], "title 'euler'"),
        (["A b: euler", "a-B: heun"], "title 'a-B'"),
        ([""], "--predictor_path or --sampler"),
        (["magic"], "unknown sampler 'magic'"),
    ],
)
def test_invalid_rows_write_nothing(
    run: Script, tmp_path: Path, rows: list[str], sentence: str
) -> None:
    code, _, err = run(*(f"--row={row}" for row in rows))
    assert code == 1 and sentence in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_rows_of_two_models_are_refused(run: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    models = iter(["one", "two"])
    monkeypatch.setattr(
        ModelSource, "card", lambda _: dataclasses.replace(cards()[SMALL], name=next(models))
    )
    code, _, err = run("--row=euler", "--row=heun")
    assert code == 1 and "different models, one and two" in err
