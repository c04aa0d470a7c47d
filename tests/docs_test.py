"""What the pages promise: the example of "Getting started", and no public name without its docs."""

import inspect
import pathlib
import runpy

import pytest

import mla_jax
from mla_jax import checkpoint

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PUBLIC = {
    name: value
    for module in (mla_jax, checkpoint)
    for name, value in vars(module).items()
    if callable(value) and not name.startswith("_")
}


def test_getting_started_prints_what_it_says(capsys):
    runpy.run_path(str(DOCS / "examples" / "getting_started.py"))
    assert capsys.readouterr().out == (DOCS / "examples" / "getting_started.txt").read_text()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_and_a_place_in_the_reference(name):
    value = PUBLIC[name]
    assert ">>>" in (inspect.getdoc(value) or ""), f"{name} has no example"
    pages = (DOCS / "reference.md").read_text()
    assert any(line.startswith("::: mla_jax.") and line.endswith(f".{name}")
               for line in pages.splitlines()), f"{name} is not in docs/reference.md"  # fmt: skip
