"""Images as examples: from IDX files, from what `datasets` reads, and prepared for a network."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from meerkat.errors import DataError
from meerkat.extras import needed_extra
from meerkat.tasks import Example, Task

__all__ = [
    "EncodedImage",
    "Image",
    "ImageEncoder",
    "as_png",
    "idx_rows",
    "image_of",
    "is_idx_folder",
    "opened",
    "prepared",
]

_IDX_BYTES = 8
"""The code of unsigned bytes in the header of an IDX file."""
_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}


@dataclass(frozen=True, eq=False)
class Image:
    """An image as an example's field; as text it is the digest of its pixels."""

    pixels: UInt8[np.ndarray, "height width *rgb"]
    """(height, width) where it is grey, else (height, width, 3)."""

    def __str__(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()


def image_of(value: Any, where: str) -> Image:
    """A value of an image column: of PIL, as `datasets` stores it, or from an IDX file.

    Raises:
        DataError: It is no image.
    """
    with needed_extra("vision"):
        import PIL.Image
    if isinstance(value, Image):
        return value
    try:
        if isinstance(value, Mapping):  # `datasets.Image` in a Parquet file
            value = io.BytesIO(value["bytes"]) if value.get("bytes") else Path(value["path"])
            with PIL.Image.open(value) as found:
                found.load()
            value = found
        if isinstance(value, PIL.Image.Image):
            if value.mode.startswith("I;16"):
                return Image((np.asarray(value) >> 8).astype(np.uint8))
            return Image(np.asarray(value.convert("L" if value.mode in ("1", "L") else "RGB")))
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{where}: the image cannot be read: {reason}") from None
    raise DataError(
        f"{where}: {type(value).__name__} is no image; give a folder of images by class, IDX "
        "files, or Parquet with a column of images as `datasets` writes it"
    )


def opened(path: Path) -> Image:
    """An image file.

    Raises:
        DataError: It cannot be read.
    """
    return image_of({"path": str(path)}, str(path))


def as_png(image: Image) -> bytes:
    """The same pixels as a PNG file."""
    with needed_extra("vision"):
        import PIL.Image
    buffer = io.BytesIO()
    PIL.Image.fromarray(image.pixels).save(buffer, "png")
    return buffer.getvalue()


def prepared(image: Image, size: int) -> UInt8[np.ndarray, "c size size"]:
    """The largest square in its middle, scaled to a side of `size` pixels; c is 1 or 3.

    Pillow scales by integer arithmetic, so the bits are the same on every machine.
    """
    with needed_extra("vision"):
        import PIL.Image
    side = min(image.pixels.shape[:2])
    top, left = ((length - side) // 2 for length in image.pixels.shape[:2])
    middle = np.ascontiguousarray(image.pixels[top : top + side, left : left + side])
    found = PIL.Image.fromarray(middle).resize((size, size), PIL.Image.Resampling.BILINEAR)
    pixels = np.asarray(found)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One example: pixels, and the network's classes that stand for the labels."""

    pixels: UInt8[np.ndarray, "c size size"]
    answers: tuple[int, ...]
    """A class of the network for each label."""
    label: int


class ImageEncoder:
    """Prepares the examples of a task for one network.

    Args:
        size: Pixels of a side.
        classes: Names of the network's classes, in their order.

    Raises:
        DataError: A verbalizer is none of the classes, or two are the same.
    """

    def __init__(self, task: Task, size: int, classes: Sequence[str]):
        self.max_length = size
        """Pixels of a side."""
        self._column = str(task.image)
        self._answers = tuple(_class_of(word, classes) for word in task.verbalizers)
        for place, answer in enumerate(self._answers):
            if answer in self._answers[:place]:
                raise DataError(
                    f"task.verbalizers: {task.verbalizers[place]!r} is the class {answer} of the "
                    "network, which another label has already; choose different ones"
                )

    def encode(self, example: Example) -> EncodedImage:
        """An example as the network takes it."""
        image: Image = example.fields[self._column]
        return EncodedImage(prepared(image, self.max_length), self._answers, example.label)


def _class_of(word: str, classes: Sequence[str]) -> int:
    """The class of this number, name, or name among several that commas separate."""
    if word.isdecimal():
        found = [int(word)] if int(word) < len(classes) else []
    else:
        found = [
            index
            for index, name in enumerate(classes)
            if word in (name, *(part.strip() for part in name.split(",")))
        ]
    if len(found) != 1:
        what = "stands for several classes" if found else "is no class"
        raise DataError(
            f"task.verbalizers: {word!r} {what} of the network; give the name or the number of one "
            f"of its {len(classes)} classes, such as {classes[0]!r} or '0'"
        )
    return found[0]


def is_idx_folder(folder: Path) -> bool:
    """Are there IDX files of training images in a folder?"""
    return any(folder.glob("train-images*ubyte*"))


def idx_rows(folder: Path, split: str) -> Iterator[Mapping[str, Any]]:
    """Rows of `image` and `label` from a pair of IDX files, plain or gzipped.

    Files are named as those of MNIST: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte.gz`.

    Raises:
        DataError: There is no such split, or a file is missing, damaged or of another kind.
    """
    if split not in _PREFIXES:
        raise DataError(
            f"task.source = {str(folder)!r} holds IDX files, whose splits are train and test, not "
            f"{split!r}"
        )
    images = _read_idx(_idx_file(folder, split, "images"), 3)
    labels = _read_idx(_idx_file(folder, split, "labels"), 1)
    if len(images) != len(labels):
        raise DataError(
            f"task.source = {str(folder)!r}: {len(images)} images and {len(labels)} labels of the "
            f"split {split!r}; these files do not belong together"
        )
    for pixels, label in zip(images, labels.tolist(), strict=True):
        yield {"image": Image(pixels), "label": label}


def _idx_file(folder: Path, split: str, what: str) -> Path:
    found = [p for prefix in _PREFIXES[split] for p in folder.glob(f"{prefix}-{what}*ubyte*")]
    if len(found) != 1:
        count = "several IDX files" if found else "no IDX file"
        raise DataError(
            f"task.source = {str(folder)!r}: {count} of {split} {what}; it needs one, such as "
            f"{_PREFIXES[split][0]}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"
        )
    return found[0]


def _read_idx(path: Path, dimensions: int) -> UInt8[np.ndarray, ...]:
    """An IDX file of bytes: two zeros, a type, the number of dimensions, their lengths, values."""
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if content[:4] != bytes((0, 0, _IDX_BYTES, dimensions)):
        raise DataError(
            f"{path} is no IDX file of bytes in {dimensions} dimensions: it begins with "
            f"{content[:4].hex()}"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise DataError(f"{path} is damaged: it ends within its header")
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path} is damaged: {len(content) - start} values after the header, which says "
            f"{' × '.join(map(str, shape))}"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
