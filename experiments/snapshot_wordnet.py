"""The snapshot of pairs of WordNet's example sentences: has a word one sense in both?

Writes `src/meerkat/data/snapshots/wordnet.csv.gz` from the files of Debian's package
`wordnet-base`. A word gives at most one pair of the same sense and one of two senses, and no
sentence stands in two pairs; as many pairs are kept of one kind as of the other.

    python experiments/snapshot_wordnet.py
"""

from __future__ import annotations

import gzip
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pandas

from meerkat.data.demo import consistent

WORDNET = Path("/usr/share/wordnet")
TARGET = Path(__file__).parents[1] / "src/meerkat/data/snapshots/wordnet.csv.gz"
KINDS = ("noun", "verb", "adj", "adv")
FEWEST_WORDS = 4
TRIES = 20
"""Pairs of a word that are drawn until one has two sentences that no other pair has."""

Senses = dict[str, list[str]]
"""Example sentences of a word, by the place of the sense in WordNet's file."""
Pair = dict[str, str]


def irregular(kind: str) -> dict[str, set[str]]:
    """Irregular forms of each word: went, gone."""
    forms = defaultdict(set)
    for line in (WORDNET / f"{kind}.exc").read_text("utf-8").splitlines():
        form, *words = line.split()
        for word in words:
            forms[word].add(form)
    return forms


def inflections(word: str, kind: str) -> set[str]:
    """The word and the regular forms that it could have."""
    endings = {"noun": ("s", "es"), "verb": ("s", "es", "ed", "d", "ing"), "adj": ("er", "est")}
    forms = {word} | {word + ending for ending in endings.get(kind, ())}
    if word.endswith("y"):
        forms |= {word[:-1] + "i" + ending for ending in ("es", "ed", "er", "est")}
    if word.endswith("e"):
        forms |= {word[:-1] + ending for ending in ("ing", "er", "est")}
    if kind == "verb":
        forms |= {word + word[-1] + ending for ending in ("ed", "ing")}
    return forms


def examples() -> dict[tuple[str, str], Senses]:
    """Sentences in which a word occurs, by the word and its kind, then by its sense."""
    found: dict[tuple[str, str], Senses] = defaultdict(lambda: defaultdict(list))
    for kind in KINDS:
        forms = irregular(kind)
        for line in (WORDNET / f"data.{kind}").read_text("utf-8").splitlines():
            if line.startswith(" "):
                continue
            head, gloss = line.split(" | ", 1)
            place, _, _, count, *rest = head.split()
            words = {re.sub(r"\(.*\)", "", word).lower() for word in rest[: 2 * int(count, 16) : 2]}
            for sentence in re.findall(r'"([^"]+)"', gloss):
                tokens = re.findall(r"[a-z']+", sentence.lower())
                if len(tokens) < FEWEST_WORDS:
                    continue
                for word in sorted(filter(str.isalpha, words)):
                    if {*tokens} & (inflections(word, kind) | forms[word]):
                        found[word, kind][place].append(sentence.strip())
    return found


def pairs(draw: random.Random) -> Iterator[Pair]:
    """Pairs of each word, those of one sense before those of two; no sentence in two of them."""
    found, used = examples(), set[str]()
    words = sorted(found)
    draw.shuffle(words)

    def take(word: str, candidates: list[list[str]], same: str) -> Iterator[Pair]:
        draw.shuffle(candidates)
        for first, second in candidates:
            if first != second and not used & {first, second}:
                used.update((first, second))
                yield {"word": word, "sentence1": first, "sentence2": second, "same": same}
                return

    for word, kind in words:
        senses = found[word, kind].values()
        several = [sense for sense in senses if len(sense) > 1]
        yield from take(word, [draw.sample(sense, 2) for sense in several * TRIES], "yes")
    for word, kind in words:
        senses = list(found[word, kind].values())
        if len(senses) > 1:
            two = [draw.sample(senses, 2) for _ in range(TRIES)]
            yield from take(word, [[draw.choice(s) for s in pair] for pair in two], "no")


def main() -> None:
    draw = random.Random(0)
    kept = consistent(pairs(draw), "same", ("word", "sentence1", "sentence2"))
    table = pandas.DataFrame(kept)
    # Pairs of two senses, first of the words that also have a pair of one, so that a word alone
    # says little.
    both = set(table[table["same"] == "yes"]["word"])
    table["single"] = ~table["word"].isin(both)
    table = table.sort_values("single", kind="stable").drop(columns="single")
    size = int(table["same"].value_counts().min())
    table = table.groupby("same").head(size)
    order = list(range(len(table)))
    draw.shuffle(order)
    table = table.iloc[order]
    # Without a time in it the same files give the same snapshot.
    TARGET.write_bytes(gzip.compress(table.to_csv(index=False).encode(), 9, mtime=0))
    print(f"{TARGET.name}: {len(table)} rows, {TARGET.stat().st_size} bytes")
    print(table["same"].value_counts().to_dict())
    shared = table.groupby("word")["same"].nunique()
    print(f"{(shared == 2).sum()} words have a pair of each kind, of {len(shared)}")
    print(table.head(8).to_string())


if __name__ == "__main__":
    main()
