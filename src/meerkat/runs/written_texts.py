"""Texts that the model writes itself, for a subspace without a corpus (method.md section 9).

Each follows the end of the task's prompt with one of the answers, such as "It was great", so that
every answer has texts that the model would say of it. In a task of conversations each is what the
model writes as the user's first message. No label and no text of a client is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from meerkat.data.chat_encoding import ChatEncoder
from meerkat.models.loading import LoadedModel
from meerkat.spaces.answers import drawn_together
from meerkat.tasks import Task

__all__ = ["WRITTEN", "written_texts"]

WRITTEN = "model"
"""As `subspace.corpus`: there is none, the model writes the texts."""
_LONGEST = 40
"""Tokens of a text."""
_TOGETHER = 16
"""Texts that are written at a time."""


def written_texts(loaded: LoadedModel, task: Task, seed: int) -> Iterator[str]:
    """Texts without end, some of one answer and then some of the next."""
    draw = np.random.Generator(np.random.Philox(seed))
    for head in cycle(_heads(loaded, task)):
        for tokens in drawn_together(loaded.model, head, _TOGETHER, _LONGEST, loaded.ends, draw):
            text = loaded.tokenizer.decode(list(tokens), skip_special_tokens=True)
            yield str(text).strip()


def _heads(loaded: LoadedModel, task: Task) -> Sequence[list[int]]:
    """What comes before a text: the prompt without its fields and an answer, or nothing."""
    if task.is_chat:
        return [ChatEncoder(task, loaded.tokenizer, _LONGEST, _LONGEST).before_user()]
    bare = task.prompt.format(**dict.fromkeys(task.fields, "")).strip(" .,:;\n")
    starts = [f"{bare} {answer}.\n\n" for answer in task.verbalizers] or [f"{bare}\n\n"]
    tokenizer = loaded.tokenizer
    return [tokenizer(start.lstrip(), verbose=False)["input_ids"] for start in starts]
