"""LoRA factors in a model: the same bits everywhere, nothing else touched, and a step over them."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import (
    ARCHITECTURES,
    algorithm_of,
    make_recipe,
    make_text_examples,
    tiny_model,
)
from torch import nn

from meerkat.config import MaskSection
from meerkat.errors import MaskError, RecipeError, RunError
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.models.adapters import (
    adapt,
    adapter_factors,
    base_layers,
    factor_shapes,
    linear_weights,
    merge,
    require_peft,
)
from meerkat.models.loading import LoadedModel, fingerprint, probe_logits
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.models.quantised import QuantisedWeight, quantise
from meerkat.spaces.mask_criteria import eligible_parameters, full_mask, still_blocks
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.noise import NoiseKey, draw, uniform

LINEAR = [name for name in ARCHITECTURES if name != "gpt2"]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
every_architecture = pytest.mark.parametrize("architecture", LINEAR)


def weights_of(loaded: LoadedModel, **fields: object) -> list[str]:
    section = MaskSection(kind="lora", **fields)
    names = list(eligible_parameters(loaded.model, section))
    return linear_weights(loaded.model, names, named=bool(section.include))


def adapted(
    architecture: str = "llama",
    dtype: torch.dtype = torch.float32,
    rank: int = 4,
    seed: int = 0,
    **fields: object,
) -> LoadedModel:
    loaded = tiny_model(architecture, dtype)
    adapt(loaded.model, weights_of(loaded, **fields), rank, 16.0, seed)
    return loaded


def mask_of(loaded: LoadedModel) -> Mask:
    return replace(full_mask(adapter_factors(loaded.model), loaded.fingerprint), kind="lora")


def theta_of(mask: Mask, scale: float = 0.1) -> np.ndarray:
    """Factors of which none is zero."""
    return np.float32(scale) * draw(NoiseKey(4, 0, 0), mask.size)


def digest_of(loaded: LoadedModel) -> str:
    values = [factor.numpy().tobytes() for factor in adapter_factors(loaded.model).values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


# The factors


@every_architecture
@both_types
def test_an_adapted_model_computes_what_it_did(architecture: str, dtype: torch.dtype) -> None:
    loaded = tiny_model(architecture, dtype)
    before, bits = probe_logits(loaded.model), loaded.fingerprint
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    weights = weights_of(loaded)
    adapt(loaded.model, weights, 4, 16.0, seed=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert probe_logits(loaded.model) == before
    factors = adapter_factors(loaded.model)
    assert len(factors) == 2 * len(weights)
    assert {factor.dtype for factor in factors.values()} == {torch.float32}
    for name, factor in factors.items():
        assert bool(factor.any()) == (".lora_A." in name)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    with base_layers(loaded.model):
        assert fingerprint(loaded.model) == bits
        assert not adapter_factors(loaded.model)
    assert adapter_factors(loaded.model).keys() == factors.keys()


@every_architecture
def test_the_first_factors_are_the_same_bits_each_time(architecture: str) -> None:
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(digests))
        digests.append(digest_of(adapted(architecture, seed=seed)))
    assert digests[0] == digests[1] != digests[2]


def test_the_first_factors_are_pinned() -> None:
    """On every machine: a change of these bits is another run."""
    values = uniform(5, (2, 3), 4097)
    assert np.array_equal(uniform(5, (2, 3), 9), values[:9])
    assert abs(values).max() < 1
    assert (
        hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()
        == "ddf93ec60ca3e42de2033b877186cbb5638571a083ad75ac283db8f46e4350b5"
    )
    assert (
        digest_of(adapted()) == "c0cb5c9635a7ca293ab55de2c8a69227aee5d91dac4e3c65990c5633f2474d6f"
    )


def test_a_is_drawn_as_peft_draws_it() -> None:
    """Kaiming-uniform with a = √5 is uniform in ±1/√in; each weight has a stream of its own."""
    loaded = adapted(rank=8)
    for place, name in enumerate(weights_of(tiny_model())):
        layer = loaded.model.get_submodule(name.removesuffix(".weight"))
        found, columns = layer.lora_A["default"].weight, layer.in_features
        theirs = nn.init.kaiming_uniform_(torch.empty(8, columns), a=5**0.5)
        assert found.abs().max() <= 1 / columns**0.5
        assert float(found.std()) == pytest.approx(float(theirs.std()), rel=0.15)
        own = (uniform(0, (place, 0), 8 * columns) / columns**0.5).astype(np.float32)
        assert np.array_equal(found.flatten().numpy(), own)


# What moves


@every_architecture
@both_types
def test_a_write_moves_factors_alone_and_restore_is_exact(
    architecture: str, dtype: torch.dtype
) -> None:
    loaded = adapted(architecture, dtype)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    mask = mask_of(loaded)
    space = MaskedSpace(loaded.model, mask)
    assert set(mask.names) == {name for name in before if ".lora_" in name}
    logits = probe_logits(loaded.model)
    theta = theta_of(mask)
    space.write(theta)
    assert np.array_equal(space.read(), theta)  # float32 in a model of either type
    assert probe_logits(loaded.model) != logits
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name)
    space.restore()
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert probe_logits(loaded.model) == logits


@every_architecture
@both_types
def test_a_merged_model_computes_what_an_adapted_one_does(
    architecture: str, dtype: torch.dtype
) -> None:
    loaded, plain = adapted(architecture, dtype), tiny_model(architecture, dtype)
    mask = mask_of(loaded)
    theta = theta_of(mask, 0.05)
    MaskedSpace(loaded.model, mask).write(theta)
    ends = np.cumsum([len(indices) for indices in mask.indices])[:-1]
    parts = zip(mask.names, mask.shapes, np.split(theta, ends), strict=True)
    factors = {name: part.reshape(shape) for name, shape, part in parts}
    names, ids = list(dict(plain.model.named_parameters())), torch.arange(5, 30)[None]
    before = plain.model(input_ids=ids).logits
    merge(plain.model, factors, 16.0)
    assert list(dict(plain.model.named_parameters())) == names
    found, expected = (m.model(input_ids=ids).logits.float() for m in (plain, loaded))
    moved = (expected - before.float()).norm()
    assert (found - expected).norm() < (1e-4 if dtype == torch.float32 else 0.2) * moved


def test_a_step_is_that_of_a_few_lines() -> None:
    """ε z over all factors both ways, two losses, one update; losses by other code than ours."""
    loaded, rate, epsilon = adapted(), 0.05, 1e-2
    mask = mask_of(loaded)
    section = {"mask": {"kind": "lora", "lora_rank": 4}}
    algorithm = algorithm_of(mask.size, optimizer={"epsilon": epsilon}, **section)
    space = MaskedSpace(loaded.model, mask)
    worker = Worker(space, TextObjective(loaded, 10_000), algorithm)
    examples = make_text_examples(4)
    client = Client(0, examples, 4, 11)
    (step,) = client.local_steps(RoundPlan(0, 1, rate, 0, 0), worker)

    plain = tiny_model()
    weights = {name: p.clone() for name, p in plain.model.named_parameters()}

    def loss(theta: np.ndarray) -> float:
        """With W + (16/4) B A in the place of each W, one example at a time."""
        begin, parts = 0, {}
        for name, shape in zip(mask.names, mask.shapes, strict=True):
            count = int(np.prod(shape))
            parts[name] = torch.from_numpy(theta[begin : begin + count]).view(shape).double()
            begin += count
        state = dict(plain.model.named_parameters())
        with torch.no_grad():
            for name in parts:
                layer = name.split(".lora_")[0]
                b, a = (parts[f"{layer}.lora_{letter}.default.weight"] for letter in "BA")
                w = weights[f"{layer}.weight"]
                state[f"{layer}.weight"].copy_(w.double() + 4.0 * (b @ a))
        found = []
        for example in examples:
            ids = torch.tensor([example.prompt])
            logits = plain.model(input_ids=ids).logits[0, -1]
            scores = logits[[answer[0] for answer in example.answers]].double()
            found.append(float(-scores.log_softmax(0)[example.label]))
        return sum(found) / len(found)

    theta, z = space_start(mask), draw(NoiseKey(11, 0, 0), mask.size)
    up, down = (loss(theta + np.float32(sign * epsilon) * z) for sign in (1, -1))
    g = (up - down) / (2 * epsilon)
    assert abs(g) > 0.01
    assert step.scalars[0] == pytest.approx(g, rel=2e-2, abs=2e-3)
    expected = theta - np.float32(rate * step.scalars[0]) * z
    np.testing.assert_allclose(step.state.theta, expected, atol=1e-6)


def space_start(mask: Mask) -> np.ndarray:
    """θ_0, by the formula: A uniform, B zero."""
    parts, place = [], 0
    for name, shape in zip(mask.names, mask.shapes, strict=True):
        if ".lora_A." in name:
            drawn = uniform(0, (place, 0), int(np.prod(shape))) / shape[1] ** 0.5
            parts.append(drawn.astype(np.float32))
            place += 1
        else:
            parts.append(np.zeros(int(np.prod(shape)), np.float32))
    return np.concatenate(parts)


# Beside other features


def test_blocks_with_factors_are_not_still() -> None:
    loaded = adapted(first_block=1)
    mask, model = mask_of(loaded), loaded.model
    assert still_blocks(model, mask.names) == [model.model.layers[0]]
    everywhere = adapted()
    assert not still_blocks(everywhere.model, mask_of(everywhere).names)
    objective, examples = TextObjective(loaded, 10_000), make_text_examples(4)
    MaskedSpace(model, mask).write(theta_of(mask))
    expected = objective.losses(examples)
    objective.keep_prefix(still_blocks(model, mask.names), KeptActivations(2**24))
    for _ in range(2):
        assert np.array_equal(objective.losses(examples), expected)


def test_passes_are_made_one_by_one() -> None:
    """All of a factor moves, so an overlay would cost as much as the factor."""
    loaded = adapted()
    assert not MaskedSpace(loaded.model, mask_of(loaded)).overlays


@pytest.mark.parametrize("bits", [8, 4])
@every_architecture
def test_quantised_weights_leave_the_factors(architecture: str, bits: int) -> None:
    loaded = adapted(architecture, rank=8)
    mask = mask_of(loaded)
    before = TextObjective(loaded, 10_000).losses(make_text_examples(4))
    quantise(loaded.model, bits, dict(zip(mask.names, mask.indices, strict=True)))
    for name, parameter in loaded.model.named_parameters():
        quantised = isinstance(parameter, QuantisedWeight)
        assert quantised == (parameter.ndim == 2 and ".lora_" not in name)
    space, theta = MaskedSpace(loaded.model, mask), theta_of(mask)
    objective = TextObjective(loaded, 10_000)
    start = objective.losses(make_text_examples(4))
    np.testing.assert_allclose(start, before, atol=0.1 if bits == 8 else 1.5)
    space.write(theta)
    assert np.array_equal(space.read(), theta)
    assert not np.array_equal(objective.losses(make_text_examples(4)), start)
    space.restore()
    assert np.array_equal(objective.losses(make_text_examples(4)), start)


# What is refused


def test_a_rank_that_a_matrix_cannot_have() -> None:
    loaded = tiny_model()
    with pytest.raises(MaskError, match=r"mask\.lora_rank = 17 is more than .*k_proj.*lower it"):
        adapt(loaded.model, weights_of(loaded), 17, 16.0, 0)
    assert not adapter_factors(loaded.model)
    assert factor_shapes({"a.weight": (3, 5)}, 3) == {
        "a.lora_A.default.weight": (3, 5),
        "a.lora_B.default.weight": (3, 3),
    }


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "*norm.weight"])
def test_weights_that_cannot_have_factors(name: str) -> None:
    with pytest.raises(MaskError, match=r"mask\.include: .* mask\.exclude"):
        weights_of(tiny_model(), include=(name,))


def test_a_tied_head_is_no_linear_layer_to_adapt() -> None:
    with pytest.raises(MaskError, match="embed_tokens"):
        weights_of(tiny_model("qwen2"), include=("*embed_tokens*",))


def test_include_chooses_the_weights() -> None:
    chosen = weights_of(tiny_model(), include=("*.q_proj.weight", "*.v_proj.weight"))
    assert len(chosen) == 4
    factors = adapter_factors(adapted(include=("*.q_proj.weight", "*.v_proj.weight")).model)
    assert {name.split(".lora_")[0] + ".weight" for name in factors} == set(chosen)


def test_a_model_without_linear_layers() -> None:
    with pytest.raises(MaskError, match=r"mask\.kind = 'lora' adapts linear layers"):
        weights_of(tiny_model("gpt2"))


def test_peft_is_asked_for_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RunError, match=r"package peft: pip install 'meerkat-fl\[lora\]'"):
        require_peft()


@pytest.mark.parametrize("field", [{"lora_rank": 4}, {"lora_alpha": 8.0}])
def test_fields_of_another_kind(field: dict[str, float]) -> None:
    (name,) = field
    with pytest.raises(RecipeError, match=rf"mask\.{name} = .* goes with mask\.kind = 'lora'"):
        make_recipe(mask=field)
    assert make_recipe(mask={"kind": "lora", **field}).fingerprint != (
        make_recipe(mask={"kind": "lora"}).fingerprint
    )


def test_no_subspace_of_factors() -> None:
    with pytest.raises(RecipeError, match=r"mask\.kind = 'lora' .*leave \[subspace\] out"):
        make_recipe(mask={"kind": "lora"}, subspace={})
    assert make_recipe(mask={"kind": "lora"}, subspace={"kind": "none"}).subspace is None


def test_later_fields_leave_fingerprints_as_they_were() -> None:
    written = make_recipe(mask={"lora_rank": 8, "lora_alpha": 16.0})
    assert written.fingerprint == make_recipe().fingerprint
