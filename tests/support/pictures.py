"""Tiny networks and pictures: the architecture of EfficientNet-Lite, files in the IDX format."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meerkat.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from meerkat.models.image_loading import Preparation

CLASSES = ("tench", "zero", "one, uno", "two", "crane", "crane")
LABELS = ("zero", "uno", "two")
"""Of the classes, those that stand for the labels 0, 1, 2."""
STAGES = [[3, 1, 1, 8, 1], [5, 2, 2, 12, 2]]


def save_tiny_network(folder: Path) -> Path:
    """A network as a user would have it, with statistics of batches as a trained one has."""
    torch.manual_seed(0)
    config = EfficientNetLiteConfig(
        STAGES, stem_width=8, head_width=16, id2label=dict(enumerate(CLASSES))
    )
    model = EfficientNetLite(config)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.2, 0.6)
    model.eval().save_pretrained(folder)
    Preparation(16, (0.5,) * 3, (0.5,) * 3).save_pretrained(folder)
    return folder


def drawn_pictures(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures of 12 pixels a side, brighter in a third that the label says."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(3, size=count).astype(np.uint8)
    pictures = draw.integers(60, size=(count, 12, 12)).astype(np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        picture[4 * label : 4 * label + 4] += 150
    return pictures, labels


def idx_bytes(values: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, values.ndim))
    return head + np.array(values.shape, ">u4").tobytes() + values.tobytes()


def write_idx(folder: Path, train: int = 60, test: int = 24) -> Path:
    """Files as MNIST has them: gzipped for training, plain for the test."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count, seed in (("train", train, 1), ("t10k", test, 2)):
        for what, values in zip(
            ("images-idx3", "labels-idx1"), drawn_pictures(count, seed), strict=True
        ):
            name, content = f"{prefix}-{what}-ubyte", idx_bytes(values)
            if prefix == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return folder


def recipe_of_pictures(folder: Path, **sections: Any) -> dict[str, Any]:
    """A short run over a network, data and a corpus that are made in a folder."""
    data = write_idx(folder / "data")
    network = save_tiny_network(folder / "network")
    recipe: dict[str, Any] = {
        "seed": 3,
        "model": {"name": str(network), "dtype": "float32"},
        "task": {
            "name": "custom",
            "source": str(data),
            "image": "image",
            "test_split": "test",
            "verbalizers": list(LABELS),
        },
        "mask": {"density": 0.1, "corpus": str(data), "batches": 3, "batch_size": 4},
        "federation": {"clients": 2, "rounds": 4, "batch_size": 4},
        "evaluation": {"examples": 12},
        "optimizer": {"learning_rate": 1e-2},
        "runtime": {"cache_dir": str(folder / "cache")},
    }
    for name, fields in sections.items():
        recipe[name] = {**recipe.get(name, {}), **fields}
    return recipe
