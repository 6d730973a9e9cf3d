"""How fast z is drawn, beside generators that promise less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from meerkat.benchmarks.machine import describe, interleaved, seconds
from meerkat.zo.noise import NoiseKey, draw

__all__ = ["bench_noise"]


def bench_noise(mask_size: int = 100_000, repeats: int = 50) -> dict[str, Any]:
    """Median milliseconds of a draw of `mask_size` values, and values a second, for each kind.

    Beside them numpy's and torch's own float32 Gaussians, whose values depend on the version,
    the machine or the thread count.
    """
    numpy_generator = np.random.default_rng(0)
    torch_generator = torch.Generator().manual_seed(0)
    steps = count()
    runs: dict[str, Callable[[], object]] = {
        "gaussian": lambda: draw(NoiseKey(0, 0, next(steps)), mask_size, "gaussian"),
        "tabulated": lambda: draw(NoiseKey(0, 0, next(steps)), mask_size, "tabulated"),
        "rademacher": lambda: draw(NoiseKey(0, 0, next(steps)), mask_size, "rademacher"),
        "numpy": lambda: numpy_generator.standard_normal(mask_size, dtype=np.float32),
        "torch": lambda: torch.randn(mask_size, generator=torch_generator),
    }
    taken = interleaved({name: partial(seconds, run) for name, run in runs.items()}, repeats)
    figures: dict[str, Any] = {}
    for kind in ("gaussian", "tabulated", "rademacher"):
        figures[f"{kind}_milliseconds"] = taken[kind] * 1e3
        figures[f"{kind}_values_per_second"] = mask_size / taken[kind]
    for kind in ("gaussian", "tabulated", "rademacher"):
        for other in ("numpy", "torch"):
            figures[f"{kind}_over_{other}"] = taken[kind] / taken[other]
    return {
        **figures,
        "numpy_milliseconds": taken["numpy"] * 1e3,
        "torch_milliseconds": taken["torch"] * 1e3,
        "mask_size": mask_size,
        "repeats": repeats,
        "machine": describe(),
    }
