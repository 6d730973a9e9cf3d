"""The zeroth-order step that people write today, for comparison: MeZO's, on all parameters.

What it reproduces: Malladi et al., *Fine-Tuning Language Models with Just Forward Passes*
(NeurIPS 2023, arXiv 2305.17333), Algorithm 1 and its code, princeton-nlp/MeZO
`large_models/trainer.py` (`zo_step`, `zo_perturb_parameters`, `zo_update`, with the noise
regenerated from its seed) and `large_models/utils.py` (`forward_wrap_with_option_len`):

- four dense sweeps over all parameters, +ε, -2ε, +ε and the update; each draws its Gaussian
  noise anew, tensor by tensor, from the seeded global generator;
- one left-padded sequence for each (example, option), in one batch;
- the whole forward pass, with vocabulary-wide logits at every position, in float32 as transformers
  makes them for a loss;
- the mean log-probability of each option's tokens, and cross-entropy over the options.

What differs: the sweeps write in place (`add_`), where the original makes three new tensors for
each parameter, so this one is faster; there is no weight decay, the original's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meerkat.data.encoding import Encoded

__all__ = ["OptionBatch", "option_batch", "option_scores", "reference_step"]


@dataclass(frozen=True)
class OptionBatch:
    """S examples with A options each, as S · A left-padded sequences of L tokens."""

    input_ids: Int64[Tensor, "SA L"]
    attention_mask: Int64[Tensor, "SA L"]
    option: Int64[Tensor, "SA L"]
    """1 at the tokens of the option, which end the sequence."""
    labels: Int64[Tensor, " S"]


def option_batch(
    examples: Sequence[Encoded], device: torch.device | None = None, pad: int = 0
) -> OptionBatch:
    """The prompt of each example with each of its options; all have the same number of options."""
    rows = [(example.prompt, answer) for example in examples for answer in example.answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    shape = (len(rows), longest)
    input_ids = torch.full(shape, pad)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    option = torch.zeros(shape, dtype=torch.int64)
    for row, (prompt, answer) in enumerate(rows):
        begin = longest - len(prompt) - len(answer)
        input_ids[row, begin:] = torch.tensor([*prompt, *answer])
        attention_mask[row, begin:] = 1
        option[row, longest - len(answer) :] = 1
    labels = torch.tensor([example.label for example in examples])
    parts = (input_ids, attention_mask, option, labels)
    return OptionBatch(*(part.to(device) for part in parts))


@torch.inference_mode()
def option_scores(model: nn.Module, batch: OptionBatch) -> Float32[Tensor, "S A"]:
    """Mean log-probability of the tokens of each option."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    log_probabilities = output.logits[:, :-1].float().log_softmax(-1)
    targets, scored = batch.input_ids[:, 1:], batch.option[:, 1:]
    chosen = log_probabilities.gather(-1, targets[:, :, None]).squeeze(-1)
    means = (chosen * scored).sum(1) / scored.sum(1)
    scores: Tensor = means.view(len(batch.labels), -1)
    return scores


def reference_step(
    model: nn.Module, batch: OptionBatch, epsilon: float, learning_rate: float, seed: int
) -> float:
    """One step, in place; the projected gradient (L+ - L-) / 2ε.

    With a learning rate of 0 the weights come back up to the rounding of three additions, which is
    the method's own: the original, too, keeps no copy of them.
    """
    device = batch.input_ids.device
    devices: list[Any] = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # whoever measures keeps its own random numbers
        _perturb(model, seed, epsilon)
        above = _loss(model, batch)
        _perturb(model, seed, -2 * epsilon)
        below = _loss(model, batch)
        _perturb(model, seed, epsilon)
        gradient = (above - below) / (2 * epsilon)
        _perturb(model, seed, -learning_rate * gradient)
    return gradient


@torch.no_grad()
def _perturb(model: nn.Module, seed: int, scale: float) -> None:
    """Each parameter plus `scale` times its noise, the same for the same seed."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        size, device, dtype = parameter.shape, parameter.device, parameter.dtype
        z = torch.normal(0.0, 1.0, size, device=device, dtype=dtype)
        parameter.data.add_(z, alpha=scale)


def _loss(model: nn.Module, batch: OptionBatch) -> float:
    return float(cross_entropy(option_scores(model, batch), batch.labels))
