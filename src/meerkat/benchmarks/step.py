"""What one zeroth-order step costs, beside two bare forward passes and beside the step of today."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from meerkat.benchmarks.machine import describe, interleaved, seconds
from meerkat.benchmarks.memory import peak_memory, random_worker
from meerkat.benchmarks.reference import option_batch, reference_step
from meerkat.config import MaskSection, ModelSection, Runtime, TaskSection
from meerkat.data.encoding import Encoded, Encoder
from meerkat.data.packing import packs
from meerkat.data.sources import load_examples
from meerkat.federation.client import Client, Worker
from meerkat.federation.messages import RoundPlan
from meerkat.models import attention
from meerkat.models.loading import LoadedModel, cache_dir, load_model
from meerkat.models.objective import TextObjective
from meerkat.models.prefix import KeptActivations
from meerkat.spaces.mask_criteria import eligible_parameters, still_blocks
from meerkat.tasks import resolve_task
from meerkat.zo.log import Update

__all__ = ["bench_step", "demo_examples", "measure_step", "padded_loss"]

_WARM_UP_BATCHES = 6
_MEMORY_BATCHES = 5
_RATE = float(np.float32(1e-6))
_EPSILON = 1e-3
"""Of the reference; its time does not depend on it."""


def bench_step(
    compile: bool = False,
    model: str = "demo:gemma-3-270m",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    batch_size: int = 16,
    repeats: int = 5,
    mask_density: float = 1e-3,
    threads: int = 0,
    reference: bool = True,
    memory: bool = True,
    first_block: int = 0,
) -> dict[str, Any]:
    """Measure a step on snippets of the demo task; see `measure_step` for what is measured.

    Args:
        mask_density: Share of the eligible parameters in a random mask; the time of a step depends
            on how many coordinates it has, not on which.
        threads: CPU threads; 0 leaves them to torch.
        reference: Also run the step of today, which takes most of the time.
        memory: Also measure peak memory, in two processes of their own.
        first_block: Where the mask begins; above 0, also steps that keep activations below it.

    Raises:
        MeerkatError: The model or the demo task cannot be loaded.
    """
    section = ModelSection(name=model, dtype=dtype)
    runtime = Runtime(compile=compile, threads=threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        loaded = load_model(section, runtime)
        examples = demo_examples(loaded, batch_size * _WARM_UP_BATCHES)
        figures = measure_step(
            loaded, examples, batch_size, runtime, mask_density, repeats, reference, first_block
        )
        if memory:
            some = examples[: batch_size * _MEMORY_BATCHES]
            figures |= peak_memory(section, runtime, some, batch_size, mask_density)
        return {"model": model, "dtype": dtype, **figures, "machine": describe()}
    finally:
        torch.set_num_threads(before)


def demo_examples(loaded: LoadedModel, count: int) -> list[Encoded]:
    """Snippets of the demo task, in the order of its own seed."""
    section = TaskSection(name="rotten_tomatoes", train_examples=count)
    task = resolve_task(section)
    encoder = Encoder(task, loaded.tokenizer, section.max_length, loaded.window)
    return [encoder.encode(example) for example in load_examples(task, section).train]


def measure_step(
    loaded: LoadedModel,
    examples: Sequence[Encoded],
    batch_size: int = 16,
    runtime: Runtime | None = None,
    mask_density: float = 1e-3,
    repeats: int = 5,
    reference: bool = True,
    first_block: int = 0,
) -> dict[str, Any]:
    """Median wall-clock seconds on the first `batch_size` examples, measured in turn.

    - `step_seconds`: all that a client does in a round of one step: it brings θ up to date by one
      log entry, draws z, writes the weights, makes two forward passes, and reports.
    - `forward_seconds`: two forward passes on the same batch and nothing else.
    - `packed_seconds`, `padded_seconds`: one pass over the packed batch, and one over the same
      prompts padded to the longest, with transformers' SDPA attention and the same rows of the LM
      head. Neither is compiled, whatever the others are.
    - `gemm_seconds`: the matrix products of such a pass alone, one after the other.
    - `prefix_step_seconds`, `kept_step_seconds`, with a `first_block` above 0: a step that computes
      the blocks below once for both its passes, and one that finds what they give.
    - `reference_seconds`: the faster of two steps of `reference.py`, which is never compiled.

    Afterwards the model has its bits back.

    Args:
        examples: With one-token answers, the same for all. What follows the first batch is used to
            warm up a compiled forward pass.
    """
    runtime = runtime or Runtime()
    batch = list(examples[:batch_size])
    objective, figures = _objective(loaded, runtime, examples, batch_size)
    graphs = _graphs()
    worker = random_worker(loaded.model, loaded.fingerprint, objective, mask_density, first_block)
    contenders = _contenders(loaded, worker, batch)
    contenders["gemm"] = _products(loaded.model, batch, runtime)
    kept = KeptActivations(2**30)
    if first_block:
        contenders |= _keeping(loaded.model, worker, objective, batch, first_block, kept)

    # Half of the reference before and half after, since the machine may change in between.
    others = [_reference(loaded, batch, _EPSILON)] if reference else []
    taken = interleaved(contenders, repeats)
    worker.space.restore()
    if reference:
        others.append(_reference(loaded, batch, _EPSILON))
        figures["reference_seconds"] = min(others)
        for name in ("step", "kept_step") if first_block else ("step",):
            figures[f"reference_over_{name}"] = figures["reference_seconds"] / taken[name]
    if runtime.compile:
        figures["recompiles_after_warm_up"] = _graphs() - graphs
    return {
        "step_over_two_forwards": taken["step"] / taken["forward"],
        "padded_over_packed": taken["padded"] / taken["packed"],
        "forward_over_gemm": taken["packed"] / taken["gemm"],
        **_prefix_figures(taken, kept, first_block),
        **figures,
        **{f"{name}_seconds": value for name, value in taken.items()},
        "tokens": sum(pack.tokens for pack in packs(batch, runtime.tokens_per_pass)),
        "padded_tokens": len(batch) * max(len(example.prompt) for example in batch),
        "mask_size": worker.space.size,
        "repeats": repeats,
    }


def _objective(
    loaded: LoadedModel, runtime: Runtime, examples: Sequence[Encoded], batch_size: int
) -> tuple[TextObjective, dict[str, Any]]:
    """The objective, warmed up where it is compiled, and what that took."""
    if runtime.compile:
        # Not `setdefault`: torch sets it to a folder of its own while transformers is imported.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir(runtime, "compiled"))
    objective = TextObjective(loaded, runtime.tokens_per_pass, runtime.compile)
    figures: dict[str, Any] = {"compile": runtime.compile, "batch_size": batch_size}
    if runtime.compile:
        figures["compile_seconds"] = seconds(lambda: _warm_up(objective, examples, batch_size))
    return objective, figures


def _contenders(
    loaded: LoadedModel, worker: Worker, batch: Sequence[Encoded]
) -> dict[str, Callable[[], float]]:
    loss = worker.objective.losses

    def packed() -> float:
        with torch.compiler.set_stance("force_eager"):
            return seconds(lambda: loss(batch))

    def padded() -> float:
        with _plain(loaded.model):
            return seconds(lambda: padded_loss(loaded, batch))

    return {
        "step": _stepper(worker, batch),
        "forward": lambda: seconds(lambda: (loss(batch), loss(batch))),
        "packed": packed,
        "padded": padded,
    }


def _products(model: Any, batch: Sequence[Encoded], runtime: Runtime) -> Callable[[], float]:
    """Seconds of the products with the weights of all linear layers of the decoder blocks."""
    tokens = sum(pack.tokens for pack in packs(batch, runtime.tokens_per_pass))
    names = eligible_parameters(model, MaskSection())
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    ]
    inputs = {
        layer.in_features: torch.randn(tokens, layer.in_features).to(layer.weight)
        for layer in layers
    }

    @torch.inference_mode()
    def multiply() -> None:
        for layer in layers:
            linear(inputs[layer.in_features], layer.weight)
        if layers and layers[0].weight.is_cuda:
            torch.cuda.synchronize()

    return lambda: seconds(multiply)


def _keeping(
    model: Any,
    worker: Worker,
    objective: TextObjective,
    batch: Sequence[Encoded],
    first_block: int,
    kept: KeptActivations,
) -> dict[str, Callable[[], float]]:
    """Steps that keep the activations below the first block; the others compute all blocks."""
    eligible = eligible_parameters(model, MaskSection(first_block=first_block))
    objective.keep_prefix(still_blocks(model, list(eligible)), kept)
    prefix, objective.prefix = objective.prefix, None
    step = _stepper(worker, batch)

    def keeping(fresh: bool) -> float:
        if fresh:
            kept.clear()
        objective.prefix = prefix
        try:
            return step()
        finally:
            objective.prefix = None

    return {"prefix_step": lambda: keeping(True), "kept_step": lambda: keeping(False)}


def _prefix_figures(
    taken: dict[str, float], kept: KeptActivations, first_block: int
) -> dict[str, Any]:
    if not first_block:
        return {}
    return {
        "first_block": first_block,
        "step_over_prefix_step": taken["step"] / taken["prefix_step"],
        "step_over_kept_step": taken["step"] / taken["kept_step"],
        "kept_bytes": kept.in_memory,
    }


def _stepper(worker: Worker, batch: Sequence[Encoded]) -> Callable[[], float]:
    """Seconds of a client's round of one step; each brings the log entry of the last."""
    client = Client(0, batch, len(batch), 0)
    log: list[Update] = []

    def step() -> float:
        round = len(log)
        plan = RoundPlan(round, 1, _RATE, 0, max(0, round - 1), tuple(log[-1:]))

        def answer() -> None:
            report, _ = client.answer(plan, worker)
            log.extend(worker.algorithm.aggregate([report], _RATE))

        return seconds(answer)

    return step


@torch.inference_mode()
def padded_loss(loaded: LoadedModel, batch: Sequence[Encoded]) -> float:
    """The loss of `Objective` for one-token answers, the usual way: S · longest tokens.

    Only padding differs: of the LM head, too, it multiplies the rows of the answers alone, at the
    answer position alone.
    """
    model: Any = loaded.model
    head = model.get_output_embeddings()
    device = head.weight.device
    lengths = torch.tensor([len(example.prompt) for example in batch])
    input_ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)
    for row, example in enumerate(batch):
        input_ids[row, : len(example.prompt)] = torch.tensor(example.prompt)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(device, torch.int64)
    output = model.base_model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
    last = output.last_hidden_state[torch.arange(len(batch)), lengths - 1]
    rows = torch.tensor([answer[0] for answer in batch[0].answers], device=device)
    scores = linear(last, head.weight[rows]).float()
    labels = torch.tensor([example.label for example in batch], device=device)
    return float(cross_entropy(scores, labels))


def _reference(loaded: LoadedModel, batch: Sequence[Encoded], epsilon: float) -> float:
    """Seconds of the step of today; the weights get their bits back from a copy."""
    model = loaded.model
    options = option_batch(batch, next(model.parameters()).device)
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with _plain(model):
            return seconds(lambda: reference_step(model, options, epsilon, _RATE, seed=0))
    finally:
        with torch.no_grad():
            for parameter, original in zip(model.parameters(), kept, strict=True):
                parameter.copy_(original)


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """The model as transformers loads it: its own attention, not compiled."""
    model.set_attn_implementation("sdpa")
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.set_attn_implementation(attention.NAME)


def _warm_up(objective: TextObjective, examples: Sequence[Encoded], batch_size: int) -> None:
    """Passes over batches of several sizes and lengths, so no shape is taken for a constant."""
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        objective.refer(objective.unreferred(group))
        for size in {len(group), max(2, len(group) // 2)}:
            objective.losses(group[:size])


def _graphs() -> int:
    """How many graphs torch has compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
