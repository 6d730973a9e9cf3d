"""Methods of a comparison by name: settings of a recipe each, and the rates that are searched.

A method is a recipe, not a fork: what it sets is written here, what it computes is elsewhere. A
grid may add others, and may replace the rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from meerkat.comparison.results import FirstOrder

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """What a method is called, what it sets, and which learning rates are tried."""

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """By the field of a recipe, `section.field`."""
    rates: tuple[float | str, ...] = ("auto",)
    bound: FirstOrder | None = None
    """A first-order method, which is no run of ours."""
    source: str = ""
    """Who proposed it."""


_PLAIN = {"subspace.kind": "none"}
_SENSITIVE = {**_PLAIN, "mask.kind": "sensitivity"}
_ALL = {**_PLAIN, "mask.kind": "full"}
_LORA = {**_PLAIN, "mask.kind": "lora"}
_SENSITIVE_RATES = (3e-6, 1e-5, 3e-5, 1e-4)
_OTHER_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
"""Of masks whose coordinates the loss depends less on."""
_ALL_RATES = (1e-8, 1e-7, 3e-7, 1e-6)
_PAPER = "arXiv 2506.03337"


def _bounds(
    rule: Literal["fedavg", "fedavgm", "scaffold"], title: str, source: str
) -> dict[str, Method]:
    """A federated first-order rule over all weights, the masked ones, and LoRA factors."""
    sgd = rule == "scaffold"
    few: tuple[float, ...] = (1e-3, 1e-2, 3e-2, 1e-1) if sgd else (1e-4, 3e-4, 1e-3, 3e-3)
    every: tuple[float, ...] = few if sgd else (1e-5, 2e-5, 5e-5, 1e-4)
    optimizer: Literal["adam", "sgd"] = "sgd" if sgd else "adam"
    chosen = FirstOrder(rule, "masked", optimizer)
    return {
        rule: Method(f"{title}, all", _PLAIN, every, FirstOrder(rule, "all", optimizer), source),
        f"{rule}-masked": Method(f"{title}, mask", _SENSITIVE, few, chosen, source),
        f"{rule}-lora": Method(f"{title}, LoRA", _LORA, few, chosen, source),
    }


METHODS: Mapping[str, Method] = {
    "meerkat": Method("Meerkat", _SENSITIVE, _SENSITIVE_RATES, source=_PAPER),
    "meerkat-vp": Method(
        "Meerkat-vp", {**_SENSITIVE, "selection.kind": "gradip"}, _SENSITIVE_RATES, source=_PAPER
    ),
    "aligned": Method(
        "Meerkat, aligned subspace", {"subspace.kind": "aligned", "mask.kind": "sensitivity"}
    ),
    "full": Method("Full-FedZO", _ALL, _ALL_RATES, source="MeZO, arXiv 2305.17333"),
    "magnitude": Method(
        "weight magnitude", {**_PLAIN, "mask.kind": "magnitude"}, _OTHER_RATES, source=_PAPER
    ),
    "random": Method("random mask", {**_PLAIN, "mask.kind": "random"}, _OTHER_RATES),
    "union": Method("union of clients' masks", {**_PLAIN, "mask.kind": "union"}, _SENSITIVE_RATES),
    "task": Method("task-gradient mask", {**_PLAIN, "mask.kind": "task"}, _SENSITIVE_RATES),
    "lora": Method("LoRA-FedZO", _LORA, (1e-5, 1e-4, 3e-4, 1e-3), source="arXiv 2106.09685"),
    "decomfl": Method(
        "DeComFL",
        {**_ALL, "optimizer.estimator": "one-sided", "noise.perturbations": 5},
        _ALL_RATES,
        source="arXiv 2405.15861",
    ),
    "fedkseed": Method(
        "FedKSeed", {**_ALL, "algorithm": "fedkseed"}, _ALL_RATES, source="arXiv 2312.06353"
    ),
    "hiso": Method(
        "HiSo",
        {
            **_ALL,
            "optimizer.rule": "hiso",
            "optimizer.estimator": "one-sided",
            "noise.perturbations": 5,
        },
        (1e-5, 1e-4, 1e-3, 1e-2),
        source="arXiv 2506.02370",
    ),
    "hiso-masked": Method(
        "HiSo, mask",
        {**_SENSITIVE, "optimizer.rule": "hiso"},
        (1e-5, 1e-4, 1e-3, 1e-2),
        source="arXiv 2506.02370",
    ),
    "feddyn": Method(
        "FedDyn over scalars",
        {**_SENSITIVE, "algorithm": "feddyn"},
        _SENSITIVE_RATES,
        source="arXiv 2111.04263",
    ),
    **_bounds("fedavg", "FedAvg", "arXiv 1602.05629"),
    **_bounds("fedavgm", "FedAvgM", "arXiv 1909.06335"),
    **_bounds("scaffold", "SCAFFOLD", "arXiv 1910.06378"),
    "central": Method(
        "central training", _PLAIN, (1e-5, 2e-5, 5e-5, 1e-4), FirstOrder("central", "all", "adam")
    ),
}
