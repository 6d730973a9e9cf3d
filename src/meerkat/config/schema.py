"""A whole recipe: its sections together, what holds between them, and what follows."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, model_validator

from meerkat.config.automatic import (
    MOST_ORTHOGONAL,
    SUBSPACE_BATCH,
    SUBSPACE_PERTURBATIONS,
    subspace_epsilon,
    subspace_rate,
)
from meerkat.config.parts import Choice, Neutral, Section, Seed
from meerkat.config.sections import (
    Evaluation,
    Federation,
    MaskSection,
    ModelSection,
    Network,
    Noise,
    Optimizer,
    Runtime,
    Selection,
    SubspaceSection,
    TaskSection,
    Tracking,
)

__all__ = ["Recipe", "without_neutral"]

_MOST_NUMBERS = 4096
"""Numbers of a step that a report may have."""


class Recipe(Section):
    """A whole run. `Recipe.fingerprint` names it."""

    algorithm: Annotated[Choice, Neutral("meerkat")] = Choice(kind="meerkat")
    """The method: see `algorithms`."""
    model: ModelSection
    task: TaskSection
    federation: Federation
    mask: MaskSection = MaskSection()
    subspace: Annotated[SubspaceSection | None, Neutral(None)] = None
    """Where θ may move within the mask; anywhere if it is left out."""
    optimizer: Optimizer = Optimizer()
    noise: Noise = Noise()
    evaluation: Evaluation = Evaluation()
    selection: Selection = Selection()
    runtime: Runtime = Runtime()
    network: Network = Network()
    tracking: Tracking = Tracking()
    seed: Seed = 0
    """Seed of noise, partition, client sampling and data order."""

    @model_validator(mode="after")
    def _fill_in(self) -> Recipe:
        """What a subspace means for fields that are left out; a recipe that was read never changes.

        A recipe that was written has all fields, so it is read as it was.
        """
        if self.subspace is not None and self.subspace.kind == "none":
            object.__setattr__(self, "subspace", None)
        given = (
            "batch_size" in self.federation.model_fields_set,
            "estimator" in self.optimizer.model_fields_set,
            "perturbations" in self.noise.model_fields_set,
        )
        if self.subspace is None or any(given):
            return self
        federation = self.federation.model_copy(update={"batch_size": SUBSPACE_BATCH})
        estimator = {"estimator": Choice(kind="one-sided")}
        noise = self.noise.model_copy(update={"perturbations": SUBSPACE_PERTURBATIONS})
        object.__setattr__(self, "federation", federation)
        object.__setattr__(self, "optimizer", self.optimizer.model_copy(update=estimator))
        object.__setattr__(self, "noise", noise)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        sampled, clients = self.federation.clients_per_round, self.federation.clients
        if sampled is not None and sampled > clients:
            raise ValueError(
                f"federation.clients_per_round = {sampled} is more than federation.clients = "
                f"{clients}; lower it"
            )
        extreme = self.federation.partition.extreme
        if extreme >= clients:
            raise ValueError(
                f"federation.partition.extreme = {extreme} leaves none of federation.clients = "
                f"{clients} for the partition; lower it, or take kind = 'single-label'"
            )
        partition = self.federation.partition
        if partition.column is not None and partition.kind != "natural":
            raise ValueError(
                f"federation.partition.column = {partition.column!r} goes with "
                f"federation.partition.kind = 'natural', which is {partition.kind!r}: leave it out"
            )
        if self.task.verbalizers is not None and self.task.answer is not None:
            raise ValueError(
                "task.verbalizers and task.answer exclude each other: verbalizers are for "
                "classification, answer is for free text"
            )
        self._check_pairs()
        quorum = self.network.quorum
        if quorum is not None and quorum > self.clients_per_round:
            raise ValueError(
                f"network.quorum = {quorum} is more than the {self.clients_per_round} clients that "
                "a round samples; lower it"
            )
        if self.runtime.compile and self.runtime.weights != "stored":
            raise ValueError(
                f"runtime.weights = {self.runtime.weights!r} cannot be compiled; set "
                "runtime.compile = false, or runtime.weights = 'stored'"
            )
        self._check_patience()
        self._check_selection()
        self._check_exact()
        self._check_renewal()
        self._check_adapters()
        return self

    def _check_pairs(self) -> None:
        """Are both columns of pairs named, and no other kind of answer?"""
        task = self.task
        if (task.chosen is None) != (task.rejected is None):
            missing, given = "chosen", "rejected"
            if task.chosen is not None:
                missing, given = given, missing
            raise ValueError(f"task.{missing} is missing; pairs need it beside task.{given}")
        for field in ("verbalizers", "answer"):
            if task.chosen is not None and getattr(task, field) is not None:
                raise ValueError(
                    f"task.{field} and task.chosen exclude each other: chosen and rejected are for "
                    "pairs of answers; leave one out"
                )

    def _check_patience(self) -> None:
        """Are there validation scores in mid-run for a patience to judge by?"""
        patience = self.evaluation.patience
        for field in ("validation", "every"):
            if patience and not getattr(self.evaluation, field):
                raise ValueError(
                    f"evaluation.patience = {patience} needs validation scores in mid-run, and "
                    f"evaluation.{field} = 0; set it, or leave patience out"
                )

    def _check_selection(self) -> None:
        chosen, clients = self.selection, self.federation.clients
        for kind, field, given in (
            ("random", "count", chosen.count is not None),
            ("list", "clients", bool(chosen.clients)),
        ):
            if given != (chosen.kind == kind):
                raise ValueError(
                    f"selection.{field} goes with selection.kind = {kind!r}, which is "
                    f"{chosen.kind!r}: " + ("leave it out" if given else "add it")
                )
        if chosen.count is not None and chosen.count > clients:
            raise ValueError(
                f"selection.count = {chosen.count} is more than federation.clients = {clients}; "
                "lower it"
            )
        unknown = [client for client in chosen.clients if client >= clients]
        if unknown:
            raise ValueError(
                f"selection.clients: {unknown[0]} is no client of federation.clients = {clients}, "
                "who are numbered from 0; leave it out"
            )
        for field, wants in (("action", chosen.action != "stop"), ("every", chosen.every > 0)):
            if wants and chosen.kind != "gradip":
                raise ValueError(
                    f"selection.{field} = {getattr(chosen, field)!r} needs paths to judge by; "
                    "set selection.kind = 'gradip'"
                )

    def _check_renewal(self) -> None:
        """Can this subspace be made again in mid-run?"""
        found = self.subspace
        if found is None or not found.renew_every:
            return
        asked = f"subspace.renew_every = {found.renew_every}"
        if found.kind != "aligned":
            raise ValueError(
                f"{asked} needs a subspace that follows the model: {found.kind!r} does not; leave "
                "it out, or take subspace.kind = 'aligned'"
            )
        if self.selection.kind == "gradip" and self.selection.signal == "gradip":
            raise ValueError(
                f"{asked} leaves no fixed directions to judge clients by GradIP along; set "
                "selection.signal = 'projected-gradient'"
            )

    def _check_adapters(self) -> None:
        """Are there LoRA factors where a recipe says what they are, and nothing else that moves?"""
        mask, usual = self.mask, MaskSection()
        if mask.kind == "lora":
            if self.subspace is not None:
                raise ValueError(
                    "mask.kind = 'lora' moves all factors, in no subspace: its rates are measured "
                    "for masks of weights; leave [subspace] out, or set subspace.kind = 'none'"
                )
            return
        for field in ("lora_rank", "lora_alpha"):
            if (given := getattr(mask, field)) != getattr(usual, field):
                raise ValueError(
                    f"mask.{field} = {given} goes with mask.kind = 'lora', which is "
                    f"{mask.kind!r}: leave it out"
                )

    def _check_exact(self) -> None:
        """Is there a subspace for exact gradients, of a size that a report may have?"""
        optimizer, clients = self.optimizer, self.federation.clients
        chosen, backward = optimizer.exact_clients, optimizer.estimator.kind == "backward"
        if not (chosen or backward):
            return
        asked = f"optimizer.exact_clients = {chosen!r}"
        if backward and chosen:
            raise ValueError(
                f"{asked} goes with another estimator: with optimizer.estimator = 'backward' all "
                "clients report the exact gradient; leave it out"
            )
        if backward:
            asked = "optimizer.estimator = 'backward'"
        if self.subspace is None:
            raise ValueError(
                f"{asked} needs a subspace, whose k numbers of gradient are reported; add "
                "[subspace], or take optimizer.estimator = 'two-point' for all clients"
            )
        if self.subspace.dimensions > _MOST_NUMBERS:
            raise ValueError(
                f"{asked} reports subspace.dimensions = {self.subspace.dimensions} numbers a "
                f"step, and may at most {_MOST_NUMBERS}; lower it"
            )
        unknown = [client for client in chosen if isinstance(client, int) and client >= clients]
        if unknown:
            raise ValueError(
                f"optimizer.exact_clients: {unknown[0]} is no client of federation.clients = "
                f"{clients}, who are numbered from 0; leave it out"
            )

    @property
    def numbers_per_step(self) -> int:
        """Most numbers that a report of this run has for a local step."""
        optimizer, drawn = self.optimizer, self.noise.perturbations
        if self.subspace is None:
            return drawn
        if optimizer.estimator.kind == "backward":
            return self.subspace.dimensions
        return max(drawn, self.subspace.dimensions) if optimizer.exact_clients else drawn

    @property
    def noise_kind(self) -> Literal["gaussian", "tabulated", "rademacher", "orthogonal"]:
        """The kind of direction after `auto`."""
        if self.noise.kind != "auto":
            return self.noise.kind
        few = self.subspace is not None and self.subspace.dimensions <= MOST_ORTHOGONAL
        return "orthogonal" if few and self.noise.keys.kind == "fresh" else "gaussian"

    @property
    def learning_rate(self) -> float:
        """η after `auto` (method.md section 9, Units)."""
        if self.optimizer.learning_rate != "auto":
            return self.optimizer.learning_rate
        if self.subspace is None:
            return 1e-5
        if self.optimizer.estimator.kind == "backward":
            return subspace_rate(self.subspace.dimensions, math.inf)
        owners = 1 if self.noise.directions == "shared" else self.clients_per_round
        return subspace_rate(self.subspace.dimensions, owners * self.noise.perturbations)

    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]:
        """How η goes over the rounds, after `auto`."""
        if self.optimizer.schedule != "auto":
            return self.optimizer.schedule
        return "constant" if self.subspace is None else "linear"

    @property
    def epsilon(self) -> float:
        """ε after `auto` (method.md section 3, Precision, and section 9, Units)."""
        if self.optimizer.epsilon != "auto":
            return self.optimizer.epsilon
        if self.subspace is not None:
            return subspace_epsilon(self.subspace.dimensions)
        return 1e-3 if self.model.dtype == "float32" else 3e-3

    @property
    def clients_per_round(self) -> int:
        return self.federation.clients_per_round or self.federation.clients

    @property
    def quorum(self) -> int:
        """Fewest reports that close a round."""
        return self.network.quorum or self.clients_per_round // 2 + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides what a run computes."""
        science = self.resolved.model_dump(mode="json", exclude={"runtime", "network", "tracking"})
        content = json.dumps(without_neutral(type(self), science), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def resolved(self) -> Recipe:
        """The same run with what `auto` means written out; ε stays, it names no other run."""
        rate: dict[str, Any] = {"learning_rate": self.learning_rate, "schedule": self.schedule}
        optimizer = self.optimizer.model_copy(update=rate)
        noise = self.noise.model_copy(update={"kind": self.noise_kind})
        return self.model_copy(update={"optimizer": optimizer, "noise": noise})

    @property
    def for_clients(self) -> Recipe:
        """What a client is told: all but who is told of the run."""
        return self.model_copy(update={"tracking": Tracking()})

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)


def without_neutral(section: type[BaseModel], dumped: dict[str, Any]) -> dict[str, Any]:
    """What a section was dumped to, less the later fields that have their neutral values."""
    kept = {}
    for name, field in section.model_fields.items():
        if name not in dumped:
            continue
        value = dumped[name]
        if any(isinstance(mark, Neutral) and mark.value == value for mark in field.metadata):
            continue
        for kind in get_args(field.annotation) or (field.annotation,):  # a section may be left out
            own = isinstance(kind, type) and issubclass(kind, Section) and kind is not Choice
            if own and value is not None:
                value = without_neutral(kind, value)
        kept[name] = value
    return kept
