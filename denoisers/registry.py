"""Load a model by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch

from denoisers.cards import Card, cards, check_converted
from denoisers.families.adm import load_adm
from denoisers.families.cm import load_cm
from denoisers.families.common import LoadedModel
from denoisers.families.diffusers.loading import fetch_pipeline, fetched_pipeline, load_diffusers
from denoisers.families.edm import load_edm
from denoisers.families.ldm import load_ldm
from denoisers.families.ncsnpp import load_ncsnpp
from denoisers.precision import DTYPES
from denoisers.protocol import Files, Model
from denoisers.recognise import describe
from denoisers.settings import parse_settings, weights_sha256
from runtime.dist import World
from runtime.errors import UserError
from runtime.files import cache_folder, download, is_cached
from runtime.job import NotFetched
from runtime.outputs import check_name

Loader = Callable[[Card, Files, torch.device, torch.dtype], LoadedModel]
FAMILIES: dict[str, Loader] = {
    "edm": load_edm,
    "adm": load_adm,
    "cm": load_cm,
    "ldm": load_ldm,
    "ncsnpp": load_ncsnpp,
    "diffusers": load_diffusers,
}
HUB = "hub:"  #: before the id of a folder on the Hugging Face hub


@dataclass(frozen=True)
class ModelSource:
    """Which model, its precision, and the source of its weights; fields are named as the flags."""

    dataset_name: str | None = None  #: of a card, or any other name for a custom model
    model_path: str | None = None  #: a local file or folder, or ``hub:owner/name``
    model_family: str | None = None  #: of a custom model; recognised from its files if None
    model_settings: str | None = None  #: JSON of settings that its file lacks
    companion_path: str | None = None  #: a local classifier (adm) or first stage (ldm)
    cache_dir: str | None = None  #: see :func:`runtime.files.cache_folder`
    dtype: str = "float32"  #: of the network, a key of `DTYPES`

    def named(self, name: str) -> ModelSource:
        """The same source, with ``name`` as the model if none was given."""
        return self if self.dataset_name else replace(self, dataset_name=name)

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the sampler's state: float64 for a float64 network, else float32."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def is_here(self) -> bool:
        """Whether the weights are on this machine, so that nothing has to be downloaded."""
        folder, path = cache_folder(self.cache_dir), self.model_path
        if path is not None:
            hub = path.startswith(HUB)
            return not hub or fetched_pipeline(path.removeprefix(HUB), folder) is not None
        card = self.card()
        return card.bundled is not None or is_cached(card.url or "", folder)

    @property
    def known_sha256(self) -> str | None:
        """Of the weights, if it is known without loading or downloading them."""
        if self.model_path is None:
            return self.card().sha256
        path = Path(self.model_path)
        settings = parse_settings(self.model_settings)
        return weights_sha256(path, settings) if path.is_file() else None

    def card(self) -> Card:
        """The registered card of this name, or one that describes the model at ``model_path``.

        Raises UserError for an unknown name without a ``model_path``, and for a missing file.
        """
        known = cards()
        if not (self.model_path or "").startswith(HUB):
            _existing(self.model_path, "--model_path")
        if self.dataset_name in known:
            card = known[self.dataset_name]
            if self.model_family not in (None, card.family):
                raise UserError(
                    f"{card.name!r} is of the family {card.family}, not {self.model_family}: leave "
                    "--model_family out, or give your model another name with --dataset_name"
                )
            if self.model_settings is not None:
                raise UserError(
                    f"{card.name!r} has its settings on its card: leave --model_settings out, or "
                    "give your model another name with --dataset_name"
                )
            return card
        if self.model_path is None:
            raise UserError(
                f"unknown dataset '{self.dataset_name}'; known: {', '.join(known)}; a model of "
                "your own takes any other name together with --model_path"
            )
        check_name("--dataset_name", str(self.dataset_name))
        return self._described

    @cached_property
    def _described(self) -> Card:
        """Cached, since the whole file has to be read."""
        path = self.model_path or ""
        if path.startswith(HUB):
            fetched = fetched_pipeline(path.removeprefix(HUB), cache_folder(self.cache_dir))
            if fetched is None:
                raise NotFetched(
                    f"--model_path {path} has not been downloaded, and {self.dataset_name!r} is "
                    "only known from its files: run once without --dry-run",
                    self.fetch,
                )
            path = str(fetched)
        own = _existing(path, "--model_path")
        assert own is not None
        settings = parse_settings(self.model_settings)
        return describe(str(self.dataset_name), own, self.model_family, settings)

    def files(self, card: Card) -> Files:
        """The files given by path, those bundled with the toolkit, or else downloaded ones.

        The companion of ``card`` is only downloaded together with its main file.
        """
        folder = cache_folder(self.cache_dir)
        main = self.fetch() or card.bundled
        companion = _existing(self.companion_path, "--companion_path")
        if companion is not None and card.companion is None:
            raise UserError(
                f"{card.name!r} has no second file: leave --companion_path {companion} out"
            )
        if main is not None:
            return Files(main, companion)
        if not card.url:
            raise UserError(
                f"{card.name!r} cannot be fetched from a script: get its {card.file} by hand from "
                "its authors' page and give it with --model_path"
            )
        if companion is None and card.companion is not None and card.companion["url"]:
            companion = _fetch(card.companion["url"], folder, card.companion["sha256"])
        return Files(_fetch(card.url or "", folder, card.sha256), companion)

    def load(self, here: World) -> Model:
        """The model on this process's device.

        Rank 0 goes first, because it may have to download files.  Raises UserError for an unknown
        dtype, and for weights that are missing, altered, or of another network.
        """
        return self._loaded(here)

    def load_compiled(self, here: World) -> Model:
        """As `load`, with the network compiled at its first call, for the shape of that batch.

        Raises UserError too where compiling is impossible, or was found not to pay.
        """
        check_compiler(here.device)
        model = self._loaded(here)
        model.network.compile()
        return model

    def _loaded(self, here: World) -> LoadedModel:
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype '{self.dtype}'; known: {', '.join(DTYPES)}")
        if here.device.type == "mps" and self.dtype == "float64":
            raise UserError("device 'mps' has no float64: use --dtype float32, or --device cpu")
        if not here.is_main:
            here.barrier()
        card = self.card()
        files = self.files(card)
        if here.is_main:
            here.barrier()
        for file in (files.main, files.companion):
            if file is not None:
                check_converted(file)
        return FAMILIES[card.family](card, files, here.device, DTYPES[self.dtype])

    def fetch(self) -> Path | None:
        """The file or folder at ``model_path``, downloaded from the hub if needed; on one rank."""
        if self.model_path is not None and self.model_path.startswith(HUB):
            return _fetch(self.model_path, cache_folder(self.cache_dir), None)
        return _existing(self.model_path, "--model_path")


def load_model(
    name: str,
    *,
    device: str | torch.device,
    dtype: str = "float32",
    model_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
) -> Model:
    """The model called ``name`` in a program of one process; see :meth:`ModelSource.load`."""
    source = ModelSource(
        name,
        None if model_path is None else str(model_path),
        cache_dir=None if cache_dir is None else str(cache_dir),
        dtype=dtype,
    )
    return source.load(World(0, 1, torch.device(device)))


def check_compiler(device: torch.device) -> None:
    """Raise UserError where ``torch.compile`` has no compiler, or where it was found not to pay."""
    if device.type != "cuda":
        raise UserError(
            f"--compile does not pay on device '{device}': on a CPU the bundled network was 0.93 "
            "to 1.00 times as fast at 64 images and 1.10 times at 16, after two minutes of "
            "compiling; leave it out, or give --device cuda"
        )
    if find_spec("triton") is None:
        raise UserError(
            "--compile needs triton, which makes the kernels of torch.compile on GPUs: pip install "
            "triton, or leave it out"
        )


def _existing(path: str | None, flag: str) -> Path | None:
    if path is not None and not Path(path).exists():
        raise UserError(f"no weights at {path}; check {flag}")
    return None if path is None else Path(path)


def _fetch(url: str, folder: Path, sha256: str | None) -> Path:
    if url.startswith(HUB):
        return fetch_pipeline(url.removeprefix(HUB), folder)
    return download(url, folder, sha256)
