"""What the pages promise: examples print what they say, no public name or preset lacks its docs."""

import inspect
import pathlib
import re
import runpy
import tomllib

import pytest

import mla_jax
from mla_jax import checkpoint, costs, generation, models

DOCS = pathlib.Path(__file__).parents[1] / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
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


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path, capsys):
    runpy.run_path(str(path))
    assert capsys.readouterr().out == path.with_suffix(".txt").read_text()


def test_the_ten_lines_run():
    text = (DOCS.parent / "README.md").read_text()
    exec(re.search(r"start:ten.*?```python\n(.*?)```", text, re.DOTALL)[1], {})


def test_released_models_are_the_presets():
    released = tomllib.loads((DOCS / "models.toml").read_text())
    listed = [preset for models in released.values() for preset in models]
    assert sorted(listed) == sorted({*mla_jax.presets()} - {"tiny", "deepseek_tiny"})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_and_a_place_in_the_reference(name):
    assert ">>>" in (inspect.getdoc(PUBLIC[name]) or ""), f"{name} has no example"
    lines = "\n".join(path.read_text() for path in DOCS.glob("reference/*.md")).splitlines()
    module = name.rpartition(".")[0]  # one that is documented whole has all its names there
    assert f"::: {name}" in lines or f"::: {module}" in lines, f"{name} is not in docs/reference"
