"""A client's path from seeds and scalars, without its data (method.md section 4, step 3)."""

from __future__ import annotations

from collections.abc import Iterator

from meerkat.federation.algorithm import Algorithm
from meerkat.federation.messages import ClientReport
from meerkat.zo.state import ModelState

__all__ = ["virtual_path"]


def virtual_path(
    state: ModelState, learning_rate: float, report: ClientReport, algorithm: Algorithm
) -> Iterator[ModelState]:
    """The client's state after each of its T_k local steps, bit for bit its own: memory O(n).

    With SGD its θ is θ_k^t = θ_r - η Σ_{s≤t} g_k^{r,s} z(r,s).
    """
    for update in algorithm.steps(report, learning_rate):
        state = algorithm.apply(state, [update])
        yield state
