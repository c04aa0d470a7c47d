"""The package itself: its names, which are imported when they are first used."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys
import types

import pytest

import mla_jax


def imported():
    """Names by the module that the type checker takes them from."""
    tree = ast.parse(pathlib.Path(mla_jax.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname: statement.module
        for statement in guarded.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def test_type_checkers_and_users_see_the_same_names():
    assert set(imported()) == set(mla_jax.__all__)
    assert set(mla_jax.__all__) <= set(dir(mla_jax))


@pytest.mark.parametrize(("name", "module"), imported().items())
def test_a_name_is_what_its_module_has(name, module):
    if module == "mla_jax":
        assert getattr(mla_jax, name) is importlib.import_module(f"mla_jax.{name}")
    else:
        assert getattr(mla_jax, name) is getattr(importlib.import_module(module), name)


def test_explain_is_the_function_whatever_was_imported_before():
    program = """
import mla_jax.explain
from mla_jax.explain import explain
assert callable(mla_jax.explain) and mla_jax.explain is explain
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    mla_jax.explain = types.ModuleType("mla_jax.explain")  # as the import system does
    assert inspect.isfunction(mla_jax.explain)


def test_modules_that_nobody_imported_are_there_too():
    assert inspect.isclass(mla_jax.models.Decoder)
    assert mla_jax.rope.__name__ == "mla_jax.rope"


@pytest.mark.parametrize("name", ["nothing", "_nothing", "__wrapped__"])
def test_other_names_are_attribute_errors(name):
    with pytest.raises(AttributeError, match=f"'mla_jax' has no attribute '{name}'"):
        getattr(mla_jax, name)


def test_nothing_slow_is_imported_before_it_is_used():
    program = """
import sys, mla_jax
mla_jax.MLAConfig.from_preset("deepseek_v3"), mla_jax.costs.devices(), mla_jax.presets()
print([name for name in ("jax", "flax", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
