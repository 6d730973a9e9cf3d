"""Scores of written answers, by hand and by the package that defines them."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meerkat.config import Choice, parse_recipe
from meerkat.errors import RecipeError, RunError
from meerkat.node.config import NodeConfig
from meerkat.tasks.metrics import (
    Metric,
    TextMetric,
    compares_texts,
    metric_values,
    metrics_of,
    prepare,
)
from meerkat.tasks.objective import Predictions


def metric(asked: str | dict[str, Any]) -> TextMetric:
    found = metrics_of([Choice.model_validate(asked)], has_classes=False)
    last = list(found.values())[-1]
    assert isinstance(last, TextMetric)
    return last


def predictions(written: list[str], references: list[str]) -> Predictions:
    none = np.zeros(len(written), np.int64)
    texts = {"written": tuple(written), "references": tuple(references)}
    return Predictions(none.astype(float), none, none, 1, **texts)


@pytest.mark.parametrize(
    ("name", "written", "reference", "score"),
    [
        ("exact_match", "The  cat, sat.", "cat sat", 1.0),
        ("exact_match", "cat sat down", "cat sat", 0.0),
        ("token_f1", "a cat sat down", "the cat sat", 0.8),
        ("token_f1", "dog dog", "dog", 2 / 3),
        ("token_f1", "", "dog", 0.0),
        ("token_f1", "the", "a", 1.0),  # nothing is left of either
        ("rouge_l", "police killed the gunman", "police kill the gunman", 1.0),  # stems
        ("rouge_l", "the gunman kill police", "police kill the gunman", 0.5),
        ("rouge_l", "", "police", 0.0),
    ],
)
def test_scores_by_hand(name: str, written: str, reference: str, score: float) -> None:
    assert metric(name).score(written, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("pattern", "written", "reference", "score"),
    [
        (r"#### (-?[0-9.,]+)", "so #### 1,200.", "it is\n#### 1200", 1.0),
        (r"#### (-?[0-9.,]+)", "#### 3 no, #### 4", "#### 4.0", 1.0),  # the last match
        (r"#### (-?[0-9.,]+)", "1200", "#### 1200", 0.0),
        (r"#### (-?[0-9.,]+)", "#### 1", "1", 0.0),
        (r"yes|no", "well, yes", "yes", 1.0),
        (r"(yes)|no", "no", "no", 1.0),
    ],
)
def test_a_pattern_is_compared(pattern: str, written: str, reference: str, score: float) -> None:
    assert metric({"kind": "regex", "pattern": pattern}).score(written, reference) == score


words = st.lists(st.sampled_from(["the", "cat", "sat", "a", "dog.", "12", "No"]), max_size=6).map(
    " ".join
)


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(words, words), min_size=2, max_size=8), cut=st.integers(1, 7))
def test_sums_add_up_over_clients(pairs: list[tuple[str, str]], cut: int) -> None:
    found = metrics_of(["exact_match", "token_f1", "rouge_l"], has_classes=False)
    shards = [part for part in (pairs[:cut], pairs[cut:]) if part]
    for name, kind in list(found.items())[1:]:
        sums, *parts = (of_pairs(kind, part) for part in (pairs, *shards))
        assert np.allclose(sum(parts), sums, rtol=1e-12)
        assert kind.is_possible(sums, len(pairs), 1)
        assert 0 <= metric_values({name: sums}, len(pairs), found)[name] <= 1
        assert not kind.is_possible(sums + len(pairs) + 1, len(pairs), 1)
        assert not kind.is_possible(sums - len(pairs) - 1, len(pairs), 1)


def of_pairs(kind: Metric, pairs: list[tuple[str, str]]) -> np.ndarray:
    return kind.sums(predictions([one for one, _ in pairs], [other for _, other in pairs]))


OWN = """
def length(prediction, reference):
    return min(1.0, len(prediction) / 10)

def large(prediction, reference):
    return 40

def broken(prediction, reference):
    raise KeyError("nothing here")

value = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_scores_of_a_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    yield "own_scores_of_a_test"
    sys.modules.pop("own_scores_of_a_test", None)


def test_a_function_of_ones_own(own: str) -> None:
    before = list(sys.path)
    assert metric(f"{own}:length").score("hello", "") == 0.5
    assert sys.path == before
    named = {"kind": "function", "function": f"{own}:large", "largest": 100, "name": "size"}
    found = metrics_of([Choice.model_validate(named), f"{own}:length"], has_classes=False)
    assert list(found) == ["loss", "size", f"{own}:length"]
    assert compares_texts(found)
    prepare(found)
    assert metric_values({"size": found["size"].sums(predictions(["a"], ["b"]))}, 1, found) == {
        "size": 40.0
    }


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("broken", "broken failed: 'nothing here'"),
        ("large", "large gave 40, and a score is from 0 to 1"),
        ("value", r"^evaluation.metrics = .* has no function 'value'$"),
        ("missing", r"^evaluation.metrics = .* has no function 'missing'$"),
    ],
)
def test_a_function_that_cannot_serve(own: str, function: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        metric(f"{own}:{function}").score("a", "b")


@pytest.mark.parametrize(
    ("asked", "has_classes", "said"),
    [
        (["accuracy"], False, "'accuracy' is about classes"),
        (["rouge_l"], True, "'rouge_l' compares written answers, and the task has classes"),
        (["bleu"], False, "known are .*exact_match.*function.*regex.*rouge_l"),
        ([{"kind": "regex"}], False, "its option pattern is missing"),
        ([{"kind": "regex", "pattern": "("}], False, "is no regular expression"),
        ([{"kind": "regex", "pattern": "a", "name": "a b"}], False, "take letters"),
        ([{"kind": "rouge_l", "beta": 1}], False, "it takes no options; leave beta out"),
        ([{"kind": "function", "function": "a:b", "largest": 0}], False, "raise it"),
        (
            [{"kind": "regex", "pattern": "a"}, {"kind": "regex", "pattern": "b"}],
            False,
            "two of them are called 'regex'",
        ),
    ],
)
def test_a_wrong_choice(asked: list[Any], has_classes: bool, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        metrics_of([Choice.model_validate(one) for one in asked], has_classes)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"no_such_module.* cannot be imported"):
        prepare(metrics_of(["no_such_module:score"], has_classes=False))
    with pytest.raises(RecipeError, match="write a function as module:function"):
        prepare(metrics_of(["a..b:score"], has_classes=False))


def test_rouge_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ModuleNotFoundError("no", name="rouge_score")
        return real(name, *arguments, **options)

    fresh = type(metric("rouge_l"))()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RunError, match=r"pip install 'meerkat-fl\[metrics\]'"):
        fresh.prepare()


# What a server may make a client run


def sent(**sections: Any) -> str:
    from builders import make_recipe

    model = {"name": "demo:gemma-3-270m"}
    task = {"name": "custom", "source": "demo", "format": "chat", **sections.pop("task", {})}
    return make_recipe(model=model, task=task, **sections).to_json()


def test_a_client_runs_no_code_of_a_server_unless_it_is_allowed() -> None:
    metrics = {"metrics": ["own:score", {"kind": "function", "function": "other.part:score"}]}
    strict = {"partition-id": 0}
    for allowed, said in (
        ({}, "names the function 'own:score', which is not allowed"),
        ({"allow-functions": "own:*"}, "names the function 'other.part:score'"),
    ):
        with pytest.raises(RecipeError, match=said):
            NodeConfig.of({**strict, **allowed}).recipe(sent(evaluation=metrics))
    hidden = {"metrics": [{"kind": "own:score", "function": "other.part:score"}]}
    found = metrics_of(parse_recipe(json.loads(sent(evaluation=hidden))).evaluation.metrics, False)
    assert found["own:score"].function == "own:score"
    both = NodeConfig.of({**strict, "allow-functions": "own:*,other.part:score"})
    assert both.recipe(sent(evaluation=metrics)).evaluation.metrics[0].kind == "own:score"
    assert NodeConfig.of(strict, trusted=True).recipe(sent(evaluation=metrics))


def test_a_client_takes_no_template_of_a_server_unless_it_is_allowed(tmp_path: Path) -> None:
    task = {"chat_template": "{{ messages }}"}
    with pytest.raises(RecipeError, match="allow-template=true"):
        NodeConfig.of({"partition-id": 0}).recipe(sent(task=task))
    allowed = NodeConfig.of({"partition-id": 0, "allow-template": "true"})
    assert allowed.recipe(sent(task=task)).task.chat_template == "{{ messages }}"
    # A file is read by whoever writes the recipe, and nowhere else.
    (tmp_path / "secret.jinja").write_text("{{ secret }}")
    task = {"chat_template": str(tmp_path / "secret.jinja")}
    assert allowed.recipe(sent(task=task)).task.chat_template == str(tmp_path / "secret.jinja")
