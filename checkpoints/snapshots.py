"""The contents of published checkpoints: networks, predictors and plain weights.

All pickles are read by :func:`checkpoints.pickles.files.read`, which runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from checkpoints.pickles.files import read
from checkpoints.pickles.records import Record, is_scalar, shown
from checkpoints.weights import own_storages, read_config, read_safetensors
from runtime.errors import UserError

PERSISTENT = "torch_utils.persistence"
NETWORK_KEYS = ("ema", "net")  #: of a snapshot; of a training state
PREDICTOR_KEYS = ("model",)
PREDICTOR_CLASS = "AMED_predictor"
#: Positional arguments of the published preconditionings; all others are given by name.
POSITIONAL = ("img_resolution", "img_channels", "label_dim", "use_fp16")
MOST_LETTERS = 5_000_000  #: of all names in a network; those of 1000 layers have 100,000
MOST_LEVELS = 32
LONGEST_LIST = 1000


@dataclass(frozen=True)
class EDMSnapshot:
    """A network of the EDM family."""

    config: dict[str, Any]  #: constructor settings and ``class_name``, for :func:`precond.build`
    tensors: dict[str, Tensor]  #: under their published names, which begin with ``model.``


@dataclass(frozen=True)
class PublishedPredictor:
    """A predictor as published by the AMED authors (``network-snapshot-*.pkl``)."""

    settings: dict[str, Any]  #: ``dataset_name``, ``num_steps``, ``sampler_stu``, ...
    tensors: dict[str, Tensor]


def read_edm(path: str | Path) -> EDMSnapshot:
    """The network in a snapshot or a training state: its ``ema``, else its ``net``.

    Raises UserError if there is none, and as :func:`read` does.
    """
    return find_network(read(path), str(path))


def is_network(content: Any) -> bool:
    """Whether a file holds a network, a valid one or not, for :func:`find_network`."""
    return _object(content, NETWORK_KEYS) is not None


def find_network(content: Any, source: str) -> EDMSnapshot:
    """The network in a result of :func:`read`; ``source`` names the file in errors."""
    record = _object(content, NETWORK_KEYS)
    if record is None:
        raise UserError(
            f"{source} holds no network of the EDM family ({_summary(content)}); give a snapshot "
            "or a training state of one"
        )
    if record.name == PREDICTOR_CLASS:
        raise UserError(f"{source} holds a predictor, not a network; give it as --predictor_path")
    config = {"class_name": record.name, **_constructor(record, source)}
    config.pop("use_fp16", None)  # the precision is chosen when the network is loaded
    attributes = _attributes(record)
    if "D" in attributes:  # PFGM++ sets it on the network, not as a constructor setting
        config["D"] = attributes["D"]
    tensors = flattened(record, source)
    if not tensors:
        raise UserError(f"{source} holds a {shown(record.name)} without weights; fetch it again")
    return EDMSnapshot(config, tensors)


def is_predictor(content: Any) -> bool:
    """Whether a file holds a predictor, for :func:`find_predictor`."""
    record = _object(content, PREDICTOR_KEYS)
    return record is not None and record.name == PREDICTOR_CLASS


def read_predictor(path: str | Path) -> PublishedPredictor:
    """A published predictor; UserError if the file holds something else."""
    return find_predictor(read(path), str(path))


def find_predictor(content: Any, source: str) -> PublishedPredictor:
    """The predictor in a result of :func:`read`; ``source`` names the file in errors."""
    record = _object(content, PREDICTOR_KEYS)
    if record is None or record.name != PREDICTOR_CLASS:
        what = f"a {shown(record.name)}" if record else _summary(content)
        raise UserError(
            f"{source} holds no predictor ({what}); give a network-snapshot-*.pkl of the AMED "
            "authors"
        )
    settings = {**_constructor(record, source), **_attributes(record)}
    return PublishedPredictor(settings, flattened(record, source))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file by name, and the settings of their network, empty if not stored.

    Raises UserError for a file without weights, and as :func:`read` and :func:`read_config` do.
    """
    if path.suffix != ".safetensors":
        return find_tensors(read(path), str(path)), {}
    tensors, metadata = read_safetensors(path)
    if not tensors:
        raise UserError(f"{path} holds no weights; give another copy of it")
    return tensors, read_config(metadata, path) or {}


def as_safetensors(files: Iterable[Path], target: Path) -> Path:
    """``target``, made to hold the weights in these files, for libraries that unpickle themselves.

    A small pickle can take all memory there.  Raises UserError for what `read_weights` refuses.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_weights(file)[0]
    save_file(own_storages(tensors), target, {"format": "pt"})
    return target


def find_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The weights in a result of :func:`read`; ``source`` names the file in errors.

    In a dict with other entries they are those under ``ema``, ``state_dict`` or ``model``.  Raises
    UserError if there are none.
    """
    members: list[Any] = [content]
    if type(content) is dict:
        members += [content.get(key) for key in ("ema", "state_dict", "model")]
        _, ema, _, model = members
        if type(ema) is dict and type(model) is dict and "shadow_params" in ema:
            return _averaged(model, ema["shadow_params"], source)
    for candidate in members:
        is_object = type(candidate) is Record
        named = flattened(candidate, source) if is_object else _tensors(candidate)
        if named:
            return named
    raise UserError(
        f"{source} holds no weights by name ({_summary(content)}); give a checkpoint that does"
    )


def _averaged(model: dict[Any, Any], shadows: Any, source: str) -> dict[str, Tensor]:
    """The average that score-SDE stores as a bare list, under the names of its parameters.

    The list lacks buffers and frozen parameters, which come first in ``model``.  Names are matched
    in order, by shape; every average must match a name, and the last name must match an average.
    """
    left: list[Any] = list(reversed(shadows)) if type(shadows) is list else [None]
    named: dict[str, Tensor] = {}
    for name, tensor in _tensors(model).items():
        if not left:
            raise UserError(
                f"{source} has {len(shadows)} averaged weights, too few for its model; fetch it "
                "again"
            )
        if type(left[-1]) is Tensor and left[-1].shape == tensor.shape:
            tensor = left.pop()
        named[name.removeprefix("module.")] = tensor
    if left:
        raise UserError(
            f"{source} has {len(left)} averaged weights that match no parameter of its model; "
            "fetch it again"
        )
    return named


def _tensors(value: Any) -> dict[str, Tensor]:
    """The entries of a dict that are tensors with a name; none of anything else."""
    return {k: v for k, v in _named(value).items() if type(v) is Tensor}


def flattened(record: Record, source: str) -> dict[str, Tensor]:
    """Parameters and persistent buffers under dotted names, in the order of ``state_dict()``.

    Raises UserError for modules that hold each other: a small file can name them without an end.
    """
    out: dict[str, Tensor] = {}
    waiting, left = [("", record)], MOST_LETTERS
    while waiting:
        prefix, module = waiting.pop()
        parameters, buffers, children = (
            _named(module.state.get(f"_{kind}")) for kind in ("parameters", "buffers", "modules")
        )
        left -= sum(len(prefix) + len(name) + 1 for name in (*parameters, *buffers, *children))
        if left < 0 or prefix.count(".") > MOST_LEVELS:
            raise UserError(
                f"{source} holds a network that is nested without an end; fetch it again"
            )
        passing = module.state.get("_non_persistent_buffers_set")
        unsaved = passing if type(passing) is set else set()
        kept = {k: v for k, v in _tensors(buffers).items() if k not in unsaved}
        out |= {f"{prefix}{name}": t for name, t in {**_tensors(parameters), **kept}.items()}
        inner = [(f"{prefix}{k}.", v) for k, v in children.items() if type(v) is Record]
        waiting += reversed(inner)
    return out


def _named(value: Any) -> dict[str, Any]:
    """The entries of a dict that have a name; none of anything else."""
    return {k: v for k, v in value.items() if type(k) is str} if type(value) is dict else {}


def _object(content: Any, keys: tuple[str, ...]) -> Record | None:
    """The persistent object that is the content, or its entry under the first of these keys."""
    members = [content.get(key) for key in keys] if type(content) is dict else [content]
    return next((m for m in members if type(m) is Record and m.module == PERSISTENT), None)


def _constructor(record: Record, source: str) -> dict[str, Any]:
    """The constructor arguments of an object, as JSON values."""
    args, kwargs = (record.state.get(f"_init_{kind}") for kind in ("args", "kwargs"))
    args, kwargs = args or (), kwargs or {}
    if type(args) not in (tuple, list) or type(kwargs) is not dict or len(args) > len(POSITIONAL):
        raise UserError(
            f"{source} has no constructor arguments of its {shown(record.name)}; fetch it again"
        )
    settings = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
    for name, value in settings.items():
        if type(name) is not str or not _is_plain(value):
            kind = type(value).__name__
            raise UserError(f"{source} has a {kind} as the setting '{shown(name)}'; fetch it again")
    return {k: list(v) if type(v) is tuple else v for k, v in settings.items()}


def _attributes(record: Record) -> dict[str, Any]:
    plain = {k: v for k, v in _named(record.state).items() if _is_plain(v)}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k != "training"}


def _is_plain(value: Any) -> bool:
    """A scalar, or a short list of scalars."""
    if type(value) in (list, tuple):
        return len(value) <= LONGEST_LIST and all(map(is_scalar, value))
    return is_scalar(value)


def _summary(content: Any) -> str:
    """A short description of other content, for an error message."""
    if type(content) is not dict:
        kind = content.name if type(content) is Record else type(content).__name__
        return f"it holds a {shown(kind)}"
    names = [shown(key) for key in list(content)[:6]]
    return f"its keys: {', '.join(names) or 'none'}"
