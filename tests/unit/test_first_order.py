"""First-order rules beside computations of a few lines, on quadratics; places; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    ARCHITECTURES,
    algorithm_of,
    make_mask,
    make_recipe,
    make_server_state,
    make_text_examples,
    tiny_model,
)
from numpy.testing import assert_allclose

from meerkat.comparison.first_order import run_first_order
from meerkat.comparison.optimizers import SGD, Adam
from meerkat.comparison.places import AllParameters, Place
from meerkat.comparison.results import (
    FirstOrder,
    FirstOrderResult,
    Point,
    read_result,
    result_path,
    write_result,
)
from meerkat.comparison.rules import Central, FedAvg, FedAvgM, Rule, Scaffold
from meerkat.comparison.vectors import add_scaled
from meerkat.errors import ModelError, RecipeError, RunError
from meerkat.federation.aggregation import shares
from meerkat.federation.rounds import plan_round, sampling_order
from meerkat.federation.schedule import Schedule
from meerkat.models.objective import TextObjective
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.log import Log

K, N, T, RATE = 3, 5, 4, 0.02
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Quadratics:
    """f_k(θ) = ½ |A_k θ - b_k|², with another minimum for each client."""

    def __init__(self, seed: int = 0, clients: int = K):
        draw = np.random.default_rng(seed)
        self.a = draw.normal(size=(clients, 2 * N, N))
        self.b = draw.normal(size=(clients, 2 * N)) * 5
        self.start = draw.normal(size=N)

    def gradient(self, client: int, theta: np.ndarray) -> np.ndarray:
        return self.a[client].T @ (self.a[client] @ theta - self.b[client])

    def gradient_at(self, client: int, step: int, theta: np.ndarray) -> np.ndarray:
        """Of a batch that differs from step to step: the loss is scaled."""
        return self.gradient(client, theta) * (1 + 0.1 * step)

    def minimum(self) -> np.ndarray:
        """Of the clients' mean."""
        left = sum(a.T @ a for a in self.a)
        return np.linalg.solve(left, sum(a.T @ b for a, b in zip(self.a, self.b, strict=True)))


@pytest.fixture
def quadratics() -> Quadratics:
    return Quadratics()


UNEQUAL = {0: 0.5, 1: 0.2, 2: 0.3}
EQUAL = dict.fromkeys(range(K), 1 / K)
SUBSETS = [(0, 2), (1, 2), (0, 1), (0, 2), (1, 2)]


def iterates(rule: Rule, q: Quadratics, shares: list[dict[int, float]]) -> list[np.ndarray]:
    found, theta = [], q.start
    for each in shares:
        before = theta.copy()
        after = rule.round(theta, each, q.gradient_at, RATE)
        assert np.array_equal(theta, before)
        assert not np.shares_memory(theta, after)
        theta = after
        found.append(theta)
    return found


def by_hand(q: Quadratics, theta: np.ndarray, client: int) -> np.ndarray:
    for step in range(T):
        theta = theta - RATE * q.gradient_at(client, step, theta)
    return theta


def test_fedavg_is_the_weighted_mean_of_local_runs(quadratics: Quadratics) -> None:
    theta = quadratics.start
    for found in iterates(FedAvg(T), quadratics, [UNEQUAL] * 4):
        theta = sum(p * by_hand(quadratics, theta, k) for k, p in UNEQUAL.items())
        assert_allclose(found, theta, **CLOSE)


def test_momentum_of_fedavgm_is_that_of_a_loop(quadratics: Quadratics) -> None:
    theta, velocity = quadratics.start, np.zeros(N)
    for found in iterates(FedAvgM(T, 0.7), quadratics, [UNEQUAL] * 5):
        mean = sum(p * by_hand(quadratics, theta, k) for k, p in UNEQUAL.items())
        velocity = 0.7 * velocity + (theta - mean)
        theta = theta - velocity
        assert_allclose(found, theta, **CLOSE)


def test_fedavgm_without_momentum_is_fedavg(quadratics: Quadratics) -> None:
    plain = iterates(FedAvg(T), quadratics, [UNEQUAL] * 4)
    for found, wanted in zip(
        iterates(FedAvgM(T, 0.0), quadratics, [UNEQUAL] * 4), plain, strict=True
    ):
        assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("chosen", [[(0, 1, 2)] * 5, SUBSETS], ids=["all", "sampled"])
def test_scaffold_is_that_of_a_loop(quadratics: Quadratics, chosen: list[tuple[int, ...]]) -> None:
    """Option II, with the common variate over all K clients and not over the sampled ones."""
    theta, common = quadratics.start, np.zeros(N)
    own = [np.zeros(N) for _ in range(K)]
    equal = [dict.fromkeys(clients, 1 / len(clients)) for clients in chosen]
    for found, clients in zip(iterates(Scaffold(T, K), quadratics, equal), chosen, strict=True):
        moves, changes = [], []
        for k in clients:
            y = theta
            for step in range(T):
                y = y - RATE * (quadratics.gradient_at(k, step, y) - own[k] + common)
            new = own[k] - common + (theta - y) / (T * RATE)
            moves.append(y - theta)
            changes.append(new - own[k])
            own[k] = new
        theta = theta + np.mean(moves, axis=0)
        common = common + np.sum(changes, axis=0) / K
        assert_allclose(found, theta, **CLOSE)


@pytest.mark.parametrize("sampled", [K, 2])
def test_scaffold_comes_to_the_minimum_of_the_mean_and_fedavg_does_not(sampled: int) -> None:
    q = Quadratics(1)
    draw = np.random.default_rng(2)
    wanted, found = q.minimum(), {}
    for name, rule in (("fedavg", FedAvg(10)), ("scaffold", Scaffold(10, K))):
        theta = q.start
        for _ in range(1500):
            clients = sorted(draw.choice(K, sampled, replace=False).tolist())
            each = dict.fromkeys(clients, 1 / sampled)
            theta = rule.round(theta, each, lambda k, _, at: q.gradient(k, at), 0.01)
        found[name] = np.linalg.norm(theta - wanted) / np.linalg.norm(wanted)
    assert found["scaffold"] < 1e-6
    assert found["fedavg"] > 1e-2


def test_central_is_fedavg_of_one_sgd_step(quadratics: Quadratics) -> None:
    plain = iterates(FedAvg(1), quadratics, [UNEQUAL] * 4)
    for found, wanted in zip(iterates(Central(1), quadratics, [UNEQUAL] * 4), plain, strict=True):
        assert_allclose(found, wanted, **CLOSE)


def test_central_takes_t_steps_a_round_and_keeps_its_optimizer(quadratics: Quadratics) -> None:
    found = iterates(Central(T, Adam()), quadratics, [EQUAL] * 3)[-1]
    theta = torch.tensor(quadratics.start)
    optimizer = torch.optim.Adam([theta], lr=RATE)
    for step in range(3 * T):
        mean = np.mean([quadratics.gradient_at(k, step % T, theta.numpy()) for k in range(K)], 0)
        theta.grad = torch.tensor(mean)
        optimizer.step()
    assert_allclose(found, theta.numpy(), rtol=1e-6)


def test_adam_of_a_client_begins_anew_each_round(quadratics: Quadratics) -> None:
    theta = quadratics.start
    for found in iterates(FedAvg(T, Adam), quadratics, [UNEQUAL] * 3):
        mean = np.zeros(N)
        for k, p in UNEQUAL.items():
            y = torch.tensor(theta)
            optimizer = torch.optim.Adam([y], lr=RATE)
            for step in range(T):
                y.grad = torch.tensor(quadratics.gradient_at(k, step, y.numpy()))
                optimizer.step()
            mean += p * y.numpy()
        theta = mean
        assert_allclose(found, theta, rtol=1e-6)


@pytest.mark.parametrize(
    "rule", [FedAvg(T), FedAvg(T, Adam), FedAvgM(T), Scaffold(T, K), Central(T), Central(T, Adam())]
)
def test_float32_stays_float32(quadratics: Quadratics, rule: Rule) -> None:
    def gradient_at(client: int, step: int, theta: np.ndarray) -> np.ndarray:
        assert theta.dtype == np.float32
        return quadratics.gradient_at(client, step, theta).astype(np.float32)

    theta = quadratics.start.astype(np.float32)
    for _ in range(2):
        theta = rule.round(theta, EQUAL, gradient_at, RATE)
        assert theta.dtype == np.float32


@pytest.mark.parametrize("n", [1, 2**18, 2**18 + 1, 2**19 + 3])
def test_sums_in_blocks_are_sums(n: int) -> None:
    draw = np.random.default_rng(0)
    target, vector = draw.normal(size=n), draw.normal(size=n)
    wanted = target + 0.3 * vector
    add_scaled(target, 0.3, vector)
    assert np.array_equal(target, wanted)
    for optimizer in (SGD(), Adam()):
        theta = vector.copy()
        optimizer.step(theta, np.sign(vector), 0.5)
        assert_allclose(theta, vector - 0.5 * np.sign(vector), atol=1e-6)


# Who takes part


@pytest.mark.parametrize("sampled", [None, 4])
def test_clients_are_sampled_as_in_a_run(sampled: int | None) -> None:
    recipe = make_recipe(federation={"clients": 9, "clients_per_round": sampled})
    schedule = Schedule.of(recipe)
    state = make_server_state(algorithm_of(10), 9)
    plans = plan_round(schedule, state, Log())
    assert sorted(sampling_order(schedule, 0)[: sampled or 9]) == list(plans)
    assert sampling_order(schedule, 0) != sampling_order(schedule, 1)


def test_shares_are_equal_or_by_examples_up_to_a_cap() -> None:
    assert shares([3, 1, 1], "uniform").tolist() == [1 / 3] * 3
    assert shares([6, 1, 1], "examples").tolist() == [0.75, 0.125, 0.125]
    assert shares([6, 1, 1], "examples", 2.0).tolist() == [0.5, 0.25, 0.25]


# All parameters of a model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_of_all_parameters_is_that_of_autograd(architecture: str) -> None:
    """Tied ones, biases and embeddings included; in one pass and in several."""
    loaded = tiny_model(architecture)
    place, examples = AllParameters(loaded.model), make_text_examples(6)
    assert isinstance(place, Place)
    assert place.size == sum(p.numel() for p in loaded.model.parameters())
    parameters = list(loaded.model.parameters())
    objective = TextObjective(loaded, 10_000)
    for parameter in parameters:
        parameter.requires_grad_(True)
    losses = torch.cat(list(objective.losses_with_graph(examples)))
    wanted = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
    flat = torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1)
         for p, g in zip(parameters, wanted, strict=True)]
    ).numpy()  # fmt: skip
    for tokens in (10_000, 30):
        parts = TextObjective(loaded, tokens).losses_with_graph(examples)
        found, gradient = place.gradient(parts, len(examples))
        assert_allclose(found, losses.detach().numpy(), rtol=1e-4, atol=1e-5)
        assert gradient.dtype == np.float32
        assert_allclose(gradient, flat, rtol=1e-3, atol=1e-5 * np.abs(flat).max())
    assert not any(p.requires_grad for p in parameters)


def test_all_parameters_are_written_and_restored() -> None:
    loaded = tiny_model("gemma3")
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    place = AllParameters(loaded.model)
    start = place.read()
    place.write(start + np.float32(1))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name] + 1)
    place.restore()
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(ValueError, match="read-only"):
        start[0] = 1


def test_all_parameters_must_be_in_float32() -> None:
    with pytest.raises(ModelError, match=r"in bfloat16.*set model.dtype = 'float32'"):
        AllParameters(tiny_model(dtype=torch.bfloat16).model)


def test_a_masked_space_is_a_place() -> None:
    loaded = tiny_model()
    assert isinstance(MaskedSpace(loaded.model, make_mask(loaded, 10)), Place)


# What is refused, and what is kept


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"method": "fedprox"}, r"method = 'fedprox' is not known; known are central, fedavg"),
        ({"place": "lora"}, r"place = 'lora' is not known; known are all, masked"),
        ({"optimizer": "lion"}, r"optimizer = 'lion' is not known; known are adam, sgd"),
        ({"method": "scaffold", "optimizer": "adam"}, r"does not go with .*'scaffold'.*'sgd'"),
        ({"momentum": 1.0}, r"momentum = 1.0 is not from 0 to below 1; lower it"),
    ],
)
def test_methods_that_are_none_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError, match=line):
        FirstOrder(**({"method": "fedavg"} | fields))


def test_recipes_without_a_rate_or_with_weights_for_scaffold_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=r"learning_rate = 'auto'.*give a number"):
        run_first_order(make_recipe(), FirstOrder("fedavg"), out)
    weighted = make_recipe(optimizer={"learning_rate": 0.1}, federation={"weighting": "examples"})
    with pytest.raises(RecipeError, match=r"weighting = 'examples'.*set it to 'uniform'"):
        run_first_order(weighted, FirstOrder("scaffold"), out)
    assert not out.exists()


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    point = Point(2, {"loss": 0.5, "accuracy": 0.75}, None, 12, 1.5)
    method = FirstOrder("fedavgm", "masked", "adam", 0.5)
    result = FirstOrderResult(method, "ab", 7, 28, 28, True, (point,))
    assert read_result(tmp_path) is None
    write_result(result, tmp_path)
    assert read_result(tmp_path) == result
    result_path(tmp_path).write_text('{"points": []')
    with pytest.raises(RunError, match=r"cannot be read.*remove it"):
        read_result(tmp_path)


def test_bytes_and_memory_follow_from_the_method() -> None:
    assert [FirstOrder(m).vectors_sent for m in ("central", "fedavg", "fedavgm", "scaffold")] == [
        0, 1, 1, 2,
    ]  # fmt: skip
    assert FirstOrder("scaffold").vectors_kept(100) == 108
    assert FirstOrder("fedavg").vectors_kept(100) == 5
    assert FirstOrder("fedavg", optimizer="adam").vectors_kept(1) == 7
