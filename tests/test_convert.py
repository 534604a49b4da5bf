"""Published checkpoints of every form read as data; damaged ones end in one sentence."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from checkpoints.pickles.files import read
from checkpoints.pickles.records import Record, Reference
from checkpoints.snapshots import find_tensors, read_edm, read_weights
from checkpoints.weights import read_safetensors
from denoisers.cards import Card, cards
from denoisers.convert import convert
from denoisers.families.precond import build
from denoisers.registry import load_model
from runtime.errors import UserError
from tests.published import (
    SOURCE,
    Persistent,
    module_state,
    network,
    pickled,
    pretended,
    snapshot,
)  # fmt: skip
from tools.convert import main

TINY: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 4,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
CONFIG = {"class_name": "EDMPrecond", **TINY}


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {k: v + 0.0 for k, v in build(CONFIG).state_dict().items()}


def net(**attributes: Any) -> Persistent:
    return network("EDMPrecond", TINY | {"use_fp16": False}, weights(), **attributes)


def saved(content: Any, zipped: bool = True) -> bytes:
    """What ``torch.save`` writes, in its present or its older format."""
    buffer = io.BytesIO()
    with pretended():
        torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fresh folder, in which nothing that a file carries has left a trace."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "module_src_was_run").exists()


# ---------------------------------------------------------------------- networks of the EDM family


@pytest.mark.parametrize("numpy", [1, 2])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_snapshots_of_every_protocol(protocol: int, numpy: int, tmp_path: Path) -> None:
    path = tmp_path / "network-snapshot.pkl"
    content = snapshot(net(sigma_min=0.0, sigma_max=float("inf"), D=np.int64(2048), layers=[1, 2]))
    path.write_bytes(pickled(content, protocol, numpy))
    assert SOURCE.strip()[:20].encode() in path.read_bytes()
    found = read_edm(path)
    # use_fp16 is dropped; D is an attribute of the network
    assert found.config == CONFIG | {"D": 2048}
    assert equal(found.tensors, weights())
    assert type(found.config["D"]) is int
    others = read(path)["dataset_kwargs"]
    assert others["mean"].tolist() == [0, 1, 2] and others["none"].shape == (0, 2)
    loss = read(path)["loss_fn"]
    assert (loss.name, loss.state["P_mean"]) == ("EDMLoss", -1.2)


@pytest.mark.parametrize(
    "write",
    [
        lambda n: pickled(n),
        lambda n: pickled({"ema": n, "net": Persistent("Other", **module_state({}))}),
        lambda n: saved({"net": n, "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}}}),
        lambda n: saved({"ema": n, "step": 7}),
        lambda n: saved({"ema": n}, zipped=False),
    ],
    ids=["bare", "ema before net", "training state", "zip", "older format"],
)
def test_networks_are_found_in_every_container(
    write: Callable[[Any], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(write(net()))
    found = read_edm(path)
    assert found.config == CONFIG and equal(found.tensors, weights())


def test_positional_settings_get_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    settings = {"model_type": "SongUNet", "channel_mult": (1, 2)}
    path.write_bytes(pickled(network("VPPrecond", settings, {"w": torch.ones(2)}, 64, 3, 10, True)))
    assert read_edm(path).config == {
        "class_name": "VPPrecond", "img_resolution": 64, "img_channels": 3, "label_dim": 10,
        "model_type": "SongUNet", "channel_mult": [1, 2],
    }  # fmt: skip


def test_layers_of_torch_keep_their_names(tmp_path: Path) -> None:
    """Real modules, as pickle writes them, against their own ``state_dict``."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 3, 1), nn.SiLU(), nn.BatchNorm2d(3))
    blocks = nn.ModuleDict({"4x4": block, "tied": block[0]})
    blocks.register_buffer("table", torch.arange(3), persistent=False)
    blocks.register_buffer("kept", torch.arange(4).half())
    state = module_state({})
    state["_modules"]["enc"] = blocks
    path = tmp_path / "x.pkl"
    path.write_bytes(pickled(Persistent("Net", **state, _init_args=(), _init_kwargs={})))
    expected = {f"enc.{k}": v for k, v in blocks.state_dict().items()}
    assert equal(read_edm(path).tensors, expected)


def test_recorded_network_through_pickle_and_conversion(
    golden: Any, golden_json: Any, tmp_path: Path
) -> None:
    """The published pickle, and what the tool makes of it, denoise as recorded."""
    stored, io_ = golden("net_edm_song_weights"), golden("net_edm_song_io")
    settings = {"img_resolution": 32, "img_channels": 3}
    settings |= golden_json("net_configs")["edm_song"]["kwargs"]
    tensors = {k: torch.tensor(stored[k]) for k in stored.files}
    source, target = tmp_path / "snapshot.pkl", tmp_path / "made" / "mine.safetensors"
    source.write_bytes(pickled(snapshot(network("EDMPrecond", settings, tensors)), numpy=1))
    arguments = [str(source), str(target), "--name", "theirs"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    card_file = target.with_suffix(".card.json")
    assert result.output == f"wrote {target}\nwrote {card_file}\n"
    assert sorted(p.name for p in target.parent.iterdir()) == ["mine.card.json", "mine.safetensors"]
    (name, entry), *more = json.loads(card_file.read_text()).items()
    card = Card(name=name, **entry)
    assert (name, more, card.file, card.shape) == ("theirs", [], target.name, (3, 32, 32))
    metadata = read_safetensors(target)[1]
    assert json.loads(metadata["config"]) == card.config
    assert metadata["bottleneck_module"] == card.bottleneck == "8x8_block0"
    x, sigma = torch.tensor(io_["x_0"]), torch.tensor(io_["sigmas"][0])
    for path in (source, target):
        out = load_model("mine", device="cpu", model_path=path).bind()(x, sigma)
        assert float((out.x0 - torch.tensor(io_["D_0"])).abs().max()) < 1e-5


def test_converted_weights_are_held_against_the_hash_on_their_card(tmp_path: Path) -> None:
    source, target = tmp_path / "x.pkl", tmp_path / "mine.safetensors"
    source.write_bytes(pickled(snapshot(net())))
    _, card = convert(read(source), source, target)
    load_model("mine", device="cpu", model_path=target)
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.write_bytes(content)
    with pytest.raises(UserError, match=r"SHA-256 .* where mine.card.json beside it says"):
        load_model("mine", device="cpu", model_path=target)
    for damaged in ("[]", '{"mine": 3}', "{"):
        card.write_text(damaged)
        with pytest.raises(UserError, match=re.escape(str(card))):
            load_model("mine", device="cpu", model_path=target)
    card.unlink()  # without a card there is nothing to hold them against
    load_model("mine", device="cpu", model_path=target)


def test_conversion_under_a_published_name(tmp_path: Path) -> None:
    """The card is the published one, with this file; weights of another size are refused."""
    source, target = tmp_path / "x.pkl", tmp_path / "y.safetensors"
    settings = {"img_resolution": 64, "img_channels": 3, "model_type": "SongUNet"}
    settings |= {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    state = build({"class_name": "EDMPrecond", **settings}).state_dict()
    source.write_bytes(pickled(snapshot(network("EDMPrecond", settings, state))))
    convert(read(source), source, target, "ffhq")
    entry = json.loads(target.with_suffix(".card.json").read_text())["ffhq"]
    assert entry["restart_info"] == cards()["ffhq"].restart_info
    assert entry["config"] == {"class_name": "EDMPrecond", **settings}
    assert (entry["file"], entry["url"]) == (target.name, None)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"\(3, 64, 64\) with 0 classes where 'cifar10'"):
        convert(read(source), source, tmp_path / "z.safetensors", "cifar10")
    with pytest.raises(UserError, match="give it the suffix .safetensors"):
        convert(read(source), source, tmp_path / "z.pt")
    source.write_bytes(pickled(snapshot(network("EDMPrecond", {"img_resolution": 8}, state))))
    with pytest.raises(UserError, match="has settings that make no network"):
        convert(read(source), source, tmp_path / "z.safetensors")
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


# ----------------------------------------------------------------------------------- plain weights


def plain() -> dict[str, Any]:
    """Every dtype; views, transposes, shared and empty storages; parameters."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    return {
        **{f"of.{str(kind)[6:]}": (10 * base).to(kind) for kind in kinds},
        "base": base,
        "transposed": base.T,
        "column": base[1:, 3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "parameter": nn.Parameter(base[:2]),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_weights_as_torch_reads_them(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(saved(plain(), zipped))
    found = read_weights(path)[0]
    assert equal(found, torch.load(path, weights_only=True))
    target = tmp_path / "x.safetensors"
    assert convert(read(path), path, target) == [target]  # of no family that we know: no card
    again = read_weights(target)[0]  # in another order
    assert equal({k: again[k] for k in found}, found) and len(again) == len(found)
    other = str(tmp_path / "y.safetensors")
    result = CliRunner().invoke(main, [str(path), other], catch_exceptions=False)
    assert "no card: say with --name which published model" in result.output


def test_rows_of_one_storage(tmp_path: Path) -> None:
    """A storage may have any number of tensors, none of which takes memory of its own."""
    path = tmp_path / "x.pt"
    rows = list(torch.arange(3000.0).reshape(1000, 3))
    path.write_bytes(saved(rows))
    found = read(path)
    assert all(map(torch.equal, found, rows)) and len(found) == 1000
    assert {row.untyped_storage().data_ptr() for row in found} == {
        found[0].untyped_storage().data_ptr()
    }


def test_other_values_become_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    content = {
        "devices": [torch.device("cpu"), torch.device("mps", 1)],
        "counts": Counter("aab"),
        "factory": defaultdict(list, a=1),
        "frozen": frozenset({1, "a"}),
        "bytes": (b"", b"\xff", bytearray(b"a")),
        "size": torch.Size([2, 3]),
        "half a character": "\ud800?",
        "keys": {("a", "b"): 1, 2**40: 2, 0.5: 3, None: 4, b"": 5},
        "scalars": [np.int64(2**40), np.float32(0.5), np.bool_(True)],
    }
    expected: dict[str, Any] = content | {"devices": ["cpu", "mps:1"], "half a character": "??"}
    for protocol in range(2, 6):
        path.write_bytes(pickled(content, protocol))
        found = read(path)
        assert found == expected
        assert [type(x) for x in found["scalars"]] == [int, float, bool]
    path.write_bytes(pickled([torch.float16, slice(1, 2, None), complex(1, 2)], 2))
    kind, part, number = read(path)
    assert kind == Reference("torch", "float16")
    assert (part.name, part.args, number.name) == ("slice", (1, 2, None), "complex")


def test_weights_are_unwrapped(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    good = {"a.weight": torch.ones(2), "a.bias": torch.zeros(1)}
    module = nn.Linear(2, 1)  # a state_dict has metadata set as an attribute of its dict
    forms: list[tuple[Any, dict[str, Tensor]]] = [
        (good, good),
        ({"state_dict": good, "epoch": 3, "lr": torch.device("mps", 0)}, good),
        ({"model": good, "optimizer": {"state": {}}}, good),
        ({"ema": good, "model": {"a.weight": torch.zeros(2)}}, good),
        ({**good, "num_updates": 7}, good),
        (module.state_dict(), dict(module.state_dict())),
    ]
    for content, expected in forms:
        path.write_bytes(saved(content))
        assert equal(read_weights(path)[0], expected)
    nothing: list[Any] = [{}, {"state_dict": {}}, [torch.ones(1)], {1: torch.ones(1)}, {"model": 3}]
    for content in nothing:
        path.write_bytes(saved(content))
        with pytest.raises(UserError, match="holds no weights by name"):
            read_weights(path)[0]


def test_lightning_checkpoints_hold_records(tmp_path: Path) -> None:
    """Callbacks and settings become records; their classes need not exist."""

    class ModelCheckpoint:
        def __init__(self, best: float) -> None:
            self.best_model_score, self.dirpath = torch.tensor(best), np.float32(best)

    class AttributeDict(dict[str, Any]): ...

    ModelCheckpoint.__qualname__, AttributeDict.__qualname__ = "ModelCheckpoint", "AttributeDict"
    weight = {"model.diffusion_model.out.weight": torch.ones(3)}
    content = {
        "state_dict": weight,
        "callbacks": {ModelCheckpoint: {"best": 1}},
        "objects": [ModelCheckpoint(0.5)],
        "hyper_parameters": AttributeDict(lr=1e-4),
        "optimizer_states": [{"state": {0: {"step": 1}}, "betas": (0.9, 0.999), "seen": {3}}],
    }
    buffer = io.BytesIO()
    names = {
        "pytorch_lightning__callbacks__model_checkpoint": {"a": ModelCheckpoint},
        "pytorch_lightning__utilities__parsing": {"a": AttributeDict},
    }
    with pretended(**names):
        torch.save(content, buffer)
    path = tmp_path / "lsun_bedrooms.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("lsun/config.yaml", "model: {}")
        made.writestr("lsun/model.ckpt", buffer.getvalue())
    assert equal(read_weights(path)[0], weight)
    assert equal(find_tensors(read(path, "model.ckpt"), "x"), weight)
    found = read(path)
    name = Reference("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    assert found["callbacks"] == {name: {"best": 1}}
    (record,) = found["objects"]
    assert type(record) is Record and (record.module, record.name) == (name.module, name.name)
    assert record.state == {"best_model_score": torch.tensor(0.5), "dirpath": 0.5}
    assert found["hyper_parameters"] == {"lr": 1e-4}
    optimizer = {"state": {0: {"step": 1}}, "betas": (0.9, 0.999), "seen": {3}}
    assert found["optimizer_states"] == [optimizer]
    with pytest.raises(UserError, match="not one other.ckpt but 0 among"):
        read(path, "other.ckpt")
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("first.ckpt", saved({"x": torch.ones(1)}))
    assert list(find_tensors(read(path, "first.ckpt"), "x")) == ["x"]
    with pytest.raises(UserError, match="not one checkpoint but 2 among"):
        read(path)


def test_score_sde_averages_find_their_names(golden_json: Any, tmp_path: Path) -> None:
    """The list lacks the Fourier frequencies and the table of noise levels."""
    path = tmp_path / "checkpoint_8.pth"
    named = {
        name: shape for name, shape in golden_json("net_ncsnpp_meta")["ncsnpp_cifar"]["params"]
    }
    model = {"module.sigmas": torch.zeros(1000), "module.table": torch.zeros(7, 5)}
    model |= {f"module.{name}": torch.zeros(shape) for name, shape in named.items()}
    trained = [name for name in named if name != "all_modules.0.W"]
    shadows = [torch.full(named[name], float(i + 1)) for i, name in enumerate(trained)]
    ema = {"decay": 0.9999, "num_updates": 10, "shadow_params": shadows}
    content = {"optimizer": {}, "model": model, "ema": ema, "step": 8}
    path.write_bytes(saved(content))
    found = read_weights(path)[0]
    assert list(found) == ["sigmas", "table", *named]
    assert not found["table"].any() and not found["all_modules.0.W"].any()
    for i, name in enumerate(trained):
        assert torch.equal(found[name], shadows[i]), name
    ema["shadow_params"] = [*shadows, torch.ones(77)]
    path.write_bytes(saved(content))
    with pytest.raises(UserError, match="has 1 averaged weights that match no"):
        read_weights(path)[0]
    assert read(path)["ema"]["num_updates"] == 10
