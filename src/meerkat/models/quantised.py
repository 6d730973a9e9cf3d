"""Weights in 8 or 4 bits, all but those that move.

What moves keeps its own values, in the type that the model stores: mask, states, fingerprints and
exports are those of the model as it is, and a client may quantise whatever others do. Each pass
makes a weight anew, layer by layer, so a matrix in full is there only while it is multiplied.

With 8 bits a value is an integer times its row's scale, max |w| over 127. With 4 it is the lowest
value of its group, 32 in a row, plus an integer times a fifteenth of the group's range. All of
that is exact IEEE operations, so the quantised weights have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GROUP", "Bits", "QuantisedWeight", "keeps", "quantise"]

Bits: TypeAlias = Literal[8, 4]
GROUP = 32
"""Values of a row that share a scale with 4 bits."""
_ROWS = 8192
"""Rows of a matrix that are made at a time: the LM head has hundreds of thousands."""


class QuantisedWeight(Tensor):
    """A matrix of a linear layer or an embedding, as far as these use it.

    Shape, type and device are those of the matrix that it stands for. What else torch can do with
    a tensor it cannot.
    """

    codes: Tensor
    """int8 (rows, columns), or uint8 with two values a byte."""
    scales: Float[Tensor, "rows groups"]
    lows: Float[Tensor, "rows groups"] | None
    """The lowest value of each group, with 4 bits."""
    bits: Bits
    places: Int64[Tensor, " m"] | None
    """Flat indices of the values that move."""
    moving: Tensor
    """Those, in the type that the model computes in."""

    @staticmethod
    def __new__(
        cls, weight: Tensor, bits: Bits, places: Int64[np.ndarray, " m"] | None
    ) -> QuantisedWeight:
        made: QuantisedWeight = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        made.bits = bits
        made.codes, made.scales, made.lows = _coded(weight, bits)
        where = None if places is None else torch.from_numpy(places).to(weight.device)
        made.places = where
        flat = weight.detach().view(-1)
        made.moving = flat[:0].clone() if where is None else flat[where]
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantisedWeight({tuple(self.shape)}, {self.bits} bits)"

    @property
    def held_bytes(self) -> int:
        """Of all that is kept of the matrix."""
        parts = (self.codes, self.scales, self.lows, self.moving, self.places)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, chosen: slice | Int64[Tensor, " r"]) -> Float[Tensor, "r columns"]:
        """Some rows in full, without what moves in them."""
        lows = None if self.lows is None else self.lows[chosen]
        return _decoded(self.codes[chosen], self.scales[chosen], lows).to(self.dtype)

    def whole(self) -> Float[Tensor, "rows columns"]:
        """The matrix in full, with what moves."""
        made = self.rows(slice(None))
        if self.places is not None:
            made = made.view(-1).index_copy(0, self.places, self.moving).view(self.shape)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        raise NotImplementedError(f"a quantised weight has no {func}")


def quantise(model: nn.Module, bits: Bits, moving: Mapping[str, np.ndarray]) -> None:
    """Quantise the matrices of a model's linear layers and embeddings, in place; a second call does
    nothing.

    Others stay as they are, as do matrices whose rows are no multiple of 32 with 4 bits, those of
    which every value moves, and those outside linear layers, or of the LM head, in which something
    moves.

    Args:
        moving: Flat indices of the values that keep their own value, by the parameter's name.
    """
    homes: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():  # a tied matrix has several
        for name, parameter in module._parameters.items():
            homes.setdefault(id(parameter), []).append((module, name))
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, parameter in list(model.named_parameters()):
        found = homes[id(parameter)]
        if isinstance(parameter, QuantisedWeight) or parameter.ndim != 2:
            continue
        if not all(isinstance(module, nn.Linear | nn.Embedding) for module, _ in found):
            continue
        inner = all(isinstance(module, nn.Linear) and module is not head for module, _ in found)
        if (name in moving and not inner) or (bits == 4 and parameter.shape[1] % GROUP):
            continue
        if name in moving and len(moving[name]) == parameter.numel():
            continue  # it would be kept twice, in full and in few bits
        made = nn.Parameter(
            QuantisedWeight(parameter.detach(), bits, moving.get(name)), requires_grad=False
        )
        stored = getattr(parameter, "stored_dtype", parameter.dtype)
        made.stored_dtype = stored  # type: ignore[attr-defined]
        for module, attribute in found:
            module._parameters[attribute] = made


def keeps(model: nn.Module, moving: Mapping[str, np.ndarray]) -> bool:
    """Is a model quantised around these values, or not at all?"""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QuantisedWeight):
            continue
        places, wanted = parameter.places, moving.get(name)
        if places is None or wanted is None:
            if places is not None or wanted is not None:
                return False
        elif not np.array_equal(places.cpu().numpy(), wanted):
            return False
    return True


def _coded(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and lowest values, some rows at a time."""
    code = _eight if bits == 8 else _four
    codes, scales, lows = zip(*(code(part.float()) for part in weight.split(_ROWS)), strict=True)
    return torch.cat(codes), torch.cat(scales), None if bits == 8 else torch.cat(lows)


def _eight(weight: Tensor) -> tuple[Tensor, Tensor, None]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    return (weight / _nonzero(scales)).round().to(torch.int8), scales, None


def _four(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups = weight.view(len(weight), -1, GROUP)
    lows, highs = groups.aminmax(dim=2)
    scales = (highs - lows) / 15
    whole = ((groups - lows[..., None]) / _nonzero(scales)[..., None]).round()
    codes = whole.clamp(0, 15).to(torch.uint8).view(weight.shape)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales, lows


def _nonzero(scales: Tensor) -> Tensor:
    """Where all values are the same there is nothing to divide by."""
    return torch.where(scales > 0, scales, 1.0)


def _decoded(codes: Tensor, scales: Tensor, lows: Tensor | None) -> Float[Tensor, "rows columns"]:
    if lows is None:
        return codes.float() * scales
    values = torch.stack([codes & 15, codes >> 4], -1).view(*scales.shape, GROUP).float()
    return (values * scales[..., None] + lows[..., None]).flatten(1)


def _linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ. Autograd keeps no matrix of it, but makes it again."""
    if not isinstance(weight, QuantisedWeight):
        return functional.linear(x, weight, bias)
    if weight.places is None and len(weight) > _ROWS:
        found = [_product(x, weight, rows) for rows in _blocks(len(weight))]
        made = torch.cat(found, -1)
    else:
        made = _product(x, weight, None)
    return made if bias is None else made + bias


def _product(x: Tensor, weight: QuantisedWeight, rows: slice | None) -> Tensor:
    def make() -> Tensor:
        return weight.whole() if rows is None else weight.rows(rows)

    matrix = make()
    if not (torch.is_grad_enabled() and x.requires_grad):
        return functional.linear(x, matrix)

    def pack(kept: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (kept.shape, kept.stride()) if kept.data_ptr() == matrix.data_ptr() else kept

    def unpack(kept: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return kept if isinstance(kept, Tensor) else make().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return functional.linear(x, matrix)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, first + _ROWS) for first in range(0, count, _ROWS))


def _embedding(ids: Tensor, weight: Any, *arguments: Any, **others: Any) -> Tensor:
    found = weight.rows(ids.flatten())
    return found.view(*ids.shape, -1)


def _item(weight: Any, rows: Any) -> Tensor:
    return weight.rows(rows)


def _same(weight: Any) -> Any:
    return weight


_HANDLERS: dict[Any, Callable[..., Any]] = {
    functional.linear: _linear,
    functional.embedding: _embedding,
    Tensor.__getitem__: _item,
    Tensor.detach: _same,
}
