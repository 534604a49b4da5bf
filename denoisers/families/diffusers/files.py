"""Pipelines of ``diffusers`` on disk: their settings, and the files of their weights.

Settings are JSON and a ``.ckpt`` is read as data: whether a pipeline is supported, and its noise
levels, are known without loading it, even if ``diffusers`` is not installed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from checkpoints.snapshots import read_weights
from denoisers.cards import Card
from denoisers.families.diffusers.kinds import ENCODERS, check_kind, transformer_card
from denoisers.families.diffusers.process import discrete_schedule
from denoisers.families.diffusers.sizes import check_sizes, upsampling, whole
from runtime.bounds import MOST_LAYERS, MOST_SIDE
from runtime.errors import UserError
from runtime.files import require_readable, sha256_file
from runtime.typed import parse_json

INDEX = "model_index.json"
EPSILON_T = 1e-3  #: smallest time that samplers use (arXiv:2206.00927, section 5)
#: Components that are neither fetched nor loaded.
UNWANTED = ("safety_checker", "feature_extractor", "image_encoder")
UNETS = ("UNet2DModel", "UNet2DConditionModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
#: Before the weights of CLIP in a single file: of Stable Diffusion 1, 2 and XL.
TEXT_ENCODER_NAMES = (
    "cond_stage_model.transformer.text_model.",
    "cond_stage_model.model.",
    "conditioner.",
)
FIRST_STAGES = ("vae", "vqvae")
#: Components with weights, in the order in which they are loaded.
WEIGHTED = (
    "unet", "transformer", *FIRST_STAGES, "text_encoder", "text_encoder_2", "text_encoder_3",
)  # fmt: skip
SINGLE = (".safetensors", ".ckpt")


def is_diffusers(path: str | Path) -> bool:
    """Whether ``path`` is the folder of a pipeline, or one file with a pipeline's weights.

    A file is recognised by its text encoder, which no other family here has.
    """
    path = Path(path)
    if path.is_dir():
        return (path / INDEX).is_file()
    return any(name.startswith(TEXT_ENCODER_NAMES) for name in _names(path))


def _names(path: Path) -> Iterable[str]:
    """The names of the tensors in a single file; none if it is something else, or not safe."""
    try:
        if path.suffix == ".safetensors":
            require_readable(path)
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        if path.suffix == ".ckpt":
            return list(read_weights(path)[0])
    except (FileNotFoundError, SafetensorError, UserError):
        pass
    return ()


def settings_folder(main: Path) -> Path:
    """The folder with the settings: ``main`` itself, or the parent of a single file.

    Raises UserError if it does not exist, or holds no pipeline.
    """
    if main.is_dir():
        if not (main / INDEX).is_file():
            raise UserError(
                f"{main} is no pipeline of diffusers: it has no {INDEX}; give the folder that "
                "save_pretrained wrote"
            )
        return main
    if not main.is_file() or main.suffix not in SINGLE:
        raise UserError(
            f"{main} is no pipeline of diffusers; give a folder, or a {' or '.join(SINGLE)} file"
        )
    if not (main.parent / INDEX).is_file():
        raise UserError(
            f"{main} holds weights without settings: put {INDEX} and the folders unet, vae, "
            "scheduler, text_encoder and tokenizer of its repository beside it (their .json and "
            ".txt files are enough)"
        )
    return main.parent


def read_json(path: Path) -> dict[str, Any]:
    """A settings file; UserError if it is missing or no JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, so the pipeline is not complete; copy it anew"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no JSON file ({error}); copy it anew") from error
    content = parse_json(text, str(path), "copy it anew")
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; copy it anew")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a network; UserError as `read_json`, and for sizes that no network has."""
    content = read_json(folder / "config.json")
    check_sizes(content, f"{folder / 'config.json'}: its settings")
    return content


def component_folder(folder: Path, name: str) -> Path:
    """The folder of a component: old unconditional pipelines have all files in one folder."""
    return folder / name if (folder / name).is_dir() else folder


def describe_diffusers(name: str, path: Path, given: Mapping[str, Any] | None = None) -> Card:
    """The card of a pipeline in a folder, or in a single file with its settings beside it.

    ``given`` are settings of the user for a pipeline with a transformer.  The weights are not
    loaded.  Raises UserError for anything that is no pipeline, and for one that is not supported,
    naming the setting.
    """
    folder = settings_folder(path)
    index = read_json(folder / INDEX)
    parts, kind = component_classes(index, str(path)), str(index.get("_class_name"))
    if "transformer" in parts:
        check_kind(kind, str(path))
        _check_encoders(parts, ENCODERS, str(path))
    scheduler: Mapping[str, Any] = {}
    if "scheduler" in parts:
        scheduler = read_json(component_folder(folder, "scheduler") / "scheduler_config.json")
    networks = {n: read_config(component_folder(folder, n)) for n in WEIGHTED if n in parts}
    stage = networks.get(first_stage(parts) or "", {})
    if "transformer" in parts:
        network = networks["transformer"]
        card = transformer_card(name, kind, network, scheduler, stage, given or {}, str(path))
    elif given:
        raise UserError(f"{path} holds all settings of its network: leave --model_settings out")
    else:
        card = pipeline_card(name, parts, networks.get("unet", {}), scheduler, stage, str(path))
    return replace(card, file=path.name)


def component_classes(index: Mapping[str, Any], source: str) -> dict[str, str]:
    """The class of every component in an index, except those that are not needed.

    These names decide which classes are imported, so only those of two libraries are accepted.
    """
    parts: dict[str, str] = {}
    for name, entry in index.items():
        if name in UNWANTED or not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue  # a missing component, or a setting
        library, kind = entry
        if library not in ("diffusers", "transformers"):
            raise UserError(
                f"{source}: the component '{name}' comes from {library!r}, and code that comes "
                "with a pipeline is not run; give one that diffusers knows"
            )
        parts[name] = kind
    return parts


def first_stage(parts: Mapping[str, Any]) -> str | None:
    """Name of the component that decodes latents; None if samples are images."""
    return next((name for name in FIRST_STAGES if name in parts), None)


def pipeline_card(
    name: str,
    parts: Mapping[str, str],
    unet: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    stage: Mapping[str, Any],
    source: str,
) -> Card:
    """The card of a pipeline with components of the classes ``parts``.

    ``unet``, ``scheduler`` and ``stage`` are settings; ``stage`` is empty if samples are images.
    Raises UserError for a pipeline that is not supported; ``source`` names it in the message.
    """
    _check_parts(parts, source)
    _check_unet(unet, source)
    side = unet["sample_size"] if isinstance(unet["sample_size"], int) else unet["sample_size"][0]
    text = parts["unet"] == "UNet2DConditionModel"
    noise, schedule = discrete_schedule(scheduler, source)
    low, high = schedule.sigma(torch.tensor([EPSILON_T, 1.0], dtype=torch.float64)).tolist()
    return Card(
        name=name,
        family="diffusers",
        resolution=side,
        channels=unet["in_channels"],
        label_dim=0,
        sigma_min=low,
        sigma_max=high,
        bottleneck="mid_block",
        guidance="cfg" if text else None,
        text=text,
        noise_schedule=noise,
        image_resolution=side * upsampling(stage, source) if stage else None,
    )


def _check_parts(parts: Mapping[str, str], source: str) -> None:
    if parts.get("unet") not in UNETS:
        raise UserError(
            f"{source}: its network is {parts.get('unet')!r}, and only {', '.join(UNETS)} and "
            "transformers are supported"
        )
    encoders = _check_encoders(parts, TEXT_ENCODERS, source)
    if ("text_encoder" in parts) != (parts["unet"] == "UNet2DConditionModel"):
        raise UserError(
            f"{source}: {parts['unet']} with the text encoders {encoders} is not supported: a "
            "UNet2DConditionModel takes a prompt, a UNet2DModel nothing"
        )


def _check_encoders(parts: Mapping[str, str], known: Collection[str], source: str) -> list[str]:
    """The classes of the text encoders; UserError for one that is not ``known``."""
    encoders = [kind for name, kind in parts.items() if name.startswith("text_encoder")]
    for kind in encoders:
        if kind not in known:
            raise UserError(
                f"{source}: text encoder {kind!r} is not supported, only {', '.join(known)} are"
            )
    return encoders


def _check_unet(unet: Mapping[str, Any], source: str) -> None:
    """Raise UserError for a network with other inputs than an image, a time and a prompt."""

    def refuse(what: str, why: str) -> None:
        raise UserError(f"{source}: the network's {what} = {unet.get(what)!r} {why}")

    size = unet.get("sample_size")
    sides = size if isinstance(size, list | tuple) else [size]
    if not sides or any(side != sides[0] for side in sides):
        refuse("sample_size", "is no square; only square images are supported")
    if not all(type(side) is int and 1 <= side <= MOST_SIDE for side in sides):
        refuse("sample_size", f"is no whole number from 1 to {MOST_SIDE}")
    whole(unet, "in_channels", MOST_LAYERS, source)
    if unet.get("in_channels") != unet.get("out_channels"):
        refuse("out_channels", f"differs from in_channels = {unet.get('in_channels')}")
    for what in ("num_class_embeds", "class_embed_type", "time_cond_proj_dim", "encoder_hid_dim"):
        if unet.get(what) is not None:
            refuse(what, "asks for a condition that is not supported")
    if unet.get("addition_embed_type") not in (None, "text_time"):
        refuse("addition_embed_type", "asks for a condition that is not supported")


def weight_files(main: Path) -> list[Path]:
    """The files with the weights to be loaded, sorted; variants (``*.fp16.*``) are ignored.

    Safetensors are preferred to other files of the same component, as in ``diffusers``.
    """
    if main.is_file():
        return [main]
    parts = component_classes(read_json(main / INDEX), str(main))
    folders = {component_folder(main, name) for name in WEIGHTED if name in parts}
    return sorted(file for folder in folders for file in component_files(folder))


def component_files(folder: Path) -> list[Path]:
    """The files with the weights of one component; UserError where there are none."""
    whole = sorted(p for p in folder.iterdir() if "." not in p.stem)
    for suffix in (".safetensors", ".bin"):
        files = [p for p in whole if p.suffix == suffix]
        if files:
            return files
    raise UserError(f"{folder} has no weights, so the pipeline is not complete; copy it anew")


def sha256_pipeline(main: Path) -> str:
    """The hash of a single file; for a folder, of the lines ``<path> <hash>`` of its weights."""
    if main.is_file():
        return sha256_file(main)
    digest = hashlib.sha256()
    for file in weight_files(main):
        digest.update(f"{file.relative_to(main).as_posix()} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
