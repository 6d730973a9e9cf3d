"""Scores and the pre-training gradient against plain autograd; the corpus behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from conftest import ARCHITECTURES, WORDS, tiny_model, tiny_tokenizer
from meerkat.calibration import calibrate_scores, gradient_at, tiers
from meerkat.data.corpus import calibration_batches, corpus_texts, sequences
from meerkat.errors import DataError
from meerkat.mask.file import Mask
from meerkat.mask.making import eligible_parameters, top_mask
from meerkat.models import LoadedModel
from meerkat.recipe import MaskSection

BATCHES = torch.randint(0, 320, (3, 2, 12), generator=torch.Generator().manual_seed(5))


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
        calibration = calibrate_scores(loaded.model, chosen, BATCHES, section)
        assert list(calibration.scores) == list(chosen)
        assert calibration.gradients is not None
        assert len(calibration.losses) == len(BATCHES)
        for name in chosen:
            each = torch.stack([gradient[name].float() for gradient in gradients])
            expected = (each**2).mean(0) if score == "mean_square" else each.mean(0) ** 2
            assert calibration.scores[name].dtype == torch.float32
            assert_close(calibration.scores[name], expected, dtype)
            assert_close(calibration.gradients[name], each.mean(0), dtype)


def test_the_two_definitions_differ() -> None:
    loaded = tiny_model()
    chosen = eligible_parameters(loaded.model, MaskSection())
    squares, means = (
        calibrate_scores(loaded.model, chosen, BATCHES, MaskSection(score=score)).scores
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
    kept = calibrate_scores(loaded.model, chosen, BATCHES, section)
    dropped = calibrate_scores(loaded.model, chosen, BATCHES, section, keep_gradients=False)
    assert dropped.gradients is None
    mask = top_mask(kept.scores, section, loaded.fingerprint)
    assert top_mask(dropped.scores, section, loaded.fingerprint).digest == mask.digest
    first = gradient_at(loaded.model, chosen, BATCHES, mask, kept)
    second = gradient_at(loaded.model, chosen, BATCHES, mask, dropped)
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
    calibrate_scores(loaded.model, chosen, BATCHES, MaskSection())
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
        calibrate_scores(loaded.model, chosen, beyond, MaskSection())
    for parameter in loaded.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert not parameter._post_accumulate_grad_hooks


def test_a_tied_embedding_is_scored_by_all_its_uses() -> None:
    loaded = tiny_model("qwen2")
    name = "model.embed_tokens.weight"
    chosen = eligible_parameters(loaded.model, MaskSection(include=(name,)))
    calibration = calibrate_scores(loaded.model, chosen, BATCHES, MaskSection())
    gradients = brute_gradients(tiny_model("qwen2"), [name])
    expected = torch.stack([gradient[name] ** 2 for gradient in gradients]).mean(0)
    assert_close(calibration.scores[name], expected, torch.float32)


# How concentrated the scores are


def test_tiers_of_a_known_vector() -> None:
    values = torch.cat([torch.full((3,), 8.0), torch.full((27,), 2.0), torch.full((60,), 1.0)])
    shuffled = values[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    scores = {"a": shuffled[:10].reshape(2, 5), "b": shuffled[10:]}
    found = tiers(scores, 3)
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
def test_tiers_without_a_second_tier(
    values: list[float], n: int, expected: dict[str, float]
) -> None:
    assert tiers({"a": torch.tensor(values)}, n) == expected


# The corpus


SECTION = MaskSection(batches=3, batch_size=2, sequence_length=10)
TEXTS = [f"{WORDS} film number {i}" for i in range(20)]


def with_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_sequences_are_pieces_of_the_corpus() -> None:
    tokenizer = tiny_tokenizer()
    batches = sequences(TEXTS, SECTION, tokenizer)
    assert batches.shape == (3, 2, 10)
    assert batches.dtype == torch.int64
    run = tokenizer("".join(text + "\n\n" for text in TEXTS))["input_ids"]
    pieces = {tuple(run[i : i + 10]) for i in range(0, len(run) - 9, 10)}
    rows = [tuple(row) for row in batches.view(-1, 10).tolist()]
    assert set(rows) <= pieces
    assert len(set(rows)) == 6


def test_sequences_start_with_bos_where_the_tokenizer_adds_it() -> None:
    bos = tiny_tokenizer().bos_token_id
    plain, started = (
        sequences(TEXTS, SECTION, tiny_tokenizer()),
        sequences(TEXTS, SECTION, with_bos()),
    )
    assert (plain != bos).all()
    assert started.shape == (3, 2, 10)
    assert (started[..., 0] == bos).all()
    assert (started[..., 1:] != bos).all()


def test_sequences_follow_the_seed() -> None:
    tokenizer = tiny_tokenizer()
    one, same, other = (
        sequences(TEXTS, SECTION.model_copy(update={"seed": seed}), tokenizer) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_sequences_read_no_more_of_the_corpus_than_needed() -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield WORDS

    sequences(endless(), SECTION, tiny_tokenizer())
    assert read < 100


def test_a_short_corpus_is_refused() -> None:
    with pytest.raises(DataError, match=r"mask\.corpus.* 6 are needed; lower mask\.batches"):
        sequences(["too short"], SECTION, tiny_tokenizer())
    with pytest.raises(DataError, match="0 sequences"):
        sequences([], SECTION, tiny_tokenizer())


def test_batches_of_text_files(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(
            "\n\n".join(TEXTS[number * 10 :][:10]) + "\n\n \n\n"
        )
    files = tuple(str(tmp_path / f"{number}.txt") for number in range(2))
    section = SECTION.model_copy(update={"corpus": files})
    assert sorted(text.strip() for text in corpus_texts(section)) == sorted(TEXTS)
    assert list(corpus_texts(section)) != [*corpus_texts(section.model_copy(update={"seed": 1}))]
    batches = calibration_batches(section, tiny_tokenizer())
    assert batches.shape == (3, 2, 10)
    assert torch.equal(batches, calibration_batches(section, tiny_tokenizer()))


@pytest.mark.parametrize("corpus", ["missing.txt", ("a.md", "b.md")])
def test_a_missing_corpus_is_refused(corpus: str | tuple[str, ...], tmp_path: Path) -> None:
    names = (corpus,) if isinstance(corpus, str) else corpus
    section = SECTION.model_copy(update={"corpus": tuple(str(tmp_path / n) for n in names)})
    with pytest.raises(DataError, match=r"mask\.corpus.*cannot be read"):
        list(corpus_texts(section))


def test_a_corpus_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xff\xfe\x00 not utf-8")
    with pytest.raises(DataError, match="cannot be read"):
        list(corpus_texts(SECTION.model_copy(update={"corpus": str(path)})))


@pytest.mark.real
def test_the_demo_corpus_holds_no_labelled_review() -> None:
    from meerkat.data.sources import load_examples
    from meerkat.recipe import TaskSection
    from meerkat.tasks import resolve_task

    section = TaskSection(name="rotten_tomatoes")
    split = load_examples(resolve_task(section), section)
    reviews = {str(example.fields["text"]) for example in (*split.train, *split.test)}
    assert not reviews & set(corpus_texts(MaskSection(corpus="demo")))


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
    kept = calibrate_scores(loaded.model, chosen, BATCHES, MaskSection())
    found = gradient_at(loaded.model, chosen, BATCHES, mask, kept)
    assert kept.gradients is not None
    assert found.tolist() == [
        *kept.gradients[names[0]].flatten()[[0, 7]].tolist(),
        kept.gradients[names[1]].flatten()[3].item(),
    ]
