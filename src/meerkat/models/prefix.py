"""What the decoder blocks that never move make of a packed batch, kept from pass to pass.

The blocks below the lowest one with a masked coordinate give an example the same activations
throughout a run. They are computed once for a packed batch, by the same passes over the same
numbers as without this module, so losses keep their bits; where the forward pass is compiled these
blocks are not, and losses differ by rounding. Kept in memory, then on disk, and computed again
where neither has room.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch, pack
from meerkat.errors import ModelError
from meerkat.models import attention

__all__ = ["KeptActivations", "Prefix"]

Hidden = Float[Tensor, "1 T width"]


class Prefix:
    """The blocks of a model that never move, and what they gave so far.

    Args:
        model: Attends with `attention.packed_attention`.
        name: What the recipe calls it, for errors.
        blocks: The decoder blocks that never move, from the first one on; at least one.
        kept: Where activations are kept.

    Raises:
        ModelError: The blocks hand on more than one tensor of activations.
    """

    def __init__(
        self, model: nn.Module, name: str, blocks: Sequence[nn.Module], kept: KeptActivations
    ):
        self._model, self._blocks, self.kept = model, tuple(blocks), kept
        self._hidden: Hidden | None = None
        self._in_tuple = False
        # Bound once: compiled code is guarded by the identity of what it calls.
        self._pass_on: Any = self._give
        self._check(name)

    @property
    def depth(self) -> int:
        """How many blocks are left out of a pass."""
        return len(self._blocks)

    @contextmanager
    def skipped(self, batch: PackedBatch, copies: int = 1) -> Iterator[None]:
        """The model goes on from the kept activations of so many copies of a batch."""
        key = _key(batch)
        hidden = self.kept.get(key, batch.input_ids.device)
        if hidden is None:
            hidden = self._compute(batch)
            self.kept.put(key, hidden)
        if copies > 1:
            hidden = hidden.repeat(1, copies, 1)
        # A leaf of its own: where gradients are asked for, the graph begins here.
        self._hidden = hidden.detach().requires_grad_() if torch.is_grad_enabled() else hidden
        for block in self._blocks:
            block.forward = self._pass_on
        try:
            yield
        finally:
            for block in self._blocks:
                del block.forward
            self._hidden = None

    def _give(self, *arguments: Any, **others: Any) -> Any:
        """In place of a block's `forward`."""
        return (self._hidden,) if self._in_tuple else self._hidden

    def _compute(self, batch: PackedBatch) -> Hidden:
        """The activations after the last of the blocks, by a pass that ends there."""
        handle = self._blocks[-1].register_forward_hook(self._stop)
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                attention.packed_logits(self._model, batch)
        except _ReachedError as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("the model does not run its blocks")

    def _stop(self, module: nn.Module, arguments: Any, output: Any) -> NoReturn:
        self._in_tuple = isinstance(output, tuple)
        raise _ReachedError(output[0] if self._in_tuple else output)

    @torch.inference_mode()
    def _check(self, name: str) -> None:
        """Are the blocks all that comes between the tokens and the next block?

        Raises:
            ModelError: Logits change where they are left out.
        """
        device = next(self._model.parameters()).device
        texts = ([(41 * number + place) % 97 for place in range(7)] for number in (1, 2))
        batch = pack([Encoded(tuple(text), ((5,), (6,)), 0) for text in texts]).to(device)
        with torch.compiler.set_stance("force_eager"):
            expected = attention.packed_logits(self._model, batch)
            same = True
            try:
                for _ in range(2):  # after a pass over the blocks, and without
                    with self.skipped(batch):
                        found = attention.packed_logits(self._model, batch)
                    same = same and torch.equal(found, expected)
            except Exception as error:  # of any type: it comes from the code of the architecture
                raise ModelError(_refusal(name, str(error) or type(error).__name__)) from None
        self.kept.clear()
        if not same:
            raise ModelError(_refusal(name, "logits change where blocks are left out"))


class _ReachedError(Exception):
    """Ends a pass after the last of the blocks."""

    def __init__(self, hidden: Hidden):
        self.hidden = hidden


def _refusal(name: str, reason: str) -> str:
    line = reason.splitlines()[0]
    return f"runtime.prefix_cache does not go with model.name = {name!r} ({line}); set it to 0"


def _key(batch: PackedBatch) -> bytes:
    """Of what decides on the activations: tokens, layout, and which kernels are used."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (batch.input_ids, batch.position_ids, *batch.layout):
        if part is not None:
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(part.cpu().numpy().tobytes())
    # Attention has another kernel where a forward derivative is asked for, and a tensor made in
    # inference mode is no part of a graph.
    modes = (torch.backends.cuda.flash_sdp_enabled(), torch.is_inference_mode_enabled())
    digest.update(repr(modes).encode())
    return digest.digest()


@dataclass
class KeptActivations:
    """Tensors by key, the last used ones in memory, others on disk, within two budgets.

    A tensor that neither has room for is dropped. The folder on disk goes with this object.
    """

    memory: int
    """Bytes."""
    disk: int = 0
    """Bytes."""
    parent: Path | None = None
    """Where the folder is made; the system's place for such files by default."""
    computed: int = 0
    """How many tensors had to be made."""
    found: int = 0
    """How many were asked for and there."""
    in_memory: int = 0
    on_disk: int = 0
    _tensors: OrderedDict[bytes, Tensor] = field(default_factory=OrderedDict, repr=False)
    _files: OrderedDict[bytes, _File] = field(default_factory=OrderedDict, repr=False)
    _folder: Path | None = field(default=None, repr=False)

    @property
    def room(self) -> bool:
        """Can anything be kept at all?"""
        return bool(self.memory or self.disk)

    @property
    def described(self) -> str:
        """How much is kept, and how many of the passes over the blocks that made unnecessary."""
        parts = [f"{self.in_memory / 1e6:.0f} MB"]
        if self.on_disk:
            parts.append(f"{self.on_disk / 1e6:.0f} MB on disk")
        asked = self.computed + self.found
        return f"{' and '.join(parts)} ({self.found:,} of {asked:,} passes saved)"

    def get(self, key: bytes, device: torch.device) -> Tensor | None:
        """What was kept under a key."""
        held = self._tensors.get(key)
        if held is not None:
            self._tensors.move_to_end(key)
        elif key in self._files:
            self._files.move_to_end(key)
            held = self._files[key].read().to(device)
        if held is not None:
            self.found += 1
        return held

    def put(self, key: bytes, tensor: Tensor) -> None:
        """Keep a tensor, at the expense of those that were not used for longest."""
        self.computed += 1
        if tensor.nbytes > self.memory:
            self._to_disk(key, tensor)
            return
        self._tensors[key] = tensor
        self.in_memory += tensor.nbytes
        while self.in_memory > self.memory:
            oldest, dropped = self._tensors.popitem(last=False)
            self.in_memory -= dropped.nbytes
            self._to_disk(oldest, dropped)

    def clear(self) -> None:
        """Forget everything, and that it was asked for."""
        self._tensors.clear()
        for file in self._files.values():
            file.path.unlink(missing_ok=True)
        self._files.clear()
        self.computed = self.found = self.in_memory = self.on_disk = 0

    def _to_disk(self, key: bytes, tensor: Tensor) -> None:
        if key in self._files or tensor.nbytes > self.disk:
            return
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="prefix-", dir=self.parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        while self.on_disk + tensor.nbytes > self.disk:
            _, dropped = self._files.popitem(last=False)
            self.on_disk -= dropped.size
            dropped.path.unlink(missing_ok=True)
        file = _File(self._folder / key.hex(), tensor.shape, tensor.dtype, tensor.nbytes)
        file.write(tensor)
        self._files[key] = file
        self.on_disk += file.size


@dataclass(frozen=True)
class _File:
    path: Path
    shape: torch.Size
    dtype: torch.dtype
    size: int

    def write(self, tensor: Tensor) -> None:
        bits = tensor.detach().cpu().contiguous().view(torch.uint8)
        bits.numpy().tofile(self.path)

    def read(self) -> Tensor:
        """The bits of the file, mapped: pages are read when they are used."""
        bits = np.memmap(self.path, np.uint8, mode="c")
        return torch.from_numpy(bits).view(self.dtype).view(self.shape)
