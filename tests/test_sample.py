"""sample.py from the command line: files, records, kills, refusals."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import samplers.job
from amed.experiments import save_predictor
from commands import sample
from denoisers.cards import cards
from denoisers.registry import ModelSource
from runtime import cli
from runtime.files import temporary_name
from runtime.images import to_uint8
from runtime.noise import SeedNoise
from runtime.record import RunRecord
from samplers.build import build
from samplers.generate import generate
from samplers.options import SamplerOptions
from tests.processes import finished, run_command, start, together
from tests.sampler_models import ClassModel, GaussianModel, make_card, trained
from tests.scripts import Script

ROOT = Path(__file__).resolve().parent.parent
SMALL = "cifar10-small"
OWN = f"--model_path={__file__}"  #: a file that exists


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Script:
    """The script in an empty folder, with a closed form in the place of the network."""
    monkeypatch.chdir(tmp_path)
    model = GaussianModel(cards()[SMALL])
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    return lambda *arguments: script(sample.main, *arguments)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def images(folder: Path) -> dict[str, bytes]:
    """The PNG files below a folder, which a process may be writing to."""
    files = folder.rglob("*.png")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_run_writes_the_images_of_its_seeds_and_its_record(run: Script, tmp_path: Path) -> None:
    done = run("--sampler=ipndm", "--nfe=5", "--afs=True", "--seeds=3,0-1", "--batch=2")
    assert done.code == 0, done.err
    folder = tmp_path / "samples" / SMALL / "ipndm4-afs_nfe5"
    assert set(tree(tmp_path)) == {
        f"samples/{SMALL}/ipndm4-afs_nfe5/{name}"
        for name in ("000000.png", "000001.png", "000003.png", "run.json")
    }
    model = GaussianModel(cards()[SMALL])
    chosen = build(SamplerOptions(sampler="ipndm", nfe=5, afs=True), model.card)
    (made,) = generate(chosen, model, [0, 1, 3], batch=3, device="cpu")
    for seed, image in zip(made.seeds, to_uint8(made.x), strict=True):
        assert np.array_equal(pixels(folder / f"{seed:06d}.png"), image)
    record = RunRecord.read(folder / "run.json")
    assert record.command == "sample" and record.model == {"name": SMALL, "sha256": "0" * 64}
    assert record.plan == {**json.loads(json.dumps(chosen.describe())), "nfe_metered": 5}
    wanted = {"seeds": "3,0-1", "batch": 2, "dtype": "float32", "device": "cpu", "class": None}
    assert wanted.items() <= record.options.items()
    assert f"samples/{SMALL}/ipndm4-afs_nfe5: 3 images made, 5 NFE each" in done.out


def test_the_record_is_there_before_the_work_and_metered_after_it(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    save = samplers.job.Folder.save

    def interrupted(folder: samplers.job.Folder, batch: object) -> None:
        seen.append(RunRecord.read(folder.path / "run.json").plan)
        if len(seen) == 2:
            raise KeyboardInterrupt
        save(folder, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(samplers.job.Folder, "save", interrupted)
    arguments = ("--sampler=dpm", "--num_steps=3", "--seeds=0-5", "--batch=2", "--outdir=x")
    done = run(*arguments)
    assert done.code == 130 and "Traceback" not in done.err
    assert [(plan["nfe_planned"], plan["nfe_metered"]) for plan in seen] == [(4, None)] * 2
    assert set(tree(tmp_path / "x")) == {"000000.png", "000001.png", "run.json"}
    monkeypatch.setattr(samplers.job.Folder, "save", save)
    assert "4 images made (2 were there already)" in run(*arguments).out
    assert RunRecord.read(tmp_path / "x" / "run.json").plan["nfe_metered"] == 4


def test_a_run_goes_on_where_it_stopped(run: Script, tmp_path: Path) -> None:
    arguments = ("--sampler=restart", "--num_steps=4", "--seeds=0-6", "--subdirs", "--outdir=x")
    assert run(*arguments).code == 0
    folder = tmp_path / "x"
    before = images(folder)
    assert len(before) == 7
    stamps = {name: (folder / name).stat().st_mtime_ns for name in before}
    (folder / "000000/000002.png").unlink()
    torn = folder / "000000/000005.png"
    torn.write_bytes(torn.read_bytes()[:50])
    (folder / "000000" / temporary_name("000002.png", finished())).write_bytes(b"half")
    done = run(*arguments, "--batch=1")
    assert "2 images made (5 were there already)" in done.out
    assert images(folder) == before and set(tree(folder)) == {*before, "run.json"}
    kept = {name for name in before if (folder / name).stat().st_mtime_ns == stamps[name]}
    assert set(before) - kept == {"000000/000002.png", "000000/000005.png"}
    assert "0 images made (7 were there already)" in run(*arguments).out


def test_a_folder_of_other_settings_is_refused(run: Script, tmp_path: Path) -> None:
    assert run("--sampler=euler", "--seeds=0-1", "--outdir=x").code == 0
    before = tree(tmp_path)
    for other in (("--num_steps=7",), ("--dtype=float64",), ("--subdirs",)):
        done = run("--sampler=euler", "--seeds=0-3", "--outdir=x", *other)
        assert done.code == 1 and done.err.startswith("error: x holds images")
        assert done.err.count("\n") == 1 and "give another --outdir" in done.err
        assert tree(tmp_path) == before
    assert run("--sampler=euler", "--seeds=2-3", "--batch=1", "--outdir=x").code == 0
    record = RunRecord.read(tmp_path / "x" / "run.json")
    assert record.options["seeds"] == "0-3"


def test_grid_and_film_strip(run: Script, tmp_path: Path) -> None:
    done = run(
        "--sampler=edm", "--num_steps=3", "--S_churn=5", "--seeds=0-4", "--batch=2", "--outdir=x",
        "--grid", "--return_inters", "--dtype=float64",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = RunRecord.read(tmp_path / "x" / "run.json")
    times = record.plan["times"]
    assert times != sorted(times, reverse=True)  # churn goes up
    model = GaussianModel(cards()[SMALL])
    chosen = build(SamplerOptions(sampler="edm", num_steps=3, S_churn=5.0), model.card)
    (made,) = generate(
        chosen, model, range(5), batch=5, device="cpu", dtype=torch.float64, keep_trajectory=True
    )
    assert made.trajectory is not None and len(made.trajectory.t) == len(times)
    strip = pixels(tmp_path / "x-inters.png")
    assert strip.shape == (5 * 32, len(times) * 32, 3)
    for column, states in enumerate(made.trajectory.x):
        wanted = to_uint8(states).reshape(5 * 32, 32, 3)
        assert np.array_equal(strip[:, column * 32 : column * 32 + 32], wanted)
    grid = pixels(tmp_path / "x-grid.png")
    assert grid.shape == (2 * 32, 3 * 32, 3)
    assert np.array_equal(grid[32:, 32:64], to_uint8(made.x)[4])
    assert set(images(tmp_path / "x")) == {f"{seed:06d}.png" for seed in range(5)}


def test_class_is_taken_or_drawn_by_seed(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = make_card(label_dim=4)
    monkeypatch.setattr(ModelSource, "card", lambda _: card)
    monkeypatch.setattr(ModelSource, "load", lambda *_: ClassModel(card))
    common = ("--dataset_name=tiny", "--sampler=euler", "--num_steps=20", "--seeds=0-6")
    monkeypatch.setattr(
        samplers.folder, "to_uint8", lambda x: to_uint8(x.repeat(1, 2, 1, 1)[:, :3])
    )
    for batch in (1, 7):
        assert run(*common, f"--batch={batch}", f"--outdir=drawn{batch}").code == 0
        assert run(*common, f"--batch={batch}", "--class=3", f"--outdir=given{batch}").code == 0
    assert images(tmp_path / "drawn1") == images(tmp_path / "drawn7")
    assert images(tmp_path / "given1") == images(tmp_path / "given7")
    drawn = SeedNoise(range(7)).integers("class", 4).tolist()
    for seed, label in enumerate(drawn):
        mean = pixels(tmp_path / f"drawn1/{seed:06d}.png").mean()
        assert abs(mean - (label / 4 * 127.5 + 128)) < 8
        assert abs(pixels(tmp_path / f"given1/{seed:06d}.png").mean() - (0.75 * 127.5 + 128)) < 8
    assert RunRecord.read(tmp_path / "given1/run.json").options["class"] == 3
    done = run(*common, "--class=4", "--outdir=no")
    assert done.code == 1 and "--class 4 " in done.err
    assert not (tmp_path / "no").exists()


def test_a_predictor_by_number_folder_and_file(run: Script, tmp_path: Path) -> None:
    trained_ = trained(SMALL, "ipndm", num_steps=3, afs=True)
    predictor, student, record = trained_.predictor, trained_.settings, trained_.record
    folder = tmp_path / "exps" / f"00003-{student.run_name()}"
    folder.mkdir(parents=True)
    save_predictor(folder / "predictor.safetensors", predictor, record)
    here = tmp_path / "samples" / SMALL / "ipndm-00003_nfe3"
    for made, spec in ((2, "3"), (0, str(folder)), (0, str(folder / "predictor.safetensors"))):
        done = run(f"--predictor_path={spec}", "--seeds=0-1")
        assert done.code == 0, done.err
        assert f"ipndm-00003_nfe3: {made} images made" in done.out
    plan = RunRecord.read(here / "run.json").plan
    assert (plan["nfe_planned"], plan["nfe_metered"]) == (3, 3)
    assert plan["predictor"] == folder.name and plan["sampler_stu"] == "ipndm"
    assert "note: ipndm-00003" not in done.err
    other = dataclasses.replace(record, model={**record.model, "sha256": "f" * 64})
    save_predictor(folder / "predictor.safetensors", predictor, other)
    done = run("--predictor_path=3", "--seeds=0", "--outdir=other")
    assert done.code == 0 and "note: ipndm-00003" in done.err and "ffffffffffff" in done.err
    done = run("--predictor_path=3", "--dataset_name=cifar10")
    assert done.code == 1 and "for 'cifar10-small', not for 'cifar10'" in done.err
    done = run("--predictor_path=3", "--sampler=euler")
    assert done.code == 1 and "--sampler euler cannot" in done.err


def test_a_dry_run_prints_the_record_and_touches_nothing(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a dry run loads no model")

    monkeypatch.setattr(ModelSource, "load", never)
    done = run("-n", "--sampler=restart", "--nfe=43", "--seeds=0-49999")
    assert done.code == 0, done.err
    record = RunRecord.from_json(done.out)
    assert record.plan["nfe_planned"] == 43 and record.plan["num_steps"] == 18
    assert record.options["outdir"] == f"samples/{SMALL}/restart_nfe43"
    assert record.model["sha256"] == cards()[SMALL].sha256
    assert list(tmp_path.iterdir()) == []


def test_the_help_shows_examples_and_defaults(run: Script) -> None:
    done = run("--help")
    assert done.code == 0
    for words in ("torchrun --standalone", "[default: 64", "[default: 0-63]", "cifar10-vp-43"):
        assert words in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((), 1, "--predictor_path or --sampler"),
        (("--sampler=euler", "--seeds=9-3"), 1, "write 3-9"),
        (("--sampler=euler", "--seeds=abc"), 1, "'abc'"),
        (("--sampler=magic",), 1, "'magic'"),
        (("--sampler=amed",), 1, "a trained predictor"),
        (("--sampler=euler", "--num_steps=1"), 2, "--num_steps"),
        (("--sampler=heun", "--nfe=5"), 1, "give 4 or 6"),
        (("--sampler=euler", "--batch=0"), 2, "--batch"),
        (("--sampler=euler", "--dataset_name=mnist"), 1, "'mnist'"),
        (("--sampler=euler", "--class=0"), 1, "--class 0"),
        (("--sampler=euler", "--model_path=no.safetensors"), 1, "no.safetensors"),
        (("--sampler=euler", "--device=tpu9"), 1, "'tpu9'"),
        (("--sampler=edm", "--afs=True"), 1, "--afs True"),
        (("--sampler=euler", "--dataset_name=../../x", OWN), 1, "'../../x' cannot name folders"),
        (("--sampler=euler", "--dataset_name=a/b", OWN), 1, "'a/b' cannot name folders"),
        (("--sampler=euler", "--dataset_name=.hidden", OWN), 1, "'.hidden' cannot name folders"),
        (("--sampler=euler", f"--dataset_name={'x' * 300}", OWN), 1, "cannot name folders"),
        (("--sampler=euler", "--sigma_max=1e9"), 1, "<= 100000, got"),
        (("--sampler=euler", "--times=1e9,1"), 1, "that decrease from 100000 or less"),
        (("--sampler=euler", "--schedule_type=logsnr", "--schedule_rho=7"), 1, "no exponent"),
        (("--sampler=euler", "--schedule_rho=0.001"), 1, "schedule_rho = 0.001 is too small"),
        (("--sampler=edm", "--S_churn=1e300"), 1, "S_churn = 1e+300 is invalid"),
        (("--sampler=edm", "--S_min=2", "--S_max=1"), 1, "S_min = 2 is above S_max = 1"),
        (("--sampler=restart", "--restart_gamma=1e9"), 1, "restart_gamma = 1e+09 is invalid"),
        (("--sampler=euler", "--guidance_rate=inf"), 2, "inf is not a finite number"),
        (("--sampler=euler", "--sigma_max=nan"), 2, "nan is not a finite number"),
        (("--sampler=restart", "--restart_info={"), 1, "not valid JSON"),
        (("--predictor_path=7",), 1, "no run 7 in exps"),
        (("--predictor_path=no/such.safetensors",), 1, "no predictor at no/such"),
    ],
)
def test_invalid_options_end_in_one_sentence_and_write_nothing(
    run: Script, tmp_path: Path, arguments: tuple[str, ...], code: int, sentence: str
) -> None:
    for dry in ((), ("-n",)):
        done = run(*arguments, *dry)
        assert done.code == code and sentence in done.err
        assert "Traceback" not in done.err and done.out == ""
        assert code == 2 or (done.err.startswith("error: ") and done.err.count("\n") == 1)
    assert list(tmp_path.iterdir()) == []


def test_killed_and_continued_by_two_processes_is_as_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the bundled network, in float64, whose rounding no pixel can see."""
    arguments = ["--sampler=euler", "--num_steps=3", "--seeds=0-7", "--dtype=float64"]
    killed = tmp_path / "killed"
    one = (*arguments, "--batch=1", "--device=cpu", f"--outdir={killed}")
    process = start(lambda: run_command(sample.main, *one), tmp_path / "log")
    while process.is_alive() and len(images(killed)) < 3:
        time.sleep(0.005)
    process.kill()
    process.join()
    assert 3 <= len(images(killed)) < 8
    assert RunRecord.read(killed / "run.json").plan["nfe_metered"] is None
    both = (*arguments, "--device=cpu", f"--outdir={killed}")
    done = together(lambda: run_command(sample.main, *both), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    said = "".join(rank.out for rank in done)
    spoken = re.findall(r"(\d+) images made \((\d+) were there already\)", said)
    assert len(spoken) == 1 and sum(map(int, spoken[0])) == 8  # one speaks, each image made once
    with pytest.raises(SystemExit) as left, monkeypatch.context() as patch:
        whole = tmp_path / "whole"
        patch.setattr(sys, "argv", ["sample.py", *arguments, f"--outdir={whole}"])
        cli.run(sample.main)
    assert left.value.code == 0
    assert set(tree(killed)) == set(tree(whole)) and images(killed) == images(whole)
    assert len(images(whole)) == 8 and len(set(images(whole).values())) == 8
    records = [RunRecord.read(folder / "run.json") for folder in (killed, whole)]
    assert records[0].plan == records[1].plan and records[0].plan["nfe_metered"] == 2
    assert [record.options["world_size"] for record in records] == [2, 1]
