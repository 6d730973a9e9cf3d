"""The snapshot of Debian's package index: short descriptions, their sections, who maintains them.

Writes `src/meerkat/data/snapshots/debian.csv.gz` from what `apt-cache dumpavail` says on a Debian
machine (after `apt-get update`). Eight sections whose name says what a package is for, at most 500
rows of each. One row of each description without its end ("game of war (data files)", "game of
war - server"), and few of each source, so that what hardly differs does not stand on both sides of
a split. Teams keep their name; a person gets a number, and no address is kept.

    python experiments/snapshot_debian.py
"""

from __future__ import annotations

import gzip
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas

from meerkat.data.demo import consistent

TARGET = Path(__file__).parents[1] / "src/meerkat/data/snapshots/debian.csv.gz"
SECTIONS = ("fonts", "games", "graphics", "mail", "math", "science", "sound", "web")
OF_EACH = 500
OF_A_SOURCE = 8
EMPTY = re.compile("transitional|dummy|meta-?package|debug", re.IGNORECASE)
TEAM = re.compile(
    r"\b(teams?|groups?|maint(ainers?)?|project|force|packag(ers?|ing)|developers|debian)\b",
    re.IGNORECASE,
)


def packages() -> Iterator[dict[str, str]]:
    """The fields of each package that fit on one line."""
    command = ["apt-cache", "dumpavail"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for paragraph in listing.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith(" ")]
        yield dict(line.split(": ", 1) for line in lines if ": " in line)


def stem(description: str) -> str:
    """A description without its end: what packages of one source share."""
    before_bracket = re.sub(r"\s*[(\[].*$", "", description)
    return re.split(r"\s*[-–—:,]\s+", before_bracket)[0]


def rows() -> Iterator[dict[str, str]]:
    """Rows of the eight sections, by the package's name."""
    people: dict[str, str] = {}
    for fields in sorted(packages(), key=lambda fields: fields.get("Package", "")):
        text = fields.get("Description", "").strip()
        if fields.get("Section") not in SECTIONS or not text or EMPTY.search(text):
            continue
        name = fields["Maintainer"].split("<")[0].strip(' "')
        if "(" in name or not TEAM.search(name):
            name = people.setdefault(name, f"person {len(people) + 1}")
        yield {
            "text": text,
            "section": fields["Section"],
            "maintainer": name,
            "package": fields["Package"],
            "stem": stem(text) or text,
            "source": fields.get("Source", fields["Package"]).split()[0],
        }


def shuffled(table: pandas.DataFrame, draw: random.Random) -> pandas.DataFrame:
    return table.iloc[draw.sample(range(len(table)), len(table))]


def main() -> None:
    table = pandas.DataFrame(consistent(rows(), "section", ("stem",)))
    table = table.groupby("source").head(OF_A_SOURCE).drop(columns=["source", "stem"])
    draw = random.Random(0)
    table = shuffled(table, draw).groupby("section").head(OF_EACH)
    # The rows that were left out were the last of their sections.
    table = shuffled(table, draw)
    # Without a time in it the same index gives the same file.
    TARGET.write_bytes(gzip.compress(table.to_csv(index=False).encode(), 9, mtime=0))
    print(f"{TARGET.name}: {len(table)} rows, {TARGET.stat().st_size} bytes")
    print(Counter(table["section"]).most_common())
    print(Counter(table["maintainer"]).most_common(12))


if __name__ == "__main__":
    main()
