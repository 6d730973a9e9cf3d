"""Gradients of many examples at the masked coordinates, by one backward pass for a batch.

The gradient of a weight matrix is Σ_t δ_t x_tᵀ over the tokens t: gradient of its output times its
input. Here these products are formed at the masked coordinates alone, and added up over the tokens
of each example by itself: no gradient of a weight is made, only those of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor, nn

from meerkat.data.packing import PackedBatch
from meerkat.spaces.mask_file import Mask

__all__ = ["example_gradients", "has_example_gradients", "summed_gradient"]


def has_example_gradients(model: nn.Module, mask: Mask) -> bool:
    """Is each masked parameter the weight of one linear layer, and of nothing else?

    The LM head does not count: a pass multiplies some of its rows only.
    """
    homes, head = _homes(model), model.get_output_embeddings()  # type: ignore[operator]
    if head is None:  # no language model: rows of a batch are not tokens
        return False
    linears = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head
    }
    parameters = dict(model.named_parameters())
    return all(
        name.endswith(".weight")
        and name.removesuffix(".weight") in linears
        and homes[id(parameters[name])] == 1
        for name in mask.names
    )


def example_gradients(
    model: nn.Module,
    mask: Mask,
    batches: Iterable[PackedBatch],
    target: Callable[[PackedBatch], Float32[Tensor, " S"]],
) -> Iterator[Float32[np.ndarray, "S n"]]:
    """∇ target of each example, batch by batch; for a mask that `has_example_gradients`.

    Memory is that of a batch's activations and of S × n values.

    Args:
        target: A batch → one number an example, with its graph; an example's own tokens alone may
            decide it.
    """
    gathering = _Gathering(mask)
    with gathering.over(model), torch.enable_grad():
        for batch in batches:
            gathering.start(batch)
            target(batch).sum().backward()
            yield gathering.found.numpy()


def summed_gradient(
    model: nn.Module,
    mask: Mask,
    parts: Iterable[Tensor],
    target: Callable[[Tensor], Tensor],
) -> Float64[np.ndarray, " n"]:
    """∇ Σ target(part) at the masked coordinates, part by part, added up in float64.

    Args:
        parts: Tensors with their graph, each made when it is asked for, freed before the next.
        target: A part → one number.
    """
    gathering, total = _Gathering(mask), np.zeros(mask.size)
    with gathering.over(model), torch.enable_grad():
        gathering.start(None)
        for part in parts:
            target(part).backward()
            total += gathering.found[0].double().numpy()
            gathering.start(None)
    return total


class _Gathering:
    """Hooks on linear layers that add products up while a backward pass runs."""

    def __init__(self, mask: Mask):
        self._mask = mask
        self._rows: Int64[Tensor, " T"] | None = None
        self.found: Float32[Tensor, "S n"] = torch.empty(0)

    def start(self, batch: PackedBatch | None) -> None:
        """Begin with sums of zero: for each example of a batch, or one for all tokens."""
        self._rows = None
        if batch is not None:
            self._rows = batch.layout.scatter // batch.layout.gather.shape[1]
        self.found = torch.zeros(1 if batch is None else batch.examples, self._mask.size)

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Hook the masked layers; the model's parameters need no gradient meanwhile."""
        modules, begin, handles = dict(model.named_modules()), 0, []
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            # Without a gradient of any weight, the graph begins at the embedded tokens.
            handles.append(embeddings.register_forward_hook(_begin_graph))
            for name, shape, places in zip(
                self._mask.names, self._mask.shapes, self._mask.indices, strict=True
            ):
                module = modules[name.removesuffix(".weight")]
                device = module.weight.device
                outputs, inputs = (
                    torch.from_numpy(part).to(device) for part in np.divmod(places, shape[1])
                )
                hook = partial(self._after_forward, outputs, inputs, begin)
                handles.append(module.register_forward_hook(hook))
                begin += len(places)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in wanted:
                parameter.requires_grad_(True)

    def _after_forward(
        self,
        outputs: Int64[Tensor, " m"],
        inputs: Int64[Tensor, " m"],
        begin: int,
        module: nn.Module,
        arguments: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        if not output.requires_grad:  # a pass without a graph, of a block that is computed again
            return
        x = arguments[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            delta = gradient.flatten(0, -2)
            products = x.index_select(1, inputs).float()
            products *= delta.index_select(1, outputs)
            if self._rows is None:
                sums = products.sum(0, keepdim=True)
            else:
                sums = products.new_zeros(len(self.found), len(inputs))
                sums.index_add_(0, self._rows.to(x.device), products)
            self.found[:, begin : begin + len(inputs)] += sums.cpu()

        output.register_hook(add)


def _begin_graph(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    output.requires_grad_()


def _homes(model: nn.Module) -> dict[int, int]:
    """In how many places of the model each parameter is used."""
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found
