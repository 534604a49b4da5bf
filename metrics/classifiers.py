"""The networks of the bundled detectors by name, and their file format."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from metrics.cnn import STAGES, CNNConfig, FeatureClassifier, SmallCNN
from metrics.resnet import SmallResNet

NETWORKS: dict[str, type[FeatureClassifier]] = {"cnn": SmallCNN, "resnet": SmallResNet}
_MOST_REASON = 300  # characters of a library's message
_SCHEMA = 2  # files of schema 1 do not name their network, which is SmallCNN


def save_classifier(model: FeatureClassifier, path: Path, record: dict[str, object]) -> None:
    """Write weights and a JSON record; matrices and kernels are in float16."""
    tensors = {
        k: (v.half() if v.is_floating_point() and v.ndim > 1 else v).contiguous().cpu()
        for k, v in model.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    network = next(name for name, made in NETWORKS.items() if type(model) is made)
    header = {"schema": _SCHEMA, "network": network, "config": asdict(model.config), **record}
    save_file(tensors, path, metadata={"record": json.dumps(header)})


def load_classifier(path: Path) -> tuple[FeatureClassifier, dict[str, object]]:
    """Read a file of `save_classifier`: the network (float32, evaluation mode) and its record.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a detector or has a newer schema.
    """
    if not path.is_file():
        raise FileNotFoundError(f"detector file {path} does not exist: check the path.")
    with open(path, "rb"):  # safetensors calls a file that cannot be opened a missing one
        pass
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118
        if record["schema"] > _SCHEMA:
            raise ValueError(
                f"detector file {path} has schema {record['schema']}, this version reads up to "
                f"{_SCHEMA}: update the toolkit."
            )
        network = NETWORKS[record["network"] if record["schema"] > 1 else "cnn"]
        channels, classes = record["config"]["channels"], record["config"]["classes"]
        if len(channels) != STAGES:
            raise TypeError(f"its record has {len(channels)} widths, not {STAGES}")
        made = CNNConfig(tuple(channels), classes)
        with torch.device("meta"):
            count = sum(weight.numel() for weight in network(made).parameters())
        if count > sum(tensor.numel() for tensor in tensors.values()):
            raise TypeError(f"{count} weights are more than it holds")
        model = network(made)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as err:
        reason = " ".join(str(err).split())[:_MOST_REASON]
        raise ValueError(
            f"{path} is not a detector file of tools.train_detector ({reason}): "
            "pass a file written by it."
        ) from err
    differing = [k for k in missing if not k.endswith("num_batches_tracked")] + unexpected
    if differing:
        raise ValueError(
            f"detector file {path} does not fit its own record (tensor {differing[0]}): train it "
            "again with tools.train_detector."
        )
    return model.eval().requires_grad_(False), record
