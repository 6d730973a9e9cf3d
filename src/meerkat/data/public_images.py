"""Public images for mask and subspace: a folder, image files, IDX files, or the demo's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meerkat.config import MaskSection
from meerkat.data.demo import package_file
from meerkat.data.images import Image, idx_rows, is_idx_folder, opened
from meerkat.errors import DataError
from meerkat.zo.noise import permutation

__all__ = ["public_images"]

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_DEMO = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
"""Photographs and pictures that come with scikit-image, read as data."""
_LEAST_SIDE = 0.25
"""Smallest side of a part, as a share of the image's shorter side."""


def public_images(section: MaskSection, count: int, draw: int, field: str) -> list[Image]:
    """So many images of a corpus, each as a whole; where it has fewer, random square parts.

    Args:
        section: With the corpus, and the seed of the choice.
        draw: A number for what the images are for, so that mask and subspace have their own.
        field: Name of the recipe's field, for errors.

    Raises:
        DataError: The corpus has no image, or one that cannot be read.
    """
    if section.corpus == "demo":
        whole = [opened(package_file("skimage", f"data/{name}", "vision")) for name in _DEMO]
    else:
        whole = _images(section.corpus, field)
    order = permutation(section.seed, (3, draw), len(whole))
    if len(whole) >= count:
        return [whole[place] for place in order[:count]]
    drawn = np.random.Generator(np.random.Philox(key=[section.seed, draw]))
    return [_part(whole[order[place % len(whole)]], drawn) for place in range(count)]


def _images(corpus: str | tuple[str, ...], field: str) -> list[Image]:
    names = (corpus,) if isinstance(corpus, str) else corpus
    found: list[Image] = []
    for name in names:
        path = Path(name).expanduser()
        if is_idx_folder(path):
            found += [row["image"] for row in idx_rows(path, "train")]
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            found += [opened(file) for file in files]
        elif path.is_file():
            found.append(opened(path))
        else:
            raise DataError(
                f"{field}: {name!r} is no file and no folder; for images a corpus is 'demo', image "
                "files, or a folder of images"
            )
    if not found:
        raise DataError(
            f"{field} = {corpus!r} has no image; its files end in {', '.join(_SUFFIXES)}"
        )
    return found


def _part(image: Image, drawn: np.random.Generator) -> Image:
    """A square at a random place, of a random size, mirrored at random."""
    shorter = min(image.pixels.shape[:2])
    side = max(1, round(shorter * drawn.uniform(_LEAST_SIDE, 1.0)))
    top, left = (drawn.integers(length - side + 1) for length in image.pixels.shape[:2])
    part = image.pixels[top : top + side, left : left + side]
    return Image(np.ascontiguousarray(part[:, ::-1] if drawn.random() < 0.5 else part))
