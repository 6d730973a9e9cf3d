"""θ in the model: exact writes, exact restore, and not a bit touched beside the mask."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import ARCHITECTURES, algorithm_of, make_recipe, make_text_examples, tiny_model
from torch import Tensor, nn

from meerkat.config import MaskSection
from meerkat.errors import MaskError
from meerkat.federation.client import Client, Worker
from meerkat.federation.rounds import close_round, plan_round
from meerkat.federation.schedule import Schedule
from meerkat.federation.state import initial_state
from meerkat.federation.virtual_path import virtual_path
from meerkat.models.loading import LoadedModel
from meerkat.models.objective import TextObjective
from meerkat.spaces.base import ParameterSpace
from meerkat.spaces.mask_criteria import eligible_parameters, full_mask, random_mask
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.log import Log
from meerkat.zo.noise import NoiseKey, draw

DTYPES = (torch.float32, torch.bfloat16)
EMBEDDING = "model.embed_tokens.weight"
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def make_mask(loaded: LoadedModel, density: float = 0.02, include: tuple[str, ...] = ()) -> Mask:
    section = MaskSection(kind="random", density=density, include=include)
    chosen = eligible_parameters(loaded.model, section)
    return random_mask(chosen, section, loaded.fingerprint)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """All state of a model as integers, so that NaN and -0.0 compare."""
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {
        name: value.detach().view(BITS[value.dtype]) if value.dtype in BITS else value.detach()
        for name, value in state.items()
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bits(model).items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = bits(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]), name


def masked(model: nn.Module, mask: Mask) -> Tensor:
    """The masked weights, taken from the model by its own names."""
    parameters = dict(model.named_parameters())
    return torch.cat(
        [parameters[n].flatten()[i] for n, i in zip(mask.names, mask.indices, strict=True)]
    )


def random_theta(size: int, generator: np.random.Generator) -> np.ndarray:
    scale = 10.0 ** generator.integers(-3, 3)
    return (generator.standard_normal(size) * scale).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_write_touches_the_masked_bits_alone(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    mask = make_mask(loaded)
    space = MaskedSpace(loaded.model, mask)
    before = snapshot(loaded.model)
    theta = random_theta(mask.size, np.random.default_rng(0))
    space.write(theta)

    # What was written is exactly the cast of θ, and is what is read.
    cast = torch.from_numpy(theta).to(dtype)
    assert torch.equal(masked(loaded.model, mask), cast)
    np.testing.assert_array_equal(space.read(), cast.float().numpy())
    assert space.read().dtype == np.float32
    # Putting the old bits back by hand, without the space, gives the old model.
    parameters = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, indices in zip(mask.names, mask.indices, strict=True):
            where = torch.from_numpy(indices)
            old = before[name].flatten()[where].view(dtype)
            parameters[name].view(-1)[where] = old
    assert_same(loaded.model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_read_is_the_weights(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    mask = make_mask(loaded)
    space = MaskedSpace(loaded.model, mask)
    assert space.size == mask.size
    np.testing.assert_array_equal(space.read(), masked(loaded.model, mask).float().numpy())
    before = snapshot(loaded.model)
    space.write(space.read())
    assert_same(loaded.model, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("architecture", "include"),
    [
        ("llama", ()),
        ("gpt2", ()),
        ("qwen2", (EMBEDDING,)),
        ("gemma3", (EMBEDDING, "*.mlp.*")),
    ],
)
def test_restore_bit_for_bit_after_1000_writes(
    architecture: str, include: tuple[str, ...], dtype: torch.dtype
) -> None:
    loaded = tiny_model(architecture, dtype)
    mask = make_mask(loaded, include=include)
    # Bits that arithmetic would not keep.
    with torch.no_grad():
        flat = dict(loaded.model.named_parameters())[mask.names[0]].view(-1)
        flat[mask.indices[0][0]] = -0.0
        flat[mask.indices[0][1]] = torch.finfo(dtype).tiny / 4
        flat[mask.indices[0][2]] = float("nan")
    before = snapshot(loaded.model)
    space = MaskedSpace(loaded.model, mask)
    generator = np.random.default_rng(1)
    for _ in range(1000):
        space.write(random_theta(mask.size, generator))
    space.restore()
    assert_same(loaded.model, before)
    space.restore()
    assert_same(loaded.model, before)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_tied_head_moves_with_its_embedding(architecture: str) -> None:
    loaded = tiny_model(architecture)
    mask = make_mask(loaded, include=(EMBEDDING,))
    assert mask.names == (EMBEDDING,)
    space = MaskedSpace(loaded.model, mask)
    theta = random_theta(mask.size, np.random.default_rng(2))
    space.write(theta)
    where = torch.from_numpy(mask.indices[0])
    for layer in (loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()):
        np.testing.assert_array_equal(layer.weight.flatten()[where].numpy(), theta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_tensors(dtype: torch.dtype) -> None:
    loaded = tiny_model("llama", dtype)
    chosen = eligible_parameters(loaded.model, MaskSection(include=("*.o_proj.*",)))
    mask = full_mask(chosen, loaded.fingerprint)
    before = snapshot(loaded.model)
    space = MaskedSpace(loaded.model, mask)
    start = space.read()
    kept = start.copy()
    theta = random_theta(mask.size, np.random.default_rng(3))
    space.write(theta)
    np.testing.assert_array_equal(start, kept)  # what was read is no view of the weights
    assert torch.equal(masked(loaded.model, mask), torch.from_numpy(theta).to(dtype))
    space.restore()
    assert_same(loaded.model, before)


def test_one_whole_tensor_is_read_as_a_copy() -> None:
    loaded = tiny_model("llama")
    chosen = eligible_parameters(loaded.model, MaskSection(include=("*.0.*.o_proj.*",)))
    space = MaskedSpace(loaded.model, full_mask(chosen, loaded.fingerprint))
    start = space.read()
    kept = start.copy()
    space.write(start + 1)
    np.testing.assert_array_equal(start, kept)


def test_the_servers_theta_can_be_written() -> None:
    # It is read-only, and torch warns of arrays that it could write through.
    loaded = tiny_model("llama")
    space = MaskedSpace(loaded.model, make_mask(loaded))
    theta = space.read() + 1
    theta.setflags(write=False)
    space.write(theta)
    np.testing.assert_array_equal(space.read(), theta)


def test_weights_of_several_types() -> None:
    loaded = tiny_model("llama", torch.bfloat16)
    loaded.model.model.layers[1].mlp.float()
    mask = make_mask(loaded)
    space = MaskedSpace(loaded.model, mask)
    theta = random_theta(mask.size, np.random.default_rng(4))
    space.write(theta)
    begin = 0
    parameters = dict(loaded.model.named_parameters())
    for name, indices in zip(mask.names, mask.indices, strict=True):
        part = torch.from_numpy(theta[begin : begin + len(indices)])
        found = parameters[name].flatten()[indices]
        assert found.dtype == (torch.float32 if "1.mlp" in name else torch.bfloat16)
        assert torch.equal(found, part.to(found.dtype))
        begin += len(indices)


def test_a_model_without_the_tensor_is_refused() -> None:
    mask = make_mask(tiny_model("llama"))
    with pytest.raises(MaskError, match=r"model\.layers\.0.* is not in this model"):
        MaskedSpace(tiny_model("gpt2").model, mask)


def test_a_tensor_of_another_shape_is_refused() -> None:
    loaded = tiny_model("llama")
    mask = make_mask(loaded)
    turned = tuple((*shape[::-1], 1) for shape in mask.shapes)
    with pytest.raises(MaskError, match=r"\(32, 32, 1\) is not in this model"):
        MaskedSpace(loaded.model, replace(mask, shapes=turned))


# Other spaces: what follows the interface is trained, replayed and restored like a mask


class LinearSubspace:
    """w of θ_0 + B w over the masked weights; B is noise, and w starts at zero."""

    def __init__(self, inner: MaskedSpace, size: int):
        self._inner, self.size = inner, size
        self._start = inner.read()
        columns = [draw(NoiseKey(77, 0, 0, 0, column), inner.size) for column in range(size)]
        self._basis = np.stack(columns, axis=1) / np.float32(np.sqrt(size))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"subspace {self._inner.fingerprint} {self.size}".encode()
        ).hexdigest()

    def read(self) -> np.ndarray:
        return np.zeros(self.size, np.float32)

    def write(self, theta: np.ndarray) -> None:
        self._inner.write(self._start + self._basis @ theta)

    def restore(self) -> None:
        self._inner.restore()


class LoraFactors:
    """A and B of W = W_0 + B A, of several matrices; A starts as noise, B at zero."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], rank: int = 2):
        parameters = dict(model.named_parameters())
        self._weights = [parameters[name].detach() for name in names]
        self._original = [weight.clone() for weight in self._weights]
        self._names, self._rank = names, rank

    @property
    def size(self) -> int:
        return sum(self._rank * sum(weight.shape) for weight in self._weights)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"lora {self._names} {self._rank}".encode()).hexdigest()

    def read(self) -> np.ndarray:
        parts = []
        for number, (rows, columns) in enumerate(weight.shape for weight in self._weights):
            parts.append(draw(NoiseKey(78, 0, number), self._rank * columns) / np.float32(8))
            parts.append(np.zeros(rows * self._rank, np.float32))
        return np.concatenate(parts)

    def write(self, theta: np.ndarray) -> None:
        values, begin = torch.from_numpy(theta.copy()), 0
        for weight, original in zip(self._weights, self._original, strict=True):
            rows, columns = weight.shape
            middle, end = begin + self._rank * columns, begin + self._rank * (rows + columns)
            a = values[begin:middle].view(self._rank, columns)
            b = values[middle:end].view(rows, self._rank)
            weight.copy_((original.float() + b @ a).to(weight.dtype))
            begin = end

    def restore(self) -> None:
        for weight, original in zip(self._weights, self._original, strict=True):
            weight.copy_(original)


LORA = tuple(
    f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qv"
)


def make_space(kind: str, loaded: LoadedModel) -> ParameterSpace:
    if kind == "lora":
        return LoraFactors(loaded.model, LORA)
    mask = make_mask(loaded)
    inner = MaskedSpace(loaded.model, mask)
    return inner if kind == "mask" else LinearSubspace(inner, 12)


def moved_tensors(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in bits(model).items() if not torch.equal(value, before[name])}


SPACES = ("mask", "subspace", "lora")


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_space_makes_the_model_a_function_of_its_values(kind: str, dtype: torch.dtype) -> None:
    loaded = tiny_model("llama", dtype)
    before = snapshot(loaded.model)
    space = make_space(kind, loaded)
    assert isinstance(space, ParameterSpace)
    start = space.read()
    assert (start.dtype, start.shape) == (np.float32, (space.size,))
    space.write(start)
    assert_same(loaded.model, before)
    generator = np.random.default_rng(1)
    theta, other = (start + random_theta(space.size, generator) / 100 for _ in range(2))
    theta.setflags(write=False)
    space.write(theta)
    written, touched = snapshot(loaded.model), moved_tensors(loaded.model, before)
    assert touched
    assert touched == set(LORA) or kind != "lora"
    space.write(other)
    assert moved_tensors(loaded.model, written)
    space.write(theta)  # nothing is left of what was written in between
    assert_same(loaded.model, written)
    space.restore()
    assert_same(loaded.model, before)
    np.testing.assert_array_equal(make_space(kind, loaded).read(), start)


def test_fingerprints_tell_spaces_apart() -> None:
    loaded = tiny_model("llama")
    made = [make_space(kind, loaded).fingerprint for kind in SPACES]
    assert len(set(made)) == 3
    assert made == [make_space(kind, tiny_model("llama")).fingerprint for kind in SPACES]


def make_worker(kind: str, loaded: LoadedModel, **sections: object) -> Worker:
    space = make_space(kind, loaded)
    return Worker(space, TextObjective(loaded, 10_000), algorithm_of(space.size, **sections))


@pytest.mark.parametrize("kind", SPACES)
@pytest.mark.parametrize(
    ("dtype", "rule"), [(torch.float32, "sgd"), (torch.bfloat16, "adam")], ids=str
)
def test_any_space_is_trained_replayed_and_restored(
    kind: str, dtype: torch.dtype, rule: str
) -> None:
    """Two rounds of two clients; nothing but the interface is asked of the space."""
    sections = {
        "federation": {"clients": 2, "local_steps": 3},
        "optimizer": {"rule": rule, "learning_rate": 1e-3},
        "noise": {"perturbations": 2},
    }
    loaded = tiny_model("llama", dtype)
    before = snapshot(loaded.model)
    worker = make_worker(kind, loaded, **sections)
    algorithm, schedule = worker.algorithm, Schedule.of(make_recipe(**sections))
    state, log = initial_state(worker.initial, 2, 3), Log()
    clients = [Client(number, make_text_examples(6 + number), 3, 11) for number in range(2)]
    for round in range(2):
        plans = plan_round(schedule, state, log)
        assert set(plans) == {0, 1}
        reports = []
        for number, plan in plans.items():
            worker.catch_up(plan.log_start, plan.updates)
            assert worker.state.digest == state.model.digest
            own = [step.state.digest for step in clients[number].local_steps(plan, worker)]
            report, loss = clients[number].answer(plan, worker)
            assert np.isfinite(loss)
            path = virtual_path(state.model, plan.learning_rate, report, algorithm)
            assert [seen.digest for seen in path] == own
            assert len(set(own)) == 3
            reports.append(report)
        # After its answer the model is at the server's state, and nowhere on the client's path.
        held = snapshot(loaded.model)
        worker.space.write(state.model.theta)
        assert_same(loaded.model, held)
        state, record = close_round(schedule, state, algorithm, plans, reports, log)
        log.append(record.updates)
        assert state.round == round + 1
    assert moved_tensors(loaded.model, before)

    # Who comes late has the same state and the same model, by the log or by a snapshot.
    late, given = (make_worker(kind, tiny_model("llama", dtype), **sections) for _ in range(2))
    late.catch_up(0, log.since(0))
    given.synchronise(given.initial.from_bytes(state.model.to_bytes()), len(log))
    worker.catch_up(0, log.since(0))
    for one in (late, given, worker):
        assert one.state.digest == state.model.digest
        assert one.position == len(log)
        one.space.write(one.state.theta)
    for one in (late, given):
        assert_same(one.objective.model, snapshot(loaded.model))

    for one in (worker, late, given):
        one.space.restore()
        assert_same(one.objective.model, before)
