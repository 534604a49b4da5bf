"""fid.py gen: the figures of sample.py and fid.py calc without the images between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from commands import fid, sample
from denoisers.cards import cards
from denoisers.registry import ModelSource
from evaluation import passes
from metrics.detectors import load_detector
from metrics.summary import FeatureSummary
from runtime import cli
from runtime.record import RunRecord
from samplers import job
from tests.processes import run_command, together
from tests.sampler_models import GaussianModel
from tests.scripts import Done, Script

ROOT = Path(__file__).resolve().parent.parent
SMALL = "cifar10-small"
IPNDM = ("--sampler=ipndm", "--nfe=5", "--afs=True")
PIXELS = ("--detector=pixels", "--ref=ref.npz")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script) -> Script:
    """A script in a folder with a reference, with a closed form in the place of the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AMED_CACHE", str(tmp_path / "cache"))
    model = GaussianModel(cards()[SMALL])
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)

    def call(module: Any, *arguments: object) -> Done:
        return script(module.main, *arguments, "--device=cpu")

    (tmp_path / "data").mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(90, 255, (12, 32, 32, 3))):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / f"data/{i:02}.png")
    made = call(fid, "ref", "--data=data", "--detector=pixels", "--features=12", "--dest=ref.npz")
    assert made.code == 0, made.err
    return call


def tree(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def summary(path: Path, detector: str = "pixels") -> FeatureSummary:
    return FeatureSummary.load(path, load_detector(detector, device="cpu"))


def distance(one: FeatureSummary, two: FeatureSummary) -> float:
    """The largest difference of means, covariances and kept features; of N as well."""
    a, b = one.moments, two.moments
    parts = [np.abs(a.mean - b.mean).max(), np.abs(a.cov - b.cov).max(), abs(a.n - b.n)]
    if one.features is not None and two.features is not None:
        parts.append((one.features - two.features).abs().max().item())
    return float(max(parts))


def test_figures_are_those_of_images_on_disk(run: Script, tmp_path: Path) -> None:
    before = tree(tmp_path)
    measured = (*PIXELS, "--metrics=fid,kid,pr,dc", "--features=9", "--seed=2")
    done = run(
        fid, "gen", *IPNDM, "--seeds=0-12,20", "--batch=4", *measured, "--json=gen.json",
        "--dest=gen.npz",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert tree(tmp_path) - before == {"gen.json", "gen.npz"}  # not an image, nothing kept
    run(sample, *IPNDM, "--seeds=0-12,20", "--outdir=x", "--batch=14")
    assert run(fid, "calc", "--images=x", *measured, "--json=calc.json").code == 0
    run(fid, "ref", "--data=x", "--detector=pixels", *measured[2:], "--dest=x.npz")
    made, wanted = (json.loads(Path(f"{name}.json").read_text()) for name in ("gen", "calc"))
    assert made["n"] == 14 and made["features_n"] == 9
    for key in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert made[key] == pytest.approx(wanted[key], abs=1e-12), key
    assert f"FID {wanted['fid']:.6g}  (detector pixels, N = 14)" in done.out
    assert distance(summary(tmp_path / "gen.npz"), summary(tmp_path / "x.npz")) < 1e-12
    record, images = made["record"], RunRecord.read(tmp_path / "x/run.json")
    assert record["command"] == "fid gen" and record["model"] == images.model
    assert record["plan"] == images.plan and record["plan"]["nfe_metered"] == 5
    wanted_options = {
        "seeds": "0-12,20",
        "metrics": "fid,kid,pr,dc",
        "outdir": None,
        "dest": ["gen.npz"],
    }
    assert wanted_options.items() <= record["options"].items()
    again = run(fid, "calc", "--images=x", "--detector=pixels", "--ref=gen.npz")
    assert float(again.out.split()[1]) < 1e-8


def test_a_bundled_reference_is_for_every_bundled_detector(run: Script, tmp_path: Path) -> None:
    both = f"--detector={SMALL},{SMALL}-resnet"
    done = run(fid, "gen", *IPNDM, "--seeds=0-12", both, "--json=both.json", "--outdir=x")
    assert done.code == 0, done.err
    one, two = json.loads(Path("both.json").read_text())["results"]
    assert one["reference"]["n"] == two["reference"]["n"] == 50_000 and one["fid"] != two["fid"]
    for measured, name in ((one, SMALL), (two, f"{SMALL}-resnet")):
        assert measured["detector"]["name"] == name
        done = run(fid, "calc", "--images=x", f"--detector={name}", "--json=one.json")
        assert done.code == 0, done.err
        assert json.loads(Path("one.json").read_text())["fid"] == pytest.approx(measured["fid"])
    for other in ("test", "converged"):
        flags = (both, f"--ref={SMALL}-{other}", f"--json={other}.json")
        assert run(fid, "calc", "--images=x", *flags).code == 0
        found = json.loads(Path(f"{other}.json").read_text())["results"]
        assert [result["reference"]["n"] for result in found] == [10_000, 10_000]
        assert {result["fid"] for result in found}.isdisjoint({one["fid"], two["fid"]})
    done = run(fid, "calc", "--images=x", "--detector=pixels", f"--ref={SMALL}-converged")
    sentence = f"bundled for {SMALL}, {SMALL}-resnet, not for detector pixels"
    assert done.code == 1 and sentence in done.err


def killed_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """``generate`` that dies after so many batches, and the seeds that it made."""
    made: list[int] = []

    def mortal(*given: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(generate(*given, **options)):
            if number == batches:
                raise KeyboardInterrupt
            made.extend(batch.seeds)
            yield batch

    generate = job.generate
    monkeypatch.setattr(job, "generate", mortal)
    return made


@pytest.mark.parametrize("keep", [False, True])
def test_a_killed_run_goes_on(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    common = ("gen", *IPNDM, "--seeds=0-12", *PIXELS, "--features=9")
    assert run(fid, *common, "--dest=whole.npz", "--batch=3").code == 0
    images = ("--outdir=x",) if keep else ()
    with monkeypatch.context() as patch:
        patch.setattr(passes, "SAVE_EVERY", -1.0)
        first = killed_after(2, patch)
        done = run(fid, *common, *images, "--dest=made.npz", "--batch=3")
    assert done.code == 130 and first == [0, 1, 2, 3, 4, 5] and not Path("made.npz").exists()
    lost = [4] if keep else []
    for seed in lost:
        Path(f"x/{seed:06}.png").unlink()
    second = killed_after(99, monkeypatch)
    done = run(fid, *common, *images, "--dest=made.npz", "--batch=2")
    assert done.code == 0 and "continuing after 6 of 13 images" in done.err
    assert second == [*lost, *range(6, 13)]
    assert distance(summary(tmp_path / "whole.npz"), summary(tmp_path / "made.npz")) < 1e-10
    assert tree(tmp_path / "cache") == set()
    if keep:
        run(sample, *IPNDM, "--seeds=0-12", "--outdir=y")
        assert tree(tmp_path / "x") == tree(tmp_path / "y")
        for name in tree(tmp_path / "y") - {"run.json"}:
            assert Path("x", name).read_bytes() == Path("y", name).read_bytes()
        assert RunRecord.read("x/run.json").plan["nfe_metered"] == 5
        assert (
            "0 images made (13 were there" in run(sample, *IPNDM, "--seeds=0-12", "--outdir=x").out
        )


def test_other_settings_start_anew(run: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(passes, "SAVE_EVERY", -1.0)
        killed_after(2, patch)
        assert run(fid, "gen", *IPNDM, "--seeds=0-9", *PIXELS, "--batch=3").code == 130
    for other in (("--seeds=0-8,10",), ("--seeds=0-9", "--sigma_min=0.01"),
                  ("--seeds=0-9", "--dtype=float64")):  # fmt: skip
        done = run(fid, "gen", *IPNDM, *other, *PIXELS)
        assert done.code == 0 and "continuing" not in done.err
    assert "continuing" in run(fid, "gen", *IPNDM, "--seeds=0-9", *PIXELS, "--batch=5").err


def test_two_processes_gather_what_one_gathers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the bundled network, in float64, whose rounding no pixel can see."""
    arguments = [
        "gen", "--sampler=euler", "--num_steps=3", "--seeds=0-4", "--dtype=float64", "--ref=none",
        "--detector=cifar10-small,pixels", "--features=3", "--device=cpu",
    ]  # fmt: skip
    dest = f"--dest={tmp_path / 'a2.npz'},{tmp_path / 'b2.npz'}"
    done = together(lambda: run_command(fid.main, *arguments, dest, "--batch=4"), tmp_path)
    assert [rank.code for rank in done] == [0, 0], done
    assert [rank.out.count("wrote") for rank in done] == [2, 0]
    dest = f"--dest={tmp_path / 'a1.npz'},{tmp_path / 'b1.npz'}"
    monkeypatch.setattr(sys, "argv", ["fid.py", *arguments, dest, "--batch=3"])
    with pytest.raises(SystemExit) as left:
        cli.run(fid.main)
    assert left.value.code == 0
    for name, detector in (("a", SMALL), ("b", "pixels")):
        one, two = (summary(tmp_path / f"{name}{i}.npz", detector) for i in (1, 2))
        assert one.moments.n == 5 and one.kept == 3
        assert distance(one, two) < 1e-10


def test_a_dry_run_prints_the_record_and_touches_nothing(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a dry run loads no model")

    monkeypatch.setattr(ModelSource, "load", never)
    before = tree(tmp_path)
    done = run(fid, "gen", "-n", "--sampler=restart", "--nfe=43", "--outdir=x")
    assert done.code == 0, done.err
    record = RunRecord.from_json(done.out)
    assert record.plan["nfe_planned"] == 43 and record.plan["nfe_metered"] is None
    assert record.options["seeds"] == "0-1999" and record.options["outdir"] == "x"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give --predictor_path or --sampler"),
        ((*IPNDM, "--seeds=4"), "--seeds 4 is one image, statistics need two"),
        ((*IPNDM, "--ref=none"), "--ref none measures nothing: give --dest"),
        ((*IPNDM, "--ref=none", "--dest=x.npz", "--json=x.json"), "--ref none measures nothing"),
        ((*IPNDM, "--dest=x"), "--dest x has to end in .npz"),
        ((*IPNDM, "--subdirs"), "--subdirs requires images on disk: add --outdir"),
        ((*IPNDM, "--metrics=is"), "unknown metric 'is'"),
        ((*IPNDM, "--detector=pixels"), "is bundled for cifar10-small, cifar10-small-resnet, not"),
        ((*IPNDM, *PIXELS, "--metrics=sfid", "--outdir=x"), "hold no spatial moments"),
        (("--sampler=heun", "--nfe=5"), "exactly 5 NFE: give 4 or 6"),
    ],
)
def test_nonsense_is_one_sentence_and_writes_nothing(
    run: Script, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    before = tree(tmp_path)
    done = run(fid, "gen", *arguments)
    assert (done.code, done.out) == (1, "") and sentence in done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert tree(tmp_path) == before


def test_a_detector_that_does_not_take_the_images_says_so_before_the_work(
    run: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GaussianModel()  # of 4x4 images
    monkeypatch.setattr(ModelSource, "load", lambda *_: model)
    before = tree(tmp_path)
    done = run(fid, "gen", *IPNDM, "--outdir=x")
    assert done.code == 1 and "takes 32x32 images, got 4x4" in done.err
    assert tree(tmp_path) == before and model.calls == []


def test_every_option_of_the_samplers_is_there() -> None:
    theirs, ours = ({o.name: o for o in command.params} for command in (sample.main, fid.gen))
    assert set(theirs) - set(ours) == {"grid", "return_inters"}
    assert all(ours[name] is theirs[name] for name in set(theirs) & set(ours) - {"outdir"})
