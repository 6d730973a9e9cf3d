"""A pass over copies of a batch, each at its own place, gives what writing the weights does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, algorithm_of, make_text_examples, tiny_model
from torch import nn

from meerkat.config import MaskSection
from meerkat.data.encoding import Encoded
from meerkat.federation import client
from meerkat.federation.client import Worker
from meerkat.models.compute import widen
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.spaces.base import OverlaidSpace
from meerkat.spaces.linear import LinearSpace
from meerkat.spaces.mask_criteria import eligible_parameters, full_mask, still_blocks
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.tasks.objective import CopyingObjective
from meerkat.zo.estimators import ESTIMATORS

LINEAR = tuple(name for name in ARCHITECTURES if name != "gpt2")
DEFAULT = MaskSection()
UNEQUAL = ((5, 6, 7), (9,), (200, 5))


def narrow_mask(loaded: LoadedModel, section: MaskSection = DEFAULT) -> Mask:
    """Some coordinates in two columns and five rows of each matrix, as sensitivity has them."""
    rng, parameters = np.random.default_rng(0), eligible_parameters(loaded.model, section)
    shapes, indices = [], []
    for parameter in parameters.values():
        shape = (parameter.shape[0], parameter.shape[1])
        rows = rng.choice(shape[0], 5, replace=False)
        columns = rng.choice(shape[1], 2, replace=False)
        places = (rows[:, None] * shape[1] + columns).ravel()
        shapes.append(shape)
        indices.append(np.sort(rng.choice(places, 7, replace=False)).astype(np.int64))
    eligible = sum(parameter.numel() for parameter in parameters.values())
    names = tuple(parameters)
    return Mask(names, tuple(shapes), tuple(indices), eligible, loaded.fingerprint, "random")


def copying(loaded: LoadedModel, mask: Mask, tokens: int = 10_000) -> TextObjective:
    objective = TextObjective(loaded, 10_000)
    layers = [loaded.model.get_submodule(name.removesuffix(".weight")) for name in mask.names]
    objective.allow_copies(tokens, layers)
    return objective


def places_near(space: Any, count: int, size: float = 0.3) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    start = space.read()
    moves = rng.standard_normal((count, space.size)).astype(np.float32)
    return [start, *(start + np.float32(size) * move for move in moves)]


def written(space: Any, objective: TextObjective, batch: Any, places: Any) -> np.ndarray:
    found = []
    for place in places:
        space.write(place)
        found.append(objective.losses(batch))
    space.restore()
    return np.stack(found)


def overlaid(space: Any, objective: TextObjective, batch: Any, places: Any) -> np.ndarray:
    with space.overlaid(places):
        return objective.losses_of_copies(batch, len(places))


def examples(kind: str) -> list[Encoded]:
    found = make_text_examples(5)
    return found if kind != "multi-token" else [Encoded(e.prompt, UNEQUAL, e.label) for e in found]


@pytest.mark.parametrize("kind", ["one-token", "multi-token"])
@pytest.mark.parametrize("architecture", LINEAR)
def test_losses_are_those_of_written_weights(architecture: str, kind: str) -> None:
    loaded = tiny_model(architecture)
    mask = narrow_mask(loaded)
    space, objective, batch = MaskedSpace(loaded.model, mask), copying(loaded, mask), examples(kind)
    assert isinstance(space, OverlaidSpace)
    assert isinstance(objective, CopyingObjective)
    assert space.overlays
    assert objective.copies_per_pass(batch) > 4
    places = places_near(space, 3)
    expected = written(space, objective, batch, places)
    found = overlaid(space, objective, batch, places)
    assert np.ptp(expected, axis=0).max() > 0.1  # the places differ
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[0] == pytest.approx(objective.losses(batch), abs=1e-5)  # and nothing is left


@pytest.mark.parametrize("architecture", LINEAR)
def test_a_place_is_rounded_as_written_weights_are(architecture: str) -> None:
    """In bfloat16 a small move of θ is none, or a whole step of the type."""
    loaded = tiny_model(architecture, torch.bfloat16)
    mask = narrow_mask(loaded)
    widen(loaded.model)
    space, objective, batch = MaskedSpace(loaded.model, mask), copying(loaded, mask), examples("")
    places = places_near(space, 5, size=2e-3)
    expected = written(space, objective, batch, places)
    found = overlaid(space, objective, batch, places)
    assert found == pytest.approx(expected, abs=1e-5)
    theta = places[1].copy()
    theta[::2] = places[0][::2]
    unrounded = np.abs(found[1] - overlaid(space, objective, batch, [theta, theta])[0]).max()
    assert unrounded > 1e-5  # half of the moves are seen


def test_in_bfloat16_the_losses_are_as_near_as_its_rounding() -> None:
    """Both ways round the output of each layer; neither is nearer to float32 than the other."""
    exact, rounded = tiny_model("llama"), tiny_model("llama", torch.bfloat16)
    mask, batch = narrow_mask(rounded), make_text_examples(40)
    with torch.no_grad():
        for ours, theirs in zip(exact.model.parameters(), rounded.model.parameters(), strict=True):
            ours.copy_(theirs.float())
    space = MaskedSpace(rounded.model, mask)
    places = [place.astype(np.float32) for place in places_near(space, 3)]
    places = [torch.from_numpy(p).bfloat16().float().numpy() for p in places]
    of_float32 = MaskedSpace(exact.model, narrow_mask(exact))
    expected = written(of_float32, copying(exact, mask), batch, places)
    objective = copying(rounded, mask)
    errors = [
        np.sqrt(((way(space, objective, batch, places) - expected) ** 2).mean())
        for way in (written, overlaid)
    ]
    assert errors[1] < 1.5 * errors[0]
    assert errors[1] > 0


def test_a_subspace_is_overlaid_as_its_masked_weights_are() -> None:
    loaded = tiny_model("qwen2")
    mask = narrow_mask(loaded)
    basis = np.random.default_rng(2).standard_normal((4, mask.size)).astype(np.float32)
    space = LinearSpace(MaskedSpace(loaded.model, mask), basis, "any")
    objective, batch = copying(loaded, mask), make_text_examples(5)
    assert isinstance(space, OverlaidSpace)
    places = places_near(space, 6, size=0.1)
    expected = written(space, objective, batch, places)
    assert overlaid(space, objective, batch, places) == pytest.approx(expected, abs=1e-4)


def test_what_the_weights_hold_does_not_matter() -> None:
    """The change is from whatever is in the model, which is left as it is."""
    loaded = tiny_model("gemma3")
    mask = narrow_mask(loaded)
    space, objective, batch = MaskedSpace(loaded.model, mask), copying(loaded, mask), examples("")
    places = places_near(space, 3)
    expected = overlaid(space, objective, batch, places)
    space.write(places[2])
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    assert overlaid(space, objective, batch, places) == pytest.approx(expected, abs=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert not any(module._forward_hooks for module in loaded.model.modules())


@pytest.mark.parametrize("kind", ["one-token", "multi-token"])
def test_blocks_that_never_move_are_computed_for_one_copy(kind: str) -> None:
    """With activations kept and without: the same bits."""
    loaded, high = tiny_model("llama"), MaskSection(first_block=1)
    mask, batch = narrow_mask(loaded, high), examples(kind)
    blocks = still_blocks(loaded.model, list(mask.names))
    space = MaskedSpace(loaded.model, mask)
    places, tokens, found = places_near(space, 4), list[int](), []
    first: Any = loaded.model.get_submodule("model.layers.0.mlp.down_proj")
    first.register_forward_pre_hook(lambda _, arguments: tokens.append(arguments[0].shape[1]))
    for memory in (0, 2**20):
        objective = copying(loaded, mask)
        objective.keep_prefix(blocks, KeptActivations(memory))
        tokens.clear()
        found += [overlaid(space, objective, batch, places) for _ in range(2)]
        single = next(iter(objective.packs(batch))).tokens
        assert tokens == [single] * (1 if memory else 2)
    assert all(np.array_equal(one, found[0]) for one in found)
    expected = written(space, copying(loaded, mask), batch, places)
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_where_it_is_no_use_it_is_not_done() -> None:
    loaded = tiny_model("gpt2")  # its layers are no nn.Linear
    assert not MaskedSpace(loaded.model, narrow_mask(loaded)).overlays
    loaded = tiny_model("llama")
    whole = MaskSection(kind="full")
    parameters = eligible_parameters(loaded.model, whole)
    assert not MaskedSpace(loaded.model, full_mask(parameters, loaded.fingerprint)).overlays
    head = MaskSection(include=("lm_head.weight",))
    assert not MaskedSpace(loaded.model, narrow_mask(loaded, head)).overlays
    tied = tiny_model("gemma3")
    shared = MaskSection(include=("model.embed_tokens.weight",))
    space = MaskedSpace(tied.model, narrow_mask(tied, shared))
    assert not space.overlays
    with pytest.raises(ValueError, match="cannot be overlaid"), space.overlaid([space.read()]):
        pass


@pytest.mark.parametrize("kind", ["one-token", "multi-token"])
def test_the_gradient_of_a_masked_head_is_its_slope(kind: str) -> None:
    """Where answers are one token, a pass multiplies their rows of the head alone."""
    loaded = tiny_model("llama")
    section = MaskSection(include=("lm_head.weight",))
    parameters = eligible_parameters(loaded.model, section)
    space = MaskedSpace(loaded.model, full_mask(parameters, loaded.fingerprint))
    objective, batch = TextObjective(loaded, 10_000), examples(kind)
    direction = np.random.default_rng(0).standard_normal(space.size).astype(np.float32)
    _, gradient = space.gradient(objective.losses_with_graph(batch), len(batch))
    _, slopes = space.slopes(objective.losses_with_graph(batch), direction)
    assert float(gradient @ direction) == pytest.approx(slopes.mean(), rel=1e-3)
    assert abs(slopes.mean()) > 1e-3


def test_a_pass_takes_no_more_tokens_than_it_may() -> None:
    loaded = tiny_model("llama")
    mask, batch = narrow_mask(loaded), make_text_examples(6)
    tokens = sum(len(example.prompt) for example in batch)
    for budget, copies in ((0, 1), (tokens, 1), (2 * tokens - 1, 1), (2 * tokens, 2)):
        assert copying(loaded, mask, budget).copies_per_pass(batch) == copies
    free = [Encoded(e.prompt, ((5,) * 9,), 0) for e in batch]  # logits over the whole vocabulary
    objective = copying(loaded, mask)
    objective._scored_per_pass = 6 * 9 * 3 + 1
    assert objective.copies_per_pass(free) == 3
    objective = TextObjective(loaded, tokens - 1)  # a batch of two passes
    objective.allow_copies(10_000, [])
    assert objective.copies_per_pass(batch) == 1


class _Routed(nn.Module):
    """Sends each token to one of two layers, as a mixture of experts does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.experts = nn.ModuleList([inner, inner])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        one, two = self.experts
        odd = torch.arange(hidden.shape[1]) % 2 == 1
        out = torch.empty_like(hidden)
        out[:, odd], out[:, ~odd] = one(hidden[:, odd]), two(hidden[:, ~odd])
        return out


def test_layers_that_see_some_tokens_only_are_not_overlaid() -> None:
    loaded = tiny_model("llama")
    block: Any = loaded.model.get_submodule("model.layers.1")
    inner = block.mlp
    block.mlp = _Routed(inner)
    objective, batch = TextObjective(loaded, 10_000), make_text_examples(3)
    objective.allow_copies(10_000, [block.self_attn.q_proj])
    assert objective.copies_per_pass(batch) > 1
    objective.allow_copies(10_000, [block.self_attn.q_proj, inner.down_proj])
    assert objective.copies_per_pass(batch) == 1


@pytest.mark.parametrize("name", ["one-sided", "one-sided-mean", "two-point"])
@pytest.mark.parametrize("tokens", [90, 10_000])
def test_estimates_are_those_of_passes_one_by_one(name: str, tokens: int) -> None:
    """In passes of a few copies, and in one pass of all."""
    loaded = tiny_model("llama")
    mask, batch = narrow_mask(loaded), make_text_examples(4)
    space, found, passes = MaskedSpace(loaded.model, mask), [], []
    theta = places_near(space, 1)[1]
    rng = np.random.default_rng(3)
    drawn = [rng.standard_normal(mask.size).astype(np.float32) for _ in range(4)]
    for budget in (0, tokens):
        objective = copying(loaded, mask, budget)
        count = _counted(objective)
        worker = Worker(space, objective, algorithm_of(mask.size))
        losses = client._Losses(worker, theta, batch)
        found.append(ESTIMATORS[name]().estimate(losses, drawn, 0.05))
        passes.append(len(count))
        space.write(theta)
    copies = objective.copies_per_pass(batch)
    assert passes[1] == -(-passes[0] // copies)
    assert found[1].coefficients == pytest.approx(found[0].coefficients, abs=2e-3)
    assert found[1].loss == pytest.approx(found[0].loss, abs=1e-5)


def _counted(objective: TextObjective) -> list[int]:
    """Grows by one with each pass."""
    found: list[int] = []
    objective.model.register_forward_pre_hook(lambda *_: found.append(1))
    return found
