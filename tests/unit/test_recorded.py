"""The selection on paths of Gemma 3 270M that were recorded: see experiments/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meerkat.config import Selection, load_recipe
from meerkat.federation.selection import decide_by_paths

ROOT = Path(__file__).parents[2]
OTHERS = range(8)
EXTREME = range(8, 11)
LOCAL_STEPS = 10

Paths = dict[int, np.ndarray]


def selection(signal: str) -> Selection:
    changes = ["selection.kind=gradip", f"selection.signal={signal}"]
    return load_recipe(ROOT / "recipes" / "meerkat-vp.toml", changes).selection


def flagged(signal: str, signals: Paths) -> tuple[int, ...]:
    return decide_by_paths(selection(signal), LOCAL_STEPS, 0, "calibration", signals).flagged


def pool(seed: str, signal: str) -> Paths:
    """The signals of eight IID clients and three that hold a single label."""
    content = json.loads((ROOT / "experiments" / "calibrations.json").read_text())
    factor = np.array(content["seeds"][seed]["alignments"]) if signal == "gradip" else 1.0
    kinds = {**dict.fromkeys(OTHERS, "iid"), **dict.fromkeys(EXTREME, "extreme")}
    named = {k: content["clients"][f"{kind}-{seed}-{k}"] for k, kind in kinds.items()}
    assert all(min(named[k]["labels"]) == 0 for k in EXTREME)
    assert all(min(named[k]["labels"]) > 0 for k in OTHERS)
    return {k: np.abs(np.array(named[k]["scalars"]) * factor) for k in named}


@pytest.mark.parametrize("seed", ["0", "1", "2", "3", "4"])
def test_single_label_clients_are_found_among_iid_ones(seed: str) -> None:
    signals = pool(seed, "projected-gradient")
    federations = [
        (*OTHERS,),
        *((*OTHERS[:7], single) for single in EXTREME),
        (*OTHERS[:5], *EXTREME),
        (*OTHERS, *EXTREME),
    ]
    for members in federations:
        found = flagged("projected-gradient", {k: signals[k] for k in members})
        assert found == tuple(k for k in members if k in EXTREME)


@pytest.mark.parametrize("seed", ["0", "1", "2", "3", "4"])
def test_nobody_is_found_by_either_signal_where_all_are_iid(seed: str) -> None:
    for signal in ("projected-gradient", "gradip"):
        signals = {k: path for k, path in pool(seed, signal).items() if k in OTHERS}
        assert flagged(signal, signals) == ()
