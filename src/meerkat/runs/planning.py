"""What a run will need, from its recipe and the configuration of its model: no weight is loaded.

Bytes on the wire, forward passes and files follow exactly. Memory is that of what is held for
certain, and for activations an estimate from the widths of the layers. With a measurement of a few
passes, which loads model and data, also the time that the run will take here.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from meerkat.config import MaskSection, Recipe
from meerkat.errors import RecipeError
from meerkat.models.adapters import factor_shapes, linear_weights
from meerkat.models.compute import computes_in_float32
from meerkat.models.loading import choose_device, empty_model
from meerkat.models.objective import TextObjective
from meerkat.models.quantised import GROUP
from meerkat.progress import Progress
from meerkat.registry import build
from meerkat.runs.assembly import assemble
from meerkat.runs.driver import CHECKPOINT_EVERY
from meerkat.runs.fit import EXAMPLES, asks
from meerkat.runs.plan_figures import (
    ByteFigures,
    DiskFigures,
    MemoryFigures,
    ModelFigures,
    PassFigures,
    Plan,
    TimeFigures,
)
from meerkat.spaces.alignment import IN_MEMORY
from meerkat.spaces.mask_criteria import (
    decoder_blocks,
    eligible_parameters,
    mask_size,
    still_blocks,
)
from meerkat.spaces.mask_file import load_mask
from meerkat.tasks import resolve_task
from meerkat.transport.messages import AXIS_BYTES, ENTRY_BYTES, PLAN_BYTES, REPORT_BYTES
from meerkat.zo.estimators import ESTIMATORS
from meerkat.zo.estimators.base import Estimator

__all__ = ["Plan", "plan_run"]

_REPEATS = 5
_BACKWARD = 3
"""A forward and a backward pass, in forward passes: the backward one takes about two."""
_MEASURED = ("sensitivity", "task")
"""Kinds of mask with scores, and p, by gradients of one pass over its batches."""
_EMPTY, _ROUND, _ROW = 60_000, 350, 20
"""What SQLite, header and evaluations, a round, and a report take in a journal beside what is
counted; as seen."""


def plan_run(recipe: Recipe, measure: bool = False, progress: Progress | None = None) -> Plan:
    """What a run of this recipe will need.

    Args:
        measure: Load the model and the data, and time a few passes.

    Raises:
        MeerkatError: There is no such model, or nothing in it may move.
    """
    if resolve_task(recipe.task).image is not None:
        raise RecipeError(
            f"task.name = {recipe.task.name!r} is a task over images, and a plan counts tokens; "
            "`meerkat run` needs none"
        )
    planner = _Planner(recipe)
    return Plan(
        planner.model,
        planner.passes,
        planner.bytes,
        planner.memory,
        planner.disk,
        planner.seconds(progress or Progress()) if measure else None,
    )


class _Planner:
    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._empty = empty_model(recipe.model, recipe.runtime)
        self._eligible = _shapes_of_eligible(self._empty, recipe.mask)
        _, self._blocks = decoder_blocks(self._empty)
        chosen = recipe.optimizer.estimator
        self._estimator: Estimator = build(
            ESTIMATORS, chosen.kind, chosen.options, "optimizer.estimator"
        )
        self._exact = chosen.kind == "backward" or bool(recipe.optimizer.exact_clients)

    @cached_property
    def model(self) -> ModelFigures:
        recipe, eligible = self._recipe, sum(map(math.prod, self._eligible.values()))
        masked = self._masked(eligible)
        still = still_blocks(self._empty, list(self._eligible))
        return ModelFigures(
            parameters=sum(parameter.numel() for parameter in self._empty.parameters()),
            eligible=eligible,
            masked=masked,
            moving=masked if recipe.subspace is None else recipe.subspace.dimensions,
            blocks=len(self._blocks),
            kept_blocks=len(still) if self._keeps else 0,
        )

    @property
    def _keeps(self) -> bool:
        return bool(self._recipe.runtime.prefix_cache or self._recipe.runtime.prefix_disk)

    @property
    def _calibrated(self) -> bool:
        """Is the mask found by gradients?"""
        mask = self._recipe.mask
        return mask.file is None and mask.kind in (*_MEASURED, "union")

    @property
    def _texts(self) -> int:
        """Public texts of an aligned subspace."""
        section = self._recipe.subspace
        return section.texts if section is not None and section.kind == "aligned" else 0

    def _masked(self, eligible: int) -> int:
        section = self._recipe.mask
        if section.file is not None:
            return load_mask(section.file).size
        if section.kind in ("full", "lora"):
            return eligible
        if section.scope == "tensor" and section.kind in (*_MEASURED, "magnitude"):
            sizes = map(math.prod, self._eligible.values())
            return sum(mask_size(section.density, size) for size in sizes)
        found = mask_size(section.density, eligible)
        if section.kind == "union":
            return min(eligible, found * self._recipe.federation.clients)
        return found

    @cached_property
    def passes(self) -> PassFigures:
        recipe = self._recipe
        federation, evaluation = recipe.federation, recipe.evaluation
        steps = federation.rounds * federation.local_steps * recipe.clients_per_round
        directions = self._estimator.forward_passes(recipe.noise.perturbations)
        every = evaluation.every or federation.rounds
        evaluations = 1 + len({*range(every, federation.rounds + 1, every), federation.rounds})
        backward = recipe.optimizer.estimator.kind == "backward"
        return PassFigures(
            forward_a_step=directions * federation.batch_size,
            backward_a_step=federation.batch_size if backward else 0,
            training=steps * directions * federation.batch_size,
            evaluating=evaluations * (evaluation.examples + evaluation.validation),
        )

    @cached_property
    def bytes(self) -> ByteFigures:
        recipe = self._recipe
        federation, numbers = recipe.federation, recipe.numbers_per_step
        reports = federation.rounds * recipe.clients_per_round
        up = REPORT_BYTES + 4 * federation.local_steps * numbers
        # A client is sent the whole log but what follows its last round; sampled as often as all.
        log = (federation.rounds - 1) * federation.local_steps * self._entries
        holders = federation.clients
        down = reports * PLAN_BYTES + log * holders
        return ByteFigures(
            up_a_client_round=up,
            down_a_client_round=down / reports,
            up=reports * up,
            down=down,
            once=self._mask_file,
        )

    @property
    def _entries(self) -> int:
        """Bytes of the log for one local step."""
        recipe = self._recipe
        shared = recipe.noise.directions == "shared"
        drawn = recipe.noise.perturbations * (1 if shared else recipe.clients_per_round)
        axes = 0
        if self._exact and recipe.subspace is not None:
            axes = ENTRY_BYTES + AXIS_BYTES * (recipe.subspace.dimensions - 1)
        if recipe.optimizer.estimator.kind == "backward":
            return axes
        return drawn * ENTRY_BYTES + axes

    @property
    def _mask_file(self) -> int:
        """Coordinates, their initial values, p where it is measured, and B in bfloat16."""
        n, model = self.model.masked, self.model
        listed = 0 if n == model.eligible else 4
        measured = 4 if self._recipe.mask.kind in (*_MEASURED, "union") else 0
        return n * (listed + 4 + measured) + 2 * n * self._dimensions

    @property
    def _dimensions(self) -> int:
        return 0 if self._recipe.subspace is None else self._recipe.subspace.dimensions

    @cached_property
    def memory(self) -> MemoryFigures:
        recipe = self._recipe
        device = choose_device(recipe.runtime)
        dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        width = 4 if computes_in_float32(recipe.runtime.compute, dtype, device) else dtype.itemsize
        weights, loaded = self._weights(width), self.model.parameters * width
        n, k = self.model.masked, self._dimensions
        state = 12 * self.model.moving  # before the run, now, and one that is being made
        space = n * (8 + 4 + 4) + n * k * (2 + 4)  # coordinates, θ_0 and p; B as stored and used
        kept = recipe.runtime.prefix_cache * 2**20 if self.model.kept_blocks else 0
        mask = recipe.mask
        tokens = min(recipe.runtime.tokens_per_pass, self._longest * recipe.federation.batch_size)
        tokens *= self._copies(tokens)
        exact = self._activations(tokens, kept=True) if self._exact else 0
        activations = width * max(exact, self._activations(tokens, kept=False))
        sequences = mask.batch_size * self._calibrated_length
        scores = 4 * self.model.eligible * (2 if recipe.runtime.mask_passes == 1 else 1)
        logits = 0 if mask.kind == "task" else 8 * sequences * self._vocabulary
        backward = width * self._activations(sequences, kept=True) + logits
        scores_of_texts = 4 * n * self._texts
        if scores_of_texts > IN_MEMORY:
            scores_of_texts = 0  # they are in a file
        gathered = scores_of_texts + 4 * n * k + 16 * self._texts**2
        of_texts = width * self._activations(16 * self._longest, kept=True)
        return MemoryFigures(
            weights=weights,
            activations=activations,
            client=weights + activations + space + state + kept,
            server=space + state,
            making_the_mask=loaded + scores + backward if self._calibrated else 0,
            making_the_subspace=loaded + gathered + of_texts if self._texts else 0,
        )

    def _weights(self, width: int) -> int:
        """Codes and scales of matrices in few bits; what moves is counted with the space.

        What moves as a whole is in the model as well: LoRA factors, and all that a full mask has.
        """
        kept, kind = self._recipe.runtime.weights, self._recipe.mask.kind
        found = 4 * self.model.masked if kind == "lora" else 0
        whole = self._eligible if kind == "full" else {}
        if kept == "stored":
            return found + self.model.parameters * width
        for name, parameter in self._empty.named_parameters():
            if parameter.ndim != 2 or name in whole:
                found += width * parameter.numel()
            elif kept == "int8":
                found += parameter.numel() + 4 * len(parameter)
            else:
                found += parameter.numel() // 2 + 8 * parameter.numel() // GROUP
        return found

    def _copies(self, tokens: int) -> int:
        """Copies of a batch of so many tokens that go through one pass of a step.

        Masks by score are taken to lie in few rows and columns, as those seen so far do.
        """
        recipe, runtime = self._recipe, self._recipe.runtime
        written = recipe.mask.file is None and recipe.mask.kind in ("random", "full", "lora")
        exact = recipe.optimizer.estimator.kind in ("backward", "forward-mode")
        if written or exact or runtime.compile:
            return 1
        budget = min(runtime.tokens_together, runtime.tokens_per_pass)
        passes = self._estimator.forward_passes(recipe.noise.perturbations)
        return max(1, min(passes, budget // tokens))

    @property
    def _longest(self) -> int:
        return self._recipe.task.max_length

    @property
    def _calibrated_length(self) -> int:
        """Tokens of a sequence, or of an example, that the mask is found by."""
        mask = self._recipe.mask
        return self._longest if mask.kind == "task" else mask.sequence_length

    @property
    def _vocabulary(self) -> int:
        return int(self._empty.get_output_embeddings().weight.shape[0])

    def _activations(self, tokens: int, kept: bool) -> int:
        """Values that a pass holds at a time: of one block, or of all that a gradient runs through.

        A block keeps the input and output of each of its linear layers. Where blocks are computed
        again, what comes into each is kept, and one block's.
        """
        linear = [m for m in self._blocks[0].modules() if isinstance(m, nn.Linear)]
        one = sum(layer.in_features + layer.out_features for layer in linear)
        above = len(self._blocks) - self.model.kept_blocks
        if kept and self._recipe.runtime.recompute:
            hidden = linear[0].in_features  # of the attention, which takes the block's input
            return tokens * (one + hidden * above)
        return tokens * one * (above if kept else 1)

    @cached_property
    def disk(self) -> DiskFigures:
        recipe = self._recipe
        federation = recipe.federation
        dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        numbers = federation.local_steps * recipe.numbers_per_step
        report = REPORT_BYTES + 4 * numbers + _ROW
        updates = federation.local_steps * self._entries
        rounds = federation.rounds * (_ROUND + updates + recipe.clients_per_round * report)
        kept = min(2, federation.rounds // CHECKPOINT_EVERY)
        states = (1 + kept) * 4 * self.model.moving
        return DiskFigures(
            model=self.model.parameters * dtype.itemsize,
            mask=self._mask_file,
            journal=_EMPTY + rounds + states,
        )

    def seconds(self, progress: Progress) -> TimeFigures:
        """Measured on the recipe's own examples; what is not measured follows from the passes."""
        recipe, passes, model = self._recipe, self.passes, self.model
        assembly = assemble(recipe, progress)
        batch = assembly.client(0).batch(0)
        objective = assembly.objective
        assert isinstance(objective, TextObjective), "a plan is of a task over texts"
        objective.refer(objective.unreferred(batch))
        tokens = sum(pack.tokens for pack in objective.packs(batch))
        copies = self._copies(tokens)
        forward = _median(lambda: assembly.objective.losses(batch))
        together = _median(lambda: assembly.objective.losses(batch * copies)) if copies > 1 else 0
        some = assembly.test[:32]
        predicting = _median(lambda: assembly.objective.predict(some))
        size = recipe.federation.batch_size
        kept = model.kept_blocks / max(1, model.blocks)
        backward = _BACKWARD + recipe.runtime.recompute
        a_step = passes.forward_a_step / size
        if copies > 1:
            a_step *= together / (copies * forward)
        a_step = a_step * (1 - kept) + kept
        a_step += (backward - 1) * passes.backward_a_step / size * (1 - kept)
        mask = recipe.mask
        of_mask = mask.batches * mask.batch_size * self._calibrated_length
        of_mask *= recipe.runtime.mask_passes
        a_token = backward * forward / tokens
        if mask.kind != "task":  # each token has a row of logits over the whole vocabulary
            a_token *= self._with_head
        of_texts = self._texts + (EXAMPLES if asks(recipe) else 0)
        steps = passes.training / passes.forward_a_step
        return TimeFigures(
            forward=forward,
            step=forward * a_step,
            mask=a_token * of_mask if self._calibrated else 0.0,
            subspace=backward * forward / size * of_texts,
            training=forward * a_step * steps,
            evaluating=predicting / len(some) * passes.evaluating,
        )

    @property
    def _with_head(self) -> float:
        """Parameters that a token of a calibration sequence meets, by those of the blocks."""
        blocks = sum(parameter.numel() for parameter in self._blocks.parameters())
        head = self._empty.get_output_embeddings().weight.numel()
        return (blocks + head) / blocks


def _shapes_of_eligible(model: PreTrainedModel, mask: MaskSection) -> dict[str, tuple[int, ...]]:
    """Of the parameters that a mask may choose from: weights, or the LoRA factors beside them."""
    shapes = {name: tuple(p.shape) for name, p in eligible_parameters(model, mask).items()}
    if mask.kind != "lora":
        return shapes
    weights = linear_weights(model, list(shapes), named=bool(mask.include))
    return dict(factor_shapes({name: shapes[name] for name in weights}, mask.lora_rank))


def _median(work: Callable[[], object]) -> float:
    """Seconds, after one run that is not counted."""
    taken = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
