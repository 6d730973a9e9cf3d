"""Scores and the pre-training gradient against plain autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, tiny_model
from torch import Tensor

from meerkat.config import MaskSection
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.spaces.mask_criteria import eligible_parameters, top_mask
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.sensitivity import (
    BatchLoss,
    concentration_of,
    gradient_at,
    sensitivity_scores,
)

BATCHES = torch.randint(0, 320, (3, 2, 12), generator=torch.Generator().manual_seed(5))


def loss_of(loaded: LoadedModel) -> BatchLoss:
    """Next-token cross-entropy by transformers' own."""
    return lambda ids: loaded.model(input_ids=ids, labels=ids, use_cache=False).loss


def brute_gradients(loaded: LoadedModel, names: list[str]) -> list[dict[str, Tensor]]:
    """∂L_b/∂w of each batch, with a loss of our own."""
    model = loaded.model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    found = []
    for ids in BATCHES:
        logits = model(input_ids=ids).logits.float()
        log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
        loss = -log_probabilities[:, :-1].gather(2, ids[:, 1:, None]).mean()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        found.append(dict(zip(names, gradients, strict=True)))
    return found


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_brute_force(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    chosen = eligible_parameters(loaded.model, MaskSection())
    gradients = brute_gradients(tiny_model(architecture, dtype), list(chosen))
    for score in ("mean_square", "squared_mean"):
        section = MaskSection(score=score)
        found = sensitivity_scores(loss_of(loaded), chosen, BATCHES, section)
        assert list(found.scores) == list(chosen)
        assert found.gradients is not None
        assert len(found.losses) == len(BATCHES)
        for name in chosen:
            each = torch.stack([gradient[name].float() for gradient in gradients])
            expected = (each**2).mean(0) if score == "mean_square" else each.mean(0) ** 2
            assert found.scores[name].dtype == torch.float32
            assert_close(found.scores[name], expected, dtype)
            assert_close(found.gradients[name], each.mean(0), dtype)


def test_the_two_definitions_differ() -> None:
    loaded = tiny_model()
    chosen = eligible_parameters(loaded.model, MaskSection())
    squares, means = (
        sensitivity_scores(loss_of(loaded), chosen, BATCHES, MaskSection(score=score)).scores
        for score in ("mean_square", "squared_mean")
    )
    for name in chosen:
        assert (squares[name] >= means[name] * (1 - 1e-5)).all()
        assert squares[name].sum() > 1.5 * means[name].sum()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_is_the_same_kept_or_from_a_second_pass(architecture: str) -> None:
    loaded = tiny_model(architecture)
    section = MaskSection(density=0.01)
    chosen = eligible_parameters(loaded.model, section)
    kept = sensitivity_scores(loss_of(loaded), chosen, BATCHES, section)
    dropped = sensitivity_scores(loss_of(loaded), chosen, BATCHES, section, keep_gradients=False)
    assert dropped.gradients is None
    mask = top_mask(kept.scores, section, loaded.fingerprint)
    assert top_mask(dropped.scores, section, loaded.fingerprint).digest == mask.digest
    first = gradient_at(loss_of(loaded), chosen, BATCHES, mask, kept)
    second = gradient_at(loss_of(loaded), chosen, BATCHES, mask, dropped)
    assert first.dtype == np.float32
    assert first.shape == (mask.size,)
    np.testing.assert_allclose(second, first, rtol=1e-6, atol=1e-9)
    gradients = brute_gradients(loaded, list(mask.names))
    expected = torch.cat(
        [
            torch.stack([gradient[name] for gradient in gradients]).mean(0).flatten()[i]
            for name, i in zip(mask.names, mask.indices, strict=True)
        ]
    )
    np.testing.assert_allclose(first, expected, rtol=1e-3, atol=1e-6)


def test_the_model_is_left_as_it_was() -> None:
    loaded = tiny_model("qwen2")
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    chosen = eligible_parameters(loaded.model, MaskSection())
    sensitivity_scores(loss_of(loaded), chosen, BATCHES, MaskSection())
    for parameter, bits in zip(loaded.model.parameters(), before, strict=True):
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks
        assert torch.equal(parameter, bits)


def test_the_model_is_left_as_it_was_after_a_failure() -> None:
    loaded = tiny_model()
    chosen = eligible_parameters(loaded.model, MaskSection())
    beyond = torch.cat([BATCHES[:1], torch.full_like(BATCHES[:1], 10_000)])
    with pytest.raises(IndexError):
        sensitivity_scores(loss_of(loaded), chosen, beyond, MaskSection())
    for parameter in loaded.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks


def test_a_tied_embedding_is_scored_by_all_its_uses() -> None:
    loaded = tiny_model("qwen2")
    name = "model.embed_tokens.weight"
    chosen = eligible_parameters(loaded.model, MaskSection(include=(name,)))
    found = sensitivity_scores(loss_of(loaded), chosen, BATCHES, MaskSection())
    gradients = brute_gradients(tiny_model("qwen2"), [name])
    expected = torch.stack([gradient[name] ** 2 for gradient in gradients]).mean(0)
    assert_close(found.scores[name], expected, torch.float32)


def test_mask_without_a_tensor_reads_the_gradient_of_the_others() -> None:
    loaded = tiny_model()
    chosen = eligible_parameters(loaded.model, MaskSection())
    names = [list(chosen)[i] for i in (1, 4)]
    mask = Mask(
        tuple(names),
        tuple(tuple(chosen[name].shape) for name in names),
        (np.array([0, 7]), np.array([3])),
        sum(p.numel() for p in chosen.values()),
        loaded.fingerprint,
        "random",
    )
    kept = sensitivity_scores(loss_of(loaded), chosen, BATCHES, MaskSection())
    found = gradient_at(loss_of(loaded), chosen, BATCHES, mask, kept)
    assert kept.gradients is not None
    assert found.tolist() == [
        *kept.gradients[names[0]].flatten()[[0, 7]].tolist(),
        kept.gradients[names[1]].flatten()[3].item(),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_objectives_own_loss_gives_the_same_scores(architecture: str) -> None:
    """It attends by another function, and returns float32 whatever the weights are."""
    plain, packed = tiny_model(architecture), tiny_model(architecture)
    objective = TextObjective(packed, 10_000)
    names = eligible_parameters(plain.model, MaskSection())
    expected = sensitivity_scores(loss_of(plain), names, BATCHES, MaskSection())
    found = sensitivity_scores(
        objective.pretraining_loss,
        eligible_parameters(packed.model, MaskSection()),
        BATCHES,
        MaskSection(),
    )
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for name in names:
        assert_close(found.scores[name], expected.scores[name], torch.float32)
    half = TextObjective(tiny_model(architecture, torch.bfloat16), 10_000)
    assert half.pretraining_loss(BATCHES[0]).dtype == torch.float32


# How concentrated the scores are


def test_concentration_of_a_known_vector() -> None:
    values = torch.cat([torch.full((3,), 8.0), torch.full((27,), 2.0), torch.full((60,), 1.0)])
    shuffled = values[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    scores = {"a": shuffled[:10].reshape(2, 5), "b": shuffled[10:]}
    found = concentration_of(scores, 3)
    assert found["mass"] == pytest.approx(24 / (24 + 54 + 60))
    assert found["ratio"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("values", "n", "expected"),
    [
        ([5.0, 0.0, 0.0, 0.0], 1, {"mass": 1.0, "ratio": float("inf")}),
        ([0.0, 0.0, 0.0], 1, {"mass": 1.0, "ratio": float("inf")}),
        ([1.0, 1.0], 2, {"mass": 1.0, "ratio": float("inf")}),
    ],
)
def test_concentration_where_nothing_is_below_the_top(
    values: list[float], n: int, expected: dict[str, float]
) -> None:
    assert concentration_of({"a": torch.tensor(values)}, n) == expected
