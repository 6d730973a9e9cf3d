"""Scores → mask, and the other masks."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from meerkat.config import MaskSection
from meerkat.errors import MaskError
from meerkat.spaces.mask_file import Mask
from meerkat.zo.noise import words

__all__ = [
    "decoder_blocks",
    "eligible_parameters",
    "full_mask",
    "largest",
    "magnitude_scores",
    "mask_size",
    "random_mask",
    "still_blocks",
    "top_mask",
    "union",
]


def eligible_parameters(model: nn.Module, section: MaskSection) -> dict[str, nn.Parameter]:
    """Parameters that a mask may choose from (method.md section 2, Eligible tensors).

    By default the weight matrices of the decoder blocks; `include` replaces that. Of parameters in
    decoder blocks those below `first_block` are left out.

    Raises:
        MaskError: A glob matches nothing, the model has no such block, or nothing is left.
    """
    parameters = dict(model.named_parameters())
    for field, globs in (("include", section.include), ("exclude", section.exclude)):
        for glob in globs:
            if not any(fnmatch.fnmatchcase(name, glob) for name in parameters):
                raise MaskError(
                    f"mask.{field}: {glob!r} matches no parameter; names look like "
                    f"{next(reversed(parameters))!r}"
                )
    if section.include:
        chosen = [n for n in parameters if any(fnmatch.fnmatchcase(n, g) for g in section.include)]
    else:
        prefix, _ = decoder_blocks(model)
        chosen = [n for n, p in parameters.items() if n.startswith(prefix) and p.ndim >= 2]
    if section.first_block:
        chosen = _from_block(model, section.first_block, chosen)
    chosen = [n for n in chosen if not any(fnmatch.fnmatchcase(n, g) for g in section.exclude)]
    if not chosen:
        raise MaskError("mask.include and mask.exclude leave no parameter; change one of them")
    return {name: parameters[name] for name in chosen}


def still_blocks(model: nn.Module, moving: Collection[str]) -> list[nn.Module]:
    """The first decoder blocks, in which none of the parameters of these names is.

    None where one of them is outside the blocks: the embeddings, say.
    """
    try:
        prefix, blocks = decoder_blocks(model)
    except MaskError:
        return []
    if not all(name.startswith(prefix) for name in moving):
        return []
    return list(blocks[: min((_block(name, prefix) for name in moving), default=0)])


def _from_block(model: nn.Module, first: int, names: Sequence[str]) -> list[str]:
    """These names, less those of blocks below the first.

    Raises:
        MaskError: The model has no such block.
    """
    prefix, blocks = decoder_blocks(model)
    if first >= len(blocks):
        raise MaskError(
            f"mask.first_block = {first}: the model has decoder blocks 0 to {len(blocks) - 1}"
        )
    return [n for n in names if not n.startswith(prefix) or _block(n, prefix) >= first]


def _block(name: str, prefix: str) -> int:
    return int(name.removeprefix(prefix).split(".", 1)[0])


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's largest list of modules, which is that of its decoder blocks, after its prefix.

    Raises:
        MaskError: It has none.
    """
    lists = {
        f"{name}.": module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise MaskError("the model has no list of decoder blocks; set mask.include")
    return max(lists.items(), key=lambda item: sum(p.numel() for p in item[1].parameters()))


def mask_size(density: float, eligible: int) -> int:
    """n = round(u · d_eligible), at least 1."""
    return max(1, round(density * eligible))


def top_mask(
    scores: Mapping[str, Tensor], section: MaskSection, model: str, kind: str | None = None
) -> Mask:
    """The n largest scores, over all tensors or the top share inside each.

    Ties go to the earlier coordinate, so that a mask is the same everywhere. Scores are never
    concatenated: the peak is one tensor's copy beside them.

    Args:
        scores: One finite score for each eligible parameter, in the model's order.

    Raises:
        MaskError: A score is not finite.
    """
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise MaskError(f"a score of {name} is not finite; use model.dtype = 'float32'")
    if section.scope == "tensor":
        indices = [
            _top([score], mask_size(section.density, score.numel()))[0] for score in scores.values()
        ]
    else:
        eligible = sum(score.numel() for score in scores.values())
        indices = _top(list(scores.values()), mask_size(section.density, eligible))
    return _mask(scores, indices, model, kind or section.kind)


def _top(scores: Sequence[Tensor], n: int) -> list[np.ndarray]:
    """Flat indices of the n largest over several tensors, for each tensor."""
    best = largest(scores, n)
    threshold = best[-1].item()
    ties = n - int((best > threshold).sum())
    chosen = []
    for score in scores:
        flat = score.flatten()
        equal = torch.nonzero(flat == threshold).squeeze(1)[:ties]
        ties -= len(equal)
        above = torch.nonzero(flat > threshold).squeeze(1)
        chosen.append(torch.cat([above, equal]).sort().values.cpu().numpy())
    return chosen


def largest(tensors: Iterable[Tensor], n: int) -> Float[Tensor, " m"]:
    """The n largest values over all tensors, descending; all of them where there are fewer.

    After the first tensors only values that are large enough to count are sorted.
    """
    best = torch.empty(0)
    for tensor in tensors:
        values = tensor.flatten()
        if len(best) == n:
            values = values[values > best[-1].item()]
        merged = torch.cat([best, values.topk(min(n, len(values))).values.cpu()])
        best = merged.topk(min(n, len(merged))).values
    return best


def magnitude_scores(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight magnitude, the baseline of method.md section 7."""
    return {name: parameter.detach().float().abs() for name, parameter in parameters.items()}


def random_mask(parameters: Mapping[str, Tensor], section: MaskSection, model: str) -> Mask:
    """n coordinates uniformly at random, the same ones on every machine."""
    eligible = sum(parameter.numel() for parameter in parameters.values())
    n = mask_size(section.density, eligible)
    if n == eligible:
        return full_mask(parameters, model)
    # Distinct draws from range(d): repeats are dropped and drawn anew until there are enough, of
    # those that are in, or where these are more than half, of those that are not.
    wanted = min(n, eligible - n)
    drawn, start = np.empty(0, np.int64), 0
    while len(drawn) < wanted:
        count = wanted - len(drawn)
        raw = words(section.seed, [0, 0, 2 << 32], count, start)
        places = (raw % np.uint64(eligible)).astype(np.int64)
        both = np.concatenate([drawn, places])
        drawn = both[np.sort(np.unique(both, return_index=True)[1])]
        start += count
    places = np.sort(drawn)
    if wanted < n:
        places = np.delete(np.arange(eligible), places)
    ends = np.cumsum([parameter.numel() for parameter in parameters.values()])
    begins = ends - [parameter.numel() for parameter in parameters.values()]
    parts = np.split(places, np.searchsorted(places, ends[:-1]))
    return _mask(parameters, [p - b for p, b in zip(parts, begins, strict=True)], model, "random")


def full_mask(parameters: Mapping[str, Tensor], model: str) -> Mask:
    """Every eligible parameter (Full-FedZO)."""
    indices = [np.arange(parameter.numel()) for parameter in parameters.values()]
    return _mask(parameters, indices, model, "full")


def union(masks: Sequence[Mask], parameters: Mapping[str, Tensor]) -> Mask:
    """Coordinates that are in any of several masks chosen from the same parameters."""
    merged: dict[str, np.ndarray] = {name: np.empty(0, np.int64) for name in parameters}
    for mask in masks:
        for name, indices in zip(mask.names, mask.indices, strict=True):
            merged[name] = np.union1d(merged[name], indices)
    return _mask(parameters, list(merged.values()), masks[0].model, "union")


def _mask(
    tensors: Mapping[str, Tensor], indices: Sequence[np.ndarray], model: str, kind: str
) -> Mask:
    kept = [
        (name, tuple(tensor.shape), np.ascontiguousarray(chosen, dtype=np.int64))
        for (name, tensor), chosen in zip(tensors.items(), indices, strict=True)
        if len(chosen)
    ]
    names, shapes, arrays = zip(*kept, strict=True)
    eligible = sum(tensor.numel() for tensor in tensors.values())
    return Mask(names, shapes, arrays, eligible, model, kind)
