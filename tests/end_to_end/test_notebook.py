"""docs/notebook.ipynb runs from top to bottom, and its last lines show what they promise."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("nilearn")

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs_from_top_to_bottom(tmp_path, nnunet_folders, monkeypatch):
    monkeypatch.setenv("NNSSL_ADAPT_DEMO", str(tmp_path / "demo"))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells), "the notebook is kept without outputs"
    sources = ["".join(cell["source"]) for cell in cells]
    assert "EPOCHS, STEPS = 8, 15" in sources[0]
    sources[0] = sources[0].replace("EPOCHS, STEPS = 8, 15", "EPOCHS, STEPS = 2, 1")
    names: dict[str, object] = {}
    shown = [run_cell(source, names) for source in sources]
    rich = [type(value).__name__ for value in shown if value is not None]
    interactive = "NiiVue" if importlib.util.find_spec("ipyniivue") else "ShownFigure"
    assert rich == ["PosixPath", "ShownFigure", "TransferReport", "ShownFigure", interactive, "Report"]
    assert "data:image/png" in names["report"]._repr_html_()
    assert names["report"].coverage == 1
    assert (names["model"].path / "report.html").read_text(encoding="utf-8") == shown[-1].html
    assert shown[-1]._repr_html_().startswith("<iframe srcdoc=")


def run_cell(source: str, names: dict[str, object]) -> object:
    """Run a cell; return the value of its last line, which a notebook would show."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)
