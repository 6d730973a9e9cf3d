"""What a step, the server and the noise cost on this machine; ratios are within one process."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, assert_never

from meerkat.benchmarks.noise import bench_noise
from meerkat.benchmarks.server import bench_server
from meerkat.benchmarks.step import bench_step

__all__ = ["Kind", "bench"]

Kind: TypeAlias = Literal["step", "server", "noise"]


def bench(kind: Kind, **options: Any) -> dict[str, Any]:
    """Measure one part; the options and the keys are those of `bench_<kind>`.

    All of the answer is plain numbers, strings and dictionaries, as JSON has them.

    Raises:
        MeerkatError: The model or its data cannot be loaded.
    """
    match kind:
        case "step":
            return bench_step(**options)
        case "server":
            return bench_server(**options)
        case "noise":
            return bench_noise(**options)
        case _:
            assert_never(kind)
