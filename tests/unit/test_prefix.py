"""What the blocks below the mask give a batch is kept, and nothing is different for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, make_text_examples, tiny_model
from torch import nn

from meerkat.config import MaskSection
from meerkat.data.encoding import Encoded
from meerkat.errors import MaskError, ModelError
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.spaces.mask_criteria import eligible_parameters, random_mask, still_blocks
from meerkat.spaces.masked import MaskedSpace

UNEQUAL = ((5, 6, 7), (9,), (200, 5))
HIGH = MaskSection(kind="random", density=0.05, first_block=1)


def high_space(loaded: LoadedModel) -> MaskedSpace:
    """A random mask over the second of two blocks."""
    parameters = eligible_parameters(loaded.model, HIGH)
    return MaskedSpace(loaded.model, random_mask(parameters, HIGH, loaded.fingerprint))


def with_prefix(loaded: LoadedModel, kept: KeptActivations | None = None) -> TextObjective:
    objective = TextObjective(loaded, 100)
    blocks = still_blocks(loaded.model, list(eligible_parameters(loaded.model, HIGH)))
    objective.keep_prefix(blocks, kept or KeptActivations(2**20))
    return objective


def examples(kind: str) -> list[Encoded]:
    found = make_text_examples(12)
    return found if kind == "one-token" else [Encoded(e.prompt, UNEQUAL, e.label) for e in found]


def passes(loaded: LoadedModel, objective: TextObjective, kind: str) -> list[Any]:
    """Everything that an objective gives, near several θ and in an order that comes back."""
    space, held, found = high_space(loaded), examples(kind), list[Any]()
    theta = space.read()
    direction = np.random.default_rng(0).standard_normal(space.size).astype(np.float32)
    for sign in (1, -1, 0.5):
        space.write(theta + np.float32(sign) * direction)
        found += [objective.losses(held), objective.losses(held[:5])]
        found += [objective.predict(held).losses, objective.predict(held).predicted]
        found += space.gradient(objective.losses_with_graph(held), len(held))
        found += space.slopes(objective.losses_with_graph(held), direction)
        found.append(objective.losses(held))
    space.restore()
    return found


@pytest.mark.parametrize("kind", ["one-token", "multi-token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_different(architecture: str, kind: str) -> None:
    loaded = tiny_model(architecture)
    expected = passes(loaded, TextObjective(loaded, 100), kind)
    objective = with_prefix(loaded)
    assert objective.prefix is not None
    assert objective.prefix.depth == 1
    for ours, theirs in zip(passes(loaded, objective, kind), expected, strict=True):
        assert np.array_equal(ours, theirs)
    # Three modes: inference, a graph, a graph with forward derivatives.
    packed = [len(list(objective.packs(e))) for e in (examples(kind), examples(kind)[:5])]
    assert objective.prefix.kept.computed == 3 * packed[0] + packed[1]


def test_the_blocks_are_left_out() -> None:
    """The weights of the first block are read once a batch, not in each pass."""
    loaded = tiny_model("llama")
    objective, held = with_prefix(loaded), make_text_examples(6)
    before = objective.losses(held)
    first: Any = loaded.model.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        first.weight.mul_(3)
    assert np.array_equal(objective.losses(held), before)
    assert not np.array_equal(objective.losses(make_text_examples(7)[1:]), before)


def test_the_model_is_left_as_it_was() -> None:
    loaded = tiny_model("qwen2")
    objective = with_prefix(loaded)
    objective.losses(make_text_examples(3))
    ids = torch.tensor([[5, 6, 7, 8]])
    fresh: Any = tiny_model("qwen2").model
    assert all("forward" not in vars(module) for module in loaded.model.modules())
    loaded.model.set_attn_implementation("sdpa")
    assert torch.equal(loaded.model(input_ids=ids).logits, fresh(input_ids=ids).logits)


def test_compiled_passes_skip_the_blocks_too() -> None:
    loaded, held = tiny_model("llama"), make_text_examples(8)
    expected = TextObjective(loaded, 100).losses(held)
    compiled = TextObjective(loaded, 100, compiled=True)
    blocks = still_blocks(loaded.model, list(eligible_parameters(loaded.model, HIGH)))
    compiled.keep_prefix(blocks, KeptActivations(2**20))
    found = [compiled.losses(held) for _ in range(3)]
    assert np.allclose(found[0], expected, atol=1e-5)
    assert np.array_equal(found[0], found[2])


class _Odd(nn.Module):
    """A block that also reads what the first block leaves outside the activations."""

    def __init__(self, inner: nn.Module, left: list[torch.Tensor]):
        super().__init__()
        self.inner, self.left = inner, left

    def forward(self, hidden: torch.Tensor, *arguments: Any, **others: Any) -> Any:
        out = self.inner(hidden, *arguments, **others)
        if self.left:
            return out + self.left.pop()
        self.left.append(hidden)
        return out


def test_a_model_with_other_ways_between_its_blocks_is_refused() -> None:
    loaded = tiny_model("llama")
    layers: Any = loaded.model.get_submodule("model.layers")
    left: list[torch.Tensor] = []
    for place in range(2):
        layers[place] = _Odd(layers[place], left)
    objective = TextObjective(loaded, 100)
    with pytest.raises(ModelError, match=r"runtime.prefix_cache .* set it to 0"):
        objective.keep_prefix(list(layers)[:1], KeptActivations(2**20))
    assert objective.prefix is None


# Which blocks


def test_blocks_below_the_mask_are_still() -> None:
    model = tiny_model("gemma3").model
    second = "model.layers.1.self_attn.q_proj.weight"
    layers: Any = model.get_submodule("model.layers")
    assert still_blocks(model, [second]) == [layers[0]]
    assert still_blocks(model, [second, "model.layers.0.mlp.up_proj.weight"]) == []
    assert still_blocks(model, [second, "model.embed_tokens.weight"]) == []


def test_a_mask_begins_at_its_first_block() -> None:
    model = tiny_model("opt").model
    names = eligible_parameters(model, HIGH)
    assert names
    assert all(name.startswith("model.decoder.layers.1.") for name in names)
    with pytest.raises(MaskError, match=r"mask.first_block = 2: .* blocks 0 to 1"):
        eligible_parameters(model, MaskSection(first_block=2))


# Where activations are kept


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((1, 4, 8), float(number)) for number in range(count)]  # 128 bytes each


def test_the_last_used_ones_stay_in_memory() -> None:
    kept = KeptActivations(3 * 128)
    for number, tensor in enumerate(tensors(3)):
        kept.put(b"%d" % number, tensor)
    assert kept.get(b"0", torch.device("cpu")) is not None
    kept.put(b"3", tensors(4)[3])
    there = [kept.get(b"%d" % number, torch.device("cpu")) is not None for number in range(4)]
    assert there == [True, False, True, True]
    assert (kept.in_memory, kept.on_disk, kept.computed) == (3 * 128, 0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [0, 300])
def test_what_memory_has_no_room_for_is_on_disk(
    memory: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    kept = KeptActivations(memory, 2**16, tmp_path)
    whole = [tensor.to(dtype) for tensor in tensors(8)]
    for number, tensor in enumerate(whole):
        kept.put(b"%d" % number, tensor)
    for _ in range(2):
        for number, tensor in enumerate(whole):
            found = kept.get(b"%d" % number, torch.device("cpu"))
            assert found is not None
            assert torch.equal(found, tensor)
    assert kept.in_memory <= memory
    assert kept.in_memory + kept.on_disk >= sum(tensor.nbytes for tensor in whole)
    (folder,) = tmp_path.iterdir()
    del kept
    assert not folder.exists()


def test_the_disk_has_a_budget_too(tmp_path: Path) -> None:
    kept = KeptActivations(0, 2 * 128, tmp_path)
    for number, tensor in enumerate(tensors(5)):
        kept.put(b"%d" % number, tensor)
    there = [kept.get(b"%d" % number, torch.device("cpu")) is not None for number in range(5)]
    assert there == [False, False, False, True, True]
    assert sum(file.stat().st_size for file in next(tmp_path.iterdir()).iterdir()) == 2 * 128


def test_a_small_budget_gives_the_same_losses(tmp_path: Path) -> None:
    loaded, held = tiny_model("llama"), make_text_examples(20)
    expected = TextObjective(loaded, 100).losses(held)
    for kept in (KeptActivations(0), KeptActivations(0, 2**20, tmp_path), KeptActivations(9000)):
        objective = with_prefix(loaded, kept)
        for _ in range(2):
            assert np.array_equal(objective.losses(held), expected)
