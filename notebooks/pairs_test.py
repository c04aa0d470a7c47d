"""Each notebook's two files agree, it opens where the project is, and runs to what it shows."""

import pathlib
import re
import tomllib

import jupytext
import nbclient
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
def test_the_code_of_figures_is_folded(path):
    """In Colab by its own tag, in Jupyter by Jupyter's, and by the title on the site."""
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "code" and "plt.show()" in cell.source:
            assert cell.source.startswith("# @title Figure: ")
            assert cell.metadata.get("cellView") == "form"
            assert cell.metadata.get("jupyter") == {"source_hidden": True}


def test_figures_of_an_accelerator_are_those_of_the_readme():
    """Notebook 03 draws the committed figures without the repository at hand."""
    readme = (FOLDER.parent / "README.md").read_text()
    rows = re.findall(r"^\|.*\|$", (FOLDER / "03_jitted_decoding.md").read_text(), re.MULTILINE)
    assert len(rows) == 8
    assert not [row for row in rows if row not in readme]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_small(path):
    cells = [cell for cell in jupytext.read(path).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [one for one in outputs if one.get("name") == "stderr"], "progress bars, warnings"
    assert path.stat().st_size < 800_000


# Outputs that are this machine's own: as a whole (or this Python's), or their numbers.
OWN = re.compile(r"^jax [\d.]+ on|^Measured on this device|of text, for example")
TIMES = re.compile(r"GFLOP/s|tokens/s")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def shown(cell):
    """What a cell prints or displays as text, without progress bars, figures and white space."""
    texts = [
        output.text if output.output_type == "stream" else output.data.get("text/markdown", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]
    return " ".join("".join(texts).split())


def same(kept, got):
    """Whether two texts say the same: whole numbers exactly, others to 10%, not roundings."""
    if OWN.search(kept) and OWN.search(got):
        return True
    if NUMBER.sub("#", kept) != NUMBER.sub("#", got):
        return False
    if TIMES.search(got):
        return True
    for pair in zip(NUMBER.findall(kept), NUMBER.findall(got), strict=True):
        was, now = (float(number.replace(",", "")) for number in pair)
        whole = not any(mark in number for number in pair for mark in ".e")
        rounding = max(abs(was), abs(now)) < 1e-3
        if (whole and was != now) or not (rounding or now == pytest.approx(was, rel=0.1)):
            return False
    return True


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_is_kept(path):
    kept, notebook = jupytext.read(path), jupytext.read(path)
    where = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600, resources=where).execute()
    code = [[cell for cell in each.cells if cell.cell_type == "code"] for each in (kept, notebook)]
    texts = [[shown(cell) for cell in cells] for cells in code]
    pythons = [each.metadata.language_info.version for each in (kept, notebook)]
    if pythons[0] != pythons[1] or "(cpu)" not in "".join(texts[1]):
        return  # what is kept was made on a CPU, and from the sources of that Python's library
    stale = [(was, now) for was, now in zip(*texts, strict=True) if not same(was, now)]
    assert not stale, "execute the notebook again and keep its outputs"


@pytest.mark.parametrize(
    ("kept", "got", "agree"),
    [
        ("loss 2.61 bits", "loss 2.63 bits", True),
        ("loss 2.61 bits", "loss 3.10 bits", False),
        ("187 M parameters", "187 M numbers", False),
        ("280,228 parameters", "280,216 parameters", False),
        ("differ by at most 3e-05", "differ by at most 9e-06", True),
        ("248 GFLOP/s, 36 GB/s", "80 GFLOP/s, 9 GB/s", True),
        ("Measured on this device: MHA", "Measured on this device: MLA", True),
        ("Measured on this device: MHA", "By the clock: MHA", False),
        ("cache: (2, 16, 64) rows hold [12 12]", "cache: (2, 16, 64) rows hold [12 10]", False),
    ],
)
def test_outputs_are_compared_where_they_do_not_depend_on_the_machine(kept, got, agree):
    assert same(kept, got) == agree
