"""Each notebook's two files agree, and it opens where the project is."""

import pathlib
import tomllib

import jupytext
import pytest

FOLDER = pathlib.Path(__file__).parent
PROJECT = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_and_its_text_agree(path):
    pair = [jupytext.read(file) for file in (path, path.with_suffix(".md"))]
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in pair]
    assert cells[0] == cells[1], "run `jupytext --sync notebooks/*.ipynb`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_names_the_repository(path):
    text = path.with_suffix(".md").read_text()
    repository = PROJECT["urls"]["Repository"]
    colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"{colab}/blob/main/notebooks/{path.name}" in text
    assert f"git+{repository}" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    assert path.stat().st_size < 800_000
