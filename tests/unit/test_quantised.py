"""Weights in few bits: what is kept, what moves, and that passes and gradients are theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, make_text_examples, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from test_overlay import UNEQUAL, copying, narrow_mask, overlaid, places_near, written
from torch import nn

from meerkat.config import MaskSection, Runtime, parse_recipe
from meerkat.data.encoding import Encoded
from meerkat.errors import MaskError, MeerkatError, RecipeError
from meerkat.models.compute import widen
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.models.quantised import GROUP, Bits, QuantisedWeight, quantise
from meerkat.node.config import NodeConfig
from meerkat.spaces.mask_criteria import still_blocks
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace

BITS: tuple[Bits, ...] = (8, 4)


def moving(mask: Mask) -> dict[str, np.ndarray]:
    return dict(zip(mask.names, mask.indices, strict=True))


def decoded(loaded: LoadedModel) -> LoadedModel:
    """The same numbers as plain matrices."""
    made: dict[int, nn.Parameter] = {}
    for module in loaded.model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, QuantisedWeight):
                plain = nn.Parameter(parameter.whole().clone(), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), plain)
    return loaded


def both(architecture: str, bits: Bits) -> tuple[LoadedModel, LoadedModel, Mask]:
    """A quantised model, one with the same numbers as plain matrices, and their mask."""
    found = [tiny_model(architecture) for _ in range(2)]
    mask = narrow_mask(found[0])
    for loaded in found:
        quantise(loaded.model, bits, moving(mask))
    return found[0], decoded(found[1]), mask


def examples(kind: str) -> list[Encoded]:
    found = make_text_examples(6)
    return found if kind == "one-token" else [Encoded(e.prompt, UNEQUAL, e.label) for e in found]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(
    weight=arrays.arrays(
        np.float32, (3, 2 * GROUP), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    )
)
def test_each_value_is_within_half_a_step(bits: Bits, weight: np.ndarray) -> None:
    found = QuantisedWeight(torch.from_numpy(weight), bits, None).whole().numpy()
    groups = weight.astype(np.float64).reshape(3, 1 if bits == 8 else 2, -1)
    step = np.abs(groups).max(2) / 127 if bits == 8 else np.ptp(groups, axis=2) / 15
    error, largest = np.abs(found.reshape(groups.shape) - groups), np.abs(groups).max(2)
    assert (error <= (0.5 * step + 1e-6 * largest)[..., None]).all()
    if bits == 8:
        assert not found[weight == 0].any()


def test_codes_are_the_same_on_every_machine() -> None:
    """Known bits: nothing but exact IEEE operations takes part."""
    weight = torch.tensor([[0.5, -0.25, 0.1, 0.0] * 8, [0.0] * 32])
    eight, four = (QuantisedWeight(weight, bits, None) for bits in BITS)
    assert eight.codes[0, :4].tolist() == [127, -64, 25, 0]
    assert eight.scales.flatten().tolist() == [np.float32(0.5) / np.float32(127), 0.0]
    assert four.codes[0, :2].tolist() == [15 | 0 << 4, 7 | 5 << 4]
    assert four.lows is not None
    assert four.lows.flatten().tolist() == [-0.25, 0.0]
    assert four.scales.flatten().tolist() == [np.float32(0.75) / np.float32(15), 0.0]
    assert (eight.codes.nbytes, four.codes.nbytes) == (64, 32)
    assert not eight.whole()[1].any()
    assert not four.whole()[1].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_are_those_of_the_same_numbers_in_full(architecture: str, bits: Bits) -> None:
    ours, theirs, _ = both(architecture, bits)
    kinds = [type(p) for p in ours.model.parameters() if p.ndim == 2]
    assert QuantisedWeight in kinds
    if architecture != "gpt2":  # most of its layers are no nn.Linear
        assert set(kinds) == {QuantisedWeight}
    for kind in ("one-token", "multi-token"):
        batch = examples(kind)
        found, expected = (TextObjective(m, 10_000).losses(batch) for m in (ours, theirs))
        assert np.array_equal(found, expected)
        predicted, wanted = (TextObjective(m, 10_000).predict(batch) for m in (ours, theirs))
        assert np.array_equal(predicted.losses, wanted.losses)


def test_a_large_head_is_made_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = TextObjective(both("llama", 8)[0], 10_000).losses(examples("multi-token"))
    monkeypatch.setattr("meerkat.models.quantised._ROWS", 100)
    sizes: list[int] = []
    rows = QuantisedWeight.rows

    def counted(self: QuantisedWeight, chosen: Any) -> torch.Tensor:
        found = rows(self, chosen)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(QuantisedWeight, "rows", counted)
    found = TextObjective(both("llama", 8)[0], 10_000).losses(examples("multi-token"))
    assert found == pytest.approx(expected, abs=1e-5)
    assert sizes[-4:] == [100, 100, 100, 20]  # of 320 tokens


@pytest.mark.parametrize("bits", BITS)
def test_what_moves_is_not_quantised(bits: Bits) -> None:
    loaded, fresh = tiny_model("qwen2"), tiny_model("qwen2")
    mask = narrow_mask(loaded)
    quantise(loaded.model, bits, moving(mask))
    space, plain = MaskedSpace(loaded.model, mask), MaskedSpace(fresh.model, mask)
    assert np.array_equal(space.read(), plain.read())
    batch, objective = examples("one-token"), TextObjective(loaded, 10_000)
    before = objective.losses(batch)
    theta = places_near(space, 1)[1]
    space.write(theta)
    assert np.array_equal(space.read(), theta)
    assert np.abs(objective.losses(batch) - before).max() > 0.1
    space.restore()
    assert np.array_equal(objective.losses(batch), before)
    quantise(loaded.model, bits, {})  # a second call does nothing
    assert np.array_equal(objective.losses(batch), before)


def test_θ_is_rounded_to_the_stored_type() -> None:
    loaded = tiny_model("llama", torch.bfloat16)
    mask = narrow_mask(loaded)
    widen(loaded.model)
    quantise(loaded.model, 8, moving(mask))
    space = MaskedSpace(loaded.model, mask)
    theta = places_near(space, 1)[1]
    space.write(theta)
    assert np.array_equal(space.read(), torch.from_numpy(theta).bfloat16().float().numpy())


@pytest.mark.parametrize("bits", BITS)
def test_exact_reports_are_those_of_the_same_numbers_in_full(bits: Bits) -> None:
    """Gradients by a backward pass, slopes by dual numbers; the matrices are not kept between."""
    ours, theirs, mask = both("llama", bits)
    batch, found = examples("one-token"), []
    for loaded in (ours, theirs):
        space, objective = MaskedSpace(loaded.model, mask), TextObjective(loaded, 10_000)
        direction = np.random.default_rng(0).standard_normal(mask.size).astype(np.float32)
        gradient = space.gradient(objective.losses_with_graph(batch), len(batch))
        slopes = space.slopes(objective.losses_with_graph(batch), direction)
        again = space.slopes(objective.losses_with_graph(batch), -direction)
        assert again[1] == pytest.approx(-slopes[1], abs=1e-4)
        found.append((*gradient, *slopes, objective.losses(batch)))
        assert float(gradient[1] @ direction) == pytest.approx(slopes[1].mean(), rel=1e-3)
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_backward_pass_keeps_no_matrix() -> None:
    loaded, _, mask = both("llama", 8)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    shapes = {tuple(p.shape) for n, p in loaded.model.named_parameters() if n in mask.names}
    space, objective = MaskedSpace(loaded.model, mask), TextObjective(loaded, 10_000)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        space.gradient(objective.losses_with_graph(examples("one-token")), 6)
    assert kept
    assert not shapes & set(kept)
    assert not {shape[::-1] for shape in shapes} & set(kept)


@pytest.mark.parametrize("bits", BITS)
def test_copies_and_kept_activations_go_with_it(bits: Bits) -> None:
    loaded = tiny_model("gemma3")
    mask = narrow_mask(loaded, MaskSection(first_block=1))
    quantise(loaded.model, bits, moving(mask))
    space, objective, batch = MaskedSpace(loaded.model, mask), copying(loaded, mask), examples("")
    places = places_near(space, 4)
    expected = written(space, objective, batch, places)
    assert overlaid(space, objective, batch, places) == pytest.approx(expected, abs=1e-4)
    objective.keep_prefix(still_blocks(loaded.model, list(mask.names)), KeptActivations(2**20))
    assert overlaid(space, objective, batch, places) == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(written(space, objective, batch, places), expected)


def test_matrices_that_move_outside_linear_layers_stay() -> None:
    tied = ("gemma3", "model.embed_tokens.weight")
    for architecture, name in (("llama", "lm_head.weight"), tied):
        loaded = tiny_model(architecture)
        mask = narrow_mask(loaded, MaskSection(include=(name,)))
        before, batch = MaskedSpace(loaded.model, mask), examples("multi-token")
        quantise(loaded.model, 8, moving(mask))
        left = [n for n, p in loaded.model.named_parameters() if n == name]
        kinds = {n: type(p) for n, p in loaded.model.named_parameters()}
        assert left == [name]
        assert kinds[name] is nn.Parameter
        assert kinds["model.layers.0.mlp.down_proj.weight"] is QuantisedWeight
        objective = TextObjective(loaded, 10_000)
        unmoved = objective.losses(batch)
        before.write(places_near(before, 1)[1])
        assert not np.array_equal(objective.losses(batch), unmoved)
        before.restore()


def test_a_mask_in_and_outside_linear_layers_has_slopes_and_no_gradient() -> None:
    loaded = tiny_model("llama")
    globs = ("lm_head.weight", "*.down_proj.weight")
    mask = narrow_mask(loaded, MaskSection(include=globs))
    quantise(loaded.model, 8, moving(mask))
    space, objective = MaskedSpace(loaded.model, mask), TextObjective(loaded, 10_000)
    batch, direction = examples("multi-token"), np.ones(mask.size, np.float32)
    _, slopes = space.slopes(objective.losses_with_graph(batch), direction)
    assert np.abs(slopes).max() > 1e-3
    with pytest.raises(MaskError, match=r"set runtime.weights = 'stored'"):
        space.gradient(objective.losses_with_graph(batch), len(batch))


def test_another_mask_is_refused() -> None:
    loaded = tiny_model("llama")
    mask = narrow_mask(loaded)
    quantise(loaded.model, 8, {})
    with pytest.raises(MaskError, match="quantised around other coordinates"):
        MaskedSpace(loaded.model, mask)


def test_what_a_quantised_weight_has_not_is_said() -> None:
    weight: Any = QuantisedWeight(torch.ones(4, 32), 4, None)
    assert repr(weight) == "QuantisedWeight((4, 32), 4 bits)"
    assert weight.held_bytes == 4 * 16 + 2 * 4 * 4
    with pytest.raises(NotImplementedError, match="a quantised weight has no"):
        weight + 1


def test_a_compiled_pass_is_refused() -> None:
    recipe = {
        "model": {"name": "none"},
        "task": {"name": "sst2"},
        "federation": {"clients": 1, "rounds": 1},
        "runtime": {"weights": "int8", "compile": True},
    }
    with pytest.raises(RecipeError, match=r"runtime.weights = 'int8' cannot be compiled"):
        parse_recipe(recipe)


def test_a_node_has_its_own_bits() -> None:
    recipe = {
        "model": {"name": "demo:gemma-3-270m"},
        "task": {"name": "rotten_tomatoes"},
        "federation": {"clients": 1, "rounds": 1},
        "runtime": {"compile": True},
    }
    sent = parse_recipe(recipe).to_json()
    asked = NodeConfig.of({"partition-id": 0, "weights": "int4"}).recipe(sent)
    assert (asked.runtime.weights, asked.runtime.compile) == ("int4", False)
    plain = NodeConfig.of({"partition-id": 0}).recipe(sent)
    assert (plain.runtime.weights, plain.runtime.compile) == (Runtime().weights, True)
    with pytest.raises(MeerkatError, match="weights = 'int2' is none of stored, int8, int4"):
        NodeConfig.of({"partition-id": 0, "weights": "int2"})
