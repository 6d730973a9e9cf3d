"""The projected gradient against autograd; the state that a client leaves behind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers

from conftest import ARCHITECTURES, tiny_model
from meerkat.client import Client, Worker
from meerkat.data.encoding import Encoded
from meerkat.descent import digest
from meerkat.errors import DivergedError, ProtocolError
from meerkat.mask.file import Mask
from meerkat.mask.making import eligible_parameters, mask_size, random_mask
from meerkat.models import LoadedModel
from meerkat.noise import Directions, NoiseKey, draw
from meerkat.objective import Objective
from meerkat.protocol import LogEntry, RoundPlan
from meerkat.recipe import MaskSection
from meerkat.space import MaskedSpace
from meerkat.zeroth_order import projected_gradient

ANSWERS = ((5,), (9,), (200,))
PLAN = RoundPlan(round=0, steps=3, learning_rate=0.01, first_step=0, log_start=0)


def make_examples(count: int) -> list[Encoded]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 20, count)
    return [
        Encoded(tuple(generator.integers(0, 320, n).tolist()), ANSWERS, int(generator.integers(3)))
        for n in lengths
    ]


def make_mask(loaded: LoadedModel, size: int) -> Mask:
    chosen = eligible_parameters(loaded.model, MaskSection())
    eligible = sum(parameter.numel() for parameter in chosen.values())
    section = MaskSection(kind="random", density=size / eligible)
    assert mask_size(section.density, eligible) == size
    return random_mask(chosen, section, loaded.fingerprint)


def make_worker(
    loaded: LoadedModel, size: int = 100, epsilon: float = 1e-3, **directions: object
) -> Worker:
    mask = make_mask(loaded, size)
    space = MaskedSpace(loaded.model, mask)
    noise = Directions(1, mask.size, **directions)
    return Worker(space, Objective(loaded, 10_000), noise, epsilon)


def masked_gradient(
    model: transformers.PreTrainedModel, mask: Mask, batch: list[Encoded]
) -> np.ndarray:
    """∇f at the masked coordinates, by autograd through a plain forward pass."""
    model.set_attn_implementation("eager")
    parameters = dict(model.named_parameters())
    loss = torch.zeros(())
    rows = [answer[0] for answer in ANSWERS]
    tensors = [parameters[name].requires_grad_(True) for name in mask.names]
    for example in batch:
        logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
        loss = loss - logits[rows].log_softmax(0)[example.label] / len(batch)
    gradients = torch.autograd.grad(loss, tensors)
    parts = [g.flatten()[i] for g, i in zip(gradients, mask.indices, strict=True)]
    return torch.cat(parts).double().numpy()


# The projected gradient


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_converges_to_the_directional_derivative(architecture: str) -> None:
    batch = make_examples(5)
    worker = make_worker(tiny_model(architecture), 150)
    mask = make_mask(tiny_model(architecture), 150)
    gradient = masked_gradient(tiny_model(architecture).model, mask, batch)
    directions = [draw(NoiseKey(0, 0, step), 150) for step in range(4)]
    exact = np.array([gradient @ z for z in directions])
    errors = {}
    for epsilon in (0.1, 1e-2, 1e-3):
        found = [
            projected_gradient(
                worker.space, worker.objective, worker.theta, z, epsilon, batch
            ).gradient
            for z in directions
        ]
        errors[epsilon] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # The error of a central difference falls with ε², until rounding takes over.
    assert errors[1e-2] < 0.5 * errors[0.1]
    assert errors[1e-3] < 0.02
    assert errors[1e-3] < errors[1e-2]


def test_its_mean_over_directions_is_the_gradient() -> None:
    batch = make_examples(4)
    worker = make_worker(tiny_model("llama"), 8)
    mask = make_mask(tiny_model("llama"), 8)
    gradient = masked_gradient(tiny_model("llama").model, mask, batch)
    count = 300
    total = np.zeros(8)
    for step in range(count):
        z = draw(NoiseKey(5, 0, step), 8)
        total += (
            z
            * projected_gradient(
                worker.space, worker.objective, worker.theta, z, 1e-3, batch
            ).gradient
        )
    mean = total / count
    # E[g z] = ∇f, with variance (n + 1) |∇f|² / count over all coordinates.
    error = np.linalg.norm(mean - gradient) / np.linalg.norm(gradient)
    assert error < 3 * math.sqrt(9 / count)
    cosine = mean @ gradient / (np.linalg.norm(mean) * np.linalg.norm(gradient))
    assert cosine > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_losses_are_taken_around_theta(dtype: torch.dtype) -> None:
    batch = make_examples(4)
    worker = make_worker(tiny_model("qwen2", dtype))
    z = draw(NoiseKey(0, 0, 0), 100)
    epsilon = 0.01
    kept = worker.theta.copy()
    probe = projected_gradient(worker.space, worker.objective, worker.theta, z, epsilon, batch)
    np.testing.assert_array_equal(worker.theta, kept)
    losses = []
    for sign in (1, -1):
        worker.space.write(kept + np.float32(sign * epsilon) * z)
        losses.append(worker.objective.loss(batch))
    assert probe.loss == sum(losses) / 2
    assert probe.gradient == (losses[0] - losses[1]) / (2 * epsilon)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(bad: float) -> None:
    worker = make_worker(tiny_model("llama"))
    worker.theta[7] = bad
    with pytest.raises(DivergedError, match=r"loss is not finite.*lower optimizer\.learning_rate"):
        Client(0, make_examples(4), 2, 0).answer(PLAN, worker)


def test_a_scalar_beyond_float32_ends_the_run() -> None:
    worker = make_worker(tiny_model("llama"), epsilon=1e-45)
    z = worker.directions.z(0, 0, 0, worker.directions.owner(0))
    assert np.isfinite(z).all()
    # ε = 1e-45 moves nothing, so the losses are made to differ.
    losses = iter([2.0, 1.0])
    worker.objective.loss = lambda batch: next(losses)
    with pytest.raises(DivergedError, match=r"projected gradient .* out of range"):
        Client(0, make_examples(4), 2, 0).answer(PLAN, worker)


# The client


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_leaves_the_weights_at_theta(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    before = {n: p.clone() for n, p in loaded.model.named_parameters()}
    worker = make_worker(loaded)
    mask = make_mask(tiny_model(architecture, dtype), 100)
    entry = LogEntry(0, 0, 0, worker.directions.owner(0), 0.5, 0.25)
    plan = RoundPlan(1, 3, 0.01, 0, 0, (entry,))
    report, loss = Client(3, make_examples(6), 4, 0).answer(plan, worker)

    # θ holds the log and nothing of the local path; the weights are its cast, the rest untouched.
    z = draw(NoiseKey(1, 0, 0), 100)
    named = dict(loaded.model.named_parameters())
    places = list(zip(mask.names, mask.indices, strict=True))
    original = torch.cat([before[name].flatten()[indices] for name, indices in places]).float()
    np.testing.assert_array_equal(worker.theta, original.numpy() - np.float32(0.5 * 0.25) * z)
    begin = 0
    with torch.no_grad():
        for name, indices in places:
            part = torch.from_numpy(worker.theta[begin : begin + len(indices)]).to(dtype)
            assert torch.equal(named[name].flatten()[indices], part)
            named[name].view(-1)[indices] = before[name].flatten()[indices]
            begin += len(indices)
    assert all(torch.equal(named[name], tensor) for name, tensor in before.items())
    assert math.isfinite(loss)
    assert (report.client, report.round, report.steps, report.examples) == (3, 1, 3, 6)
    assert len(report.scalars) == 3
    assert digest(worker.theta).startswith(report.theta_digest.hex())


def test_an_answer_depends_on_nothing_but_plan_and_data() -> None:
    worker = make_worker(tiny_model("llama"))
    clients = [Client(number, make_examples(5 + number), 2, 0) for number in range(3)]
    first = [client.answer(PLAN, worker) for client in clients]
    again = [client.answer(PLAN, worker) for client in reversed(clients)]
    assert again[::-1] == first
    alone = clients[2].answer(PLAN, make_worker(tiny_model("llama")))
    assert alone == first[2]
    assert len({report.scalars for report, _ in first}) == 3


def test_what_is_reported_is_what_is_applied() -> None:
    worker = make_worker(tiny_model("llama"), perturbations=2)
    steps = list(Client(0, make_examples(5), 2, 0).local_steps(PLAN, worker))
    theta = worker.theta.copy()
    for number, step in enumerate(steps):
        for q, scalar in enumerate(step.scalars):
            assert np.float32(scalar) == scalar
            z = draw(NoiseKey(1, 0, number, q), 100)
            theta -= np.float32(PLAN.learning_rate * (scalar / 2)) * z
    np.testing.assert_array_equal(steps[-1].theta, theta)


def test_the_data_pointer_moves_on() -> None:
    client = Client(0, make_examples(7), 3, 0)
    seen = [client.batch(step) for step in range(7)]
    for step in range(7):
        assert client.batch(step) == seen[step]
    flat = [id(example) for batch in seen for example in batch]
    assert all(flat.count(id(example)) == 3 for example in client.examples)
    worker = make_worker(tiny_model("llama"))
    three, _ = client.answer(PLAN, worker)
    # A round that goes on at step 2 sees the same batch with another direction.
    used = []
    worker.objective.loss = lambda batch: float(len(used.append(batch) or used))
    client.answer(RoundPlan(1, 1, 0.01, 2, 0), worker)
    assert used == [seen[2], seen[2]]
    assert three.steps == 3


def test_a_worker_reads_each_log_entry_once() -> None:
    worker = make_worker(tiny_model("llama"))
    entries = tuple(LogEntry(r, 0, 0, worker.directions.owner(0), 0.01, 0.5 + r) for r in range(4))
    fresh = make_worker(tiny_model("llama"))
    worker.catch_up(RoundPlan(2, 1, 0.01, 0, 0, entries[:2]))
    worker.catch_up(RoundPlan(2, 1, 0.01, 0, 1, entries[1:2]))
    worker.catch_up(RoundPlan(4, 1, 0.01, 0, 1, entries[1:]))
    fresh.catch_up(RoundPlan(4, 1, 0.01, 0, 0, entries))
    assert worker.position == fresh.position == 4
    assert digest(worker.theta) == digest(fresh.theta)
    with pytest.raises(ProtocolError, match=r"starts at entry 5, this worker has 4; .*sent"):
        worker.catch_up(RoundPlan(6, 1, 0.01, 0, 5, ()))
