"""What a task's examples are, texts or images: all that a run does differently for them."""

from meerkat.runs.modalities.base import ExampleEncoder, Modality, ModelObjective
from meerkat.runs.modalities.images import Images
from meerkat.runs.modalities.texts import Texts
from meerkat.tasks import Task

__all__ = ["ExampleEncoder", "Modality", "ModelObjective", "modality_of"]


def modality_of(task: Task) -> Modality:
    """That of a task's examples."""
    return Texts() if task.image is None else Images()
