"""First-order methods on a recipe's data and model: upper bounds for a table of comparison.

A client of these sends n float32 values a round, not scalars, and keeps a backward pass's
activations. So they are no part of the product: one process, no journal, no transport.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from meerkat.comparison.optimizers import OPTIMIZERS
from meerkat.comparison.places import Place, place_of
from meerkat.comparison.results import (
    PASSES,
    FirstOrder,
    FirstOrderResult,
    Point,
    read_result,
    result_path,
    write_result,
)
from meerkat.comparison.rules import Central, FedAvg, FedAvgM, Rule, Scaffold
from meerkat.comparison.vectors import Vector
from meerkat.config import Choice, Noise, Optimizer, Recipe, Selection
from meerkat.errors import DivergedError, RecipeError, RunError
from meerkat.federation.aggregation import shares
from meerkat.federation.client import Client, refer
from meerkat.federation.rounds import sampling_order
from meerkat.federation.schedule import Schedule
from meerkat.journal.records import Evaluated
from meerkat.progress import Progress
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.directory import check_free
from meerkat.runs.evaluation import evaluate_objective
from meerkat.runs.lock import locked

__all__ = ["run_first_order", "train_first_order"]


def run_first_order(
    recipe: Recipe,
    method: FirstOrder,
    directory: Path,
    progress: Progress | None = None,
    memory_limit: int | None = None,
) -> FirstOrderResult:
    """Train as a method says, on what a recipe says; the result, which the directory keeps, too.

    Of the recipe count data, partition, batches and their order, rounds, local steps, sampling and
    weights of clients, η and its schedule, evaluation, mask and seed. What is about zeroth-order
    steps has no meaning here: noise, estimator, update rule, subspace, selection, aggregator,
    clipping, transforms. The model is in float32 whatever `model.dtype` says, which is about
    inference, and so is what its mask is found in: a `mask.file` must be of the float32 model.

    `DIR/first_order.json` is written after each evaluation. A finished result is returned without
    running again. An unfinished one starts again from the beginning: nothing else is kept.

    Args:
        memory_limit: Most bytes of vectors of n values (`FirstOrder.vectors_kept`), beside model
            and activations.

    Raises:
        RecipeError: η is `auto`, SCAFFOLD is to weigh clients, or the vectors need more memory.
        RunError: The directory has another run, or another process works on it.
        DivergedError: A loss is not finite; evaluations before are kept in the file.
        MeerkatError: See `assembly.assemble`.
    """
    _check(recipe, method)
    check_free(directory)
    with locked(directory):
        found = read_result(directory)
        if found is not None:
            if (found.method, found.fingerprint) != (method, recipe.fingerprint):
                raise RunError(
                    f"{result_path(directory)} is of another method or recipe ({found.method}, "
                    f"fingerprint {found.fingerprint[:12]}, now {method}, "
                    f"{recipe.fingerprint[:12]}); choose another directory, or remove it"
                )
            if found.finished:
                return found
        assembly = assemble(_in_float32(recipe), progress)

        def keep(result: FirstOrderResult) -> None:
            write_result(replace(result, fingerprint=recipe.fingerprint), directory)

        result = train_first_order(assembly, method, keep, memory_limit)
        return replace(result, fingerprint=recipe.fingerprint)


def _check(recipe: Recipe, method: FirstOrder) -> None:
    if recipe.optimizer.learning_rate == "auto":
        raise RecipeError(
            "optimizer.learning_rate = 'auto' is the η of zeroth-order steps; give a number"
        )
    if method.method == "scaffold" and recipe.federation.weighting != "uniform":
        raise RecipeError(
            f"federation.weighting = {recipe.federation.weighting!r} does not go with SCAFFOLD, "
            "which counts clients equally; set it to 'uniform'"
        )


def _in_float32(recipe: Recipe) -> Recipe:
    """The recipe less what is about zeroth-order steps, with a model in float32 as stored."""
    resolved = recipe.resolved
    rate = {"learning_rate": resolved.learning_rate, "schedule": resolved.schedule}
    changes = {
        "algorithm": Choice(kind="meerkat"),
        "model": recipe.model.model_copy(update={"dtype": "float32"}),
        "subspace": None,
        "optimizer": Optimizer().model_copy(update=rate),
        "noise": Noise(),
        "selection": Selection(),
        "runtime": recipe.runtime.model_copy(update={"weights": "stored", "theta": "host"}),
    }
    return recipe.model_copy(update=changes)


def train_first_order(
    assembly: Assembly,
    method: FirstOrder,
    keep: Callable[[FirstOrderResult], None] = lambda result: None,
    memory_limit: int | None = None,
) -> FirstOrderResult:
    """As `run_first_order`, with what is assembled; the model is left as it was.

    Args:
        keep: Is told what was found so far, after each evaluation.
    """
    recipe = assembly.recipe
    rounds, every = recipe.federation.rounds, recipe.evaluation.every
    place = place_of(assembly, method.place)
    _check_memory(method, place.size, recipe, memory_limit)
    sent = 4 * place.size * method.vectors_sent
    result = FirstOrderResult(method, recipe.fingerprint, place.size, sent, sent, False)
    training = _Training(assembly, method, place)
    try:
        for round in range(rounds + 1):
            last = round == rounds
            if round == 0 or last or (every and round % every == 0):
                point = training.point(round)
                result = replace(result, finished=last, points=(*result.points, point))
                keep(result)
                assembly.progress.start("Training", rounds, round)
            if not last:
                training.round(round)
                assembly.progress.advance()
        return result
    finally:
        place.restore()


def _check_memory(method: FirstOrder, size: int, recipe: Recipe, limit: int | None) -> None:
    needed = 4 * size * method.vectors_kept(recipe.federation.clients)
    if limit is not None and needed > limit:
        raise RecipeError(
            f"method = {method.method!r} over {size} values with federation.clients = "
            f"{recipe.federation.clients} needs {needed / 2**30:.1f} GiB, more than memory_limit = "
            f"{limit / 2**30:.1f} GiB; take place = 'masked' or another method (fedavg keeps "
            "nothing of a client), or raise the limit"
        )


class _Training:
    """θ on its way through the rounds, and what that has cost."""

    def __init__(self, assembly: Assembly, method: FirstOrder, place: Place):
        recipe = assembly.recipe
        self._assembly, self._place = assembly, place
        self._schedule, self._central = Schedule.of(recipe), method.method == "central"
        self._rule = _rule(method, recipe.federation.local_steps, recipe.federation.clients)
        self._clients = assembly.clients()
        self._steps_taken = [0] * len(self._clients)
        self._theta: Vector = place.read()
        self._losses: list[float] = []
        self._passes, self._seconds = 0, 0.0

    def round(self, round: int) -> None:
        """Take a round; θ is then that of the next."""
        started = time.monotonic()
        sampled = self._sampled(round)

        def gradient_at(client: int, step: int, theta: Vector) -> Vector:
            where = f"round {round}, client {client}, local step {step}"
            batch_step = self._steps_taken[client] + step
            return self._gradient(self._clients[client], batch_step, theta, where)

        rate = self._schedule.learning_rate(round)
        self._theta = self._rule.round(self._theta, sampled, gradient_at, rate)
        for client in sampled:
            self._steps_taken[client] += self._schedule.federation.local_steps
        self._seconds += time.monotonic() - started

    def _sampled(self, round: int) -> Mapping[int, float]:
        """p_k of the clients of a round, as `federation.rounds` samples them; `central` has all."""
        section = self._schedule.federation
        count = section.clients if self._central else self._schedule.clients_per_round
        chosen = sorted(sampling_order(self._schedule, round)[:count])
        held = [len(self._clients[client].examples) for client in chosen]
        cap = section.weight_cap or math.inf
        return dict(zip(chosen, shares(held, section.weighting, cap).tolist(), strict=True))

    def _gradient(self, client: Client, step: int, theta: Vector, where: str) -> Vector:
        batch, objective = client.batch(step), self._assembly.objective
        refer(objective, self._place.restore, batch)
        self._place.write(theta)
        parts = objective.losses_with_graph(batch)
        losses, gradient = self._place.gradient(parts, len(batch))
        self._passes += PASSES * len(batch)
        self._losses.append(_finite(float(losses.mean()), f"the loss of {where}"))
        return gradient.astype(theta.dtype, copy=False)

    def point(self, round: int) -> Point:
        """Evaluate at θ as it is now."""
        self._place.write(self._theta)
        found = _evaluate(self._assembly, round)
        if found.examples:
            _finite(found.metrics["loss"], f"the loss on held-out examples after round {round}")
        trained = float(np.mean(self._losses)) if self._losses else None
        self._losses.clear()
        return Point(round, found.metrics, trained, self._passes, self._seconds)


def _evaluate(assembly: Assembly, round: int) -> Evaluated:
    """The recipe's metrics on its held-out examples, at the weights as they are."""
    return evaluate_objective(
        assembly.objective,
        assembly.test,
        assembly.metrics,
        round,
        assembly.progress,
        validation=assembly.validation,
        write=assembly.write,
    )


def _rule(method: FirstOrder, steps: int, clients: int) -> Rule:
    optimizer = OPTIMIZERS[method.optimizer]
    match method.method:
        case "fedavg":
            return FedAvg(steps, optimizer)
        case "fedavgm":
            return FedAvgM(steps, method.momentum, optimizer)
        case "scaffold":
            return Scaffold(steps, clients)
        case "central":
            return Central(steps, optimizer())


def _finite(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise DivergedError(f"{what} is {loss}; lower optimizer.learning_rate")
    return loss
