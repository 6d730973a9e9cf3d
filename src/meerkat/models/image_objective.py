"""Images → one loss an example, over the classes of the network that stand for the labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor
from torch.nn.functional import cross_entropy

from meerkat.data.images import EncodedImage
from meerkat.models.image_loading import LoadedImageModel
from meerkat.tasks.objective import Predictions

__all__ = ["DrawnBatch", "ImageObjective"]

_PER_PASS = 32
"""Most images of one pass."""

DrawnBatch = tuple[Sequence[EncodedImage], Float64[np.ndarray, " S"]]
"""Public images, and for each a number in [0, 1) by which its class is drawn."""


class ImageObjective:
    """The `Objective` of a task over images: cross-entropy over the answers' logits.

    Normalisation by batches has fixed statistics, so an example's loss is its own.
    """

    prefix = None
    """Nothing of a pass is kept."""

    def __init__(self, loaded: LoadedImageModel):
        self.model = loaded.model
        parameter = next(self.model.parameters())
        self.device, self._dtype = parameter.device, parameter.dtype
        mean, std = loaded.preparation.mean, loaded.preparation.std
        self._mean = 255 * torch.tensor(mean, device=self.device)[:, None, None]
        self._std = 255 * torch.tensor(std, device=self.device)[:, None, None]

    @torch.inference_mode()
    def losses(self, examples: Sequence[EncodedImage]) -> Float64[np.ndarray, " S"]:
        """The loss of each example at the weights as they are."""
        found = [_losses(self.scores(some), some).cpu() for some in _passes(examples)]
        return torch.cat(found).double().numpy()

    def losses_with_graph(
        self, examples: Sequence[EncodedImage]
    ) -> Iterator[Float32[Tensor, " s"]]:
        """The losses of some examples after the other, computed one by one."""
        for some in _passes(examples):
            yield _losses(self.scores(some), some)

    usual_losses_with_graph = losses_with_graph

    @torch.inference_mode()
    def predict(self, examples: Sequence[EncodedImage]) -> Predictions:
        """Losses, and the answer with the highest score of each example."""
        scores = [self.scores(some) for some in _passes(examples)]
        losses = [_losses(found, s) for found, s in zip(scores, _passes(examples), strict=True)]
        return Predictions(
            losses=torch.cat(losses).double().cpu().numpy(),
            labels=np.array([example.label for example in examples], np.int64),
            predicted=torch.cat(scores).argmax(1).cpu().numpy(),
            classes=len(examples[0].answers),
        )

    @torch.inference_mode()
    def scores_of(self, examples: Sequence[EncodedImage]) -> Float64[Tensor, "S A"]:
        """Score of each answer of any number of examples, at the weights as they are."""
        return torch.cat([self.scores(some) for some in _passes(examples)]).double()

    def pretraining_loss(self, batch: DrawnBatch) -> Float32[Tensor, ""]:
        """The loss that the mask is calibrated by, with its graph (docs/vision.md).

        Cross-entropy over all classes of the network, to classes that it draws itself.
        """
        images, drawn = batch
        logits = self._logits(images)
        shares = logits.detach().double().softmax(1).cumsum(1).cpu().numpy()
        classes = [np.searchsorted(row, u * row[-1]) for row, u in zip(shares, drawn, strict=True)]
        targets = torch.tensor(np.array(classes, np.int64), device=self.device)
        return cross_entropy(logits, targets)

    def scores(self, examples: Sequence[EncodedImage]) -> Float32[Tensor, "S A"]:
        """Logit of each answer's class, in one pass."""
        return self._logits(examples)[:, list(examples[0].answers)]

    def _logits(self, examples: Sequence[EncodedImage]) -> Float32[Tensor, "S classes"]:
        pixels = np.stack([np.broadcast_to(e.pixels, (3, *e.pixels.shape[1:])) for e in examples])
        values = torch.from_numpy(pixels).to(self.device, torch.float32)
        values = (values - self._mean) / self._std
        return self.model(pixel_values=values.to(self._dtype)).logits.float()


def _passes(examples: Sequence[EncodedImage]) -> Iterator[Sequence[EncodedImage]]:
    for begin in range(0, len(examples), _PER_PASS):
        yield examples[begin : begin + _PER_PASS]


def _losses(
    scores: Float32[Tensor, "S A"], examples: Sequence[EncodedImage]
) -> Float32[Tensor, " S"]:
    labels = torch.tensor([example.label for example in examples], device=scores.device)
    return cross_entropy(scores, labels, reduction="none")
