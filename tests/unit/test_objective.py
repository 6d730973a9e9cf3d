"""Packed losses against transformers' own forward pass: unpacked, eager attention, full logits."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from builders import ARCHITECTURES, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meerkat.data.encoding import Encoded
from meerkat.data.packing import pack, packs
from meerkat.errors import ModelError
from meerkat.models.attention import NAME, packed_logits
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective

VOCABULARY = 320
LARGE = 10_000
ONE_TOKEN = ((5,), (9,), (200,))
UNEQUAL = ((5, 6, 7), (9,), (200, 5))
KINDS = ("one-token", "multi-token", "free-text")
# Every architecture, and what bends attention: a window shorter than the sequences in all
# layers, in every second one, and softcapping of attention scores and logits.
VARIANTS = (*ARCHITECTURES, "gemma3-window", "mistral-window", "gemma2-softcap")


def variant(
    name: str, dtype: torch.dtype = torch.float32, **changes: int | float | None
) -> LoadedModel:
    if name in ARCHITECTURES:
        return tiny_model(name, dtype, **changes)
    if name == "gemma3-window":
        return tiny_model("gemma3", dtype, **{"sliding_window": 4, **changes})
    size = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "sliding_window": 4,
    }
    if name == "mistral-window":
        return build(transformers.MistralConfig(**{**size, **changes}), dtype)
    softcap = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0}
    heads = {"head_dim": 8, "query_pre_attn_scalar": 1}
    return build(transformers.Gemma2Config(**{**size, **heads, **softcap, **changes}), dtype)


def build(config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32) -> LoadedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, tiny_tokenizer(), "", config.model_type)


@cache
def objective(name: str) -> TextObjective:
    return TextObjective(variant(name), LARGE)


@cache
def eager(name: str) -> transformers.PreTrainedModel:
    model = variant(name).model
    model.set_attn_implementation("eager")
    return model


def examples(kind: str, lengths: list[int], seed: int = 0) -> list[Encoded]:
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, VOCABULARY, count).tolist())

    made = []
    for length in lengths:
        answers = {"one-token": ONE_TOKEN, "multi-token": UNEQUAL}.get(kind)
        answers = answers or (tokens(int(generator.integers(1, 6))),)
        made.append(Encoded(tokens(length), answers, int(generator.integers(len(answers)))))
    return made


@torch.inference_mode()
def plain_score(model: transformers.PreTrainedModel, example: Encoded, answer: int) -> float:
    """Mean log-probability of an answer's tokens, from one unpacked sequence."""
    ids = [*example.prompt, *example.answers[answer]]
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    chosen = [
        logits[place, token] - logits[place].exp().sum().log()
        for place, token in enumerate(example.answers[answer], start=len(example.prompt) - 1)
    ]
    return float(sum(chosen) / len(chosen))


def plain_loss(model: transformers.PreTrainedModel, example: Encoded) -> float:
    scores = [plain_score(model, example, answer) for answer in range(len(example.answers))]
    if len(scores) == 1:
        return -scores[0]
    return float(np.log(np.sum(np.exp(scores))) - scores[example.label])


@torch.inference_mode()
def packed_losses(of: TextObjective, batch: list[Encoded]) -> Tensor:
    return of.batch_losses(pack(batch))


# The same loss as without packing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_equals_the_plain_forward_pass(name: str, kind: str) -> None:
    batch = examples(kind, [9, 1, 23, 2, 14])
    expected = [plain_loss(eager(name), example) for example in batch]
    found = packed_losses(objective(name), batch)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert objective(name).losses(batch) == pytest.approx(np.array(expected), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_of_every_answer_equal_the_plain_forward_pass(name: str) -> None:
    batch = examples("multi-token", [7, 19, 1])
    expected = [[plain_score(eager(name), example, a) for a in range(3)] for example in batch]
    with torch.inference_mode():
        found = objective(name).scores(pack(batch))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    predictions = objective(name).predict(batch)
    assert predictions.classes == 3
    assert predictions.labels.tolist() == [example.label for example in batch]
    assert predictions.losses == pytest.approx(objective(name).losses(batch), rel=1e-5, abs=1e-5)
    # Not `argmax`: two scores may differ by less than the two ways of computing them.
    scores = np.array(expected)
    chosen = scores[np.arange(len(batch)), predictions.predicted]
    assert chosen == pytest.approx(scores.max(1), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 100),
)
def test_packed_equals_one_sequence_at_a_time(
    name: str, lengths: list[int], kind: str, seed: int
) -> None:
    batch = examples(kind, lengths, seed)
    together = packed_losses(objective(name), batch)
    alone = torch.cat([packed_losses(objective(name), [example]) for example in batch])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_agrees_roughly(architecture: str, kind: str) -> None:
    batch = examples(kind, [9, 1, 23, 2, 14])
    half = variant(architecture, torch.bfloat16)
    # The same rounded weights in float32, so that only the arithmetic differs.
    wide = variant(architecture, torch.bfloat16).model.float()
    wide.set_attn_implementation("eager")
    expected = torch.tensor([plain_loss(wide, example) for example in batch])
    found = packed_losses(TextObjective(half, LARGE), batch)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma3-window", {"sliding_window": 64}),
        ("mistral-window", {"sliding_window": None}),
        ("gemma2-softcap", {"sliding_window": 64}),
        ("gemma2-softcap", {"attn_logit_softcapping": None}),
        ("gemma2-softcap", {"final_logit_softcapping": None}),
    ],
)
def test_the_bends_of_attention_matter(name: str, change: dict[str, int | None]) -> None:
    """Without them the same weights give another loss, so the tests above do see them."""
    example = examples("free-text", [23])[0]
    straight = variant(name, **change).model
    straight.set_attn_implementation("eager")
    assert abs(plain_loss(straight, example) - plain_loss(eager(name), example)) > 1e-3


# What is computed


@pytest.mark.parametrize("name", VARIANTS)
def test_candidate_rows_equal_the_full_head(name: str) -> None:
    batch = pack(examples("one-token", [3, 8, 1]))
    assert batch.candidates is not None
    with torch.inference_mode():
        full = packed_logits(objective(name).model, batch)
        rows = objective(name).scores(batch)
    assert full.shape == (3, VOCABULARY)
    torch.testing.assert_close(rows, full[:, batch.candidates], rtol=1e-5, atol=1e-5)


def test_the_bias_of_a_head_counts() -> None:
    loaded = build(
        transformers.PhiConfig(  # its head has a bias
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    torch.nn.init.normal_(loaded.model.lm_head.bias)
    batch = examples("one-token", [4, 7])
    found = packed_losses(TextObjective(loaded, LARGE), batch)
    loaded.model.set_attn_implementation("eager")
    expected = torch.tensor([plain_loss(loaded.model, example) for example in batch])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_head_is_put_back(name: str) -> None:
    of = TextObjective(variant(name), LARGE)
    head = of.model.get_output_embeddings()
    of.losses(examples("one-token", [3, 8]))
    assert "forward" not in vars(head)
    assert head(torch.zeros(1, 32)).shape == (1, VOCABULARY)
    broken = [Encoded((5, VOCABULARY + 7), ONE_TOKEN, 0)]
    with pytest.raises(IndexError):
        of.losses(broken)
    assert "forward" not in vars(head)


def test_the_model_is_not_changed_by_a_loss() -> None:
    loaded = variant("qwen2")
    of = TextObjective(loaded, LARGE)
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    of.losses(examples("multi-token", [3, 8]))
    assert all(map(torch.equal, before, loaded.model.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 12, 30, 45, LARGE])
def test_the_token_budget_does_not_change_the_loss(kind: str, budget: int) -> None:
    loaded = variant("gemma3")
    batch = examples(kind, [9, 1, 23, 2, 14, 5])
    whole = TextObjective(loaded, LARGE)
    split = TextObjective(loaded, budget)
    assert split.losses(batch) == pytest.approx(whole.losses(batch), rel=1e-5, abs=1e-5)
    first, second = split.predict(batch), whole.predict(batch)
    assert first.losses == pytest.approx(second.losses, rel=1e-5, abs=1e-5)
    assert first.labels.tolist() == second.labels.tolist()
    # Two scores may be nearer to each other than the two ways of computing them.
    with torch.inference_mode():
        best = whole.scores(pack(batch)).topk(min(2, first.classes)).values
    clear = (best[:, 0] - best[:, -1] > 1e-4).numpy()
    assert (first.predicted == second.predicted)[clear].all()
    assert first.classes == second.classes


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    kind=st.sampled_from(KINDS),
    budget=st.integers(1, 150),
)
def test_packs_keep_order_and_budget(lengths: list[int], kind: str, budget: int) -> None:
    batch = examples(kind, lengths)
    made = list(packs(batch, budget))
    assert sum(pack.examples for pack in made) == len(batch)
    assert all(pack.tokens <= budget or pack.examples == 1 for pack in made)
    assert torch.equal(torch.cat([pack.input_ids for pack in made], 1), pack(batch).input_ids)
    # No pack could have taken the first example of the next.
    firsts = np.cumsum([0, *(pack.examples for pack in made)])[1:-1]
    for pack_, first in zip(made, firsts, strict=False):
        assert pack_.tokens + pack([batch[first]]).tokens > budget


def test_only_what_matters_is_read_and_scored() -> None:
    example = Encoded((1, 2, 3), ((4, 5), (6,), (7, 8, 9)), 2)
    batch = pack([example, Encoded((1,), ((4, 5), (6,), (7, 8, 9)), 0)])
    # The last token of an answer is a target only; a prompt is read once.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 7, 8, 1, 4, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0, 1, 1, 2]]
    assert batch.scored.tolist() == [2, 3, 2, 2, 4, 5, 6, 7, 6, 6, 8, 9]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8, 9] * 2
    one = pack([Encoded((1, 2), ((4,), (5,)), 0), Encoded((3,), ((4,), (5,)), 1)])
    assert one.input_ids.tolist() == [[1, 2, 3]]
    assert one.scored.tolist() == [1, 2]
    assert one.layout.allowed is None


# Edges


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_of_one_token(kind: str) -> None:
    batch = examples(kind, [1])
    expected = plain_loss(eager("llama"), batch[0])
    assert objective("llama").losses(batch).mean() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["one-token", "multi-token"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_batch_of_one_label(kind: str, label: int) -> None:
    batch = [Encoded(e.prompt, e.answers, label) for e in examples(kind, [3, 4, 5])]
    expected = np.mean([plain_loss(eager("llama"), example) for example in batch])
    assert objective("llama").losses(batch).mean() == pytest.approx(expected, rel=1e-5)


def test_answers_that_differ_between_examples() -> None:
    # One token each, yet no common rows of the head.
    batch = [Encoded((3, 4), ((5,), (6,)), 0), Encoded((7,), ((8,), (9,)), 1)]
    assert pack(batch).candidates is None
    expected = np.mean([plain_loss(eager("llama"), example) for example in batch])
    assert objective("llama").losses(batch).mean() == pytest.approx(expected, rel=1e-5)


def test_mixed_answer_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="same number of answers"):
        pack([Encoded((1, 2), ((3,), (4,)), 0), Encoded((1, 2), ((3,),), 0)])
    with pytest.raises(ValueError, match="same number of answers"):
        pack([])
    with pytest.raises(ValueError, match="same number of answers"):
        pack([Encoded((1, 2), (), 0)])


def test_without_a_packed_layout_the_model_is_transformers_own() -> None:
    ids = torch.tensor([[3, 9, 4, 100], [7, 7, 2, 1]])
    with torch.inference_mode():
        for architecture in ARCHITECTURES:
            model = objective(architecture).model
            assert model.config._attn_implementation == NAME
            torch.testing.assert_close(
                model(input_ids=ids).logits, eager(architecture)(input_ids=ids).logits
            )


# Models that cannot be packed

SIZE = {"vocab_size": VOCABULARY, "hidden_size": 32}
UNPACKABLE = {
    "alibi": transformers.BloomConfig(**SIZE, n_layer=2, n_head=4),
    "own attention": transformers.GPTNeoConfig(
        **SIZE, num_layers=2, num_heads=4, attention_types=[[["global"], 2]], intermediate_size=64
    ),
    "state space": transformers.MambaConfig(**SIZE, num_hidden_layers=2, state_size=4),
    "short convolution": transformers.Lfm2Config(
        **SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        full_attn_idxs=[1],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNPACKABLE)
def test_models_that_cannot_be_packed_are_refused(name: str, dtype: torch.dtype) -> None:
    loaded = build(UNPACKABLE[name], dtype)
    with pytest.raises(ModelError, match=rf"model\.name = '{loaded.name}' cannot be packed"):
        TextObjective(loaded, LARGE)


def test_a_model_without_a_linear_head_is_refused() -> None:
    loaded = variant("llama")
    loaded.model.lm_head = torch.nn.Sequential(loaded.model.lm_head)
    with pytest.raises(ModelError, match="no linear LM head"):
        TextObjective(loaded, LARGE)
