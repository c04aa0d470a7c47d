"""What the pages promise: the example of "Getting started", and no public name without its docs."""

import inspect
import pathlib
import runpy

import pytest

import mla_jax
from mla_jax import checkpoint, costs, generation, models

DOCS = pathlib.Path(__file__).parents[1] / "docs"
# What a package gathers is its own; of a module's names, those that it defines.
PUBLIC = {
    f"{module.__name__}.{name}": value
    for module in (mla_jax, checkpoint, models, generation, costs)
    for name in dir(module)
    if callable(value := getattr(module, name))
    and not name.startswith("_")
    and value.__module__.startswith("mla_jax")
    and (hasattr(module, "__path__") or value.__module__ == module.__name__)
}


@pytest.mark.parametrize("name", ["getting_started", "own_model", "export", "training", "lora"])
def test_an_example_prints_what_it_says(name, capsys):
    runpy.run_path(str(DOCS / "examples" / f"{name}.py"))
    assert capsys.readouterr().out == (DOCS / "examples" / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_and_a_place_in_the_reference(name):
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or ""), f"{name} has no example"
    lines = (DOCS / "reference.md").read_text().splitlines()
    module = name.rpartition(".")[0]  # one that is documented whole has all its names there
    assert f"::: {name}" in lines or f"::: {module}" in lines, f"{name} is not in reference.md"
