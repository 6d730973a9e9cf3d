"""Losses of pairs, a chosen and a rejected answer: SimPO, and DPO with a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from meerkat.tasks.losses.base import Kind, OfEach, Scored

__all__ = ["DPO", "SimPO"]


@dataclass(frozen=True)
class SimPO(OfEach):
    """- log σ(β (s_chosen - s_rejected) - γ), s the mean log-probability of an answer's tokens.

    Eq. 6 of Meng, Xia and Chen, arXiv 2405.14734; no reference model. With β = 1 and γ = 0 it is
    the usual loss of a pair.
    """

    beta: float = 2.0
    gamma: float = 0.5

    of: ClassVar[Kind] = "pairs"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def losses(self, batch: Scored) -> Any:
        difference = batch.scores[:, 0] - batch.scores[:, 1]
        return -_log_sigmoid(self.beta * difference - self.gamma)


@dataclass(frozen=True)
class DPO(OfEach):
    """- log σ(β (log π/π_ref of the chosen answer - log π/π_ref of the rejected one)).

    Eq. 7 of Rafailov et al., arXiv 2305.18290, with sums of log-probabilities over an answer's
    tokens; π_ref is the model as it was loaded.
    """

    beta: float = 0.1

    of: ClassVar[Kind] = "pairs"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def losses(self, batch: Scored) -> Any:
        moved = (batch.scores - batch.reference) * batch.lengths
        return -_log_sigmoid(self.beta * (moved[:, 0] - moved[:, 1]))


def _check_beta(beta: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta is {beta:g}; give a number above 0")


def _log_sigmoid(values: Any) -> Any:
    """log σ, exact to rounding however large a value is."""
    return -(values.abs().neg().exp().log1p() + values.neg().clamp(min=0))
