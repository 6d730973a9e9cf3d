"""One machine, no federation: a run with one client, with the habits of transformers' Trainer."""

from meerkat.trainer.arguments import TrainingArguments
from meerkat.trainer.trainer import Trainer

__all__ = ["Trainer", "TrainingArguments"]
