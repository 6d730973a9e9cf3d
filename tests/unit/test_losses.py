"""Training losses: their numbers, and that a batch's do not depend on how it is passed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_mask, make_recipe, make_text_examples, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from meerkat.errors import RecipeError
from meerkat.models.objective import TextObjective
from meerkat.node.config import NodeConfig
from meerkat.spaces.masked import MaskedSpace
from meerkat.tasks import resolve_task
from meerkat.tasks.losses import (
    Scored,
    TrainingLoss,
    UsualLoss,
    import_objective,
    training_loss,
)
from meerkat.tasks.losses.accuracy import Inaccuracy
from meerkat.tasks.losses.function import FunctionLoss
from meerkat.tasks.losses.macro_f1 import MacroF1Loss
from meerkat.tasks.metrics import METRICS
from meerkat.tasks.objective import Predictions

LOSSES: tuple[TrainingLoss, ...] = (
    UsualLoss(),
    Inaccuracy(),
    Inaccuracy(0.0),
    MacroF1Loss(),
    MacroF1Loss(0.5),
    MacroF1Loss(0.0),
)
SMOOTH = [loss for loss in LOSSES if loss.is_smooth]


def scored(seed: int, examples: int, classes: int = 3) -> Scored:
    draw = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(examples, classes, generator=draw)
    return Scored(scores, torch.randint(classes, (examples,), generator=draw))


def metric(name: str, batch: Scored) -> float:
    labels, predicted = batch.labels.numpy(), batch.scores.argmax(1).numpy()
    found = Predictions(np.zeros(len(labels)), labels, predicted, batch.scores.shape[1])
    return METRICS[name].value(METRICS[name].sums(found), len(labels))


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(2, 6))
@settings(deadline=None)
def test_without_smoothing_a_loss_is_one_less_the_metric(
    seed: int, size: int, classes: int
) -> None:
    batch = scored(seed, size, classes)
    for loss, name in ((Inaccuracy(0.0), "accuracy"), (MacroF1Loss(0.0), "macro_f1")):
        found = loss.losses(batch)
        assert found.shape == (size,)
        assert float(found.double().mean()) == pytest.approx(1 - metric(name, batch), abs=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 30))
@settings(deadline=None)
def test_smoothed_ones_come_near_as_the_temperature_falls(seed: int, size: int) -> None:
    batch = scored(seed, size)
    best = batch.scores.sort(1).values
    if (best[:, -1] - best[:, -2]).min() < 0.05:  # nearly a tie
        return
    for smooth, hard in (
        (Inaccuracy(1e-3), Inaccuracy(0.0)),
        (MacroF1Loss(1e-3), MacroF1Loss(0.0)),
    ):
        assert torch.allclose(smooth.losses(batch), hard.losses(batch), atol=1e-5)


def test_expected_counts_by_hand() -> None:
    """Three examples, two classes, p of the first class 0.8, 0.3, 0.6; labels 0, 0, 1."""
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    batch = Scored(p.log(), torch.tensor([0, 0, 1]))
    f1 = 0.5 * (2 * 1.1 / (2 + 1.7) + 2 * 0.4 / (1 + 1.3))
    assert float(MacroF1Loss().losses(batch).mean()) == pytest.approx(1 - f1, rel=1e-6)
    assert Inaccuracy().losses(batch).tolist() == pytest.approx([0.2, 0.7, 0.6])
    # At temperature 0.5 the shares are p² / Σ p².
    assert Inaccuracy(0.5).losses(batch)[0] == pytest.approx(1 - 0.64 / 0.68)


def test_the_usual_loss_has_the_bits_of_cross_entropy() -> None:
    for seed in range(20):
        batch = scored(seed, 1 + seed)
        expected = cross_entropy(batch.scores, batch.labels, reduction="none")
        assert torch.equal(UsualLoss().losses(batch), expected)
    one = Scored(torch.tensor([[-2.0], [-0.5]]), torch.tensor([0, 0]))
    assert UsualLoss().losses(one).tolist() == [2.0, 0.5]


# Over a model: passes, copies, derivatives


@cache
def objective(loss: TrainingLoss, tokens: int = 10_000) -> TextObjective:
    return TextObjective(tiny_model("llama"), tokens, loss=loss)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_batch_in_several_passes_has_the_same_losses(loss: TrainingLoss) -> None:
    examples = make_text_examples(9)
    whole = objective(loss).losses(examples)
    assert objective(loss, 20).losses(examples) == pytest.approx(whole, abs=2e-5)
    assert len(list(objective(loss, 20).packs(examples))) > 2


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_copies_of_a_batch_are_batches_of_their_own(loss: TrainingLoss) -> None:
    examples = make_text_examples(6)
    found = objective(loss).losses_of_copies(examples, 3)
    assert found.shape == (3, 6)
    for copy in found:
        assert copy == pytest.approx(objective(loss).losses(examples), abs=2e-5)


@pytest.mark.parametrize("loss", SMOOTH, ids=repr)
@pytest.mark.parametrize("tokens", [10_000, 20])
def test_exact_derivatives_are_those_of_differences(loss: TrainingLoss, tokens: int) -> None:
    of, examples = objective(loss, tokens), make_text_examples(7)
    space = MaskedSpace(of.model, make_mask(tiny_model("llama"), 60))
    theta = space.read()
    losses, gradient = space.gradient(of.losses_with_graph(examples), len(examples))
    assert losses == pytest.approx(of.losses(examples), abs=2e-5)
    direction = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    _, slopes = space.slopes(of.losses_with_graph(examples), direction)
    means = []
    for sign in (1, -1):
        space.write(theta + np.float32(sign * 2e-3) * direction)
        means.append(of.losses(examples).mean())
    space.restore()
    slope = (means[0] - means[1]) / 4e-3
    assert float(gradient @ direction) == pytest.approx(slope, rel=0.05, abs=2e-3)
    assert slopes.mean() == pytest.approx(float(gradient @ direction), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("exact", ["gradient", "slopes"])
def test_steps_have_no_derivative(exact: str) -> None:
    of, examples = objective(MacroF1Loss(0.0)), make_text_examples(4)
    space = MaskedSpace(of.model, make_mask(tiny_model("llama"), 60))
    second: Any = len(examples) if exact == "gradient" else np.ones(60, np.float32)
    with pytest.raises(RecipeError, match=r"task\.objective gives losses without a derivative"):
        getattr(space, exact)(of.losses_with_graph(examples), second)


def test_evaluations_have_the_usual_loss() -> None:
    examples = make_text_examples(5)
    usual = objective(UsualLoss()).losses(examples)
    assert objective(MacroF1Loss()).predict(examples).losses.tolist() == usual.tolist()


# A function of one's own


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module with losses."""
    name = f"losses_of_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(
        "def each(scores, labels, factor=1.0):\n"
        "    right = scores.gather(1, labels[:, None])[:, 0]\n"
        "    return factor * (scores.logsumexp(1) - right)\n"
        "def batch(scores, labels):\n"
        "    return float((scores.argmax(1) != labels).float().mean())\n"
        "def array(scores, labels):\n"
        "    return scores.detach().numpy()[:, 0]\n"
        "def failing(scores, labels):\n"
        "    raise KeyError('mine')\n"
        "def pairs(scores, labels):\n"
        "    return scores\n"
        "nothing = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_gives_one_number_an_example_or_one_for_the_batch(own: str) -> None:
    batch = scored(0, 5)
    usual = UsualLoss().losses(batch)
    doubled = FunctionLoss(f"{own}:each", {"factor": 2.0}).losses(batch)
    assert torch.allclose(doubled, 2 * usual, atol=1e-5)
    share = 1 - metric("accuracy", batch)
    assert FunctionLoss(f"{own}:batch").losses(batch).tolist() == pytest.approx([share] * 5)
    assert torch.equal(FunctionLoss(f"{own}:array").losses(batch), batch.scores[:, 0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", "failed over 5 examples: KeyError: 'mine'"),
        ("pairs", r"gave numbers of shape \(5, 3\) for 5 examples; it must return one"),
        ("absent", "has no function 'absent'"),
        ("nothing", "has no function 'nothing'"),
    ],
)
def test_a_function_that_does_not_do(own: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        FunctionLoss(f"{own}:{name}").losses(scored(0, 5))
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(RecipeError, match=r"'no_such:loss': module 'no_such' cannot be imported"):
        FunctionLoss("no_such:loss").losses(scored(0, 5))


def test_a_function_that_leaves_torch_has_no_derivative(own: str) -> None:
    of = TextObjective(tiny_model("llama"), 10_000, loss=FunctionLoss(f"{own}:array"))
    space = MaskedSpace(of.model, make_mask(tiny_model("llama"), 60))
    examples = make_text_examples(4)
    with pytest.raises(RecipeError, match=r"task\.objective gives losses without a derivative"):
        space.gradient(of.losses_with_graph(examples), len(examples))


# In a recipe


SUBSPACE = {"dimensions": 8}


@pytest.mark.parametrize(
    ("objective", "sections", "message"),
    [
        ("acuracy", {}, r"task\.objective = 'acuracy' is not known; known are accuracy, "),
        ({"kind": "accuracy", "temperature": -1.0}, {}, r"temperature is -1; give 0"),
        ({"kind": "loss", "temperature": 1.0}, {}, r"temperature is not one of its options"),
        (
            {"kind": "accuracy", "temperature": 0},
            {"optimizer": {"estimator": "forward-mode"}, "federation": {"clip_factor": 0}},
            r"no derivative, which optimizer\.estimator needs",
        ),
        (
            {"kind": "macro_f1", "temperature": 0},
            {"optimizer": {"exact_clients": [0]}, "subspace": SUBSPACE},
            r"no derivative, which optimizer\.exact_clients needs",
        ),
        ({"kind": "macro_f1", "temperature": 0}, {}, r"federation\.clip_factor = 10 times"),
        (
            "macro_f1",
            {"task": {"name": "custom", "source": "x.csv", "prompt": "{a}", "answer": "b"}},
            r"'macro_f1' is about classes, and the task is free text; .* are loss",
        ),
    ],
)
def test_an_objective_that_does_not_fit(
    objective: Any, sections: dict[str, Any], message: str
) -> None:
    task = {**sections.pop("task", {}), "objective": objective}
    recipe = make_recipe(task=task, **sections)
    with pytest.raises(RecipeError, match=message) as caught:
        training_loss(recipe, resolve_task(recipe.task))
    assert "\n" not in str(caught.value)


def test_a_node_imports_no_function_that_its_operator_has_not_allowed(own: str) -> None:
    """Whatever the server's recipe names; a simulation's operator is the server's."""
    objective = f"{own}:each"
    sent = make_recipe(model={"name": "demo:gemma-3-270m"}, task={"objective": objective}).to_json()
    message = rf"task\.objective = '{objective}' is not allowed at this node; .* allow-functions"
    for allowed in ({}, {"allow-functions": "other:*"}, {"allow-functions": ""}):
        with pytest.raises(RecipeError, match=message) as caught:
            NodeConfig.of({"partition-id": 0, **allowed}).recipe(sent)
        assert "\n" not in str(caught.value)
    assert own not in sys.modules
    for name in (objective, f"{own}:*"):
        found = NodeConfig.of({"partition-id": 0, "allow-functions": name}).recipe(sent)
        assert found.task.objective.kind == objective
    assert NodeConfig.of({"partition-id": 0}, trusted=True).recipe(sent).task.objective
    import_objective(found)
    assert own in sys.modules


def test_the_usual_objective_names_no_other_run() -> None:
    usual, spelled = make_recipe(), make_recipe(task={"objective": "loss"})
    assert usual.fingerprint == spelled.fingerprint
    others: Sequence[Any] = ("macro_f1", {"kind": "macro_f1", "temperature": 0.5})
    found = {make_recipe(task={"objective": other}).fingerprint for other in others}
    assert len({usual.fingerprint, *found}) == 3
