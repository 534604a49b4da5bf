"""Pipelines on disk: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from denoisers.cards import Card
from denoisers.families.diffusers.files import describe_diffusers, is_diffusers, sha256_pipeline
from denoisers.families.diffusers.loading import fetch_pipeline, load_diffusers, require_diffusers
from denoisers.protocol import Files
from denoisers.recognise import recognise
from runtime.errors import UserError
from tests import tiny_pipeline
from tests.processes import python
from tests.test_convert_bombs import doubled, peak
from tests.test_convert_hostile import archive, called, glob, put

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return tiny_pipeline.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "sd"))


def load(main: Path, **changes: object):
    card = replace(describe_diffusers("mine", main), **changes)
    return load_diffusers(card, Files(main), torch.device("cpu"), torch.float32)


def settings_of(path: Path) -> Card:
    return replace(describe_diffusers("mine", path), file="")


def denoised(model) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.bind(None, 3.0, ["a cat"])(x, torch.tensor(0.8)).x0


def change(file: Path, **entries) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **entries}))


def test_a_single_file_is_the_folder_in_one(folder: Path) -> None:
    """Original checkpoint names, with the repository's settings beside the file."""
    whole = load(folder)
    main = folder / "v1.safetensors"
    save_file(tiny_pipeline.single_file(whole.pipe), main)
    for file in [*folder.rglob("model.safetensors"), *folder.rglob("diffusion_*.safetensors")]:
        file.unlink()
    assert is_diffusers(main) and settings_of(main) == settings_of(folder)
    one = load(main)
    assert float((denoised(one) - denoised(whole)).abs().max()) < 1e-6
    z = torch.randn(1, 4, 8, 8)
    assert float((one.decode(z) - whole.decode(z)).abs().max()) < 1e-6
    torch.save({"state_dict": load_file(main)}, main.with_suffix(".ckpt"))
    assert is_diffusers(main.with_suffix(".ckpt"))
    assert float((denoised(load(main.with_suffix(".ckpt"))) - denoised(whole)).abs().max()) < 1e-6
    weights = load_file(main)
    for name, sentence in (
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "lacks 'text_encoder.*bi",
        ),
        ("model.diffusion_model.out.2.bias", "does not load as a pipeline"),
    ):
        save_file({k: v for k, v in weights.items() if k != name}, main)
        with pytest.raises(UserError, match=sentence):
            load(main)
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match="holds weights without settings: put"):
        load(main)


def test_old_names_of_attention_weights_are_known(folder: Path) -> None:
    """The first published VAEs have them; the library translates."""
    before = load(folder).decode(torch.ones(1, 4, 8, 8))
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_file({tiny_pipeline._replace(k, old): v for k, v in load_file(file).items()}, file)
    assert torch.equal(load(folder).decode(torch.ones(1, 4, 8, 8)), before)


@pytest.mark.parametrize(
    ("file", "entries", "sentence"),
    [
        ("model_index.json", {"unet": ["os", "system"]}, "'unet' comes from 'os', and code that"),
        ("model_index.json", {"vae": ["mine", "Mine"]}, "the component 'vae' comes from 'mine'"),
        ("model_index.json", {"unet": ["diffusers", "Flux"]}, "its network is 'Flux', and only"),
        (
            "model_index.json",
            {"unet": [None, None], "transformer": ["diffusers", "DiT"]},
            "with a t",
        ),
        ("model_index.json", {"text_encoder": ["transformers", "T5"]}, "text encoder 'T5' is not"),
        (
            "model_index.json",
            {"text_encoder": [None, None]},
            "with the text encoders \\[\\] is not",
        ),
        ("model_index.json", {"_class_name": "NoSuch"}, "diffusers knows no pipeline 'NoSuch'"),
        ("unet/config.json", {"in_channels": 9}, "out_channels = 4 differs from in_channels = 9"),
        ("unet/config.json", {"sample_size": [8, 16]}, "sample_size = \\[8, 16\\] is no square"),
        ("unet/config.json", {"num_class_embeds": 5}, "num_class_embeds = 5 asks for a condition"),
        ("unet/config.json", {"addition_embed_type": "image"}, "addition_embed_type = 'image' ask"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "beta_schedule 'x' is not one"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "betas .*2.0.* make no noise sched"),
    ],
)
def test_a_pipeline_with_no_place_here_is_refused_by_name(folder, file, entries, sentence) -> None:
    change(folder / file, **entries)
    with pytest.raises(UserError, match=sentence) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_settings_are_named(folder: Path, tmp_path: Path) -> None:
    assert is_diffusers(folder) and not is_diffusers(tmp_path)
    with pytest.raises(UserError, match="has no model_index.json"):
        describe_diffusers("mine", tmp_path)
    with pytest.raises(UserError, match="is no pipeline of diffusers; give a folder"):
        describe_diffusers("mine", tmp_path / "absent")
    index = folder / "model_index.json"
    for text, sentence in (("{", "is not valid JSON"), ("[]", "holds no settings")):
        index.write_text(text)
        with pytest.raises(UserError, match=sentence):
            describe_diffusers("mine", folder)
    index.write_text("{}")
    with pytest.raises(UserError, match="its network is None"):
        describe_diffusers("mine", folder)
    (folder / "unet/config.json").unlink()
    index.write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(UserError, match="unet/config.json is missing, so the pipeline"):
        describe_diffusers("mine", folder)


def test_a_process_without_betas_is_refused(folder: Path) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(flow))
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        describe_diffusers("mine", folder)


@pytest.mark.parametrize("length", [None, 10**6])
def test_no_tokenizer_makes_more_tokens_than_its_encoder_takes(folder: Path, length) -> None:
    """One without a length has 10^30, which the library cannot pad to: it is no int32."""
    expected = denoised(load(folder))
    change(folder / "tokenizer/tokenizer_config.json", model_max_length=length)
    assert torch.equal(denoised(load(folder)), expected)


def test_weights_must_all_be_there_and_fit(folder: Path) -> None:
    weights = load_file(folder / UNET)
    text = folder / "text_encoder/model.safetensors"
    first = next(iter(sorted(load_file(text))))
    cases = [
        (UNET, {k: v for k, v in weights.items() if k != "conv_in.bias"}, "lacks 'conv_in.bias'"),
        (UNET, {**weights, "more": torch.zeros(1)}, "has 'more', which the network lacks"),
        (UNET, {**weights, "conv_in.bias": torch.zeros(3)}, "does not load as a pipeline"),
        (text, {k: v for k, v in load_file(text).items() if k != first}, f"lacks '{first}'"),
    ]
    for name, tensors, sentence in cases:
        kept = (folder / name).read_bytes()
        save_file(tensors, folder / name)
        with pytest.raises(UserError, match=sentence):
            load(folder)
        (folder / name).write_bytes(kept)
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:5000])
    with pytest.raises(UserError, match="does not load as a pipeline"):
        load(folder)
    (folder / UNET).unlink()
    with pytest.raises(UserError, match="unet has no weights, so the pipeline is not"):
        load(folder)


def test_another_models_pipeline_does_not_pass_for_a_known_one(folder: Path) -> None:
    for other in ({"resolution": 64}, {"text": False}, {"sigma_max": 80.0}):
        with pytest.raises(UserError, match="where 'mine' has .*choose the dataset it"):
            load(folder, **other)


def test_conditions_that_a_pipeline_does_not_take(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    with pytest.raises(UserError, match="'mine' has no classes"):
        model.bind(torch.tensor([1]), prompts=["a"])
    with pytest.raises(UserError, match="'mine' is conditioned on text; give --prompt"):
        model.bind()
    plain = load(tiny_pipeline.unconditional(tmp_path / "ddpm"))
    with pytest.raises(UserError, match="takes no text"):
        plain.bind(prompts=["a cat"])
    with pytest.raises(UserError, match="has no guidance, but the rate is 7.5"):
        plain.bind(guidance_rate=7.5)


def test_the_hash_is_of_the_weights_that_are_loaded(folder: Path) -> None:
    before = sha256_pipeline(folder)
    shutil.copy(folder / UNET, (folder / UNET).with_suffix(".fp16.safetensors"))
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not read")
    (folder / "README.md").write_text("not read")
    assert sha256_pipeline(folder) == before == load(folder).sha256
    weights = load_file(folder / UNET)
    weights["conv_in.bias"][0] += 1
    save_file(weights, folder / UNET)
    assert sha256_pipeline(folder) != before


def test_weights_in_the_older_format(folder: Path) -> None:
    before = denoised(load(folder))
    torch.save(load_file(folder / UNET), (folder / UNET).with_suffix(".bin"))
    (folder / UNET).unlink()
    assert torch.equal(denoised(load(folder)), before)


#: Each under 1 kB.  Unpickled with ``weights_only=True``, the first takes years to hash its key,
#: the second 5.4 GB, and the library looks for the innermost dict of the third without an end.
BOMBS = {
    "time": b"}" + doubled(60) + b"Ns",
    "memory": called(glob("builtins", "bytearray"), put(5_400_000_000)),
    "a dict in itself": b"}q\x01" + put("state_dict") + b"h\x01s",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_take_neither_all_time_nor_all_memory(name: str, folder: Path) -> None:
    single, unet = folder / "v1.ckpt", (folder / UNET).with_suffix(".bin")
    for path in (single, unet):
        archive(BOMBS[name], path)
        assert path.stat().st_size < 1000
    (folder / UNET).unlink()
    card = describe_diffusers("mine", folder)
    require_diffusers()  # its import is not to be measured
    began, before = time.process_time(), peak()
    assert not is_diffusers(single)
    with pytest.raises(UserError, match="v1.ckpt (holds no weights|makes bytes|uses a tuple)"):
        recognise(single)
    for main, bad in ((single, single), (folder, unet)):
        with pytest.raises(UserError, match=f"{bad} (holds no weights|makes bytes|uses a tuple)"):
            load_diffusers(card, Files(main), torch.device("cpu"), torch.float32)
    assert time.process_time() - began < 10 and peak() - before < 500


def test_other_families_have_encoders_of_conditions_too(tmp_path: Path) -> None:
    """Latent diffusion conditioned on classes, as published, is no pipeline."""
    path = tmp_path / "cin.ckpt"
    for name, expected in (
        ("cond_stage_model.embedding.weight", False),
        ("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias", True),
        ("cond_stage_model.model.ln_final.weight", True),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", True),
    ):
        torch.save({"state_dict": {name: torch.ones(1)}}, path)
        assert is_diffusers(path) == expected


def test_the_hub_is_asked_once(original: Path, tmp_path: Path, monkeypatch) -> None:
    """What is whole is not fetched again, and altered weights are noticed."""
    import diffusers

    asked = []

    def download(repo, cache_dir, **left_out):
        asked.append(repo)
        assert "safety_checker" in left_out
        snapshot = cache_dir / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc"
        return str(shutil.copytree(original, snapshot))

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    main = fetch_pipeline("owner/name", tmp_path)
    assert fetch_pipeline("owner/name", tmp_path) == main and asked == ["owner/name"]
    assert load(main).sha256 == sha256_pipeline(original)
    weights = load_file(main / UNET)
    save_file({**weights, "conv_in.bias": weights["conv_in.bias"] + 1}, main / UNET)
    with pytest.raises(UserError, match="are not those that were fetched .*delete the"):
        load(main)


def test_without_a_connection_the_way_out_is_named(tmp_path: Path, monkeypatch) -> None:
    import diffusers

    def download(*args, **kwargs):
        raise OSError("no route to host\nand many lines more")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    with pytest.raises(UserError) as caught:
        fetch_pipeline("owner/name", tmp_path)
    assert str(caught.value) == (
        f"owner/name could not be fetched from https://huggingface.co/owner/name into {tmp_path} "
        "(no route to host): run again to carry on, or fetch it elsewhere and give its folder "
        "with --model_path"
    )
    assert not list(tmp_path.iterdir())


def test_without_the_extra_its_name_is_said(folder: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert describe_diffusers("mine", folder).text  # settings need no library
    with pytest.raises(UserError, match="need diffusers: pip install"):
        load(folder)


def test_nothing_slow_is_imported_before_it_is_used() -> None:
    """Neither the extra, nor PyTorch's compiler, which takes more than a second."""
    code = (
        "import sys, denoisers.families.diffusers.loading, samplers.in_diffusers\n"
        "import denoisers.registry, denoisers.cards, denoisers.families.precond, torch\n"
        "denoisers.registry.load_model('cifar10-small', device='cpu')\n"
        "with torch.device('meta'):\n"
        "    for card in denoisers.cards.cards().values():\n"
        "        if 'class_name' in card.config: denoisers.families.precond.build(card.config)\n"
        "slow = ('diffusers', 'transformers', 'torchvision', 'torch._dynamo')\n"
        "print([m for m in slow if m in sys.modules])"
    )
    done = python("-c", code)
    assert done.out.strip() == "[]", done.err
