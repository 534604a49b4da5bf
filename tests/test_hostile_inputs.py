"""Other people's files that ask for too much or mean nothing: one sentence each, at once."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from checkpoints.pickles.files import read
from checkpoints.snapshots import read_weights
from denoisers.convert import convert
from denoisers.families.diffusers.files import describe_diffusers
from denoisers.nets.openai import UNet
from denoisers.recognise import describe
from image_data.raw.files import open_files
from image_data.sources import ImageSource
from restart.intervals import parse_restart_info
from runtime.errors import UserError, shortened
from runtime.record import RunRecord
from tests.attacks import VALUES, attack_json, survives
from tests.denoiser_problems import SONG, network
from tests.test_arrays import encrypted
from tests.test_convert_bombs import peak
from tests.test_convert_hostile import bare, glob, put
from tests.test_denoisers_adm import SMALL

DEEP = "[" * 10**5 + "]" * 10**5
NESTED = "[" * 500 + "]" * 500


#: A persistent object, as EDM's networks are, with settings and nothing else.
STATE = b"}" + put("_init_args") + b")" + put("_init_kwargs") + b"}"
EMPTY_NETWORK = (
    glob("torch_utils.persistence", "_reconstruct_persistent_obj")
    + b"(}" + b"(" + put("type") + put("class") + put("class_name") + put("X") + put("state")
    + b"}(" + STATE[1:] + b"u" + b"utR"
)  # fmt: skip


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    began, before = time.process_time(), peak()
    yield
    assert time.process_time() - began < 20 and peak() - before < 300


@pytest.mark.parametrize("deep", [DEEP, NESTED])
def test_deep_json_is_one_sentence(deep: str, tmp_path: Path) -> None:
    weights, record = tmp_path / "x.safetensors", tmp_path / "run.json"
    index = tmp_path / "model_index.json"
    save_file({"a": torch.zeros(2)}, weights, {"config": f'{{"a": {deep}}}'})
    record.write_text(deep)
    index.write_text(f'{{"unet": {deep}}}')
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", png(4, 4))
        archive.writestr("dataset.json", f'{{"labels": {deep}}}')
    uses: tuple[Callable[[], object], ...] = (
        lambda: parse_restart_info(f'{{"0": {deep}}}'),
        lambda: read_weights(weights),
        lambda: RunRecord.read(record),
        lambda: describe_diffusers("mine", tmp_path),
        lambda: ImageSource(tmp_path / "images.zip").labels(),
        lambda: open_files(tmp_path / "images.zip").__enter__(),
    )
    for use in uses:
        with pytest.raises(ValueError, match="nested more than 64 deep"):
            use()


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    data = buffer.getvalue()
    header = b"IHDR" + struct.pack(">2I", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def zipped(path: Path, content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("side", [9000, 13_000, 2**31 - 1])
@pytest.mark.filterwarnings("error")
def test_image_bombs_are_refused(side: int, tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": png(side, side)})
    sentence = "a.png in .* cannot be read .*(pixels are more than|decompression bomb)"
    with ImageSource(path) as source, pytest.raises(ValueError, match=sentence):
        source.read(0)


def unknown_method(path: Path) -> None:
    data = path.read_bytes()
    for mark, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.find(mark)
        data = data[: at + place] + b"\x63\x00" + data[at + place + 2 :]
    path.write_bytes(data)


@pytest.mark.parametrize("pack", [encrypted, unknown_method])
def test_zips_that_cannot_be_unpacked(pack: Callable[[Path], None], tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": png(4, 4)})
    pack(path)
    with ImageSource(path) as source, pytest.raises(ValueError, match="a.png in .* cannot be read"):
        source.read(0)
    with open_files(path) as dataset, pytest.raises(ValueError):  # noqa: PT011 (of any sentence)
        next(iter(dataset.items)).load()


def test_a_file_that_would_unpack_to_gigabytes(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.zip", {"a.png": png(4, 4)})
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = b"\xf0\xff\xff\x7f"
    path.write_bytes(data)
    with ImageSource(path) as source, pytest.raises(ValueError, match="would unpack to more than"):
        source.read(0)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({}, path, {"config": "{}"})
    with pytest.raises(UserError, match="x.safetensors holds no weights; give another copy"):
        describe("mine", path)


def settings_survive(path: Path, tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Every setting with every value, in the metadata of a file that is right otherwise."""
    save_file(tensors, path, {"config": json.dumps(config)})
    describe("mine", path)
    for name in config:
        for value in (*VALUES, 10**6, 10**9):
            save_file(tensors, path, {"config": json.dumps({**config, name: value})})
            survives(lambda: describe("mine", path), f"{name} = {str(value)[:50]}")


def test_settings_of_guided_diffusion(tmp_path: Path) -> None:
    net = UNet(**{**SMALL, "num_head_channels": 8, "out_channels": 3})
    config = {"image_size": 8, "num_head_channels": 8, "num_heads": 4, "attention": "new"}
    settings_survive(tmp_path / "x.safetensors", net.state_dict(), {**config, "dropout": 0.1})


def test_settings_of_edm(tmp_path: Path) -> None:
    net = network(SONG)
    config = {**SONG, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "label_dim": 0}
    settings_survive(tmp_path / "x.safetensors", net.state_dict(), config)


INDEX = {
    "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
    "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
}  # fmt: skip
PIPELINE: dict[str, dict[str, Any]] = {
    "model_index.json": INDEX,
    "unet/config.json": {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
        "block_out_channels": [8, 16], "cross_attention_dim": 16,
    },
    "vae/config.json": {"block_out_channels": [8, 16], "layers_per_block": 1},
    "text_encoder/config.json": {"num_hidden_layers": 2, "vocab_size": 1000},
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINE)
def test_settings_of_pipelines(name: str, tmp_path: Path) -> None:
    for file, content in PIPELINE.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    assert describe_diffusers("mine", tmp_path).image_resolution == 16
    attack_json(tmp_path / name, lambda: describe_diffusers("mine", tmp_path), 300)


@pytest.mark.parametrize(
    ("file", "setting", "value"),
    [
        ("unet/config.json", "layers_per_block", 10**9),
        ("unet/config.json", "layers_per_block", [2, 10**9]),
        ("unet/config.json", "block_out_channels", [8] * 1001),
        ("unet/config.json", "block_out_channels", [10**9, 8]),
        ("unet/config.json", "sample_size", 10**5),
        ("text_encoder/config.json", "num_hidden_layers", 101),
        ("vae/config.json", "block_out_channels", [8] * 9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
    ],
)
def test_a_pipeline_that_would_be_built_without_an_end(
    file: str, setting: str, value: Any, tmp_path: Path
) -> None:
    for name, content in PIPELINE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        changed = {**content, setting: value} if name == file else content
        (tmp_path / name).write_text(json.dumps(changed))
    with pytest.raises(UserError):
        describe_diffusers("mine", tmp_path)


def test_long_names_are_shortened_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"n" * 10**6: torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"holds '?n{200,400}\.\.\.") as caught:
        describe("mine", path)
    assert len(str(caught.value)) < 1000 and "give --model_family" in str(caught.value)
    words = " ".join(["word"] * 10**5)
    assert len(shortened(words)) < 2100 and shortened("/a" * 150) == "/a" * 150


@pytest.mark.parametrize(
    "payload",
    [
        glob("torch.nn.modules.container", "Sequential") + b")\x81",
        b"}" + put("model") + glob("torch.nn.modules.container", "Sequential") + b")\x81s",
        EMPTY_NETWORK,
        b"}" + put("ema") + EMPTY_NETWORK + b"s",
        b"}",
    ],
)
def test_nothing_is_converted_where_there_are_no_weights(payload: bytes, tmp_path: Path) -> None:
    path, target = tmp_path / "x.pkl", tmp_path / "y.safetensors"
    path.write_bytes(bare(payload))
    with pytest.raises(UserError, match="x.pkl (holds no weights by name|holds a X without weig)"):
        convert(read(path), path, target)
    assert not target.exists()
