"""Predictors in the form in which the AMED authors publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from amed.experiments import load_predictor
from amed.predictor import AMEDPredictor
from amed.settings import StudentSettings
from commands import sample
from denoisers.families.precond import build
from runtime.errors import UserError
from solvers.types import Node
from tests.published import SOURCE, network, pickled, predictor, snapshot
from tools.convert import main

NAMES = ("r", "scale_dir", "scale_time")
#: The attributes of the published module, as a CIFAR-10 run of iPNDM has them.
SETTINGS: dict[str, Any] = {
    "dataset_name": "cifar10",
    "img_resolution": 32,
    "num_steps": 4,
    "sampler_stu": "ipndm",
    "sampler_tea": "ipndm",
    "M": 2,
    "guidance_type": None,
    "guidance_rate": 0.0,
    "schedule_type": "polynomial",
    "schedule_rho": 7,
    "afs": True,
    "scale_dir": 0.01,
    "scale_time": 0.2,
    "max_order": 4,
    "predict_x0": False,
    "lower_order_final": True,
}


def weights(scale_dir: float = 0.01, scale_time: float = 0.2) -> dict[str, Tensor]:
    return AMEDPredictor(scale_dir, scale_time, seed=7).state_dict()


def write(path: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in (SETTINGS | changes).items() if v is not ...}
    path.write_bytes(predictor(weights() if tensors is None else tensors, kept))
    return path


@pytest.mark.parametrize("tag", ["dir0.01_time0.2_bias", "dir0.01_time0_init"])
def test_recorded_outputs_through_a_pickle(tag: str, golden: Any, tmp_path: Path) -> None:
    recorded = golden("predictor")
    prefix = f"{tag}|sd|"
    scale_time = 0.2 if "time0.2" in tag else 0
    tensors = {k[len(prefix) :]: torch.tensor(recorded[k]) for k in recorded.files if prefix in k}
    path = write(tmp_path / "network-snapshot-000010.pkl", tensors, scale_time=scale_time)
    assert SOURCE.encode() in path.read_bytes()  # the code is there, and is not what is read
    student = load_predictor(str(path), tmp_path)
    loaded, settings, record = student.predictor, student.settings, student.record
    assert (settings.scale_dir, settings.scale_time) == (0.01, scale_time)
    assert record.options["total_kimg"] == 10
    feat = torch.tensor(recorded["features"], dtype=torch.float32).reshape(4, 8, 8)
    x, checked = torch.zeros(4, 3, 8, 8), 0
    for i, (t, t_next) in enumerate(recorded["t_pairs"]):
        t, t_next = (torch.tensor(v, dtype=torch.float64) for v in (t, t_next))
        for name, value in zip(NAMES, loaded(Node(t, x, x, feat), t_next), strict=True):
            key = f"{tag}|f32|pair{i}|{name}"
            if key in recorded.files:
                expected = torch.tensor(recorded[key]).reshape(4, 1, 1, 1)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
                checked += 1
    assert checked == 6 * (3 if scale_time else 2)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_settings_and_weights_arrive(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot-000010.pkl"
    path.write_bytes(predictor(weights(), SETTINGS, protocol))
    student = load_predictor(str(path), tmp_path)
    loaded, settings, record = student.predictor, student.settings, student.record
    assert settings == StudentSettings(
        "cifar10", "ipndm", 4, 0.002, 80.0, "ipndm", 2, afs=True,
        scale_dir=0.01, scale_time=0.2, max_order=4, predict_x0=False,
    )  # fmt: skip
    assert settings.guidance_rate is None  # the published default rate of a model without guidance
    for name, tensor in weights().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert record.plan["nfe"] == settings.nfe() == 5
    assert (
        record == load_predictor(str(path), tmp_path).record
    )  # nothing depends on when it is read


def test_published_dpmpp_students_threshold(tmp_path: Path) -> None:
    """As the published solver does whenever it predicts x0."""
    for solver, x0, expected in (("dpmpp", True, True), ("dpmpp", False, False)):
        path = write(tmp_path / "a.pkl", sampler_stu=solver, predict_x0=x0, max_order=2)
        assert load_predictor(str(path), tmp_path).settings.thresholding is expected
    path = write(tmp_path / "b.pkl", sampler_stu="ipndm", predict_x0=True)
    assert load_predictor(str(path), tmp_path).settings.thresholding is False


def test_run_folders_give_the_latest_snapshot(tmp_path: Path) -> None:
    folder = tmp_path / "00027-cifar10-4-5-ipndm-ipndm-2-poly-afs"
    for kimg in (5, 20, 10):
        write(folder / f"network-snapshot-{kimg:06d}.pkl", M=kimg)
    (folder / "training_options.json").write_text("{}")
    for spec in ("27", str(folder)):
        student = load_predictor(spec, tmp_path)
        settings, record = student.settings, student.record
        assert (settings.M, record.options["total_kimg"]) == (20, 20)


def test_a_published_pair_samples(tmp_path: Path) -> None:
    """Network and predictor, both as pickles, give the images of the same two in our format."""
    settings = {"img_resolution": 32, "img_channels": 3, "model_type": "SongUNet"}
    settings |= {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    torch.manual_seed(0)
    net = build({"class_name": "EDMPrecond", **settings}).state_dict()
    net = {k: 0.1 * torch.randn_like(v) if k.endswith("weight") else v for k, v in net.items()}
    theirs, ours = [tmp_path / "network-snapshot-000010.pkl", tmp_path / "net.pkl"], []
    write(theirs[0])
    theirs[1].write_bytes(pickled(snapshot(network("EDMPrecond", settings, net))))
    for path in theirs:
        ours.append(path.with_suffix(".safetensors"))
        CliRunner().invoke(main, [str(path), str(ours[-1])], catch_exceptions=False)
    images = []
    for i, (guide, model) in enumerate([theirs, ours]):
        out = tmp_path / str(i)
        options = f"--predictor_path {guide} --model_path {model} --seeds 3-4 --outdir {out}"
        CliRunner().invoke(sample.main, [*options.split(), "--device=cpu"], catch_exceptions=False)
        images.append([path.read_bytes() for path in sorted(out.glob("*.png"))])
    assert images[0] == images[1]
    assert len(set(images[0])) == 2


def test_conversion_gives_what_train_writes(tmp_path: Path) -> None:
    source = write(tmp_path / "network-snapshot-000010.pkl")
    target = tmp_path / "00001-theirs" / "predictor.safetensors"
    result = CliRunner().invoke(main, [str(source), str(target)], catch_exceptions=False)
    assert result.output == f"wrote {target}\n"
    theirs, ours = load_predictor(str(source), tmp_path), load_predictor("1", tmp_path)
    assert (theirs.settings, theirs.record) == (ours.settings, ours.record)
    for name, tensor in theirs.predictor.state_dict().items():
        assert torch.equal(ours.predictor.state_dict()[name], tensor)
    assert not list(tmp_path.rglob("*.card.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "cifar11"}, "trained for 'cifar11'"),
        ({"dataset_name": ...}, "None as its setting 'dataset_name'"),
        ({"num_steps": "four"}, "'four' as its setting 'num_steps'"),
        ({"sampler_stu": "unipc"}, "invalid settings: unknown student 'unipc'"),
        ({"schedule_type": "cosine"}, "invalid settings: .*'cosine'"),
        ({"scale_time": 0.0}, "do not fit .*scale_time = 0;"),
    ],
)
def test_invalid_predictors_raise(changes: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "network-snapshot-000010.pkl", **changes)
    with pytest.raises(UserError, match=message):
        load_predictor(str(path), tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot-000001.pkl"
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")
    with pytest.raises(UserError, match="web page"):
        load_predictor(str(path), tmp_path)
    path.write_bytes(b"\x80\x04}.")  # an empty dict
    with pytest.raises(UserError, match="keys: none"):
        load_predictor(str(path), tmp_path)
    with pytest.raises(UserError, match="no predictor at .*nowhere.pkl"):
        load_predictor(str(tmp_path / "nowhere.pkl"), tmp_path)
