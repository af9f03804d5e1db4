"""Notebooks import, define nothing, and run from top to bottom on the results that ship beside them."""

import ast
import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_defines_nothing(path):
    code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    code = "\n".join(line for line in code.splitlines() if not line.startswith("%"))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert [node for node in ast.walk(ast.parse(code)) if isinstance(node, defined)] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_on_the_shipped_results_and_shows_what_it_keeps(path):
    kept, notebook = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert [_kinds(c) for c in notebook.cells] == [_kinds(c) for c in kept.cells]
    assert any("image/png" in kinds for c in kept.cells for kinds in _kinds(c))


def _kinds(cell):
    """Of each output its formats, or the name of its stream: a warning on stderr is a difference, where a stream is cut is none."""
    kinds = [sorted(o["data"]) if "data" in o else [o.get("name", o.output_type)] for o in cell.get("outputs", [])]
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_keeps_its_outputs_small_and_without_an_error(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert {o.get("name", o.output_type) for c in code for o in c.outputs} <= {
        "stdout",
        "display_data",
        "execute_result",
    }
    assert path.stat().st_size < 600_000
