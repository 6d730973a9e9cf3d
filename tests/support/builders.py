"""Builders that tests share: tiny models of real architectures, recipes, updates, reports.

No download, and no test: a test module imports from here, never from another test module.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from meerkat.algorithms import make_algorithm
from meerkat.config import MaskSection, Recipe, parse_recipe
from meerkat.data.encoding import Encoded
from meerkat.federation.algorithm import Algorithm
from meerkat.federation.client import Worker
from meerkat.federation.messages import DIGEST_BYTES, ClientReport, RoundPlan
from meerkat.federation.state import ServerState, initial_state
from meerkat.models.loading import LoadedModel, fingerprint
from meerkat.models.objective import TextObjective
from meerkat.spaces.mask_criteria import eligible_parameters, random_mask
from meerkat.spaces.mask_file import Mask
from meerkat.spaces.masked import MaskedSpace
from meerkat.zo.directions import DirectionKey
from meerkat.zo.log import LogEntry, Update
from meerkat.zo.noise import SHARED, NoiseKey, draw
from meerkat.zo.state import ModelState

WORDS = (
    "It was great terrible good bad fine awful a an the film movie plot story actor scene is "
    "Yes No true false question answer World Sports Business Technology news about This"
)
SECTIONS = "fonts games graphics email math science music web"
"""Answers of the tasks on Debian's sections."""
ARCHITECTURES = ("llama", "qwen2", "gemma3", "opt", "gpt2")
SIZE = {"vocab_size": 320, "max_position_embeddings": 128}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def tiny_config(architecture: str, **changes: object) -> transformers.PreTrainedConfig:
    match architecture:
        case "llama":
            return transformers.LlamaConfig(
                **{**SIZE, **SMALL, "tie_word_embeddings": False, **changes}
            )
        case "qwen2":
            return transformers.Qwen2Config(
                **{**SIZE, **SMALL, "tie_word_embeddings": True, **changes}
            )
        case "gemma2":
            own = {"sliding_window": 16, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
            return transformers.Gemma2Config(**{**SIZE, **SMALL, "head_dim": 8, **own, **changes})
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **SIZE, **SMALL, head_dim=8, **{"sliding_window": 16, **changes}
            )
        case "opt":
            return transformers.OPTConfig(
                **SIZE,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=64,
                word_embed_proj_dim=32,
                **changes,
            )
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=320, n_positions=128, n_embd=32, n_layer=2, n_head=4, **changes
            )
    raise ValueError(architecture)


def tiny_tokenizer(vocabulary: int = 320, words: str = WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words, *(f" {word}" * 9 for word in words.split())], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_model(
    architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: object
) -> LoadedModel:
    torch.manual_seed(0)
    config = tiny_config(architecture, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    # The usual initialisation is so small that all logits are nearly equal.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    model = model.eval().requires_grad_(False)
    return LoadedModel(model, tiny_tokenizer(), fingerprint(model), f"tiny-{architecture}")


def save_tiny_model(
    folder: Path, architecture: str = "llama", answers: Sequence[str] = (), **changes: Any
) -> Path:
    """Model and tokenizer as a user would have them.

    Args:
        answers: Words that are to be one token each, besides those of `WORDS`.
    """
    loaded = tiny_model(architecture, **changes)
    loaded.model.save_pretrained(folder)
    vocabulary = changes.get("vocab_size", SIZE["vocab_size"])
    tokenizer = tiny_tokenizer(vocabulary, " ".join([WORDS, *answers]))
    tokenizer.save_pretrained(folder)
    return folder


# Recipes


def merged(data: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A recipe's mapping with fields of its sections changed: `federation={"rounds": 2}`."""
    result = copy.deepcopy(data)
    for section, fields in sections.items():
        if isinstance(fields, dict):
            result[section] = merged(result.get(section, {}), **fields)
        else:
            result[section] = fields
    return result


MINIMAL: dict[str, Any] = {
    "seed": 11,
    "model": {"name": "tiny", "dtype": "float32"},
    "task": {"name": "sst2"},
    "federation": {"clients": 3, "rounds": 8},
}
"""A recipe of which nothing is loaded."""

STOPS_ALL: dict[str, Any] = {
    "kind": "gradip",
    "calibration_steps": 8,
    "rho_later": 0.0,
    "rho_quiet": 0.0,
    "sigma": 1e9,
}
"""A `selection` with thresholds that every client is beyond."""


def make_recipe(**sections: Any) -> Recipe:
    """`MINIMAL` with fields of its sections changed."""
    return parse_recipe(merged(MINIMAL, **sections))


def algorithm_of(n: int, **sections: Any) -> Algorithm:
    """The algorithm of `make_recipe(**sections)` for a state of n values."""
    return make_algorithm(make_recipe(**sections), n)


# Log and reports


def make_update(
    rate: float,
    coefficient: float,
    round: int = 0,
    step: int = 0,
    perturbation: int = 0,
    client: int = SHARED,
) -> Update:
    """An update of one direction."""
    key = DirectionKey(round, step, perturbation, client)
    return Update(float(np.float32(rate)), (LogEntry(key, coefficient),))


def make_report(
    state: ModelState,
    client: int,
    scalars: list[float],
    round: int = 0,
    perturbations: int = 1,
    examples: int | None = None,
) -> ClientReport:
    """A report that starts from a state; scalars are rounded to float32."""
    return ClientReport(
        round=round,
        client=client,
        examples=1 + client % 7 if examples is None else examples,
        steps=len(scalars) // perturbations,
        perturbations=perturbations,
        state_digest=bytes.fromhex(state.digest)[:DIGEST_BYTES],
        scalars=tuple(float(np.float32(scalar)) for scalar in scalars),
    )


# Rounds


def make_server_state(algorithm: Algorithm, clients: int, local_steps: int = 100) -> ServerState:
    """The state before round 0 of a run of this algorithm, from a θ that is noise."""
    theta = draw(NoiseKey(99, 0, 0), algorithm.stream.n)
    return initial_state(algorithm.init(theta), clients, local_steps)


def plans_of(reports: Sequence[ClientReport], rate: float = 0.1) -> dict[int, RoundPlan]:
    """The plans that reports answer, by client."""
    return {r.client: RoundPlan(r.round, r.steps, rate, 0, 0) for r in reports}


# Clients over a tiny model

ANSWERS = ((5,), (9,), (200,))


def make_text_examples(count: int) -> list[Encoded]:
    """Examples of random tokens with three one-token answers."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 20, count)
    return [
        Encoded(tuple(generator.integers(0, 320, n).tolist()), ANSWERS, int(generator.integers(3)))
        for n in lengths
    ]


def make_mask(loaded: LoadedModel, size: int) -> Mask:
    """A random mask of so many coordinates."""
    chosen = eligible_parameters(loaded.model, MaskSection())
    eligible = sum(parameter.numel() for parameter in chosen.values())
    section = MaskSection(kind="random", density=size / eligible)
    return random_mask(chosen, section, loaded.fingerprint)


def make_worker(loaded: LoadedModel, size: int = 100, **sections: Any) -> Worker:
    """A worker over such a mask, with the algorithm of `make_recipe(**sections)`."""
    space = MaskedSpace(loaded.model, make_mask(loaded, size))
    return Worker(space, TextObjective(loaded, 10_000), algorithm_of(size, **sections))
