"""The benchmarks measure what they say; figures themselves are not tested."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from torch.nn.functional import cross_entropy

from meerkat.benchmarks import bench, machine, step
from meerkat.benchmarks.memory import peak_memory
from meerkat.benchmarks.reference import option_batch, option_scores, reference_step
from meerkat.benchmarks.step import measure_step, padded_loss
from meerkat.config import ModelSection, Runtime
from meerkat.data.encoding import Encoded
from meerkat.errors import MeerkatError
from meerkat.models.loading import LoadedModel, fingerprint
from meerkat.models.objective import TextObjective

ANSWERS = ((7,), (9,))


def examples(count: int, answers: tuple[tuple[int, ...], ...] = ANSWERS) -> list[Encoded]:
    """Prompts of different lengths, without the padding token."""
    return [
        Encoded(tuple(range(20 + i, 25 + i + i % 4)), answers, i % len(answers))
        for i in range(count)
    ]


def assert_figures(figures: dict[str, Any], *keys: str) -> None:
    assert set(keys) <= set(figures)
    assert json.loads(json.dumps(figures)) == figures
    for key, value in figures.items():
        if key not in ("machine", "recompiles_after_warm_up") and not isinstance(value, str | bool):
            assert math.isfinite(value), key
            assert value > 0, key
    assert figures["machine"].keys() >= {"cpu", "threads", "torch"}


def weights(loaded: LoadedModel) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in loaded.model.parameters()]


# The reference step.


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_reference_scores_give_the_loss_of_the_objective(architecture: str) -> None:
    loaded, batch = tiny_model(architecture), examples(6)
    options = option_batch(batch)
    plain = float(cross_entropy(option_scores(loaded.model, options), options.labels))
    assert plain == pytest.approx(TextObjective(loaded, 4096).losses(batch).mean(), rel=1e-5)


def test_reference_scores_agree_for_answers_of_several_tokens() -> None:
    loaded, batch = tiny_model("llama"), examples(5, ((7, 8, 3), (9,)))
    options = option_batch(batch)
    plain = float(cross_entropy(option_scores(loaded.model, options), options.labels))
    assert plain == pytest.approx(TextObjective(loaded, 4096).losses(batch).mean(), rel=1e-5)


def test_reference_gradient_is_the_slope_along_its_noise() -> None:
    loaded = tiny_model("llama")
    options = option_batch(examples(6))
    before = weights(loaded)
    seed, epsilon = 5, 1e-4
    gradient = reference_step(loaded.model, options, epsilon, learning_rate=0.0, seed=seed)

    for parameter, kept in zip(loaded.model.parameters(), before, strict=True):
        parameter.data.copy_(kept)
        parameter.requires_grad_(True)
    logits = loaded.model(
        input_ids=options.input_ids, attention_mask=options.attention_mask
    ).logits[:, -2]
    chosen = logits.log_softmax(-1).gather(1, options.input_ids[:, -1:])
    cross_entropy(chosen.view(-1, 2), options.labels).backward()
    torch.manual_seed(seed)
    slope = sum(
        float((parameter.grad * torch.normal(0.0, 1.0, parameter.shape)).sum())
        for parameter in loaded.model.parameters()
    )
    assert gradient == pytest.approx(slope, rel=2e-2)


def test_reference_weights_come_back_and_the_update_goes_down_the_slope() -> None:
    loaded = tiny_model("llama")
    options = option_batch(examples(6))
    before = weights(loaded)
    gradient = reference_step(loaded.model, options, 1e-3, learning_rate=0.0, seed=1)
    for parameter, kept in zip(loaded.model.parameters(), before, strict=True):
        assert torch.allclose(parameter, kept, rtol=0, atol=1e-5)

    rate = 1e-2
    assert reference_step(loaded.model, options, 1e-3, rate, seed=1) == pytest.approx(
        gradient, rel=1e-2
    )
    torch.manual_seed(1)
    for parameter, kept in zip(loaded.model.parameters(), before, strict=True):
        z = torch.normal(0.0, 1.0, parameter.shape)
        assert torch.allclose(parameter, kept - rate * gradient * z, rtol=0, atol=1e-3)


def test_reference_leaves_the_global_generator_alone() -> None:
    loaded, options = tiny_model("llama"), option_batch(examples(2))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    reference_step(loaded.model, options, 1e-3, 1e-3, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_option_batch_is_left_padded() -> None:
    batch = option_batch([Encoded((4, 5), ((6,), (7, 8)), 1)])
    assert batch.input_ids.tolist() == [[0, 4, 5, 6], [4, 5, 7, 8]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch.option.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert batch.labels.tolist() == [1]


# The step.


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3", "opt"])
def test_padded_pass_computes_the_same_loss(architecture: str) -> None:
    loaded, batch = tiny_model(architecture), examples(6)
    packed = TextObjective(loaded, 4096).losses(batch).mean()
    assert padded_loss(loaded, batch) == pytest.approx(packed, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_step_restores_the_model(dtype: torch.dtype) -> None:
    loaded = tiny_model("llama", dtype)
    figures = measure_step(loaded, examples(6), batch_size=6, mask_density=0.05, repeats=2)
    figures["machine"] = machine.describe()
    assert_figures(
        figures,
        "step_over_two_forwards",
        "reference_over_step",
        "padded_over_packed",
        "step_seconds",
        "forward_seconds",
        "reference_seconds",
        "tokens",
        "padded_tokens",
        "compile",
    )
    lengths = [len(example.prompt) for example in examples(6)]
    assert figures["tokens"] == sum(lengths)
    assert figures["padded_tokens"] == 6 * max(lengths)
    assert fingerprint(loaded.model) == loaded.fingerprint


def test_steps_that_keep_a_prefix_are_measured_beside_the_others() -> None:
    loaded = tiny_model("gemma3")
    figures = measure_step(loaded, examples(6), 6, mask_density=0.05, repeats=2, first_block=1)
    figures["machine"] = machine.describe()
    assert_figures(figures, "step_over_prefix_step", "step_over_kept_step", "forward_over_gemm")
    assert_figures(figures, "reference_over_step", "reference_over_kept_step")
    assert figures["first_block"] == 1
    assert figures["kept_bytes"] == 4 * 32 * figures["tokens"]
    assert fingerprint(loaded.model) == loaded.fingerprint


def test_step_without_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "load_model", lambda section, runtime: tiny_model("llama"))
    monkeypatch.setattr(step, "demo_examples", lambda loaded, count: examples(count))
    threads = torch.get_num_threads()
    figures = bench("step", batch_size=3, repeats=1, reference=False, memory=False, threads=1)
    assert_figures(figures, "step_over_two_forwards", "padded_over_packed", "model", "dtype")
    assert not {"reference_over_step", "train_over_eval_memory"} & set(figures)
    assert figures["machine"]["threads"] == 1
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tiny_folder: Path) -> None:
    model = ModelSection(name=str(tiny_folder), dtype="float32")
    figures = peak_memory(model, Runtime(device="cpu", threads=1), examples(8), 4, 0.05)
    assert figures["memory_method"]
    ratio = figures["training_peak_bytes"] / figures["evaluating_peak_bytes"]
    assert figures["train_over_eval_memory"] == ratio
    assert 0.5 < ratio < 2
    for work in ("training", "evaluating"):
        assert figures[f"{work}_peak_bytes"] >= figures[f"{work}_resting_bytes"] > 0


def test_memory_says_why_a_process_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: no room\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(MeerkatError, match="MemoryError: no room"):
        peak_memory(ModelSection(name="none"), Runtime(), examples(2), 2, 0.05)


# The server and the noise.


def test_server_needs_far_less_than_clients_times_mask() -> None:
    figures = bench("server", clients=2_000, steps=3, mask_size=5_000)
    assert_figures(
        figures,
        "seconds",
        "decode_seconds",
        "close_seconds",
        "score_seconds",
        "cpu_seconds",
        "peak_extra_bytes",
        "memory_method",
        "clients",
        "steps",
        "mask_size",
    )
    assert figures["bytes_if_k_times_n"] == 2_000 * 5_000 * 4
    assert figures["peak_extra_bytes"] < figures["bytes_if_k_times_n"] / 10
    parts = ("decode_seconds", "close_seconds", "score_seconds")
    assert figures["seconds"] == pytest.approx(sum(figures[part] for part in parts))


def test_noise_figures() -> None:
    figures = bench("noise", mask_size=10_000, repeats=2)
    assert_figures(
        figures,
        "gaussian_milliseconds",
        "gaussian_values_per_second",
        "gaussian_over_torch",
        "tabulated_milliseconds",
        "tabulated_over_numpy",
        "rademacher_milliseconds",
        "rademacher_values_per_second",
        "rademacher_over_numpy",
    )
    assert figures["gaussian_values_per_second"] == pytest.approx(
        1e3 * 10_000 / figures["gaussian_milliseconds"]
    )


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    medians = machine.interleaved(
        {"a": lambda: contender("a", 1.0), "b": lambda: contender("b", 2.0)}, 2
    )
    assert order == ["a", "b"] * 3
    assert medians == {"a": 1.0, "b": 2.0}
