"""Blocks that are computed again for a backward pass: the same gradients, few activations kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, make_mask, make_text_examples, tiny_model
from torch import Tensor

from meerkat.config import MaskSection
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.models.recomputing import recomputed
from meerkat.spaces.alignment import packed_score_gradients
from meerkat.spaces.mask_criteria import decoder_blocks, eligible_parameters, random_mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.spaces.sensitivity import sensitivity_scores

EXAMPLES = make_text_examples(12)


def blocks_of(loaded: LoadedModel) -> list[torch.nn.Module]:
    return list(decoder_blocks(loaded.model)[1])


def objectives(loaded: LoadedModel) -> tuple[TextObjective, TextObjective]:
    """One that keeps activations, one that does not."""
    return (
        TextObjective(loaded, 10_000),
        TextObjective(loaded, 10_000, recomputed=blocks_of(loaded)),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sensitivity_scores_keep_their_bits(architecture: str) -> None:
    loaded = tiny_model(architecture)
    batches = torch.randint(3, 300, (3, 2, 24), generator=torch.Generator().manual_seed(0))
    found = [
        sensitivity_scores(
            objective.pretraining_loss,
            eligible_parameters(loaded.model, MaskSection()),
            batches,
            MaskSection(),
        )
        for objective in objectives(loaded)
    ]
    assert found[0].losses == found[1].losses
    for kind in ("scores", "gradients"):
        ours, theirs = (getattr(one, kind) for one in found)
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(bool(tensor.any()) for tensor in theirs.values())


@pytest.mark.parametrize("include", [(), ("*",)], ids=["linear layers", "all parameters"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exact_gradients_keep_their_bits(architecture: str, include: tuple[str, ...]) -> None:
    loaded = tiny_model(architecture)
    section = MaskSection(kind="random", density=0.01, include=include)
    mask = random_mask(eligible_parameters(loaded.model, section), section, loaded.fingerprint)
    found = []
    for objective in objectives(loaded):
        parts = objective.losses_with_graph(EXAMPLES)
        found.append(MaskedSpace(loaded.model, mask).gradient(parts, len(EXAMPLES)))
    assert found[0][0].tobytes() == found[1][0].tobytes()
    assert found[0][1].tobytes() == found[1][1].tobytes()
    assert np.count_nonzero(found[1][1]) > 0.5 * mask.size


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gpt2"])
def test_scores_of_texts_keep_their_bits(architecture: str) -> None:
    loaded = tiny_model(architecture)
    mask = make_mask(loaded, 200)
    rows = []
    for objective in objectives(loaded):

        def scores(batch: Any, objective: TextObjective = objective) -> Tensor:
            with objective.with_graph():
                return objective.scores(batch)

        batches = list(objective.packs(EXAMPLES[:6])) + list(objective.packs(EXAMPLES[6:]))
        rows.append(
            packed_score_gradients(scores, loaded.model, batches, len(EXAMPLES), mask, "mixed")
        )
    assert rows[0].tobytes() == rows[1].tobytes()
    assert rows[1].any(axis=1).all()


def test_slopes_are_as_before() -> None:
    loaded = tiny_model()
    mask, found = make_mask(loaded, 100), []
    for objective in objectives(loaded):
        space = MaskedSpace(loaded.model, mask)
        direction = np.linspace(-1, 1, 100, dtype=np.float32)
        found.append(space.slopes(objective.losses_with_graph(EXAMPLES), direction))
    assert found[0][1].tobytes() == found[1][1].tobytes()


def test_kept_activations_stay_out_of_it() -> None:
    """Blocks whose activations are kept from pass to pass have no graph to begin with."""
    loaded = tiny_model(num_hidden_layers=4)
    blocks, gradients = blocks_of(loaded), []
    section = MaskSection(kind="random", density=0.02, first_block=2)
    mask = random_mask(eligible_parameters(loaded.model, section), section, loaded.fingerprint)
    for objective in objectives(loaded):
        objective.keep_prefix(blocks[:2], KeptActivations(2**20))
        for _ in range(2):
            parts = objective.losses_with_graph(EXAMPLES)
            gradients.append(MaskedSpace(loaded.model, mask).gradient(parts, len(EXAMPLES))[1])
    assert len({gradient.tobytes() for gradient in gradients}) == 1


def kept_bytes(objective: TextObjective, model: torch.nn.Module) -> int:
    """What a graph holds before its backward pass, weights left out."""
    weights, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = list(objective.losses_with_graph(EXAMPLES))
    assert losses[0].requires_grad
    return sum(held.values())


def test_little_is_kept() -> None:
    loaded = tiny_model(num_hidden_layers=6)
    for parameter in eligible_parameters(loaded.model, MaskSection()).values():
        parameter.requires_grad_(True)
    usual, again = (kept_bytes(one, loaded.model) for one in objectives(loaded))
    tokens = sum(pack.tokens for pack in objectives(loaded)[0].packs(EXAMPLES))
    hidden = 6 * tokens * 32 * 4
    assert hidden <= again < 2 * hidden
    assert usual > 5 * again


def test_the_blocks_are_as_they_were() -> None:
    loaded = tiny_model()
    blocks = blocks_of(loaded)
    with recomputed(blocks):
        assert all("forward" in vars(block) for block in blocks)
    with pytest.raises(RuntimeError, match="within"), recomputed(blocks):
        raise RuntimeError("within")
    assert not any("forward" in vars(block) for block in blocks)
