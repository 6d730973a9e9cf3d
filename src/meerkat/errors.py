"""What can go wrong, as one tree.

MeerkatError            a user can act on it: one line on the terminal, exit code 2
├── RecipeError         a field of the recipe: unknown, of the wrong type, out of range
├── ModelError          a model or tokenizer that cannot be loaded, or is not what it should be
├── DataError           a data set, corpus, label, verbalizer or partition
├── MaskError           a mask file: damaged, or made for another model
├── ProtocolError       a message that breaks the protocol between server and client
├── RunError            a run directory: taken, missing, or not in the state that a command needs
├── JournalError        a journal that cannot be written or read; what it held so far is kept
└── DivergedError       a loss that is no longer finite; the journal ends before that round
"""

__all__ = [
    "DataError",
    "DivergedError",
    "JournalError",
    "MaskError",
    "MeerkatError",
    "ModelError",
    "ProtocolError",
    "RecipeError",
    "RunError",
]


class MeerkatError(Exception):
    """Base of all errors that name what was wrong and the way out."""


class RecipeError(MeerkatError):
    """A recipe does not follow its schema."""


class ModelError(MeerkatError):
    """A model, its tokenizer or its fingerprint is not usable."""


class DataError(MeerkatError):
    """Examples, labels, verbalizers, a corpus or a partition are not usable."""


class MaskError(MeerkatError):
    """A mask is damaged or belongs to another model."""


class ProtocolError(MeerkatError):
    """A message between server and client is malformed or out of place."""


class RunError(MeerkatError):
    """A run directory does not allow what was asked."""


class JournalError(MeerkatError):
    """The journal cannot be written or read on; all complete rounds are kept."""


class DivergedError(MeerkatError):
    """The training left the finite numbers."""
