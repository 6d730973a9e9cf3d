"""The encoder of a task: of columns and a prompt, of conversations, or of rows that are tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from meerkat.data.chat_encoding import ChatEncoder
from meerkat.data.encoding import Encoder
from meerkat.data.token_rows import TokenEncoder
from meerkat.tasks import Task

__all__ = ["encoder_of"]


def encoder_of(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, window: int
) -> Encoder | ChatEncoder:
    """The encoder of a task's examples.

    Raises:
        DataError: As `Encoder` or `ChatEncoder`.
    """
    if task.is_chat:
        return ChatEncoder(task, tokenizer, max_length, window)
    kind = TokenEncoder if task.is_tokens else Encoder
    return kind(task, tokenizer, max_length, window)
