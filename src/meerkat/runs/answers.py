"""A model's answers beside what they should be, to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meerkat.data.encoding import Encoded
from meerkat.errors import RunError
from meerkat.runs.assembly import Assembly

__all__ = ["Answered", "answers"]


@dataclass(frozen=True)
class Answered:
    """An example as the model reads it, and its answer."""

    prompt: str
    answer: str
    """What the model writes, or the answer of those of the task that it prefers."""
    reference: str


def answers(assembly: Assembly, examples: Sequence[Encoded]) -> Iterator[Answered]:
    """The answer to each example, at the weights as they are.

    Raises:
        RunError: They are images.
    """
    if not examples:
        return
    if assembly.task.image is not None:
        raise RunError("--show prints texts, and the task is over images; leave it out")
    task, decode = assembly.task, assembly.loaded.tokenizer.decode
    if task.has_classes:
        found = assembly.objective.predict(examples)
        given = [task.verbalizers[which] for which in found.predicted]
        wanted = [task.verbalizers[which] for which in found.labels]
    else:
        given = list(assembly.write(examples))
        wanted = [example.reference for example in examples]
    for example, answer, reference in zip(examples, given, wanted, strict=True):
        yield Answered(str(decode(list(example.lead))), answer, reference)
