"""Which coordinates a mask chooses, and what a mask file refuses."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch import Tensor, nn

from meerkat.config import MaskSection
from meerkat.errors import MaskError
from meerkat.spaces.mask_criteria import (
    eligible_parameters,
    full_mask,
    magnitude_scores,
    mask_size,
    random_mask,
    top_mask,
    union,
)
from meerkat.spaces.mask_file import Mask, load_mask, save_mask

MATRICES_PER_BLOCK = {"llama": 7, "qwen2": 7, "gemma3": 7, "opt": 6, "gpt2": 4}


def as_sets(mask: Mask) -> dict[str, set[int]]:
    return {n: set(i.tolist()) for n, i in zip(mask.names, mask.indices, strict=True)}


def check_well_formed(mask: Mask, tensors: dict[str, Tensor]) -> None:
    """Names in the model's order, none empty, indices ascending, distinct and in range."""
    assert list(mask.names) == [name for name in tensors if name in mask.names]
    for name, shape, indices in zip(mask.names, mask.shapes, mask.indices, strict=True):
        assert shape == tuple(tensors[name].shape)
        assert indices.dtype == np.int64
        assert len(indices)
        assert (np.diff(indices) > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < tensors[name].numel()
    assert mask.eligible == sum(tensor.numel() for tensor in tensors.values())


def brute_force(scores: dict[str, Tensor], n: int) -> dict[str, set[int]]:
    """The n largest, ties by position: one stable sort of everything."""
    flat = np.concatenate([score.flatten().numpy() for score in scores.values()])
    chosen = np.sort(np.argsort(-flat, kind="stable")[:n])
    found, begin = {}, 0
    for name, score in scores.items():
        inside = chosen[(chosen >= begin) & (chosen < begin + score.numel())] - begin
        if len(inside):
            found[name] = set(inside.tolist())
        begin += score.numel()
    return found


few_values = st.lists(st.integers(0, 3), min_size=1, max_size=30)
tied_scores = st.lists(few_values, min_size=1, max_size=5).map(
    lambda rows: {f"t{i}": torch.tensor(row, dtype=torch.float32) for i, row in enumerate(rows)}
)
densities = st.floats(0.001, 1.0)


# The largest scores


@settings(max_examples=200, deadline=None)
@given(tied_scores, densities)
def test_top_mask_is_the_n_largest(scores: dict[str, Tensor], density: float) -> None:
    mask = top_mask(scores, MaskSection(density=density), "model")
    n = max(1, round(density * sum(score.numel() for score in scores.values())))
    assert mask.size == n
    assert as_sets(mask) == brute_force(scores, n)
    check_well_formed(mask, scores)


@settings(max_examples=100, deadline=None)
@given(tied_scores, densities)
def test_tensor_scope_takes_the_top_of_each(scores: dict[str, Tensor], density: float) -> None:
    mask = top_mask(scores, MaskSection(density=density, scope="tensor"), "model")
    expected = {}
    for name, score in scores.items():
        expected |= brute_force({name: score}, max(1, round(density * score.numel())))
    assert as_sets(mask) == expected
    check_well_formed(mask, scores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_top_mask_of_many_distinct_scores(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = {
        f"t{i}": torch.randn(rows, 40, generator=generator).to(dtype)
        for i, rows in enumerate((7, 90, 1))
    }
    mask = top_mask(scores, MaskSection(density=0.03), "model")
    as_double = {name: score.double() for name, score in scores.items()}
    assert as_sets(mask) == brute_force(as_double, mask.size)


def test_ties_go_to_the_earlier_coordinate() -> None:
    scores = {"a": torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "b": torch.tensor([2.0, 1.0])}
    mask = top_mask(scores, MaskSection(density=0.5), "model")
    assert as_sets(mask) == {"a": {1, 2}, "b": {0}}


@pytest.mark.parametrize(
    ("density", "eligible", "n"),
    [(1e-3, 12_345, 12), (1e-3, 12_600, 13), (1e-3, 10, 1), (1.0, 9, 9)],
)
def test_mask_size_is_rounded(density: float, eligible: int, n: int) -> None:
    assert mask_size(density, eligible) == n


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(MaskError, match=r"score of b .*float32"):
        top_mask({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}, MaskSection(), "model")


# The other masks


def parameters() -> dict[str, nn.Parameter]:
    shapes = {"a": (30, 200), "b": (9000,), "c": (5, 5, 1000)}
    generator = torch.Generator().manual_seed(2)
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def test_magnitude_takes_the_largest_weights() -> None:
    tensors = parameters()
    section = MaskSection(kind="magnitude", density=0.01)
    mask = top_mask(magnitude_scores(tensors), section, "model")
    chosen = torch.cat(
        [tensors[n].detach().flatten()[i] for n, i in zip(mask.names, mask.indices, strict=True)]
    ).abs()
    rest = torch.cat([t.detach().flatten() for t in tensors.values()]).abs().sort().values
    assert mask.kind == "magnitude"
    assert torch.equal(chosen.sort().values, rest[-mask.size :])


def test_full_mask_is_everything() -> None:
    tensors = parameters()
    mask = full_mask(tensors, "model")
    assert mask.size == mask.eligible == 40_000
    check_well_formed(mask, tensors)


def test_union_is_the_union() -> None:
    tensors = parameters()
    sections = [MaskSection(kind="random", density=0.01, seed=seed) for seed in (1, 2, 3)]
    masks = [random_mask(tensors, section, "model") for section in sections]
    both = union(masks, tensors)
    expected: dict[str, set[int]] = {}
    for mask in masks:
        for name, indices in as_sets(mask).items():
            expected[name] = expected.get(name, set()) | indices
    assert as_sets(both) == expected
    assert both.size < sum(mask.size for mask in masks)
    assert (both.kind, both.model) == ("union", "model")
    check_well_formed(both, tensors)


def test_union_keeps_the_order_of_the_model() -> None:
    tensors = {name: torch.zeros(4) for name in ("first", "second")}
    later = Mask(("second",), ((4,),), (np.array([1]),), 8, "model", "random")
    earlier = Mask(("first",), ((4,),), (np.array([3]),), 8, "model", "random")
    assert union([later, earlier], tensors).names == ("first", "second")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.integers(0, 2**63 - 1),
    st.floats(0.001, 1.0),
)
def test_random_mask_has_the_right_size(sizes: list[int], seed: int, density: float) -> None:
    tensors = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    section = MaskSection(kind="random", density=density, seed=seed)
    mask = random_mask(tensors, section, "model")
    assert mask.size == max(1, round(density * sum(sizes)))
    assert mask.digest == random_mask(tensors, section, "model").digest
    check_well_formed(mask, tensors)


def test_random_mask_is_pinned_and_follows_its_seed() -> None:
    tensors = parameters()
    digests = [
        random_mask(tensors, MaskSection(kind="random", density=0.01, seed=seed), "m").digest
        for seed in (0, 1)
    ]
    assert digests[0] == "b0d702a73b67e625f5272c06797c18b71b312ff763b6b83f7ac1c9f63e92e2ec"
    assert digests[1] != digests[0]


@pytest.mark.parametrize("density", [0.1, 0.9])
def test_random_mask_is_uniform_over_the_tensors(density: float) -> None:
    tensors = parameters()
    mask = random_mask(tensors, MaskSection(kind="random", density=density), "model")
    for name, indices in as_sets(mask).items():
        size = tensors[name].numel()
        spread = math.sqrt(size * density * (1 - density))
        assert abs(len(indices) - density * size) < 4 * spread
        assert abs(np.mean(list(indices)) / size - 0.5) < 4 / math.sqrt(12 * len(indices))


# Eligible parameters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eligible_are_the_matrices_of_the_decoder_blocks(architecture: str) -> None:
    model = tiny_model(architecture).model
    chosen = eligible_parameters(model, MaskSection())
    assert len(chosen) == 2 * MATRICES_PER_BLOCK[architecture]
    for name, parameter in chosen.items():
        assert parameter.ndim == 2
        assert name.endswith(".weight")
        assert {"layers", "h"} & set(name.split("."))
        assert not any(word in name for word in ("embed", "head", "norm", "ln_", "wte", "wpe"))
    named = dict(model.named_parameters())
    assert list(chosen) == [name for name in named if name in chosen]
    left_out = [n for n, p in named.items() if n not in chosen and p.ndim >= 2]
    assert all(any(w in n for w in ("embed", "head", "wte", "wpe")) for n in left_out)


def test_include_and_exclude_globs() -> None:
    model = tiny_model("llama").model
    section = MaskSection(include=("*.mlp.*", "lm_head.weight"), exclude=("*.1.*",))
    assert set(eligible_parameters(model, section)) == {
        "lm_head.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }
    default = eligible_parameters(model, MaskSection(exclude=("*.mlp.*",)))
    assert len(default) == 8
    assert all("self_attn" in name for name in default)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            MaskSection(include=("*.mlp.*", "nothing.*")),
            r"mask\.include.*'nothing\.\*'.*names look",
        ),
        (MaskSection(exclude=("*.mpl.*",)), r"mask\.exclude.*'\*\.mpl\.\*'.*names look"),
        (MaskSection(include=("*.mlp.*",), exclude=("*",)), "leave no parameter; change"),
    ],
)
def test_globs_that_do_nothing_are_refused(section: MaskSection, words: str) -> None:
    with pytest.raises(MaskError, match=words):
        eligible_parameters(tiny_model("llama").model, section)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(MaskError, match=r"set mask\.include"):
        eligible_parameters(nn.Linear(3, 3), MaskSection())


# Files


@pytest.fixture
def mask() -> Mask:
    made = random_mask(parameters(), MaskSection(kind="random", density=0.0005), "fingerprint")
    gradient = np.linspace(-1, 1, made.size, dtype=np.float32)
    return replace(made, gradient=gradient, concentration={"mass": 0.5, "ratio": math.inf})


@pytest.mark.parametrize("with_gradient", [True, False])
def test_file_round_trip(mask: Mask, tmp_path: Path, with_gradient: bool) -> None:
    if not with_gradient:
        mask = replace(mask, gradient=None)
    path = tmp_path / "deep" / "mask.safetensors"
    save_mask(mask, path)
    loaded = load_mask(path, "fingerprint")
    assert loaded.digest == mask.digest
    for field in ("names", "shapes", "eligible", "model", "kind", "concentration", "size"):
        assert getattr(loaded, field) == getattr(mask, field)
    for ours, theirs in zip(mask.indices, loaded.indices, strict=True):
        assert theirs.dtype == np.int64
        np.testing.assert_array_equal(ours, theirs)
    if with_gradient:
        assert loaded.gradient is not None
        assert loaded.gradient.tobytes() == mask.gradient.tobytes()
    else:
        assert loaded.gradient is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_full_mask_needs_no_list_of_coordinates(tmp_path: Path) -> None:
    tensors = parameters()
    save_mask(full_mask(tensors, "fingerprint"), tmp_path / "mask")
    loaded = load_mask(tmp_path / "mask", "fingerprint")
    assert (tmp_path / "mask").stat().st_size < 1000
    assert loaded.digest == full_mask(tensors, "fingerprint").digest
    check_well_formed(loaded, tensors)


def test_digest_is_of_the_coordinates(mask: Mask) -> None:
    assert replace(mask, gradient=None, kind="other").digest == mask.digest
    assert replace(mask, names=("x", *mask.names[1:])).digest != mask.digest
    moved = (mask.indices[0] + 1, *mask.indices[1:])
    assert replace(mask, indices=moved).digest != mask.digest
    assert len(bytes.fromhex(mask.digest)) == hashlib.sha256().digest_size


def test_another_model_is_refused(mask: Mask, tmp_path: Path) -> None:
    save_mask(mask, tmp_path / "mask")
    with pytest.raises(MaskError, match=r"another model.*calibrate for this model"):
        load_mask(tmp_path / "mask", "another fingerprint")


def test_every_flipped_bit_is_noticed(mask: Mask, tmp_path: Path) -> None:
    path = tmp_path / "mask"
    save_mask(mask, path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(MaskError):
            load_mask(path, "fingerprint")


def test_every_truncation_is_noticed(mask: Mask, tmp_path: Path) -> None:
    path = tmp_path / "mask"
    save_mask(mask, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(MaskError, match="damaged"):
            load_mask(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask"
    with pytest.raises(MaskError, match="no such file"):
        load_mask(path)
    path.write_text("density = 1e-3\n")
    with pytest.raises(MaskError, match="not a mask file"):
        load_mask(path)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(MaskError, match="not a mask file"):
        load_mask(path)
    save_file({"weight": np.zeros(3)}, path, {"format": "meerkat-mask-5", "mask": "[1, 2]"})
    with pytest.raises(MaskError, match="not a mask file"):
        load_mask(path)
    save_file({"weight": np.zeros(3)}, path, {"format": "meerkat-mask-6", "mask": "{}"})
    with pytest.raises(MaskError, match=r"a newer version.*meerkat-mask-6"):
        load_mask(path)
    save_file({"weight": np.zeros(3)}, path, {"format": "meerkat-mask-2", "mask": "{}"})
    with pytest.raises(MaskError, match=r"an older version.*meerkat-mask-2"):
        load_mask(path)
