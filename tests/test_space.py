"""θ in the model: exact writes, exact restore, and not a bit touched beside the mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ARCHITECTURES, tiny_model
from meerkat.errors import MaskError
from meerkat.mask.file import Mask
from meerkat.mask.making import eligible_parameters, full_mask, random_mask
from meerkat.models import LoadedModel
from meerkat.recipe import MaskSection
from meerkat.space import MaskedSpace

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
