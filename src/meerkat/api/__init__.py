"""The commands as functions, with the same names: what `import meerkat` offers.

What needs a model is imported where it is used, so that a server without torch has the rest.
"""

from __future__ import annotations

from meerkat.api.results import (
    Gradip,
    Replayed,
    evaluate,
    export,
    gradip,
    harness,
    push,
    replay,
    report,
)
from meerkat.api.running import (
    calibrate,
    compare,
    default_out,
    plan,
    recalibrate,
    resume,
    run,
    schema,
    split,
    tune,
)

__all__ = [
    "Gradip",
    "Replayed",
    "calibrate",
    "compare",
    "default_out",
    "evaluate",
    "export",
    "gradip",
    "harness",
    "plan",
    "push",
    "recalibrate",
    "replay",
    "report",
    "resume",
    "run",
    "schema",
    "split",
    "tune",
]
