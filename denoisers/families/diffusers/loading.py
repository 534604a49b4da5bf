"""Loading pipelines of ``diffusers``: from a folder, a single file, or the hub."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from checkpoints.snapshots import as_safetensors
from checkpoints.weights import missing_entry, unknown_entry
from denoisers.cards import Card
from denoisers.families.diffusers.files import (
    INDEX,
    UNWANTED,
    WEIGHTED,
    component_classes,
    component_files,
    component_folder,
    describe_diffusers,
    first_stage,
    read_json,
    settings_folder,
    sha256_pipeline,
)
from denoisers.families.diffusers.kinds import ENCODERS
from denoisers.families.diffusers.model import DiffusersModel, from_pipeline
from denoisers.families.diffusers.one_step import TransformerModel, from_transformer_pipeline
from denoisers.precision import wide_dtype
from denoisers.protocol import Files
from denoisers.settings import with_settings
from runtime.errors import UserError, first_line
from runtime.files import write_text

MOST_TOKENS = 4096  #: of a prompt, where the encoder has no limit of its own
NOTE = "weights.sha256"  #: in a folder from the hub: it is whole, and its weights had this hash


def load_diffusers(
    card: Card, files: Files, device: torch.device, dtype: torch.dtype
) -> DiffusersModel | TransformerModel:
    """Load a folder, or a single file with its settings beside it; see :func:`registry.load_model`.

    Network and text encoders run in ``dtype``; the first stage in float32 at least, as that of SDXL
    overflows in half precision.  Raises UserError for weights that are missing or of another
    network, and for a pipeline with other samples or noise levels than the card's.
    """
    source = str(files.main)
    _check_card(card, describe_diffusers(card.name, files.main, card.settings), source)
    digest = sha256_pipeline(files.main)
    note = files.main / NOTE
    if note.is_file() and note.read_text().strip() != digest:
        raise UserError(
            f"the weights in {source} are not those that were fetched (their hash is "
            f"{digest[:12]}...): delete the folder and they will be fetched again"
        )
    diffusers = require_diffusers()
    with _quiet():
        try:
            pipe = _place(_read(diffusers, files.main), device, dtype)
            _limit_tokenizers(pipe)
        except UserError:
            raise
        except Exception as error:  # the libraries may raise anything for a damaged file
            raise UserError(
                f"{source} does not load as a pipeline ({first_line(error)}); copy it anew, or "
                "give one that diffusers itself loads"
            ) from error
    if "transformer" in pipe.components:
        digest = with_settings(digest, card.settings)
        return from_transformer_pipeline(pipe, card, digest)
    return from_pipeline(pipe, card, digest)


def fetched_pipeline(repo: str, folder: Path) -> Path | None:
    """Where an earlier `fetch_pipeline` put ``owner/name``, or None."""
    whole = sorted(folder.glob(f"models--{repo.replace('/', '--')}/snapshots/*/{NOTE}"))
    return whole[0].parent if whole else None


def fetch_pipeline(repo: str, folder: Path) -> Path:
    """Fetch ``owner/name`` from the Hugging Face hub into ``folder`` once; its folder.

    The hash of the weights is noted beside them, for every later load to check.  A transfer that
    broke is carried on.  Raises UserError without a connection.  Call it on one rank only.
    """
    fetched = fetched_pipeline(repo, folder)
    if fetched is not None:
        return fetched
    download = require_diffusers().DiffusionPipeline.download
    try:
        with _quiet():
            main = Path(download(repo, cache_dir=folder, **dict.fromkeys(UNWANTED)))
    except (OSError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{repo} could not be fetched from https://huggingface.co/{repo} into {folder} "
            f"({reason}): run again to carry on, or fetch it elsewhere and give its folder with "
            "--model_path"
        ) from error
    write_text(main / NOTE, sha256_pipeline(main))
    return main


def require_diffusers() -> ModuleType:
    """The library; UserError that names the extra if it is not installed."""
    try:
        import diffusers
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"pipelines of diffusers need {error.name}: pip install 'amed-toolkit[diffusion]'"
        ) from None
    return diffusers


def _check_card(card: Card, own: Card, source: str) -> None:
    """Raise UserError unless the samples and noise levels of ``own`` are those of ``card``."""
    same = (own.shape, own.text) == (card.shape, card.text)
    low, high = own.sigma_min / card.sigma_min, own.sigma_max / card.sigma_max
    if not same or abs(low - 1) + abs(high - 1) > 1e-2:
        kind = {True: "with text", False: "without text"}
        raise UserError(
            f"{source} has samples {own.shape} {kind[own.text]} at sigma {own.sigma_min:.4g} to "
            f"{own.sigma_max:.4g} where '{card.name}' has {card.shape} {kind[card.text]} at "
            f"{card.sigma_min:.4g} to {card.sigma_max:.4g}; choose the dataset it belongs to"
        )


def _read(diffusers: Any, main: Path) -> Any:
    """The pipeline on the CPU in float32, all of its weights from the files."""
    folder = settings_folder(main)
    index = read_json(folder / INDEX)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if pipeline is None:
        raise UserError(
            f"{main}: diffusers knows no pipeline {index.get('_class_name')!r}; install a version "
            "that does"
        )
    left_out: dict[str, Any] = {name: None for name in UNWANTED if name in index}
    if "requires_safety_checker" in index:
        left_out["requires_safety_checker"] = False
    if main.is_file():
        options = {"config": str(folder), "local_files_only": True, **left_out}
        with tempfile.TemporaryDirectory() as temporary:
            pickled = main.suffix != ".safetensors"
            file = as_safetensors([main], Path(temporary, "all.safetensors")) if pickled else main
            pipe = pipeline.from_single_file(str(file), **options)
        _check_whole(pipe, str(main))
        return pipe
    parts = component_classes(index, str(main))
    loaded = {
        name: _component(diffusers, kind, component_folder(main, name))
        for name, kind in parts.items()
        if name in WEIGHTED
    }
    safe = {"local_files_only": True, "use_safetensors": True}
    return pipeline.from_pretrained(main, **safe, **loaded, **left_out)


def _place(pipe: Any, device: torch.device, dtype: torch.dtype) -> Any:
    wide = wide_dtype(dtype)
    stage = first_stage(pipe.components)
    for name, part in pipe.components.items():
        if name in WEIGHTED and part is not None:
            part.to(device=device, dtype=wide if name == stage else dtype)
    return pipe


def _limit_tokenizers(pipe: Any) -> None:
    """Let no tokenizer make more tokens than its encoder has positions.

    A tokenizer without a length has 10^30, which the library cannot pad to.
    """
    for suffix in ("", "_2", "_3"):
        tokenizer = pipe.components.get(f"tokenizer{suffix}")
        encoder = pipe.components.get(f"text_encoder{suffix}")
        if tokenizer is not None and encoder is not None:
            positions = encoder.config.get_text_config().to_dict().get("max_position_embeddings")
            most = positions or MOST_TOKENS  # T5 has relative positions
            tokenizer.model_max_length = min(tokenizer.model_max_length, most)


def _component(diffusers: Any, kind: str, folder: Path) -> Any:
    """One network; UserError if names in its file are missing or unknown."""
    import transformers

    library = transformers if kind in ENCODERS else diffusers
    files = component_files(folder)
    with tempfile.TemporaryDirectory() as temporary:
        source = folder
        if files[0].suffix != ".safetensors":
            source = Path(shutil.copy(folder / "config.json", temporary)).parent
            weights = [f for f in files if "pytorch_model" in f.stem]
            name = "model" if library is transformers else "diffusion_pytorch_model"
            as_safetensors(weights, source / f"{name}.safetensors")
        part, report = getattr(library, kind).from_pretrained(
            source, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing:
        raise missing_entry(folder, missing[0])
    if unknown:
        raise unknown_entry(folder, unknown[0])
    return part


def _check_whole(pipe: Any, source: str) -> None:
    """Raise UserError for weights missing in a single file: they are left on the meta device."""
    for name, part in pipe.components.items():
        for key, weight in part.named_parameters() if name in WEIGHTED and part else ():
            if weight.is_meta:
                raise missing_entry(source, f"{name}.{key}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' messages and progress bars: what they warn of is an error here."""
    from diffusers.utils import logging as first
    from transformers.utils import logging as second

    before = [(x, x.get_verbosity(), x.is_progress_bar_enabled()) for x in (first, second)]
    for library, _, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bars in before:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
