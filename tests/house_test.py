"""How modules may depend on each other, and what no file may hold."""

import ast
import pathlib

import pytest

import mla_jax

ROOT = pathlib.Path(mla_jax.__file__).parent
# Arrows go one way: a layer may import those before it, and modules of its own.
ORDER = [
    ["check", "config", "plain", "target", "sharding"], ["rates"], ["rope", "costs"], ["cache"],
    ["ops"], ["layers"],
    ["models"], ["families"], ["checkpoint"], ["generation"],
    ["training", "explain", "placing"], ["cli"],
]  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
# A config's `from_hf` reads what a family's entry says, which comes later.
ALLOWED = {("config", "families"), ("models", "families")}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """(module, names) of every import of this package in a file, those in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mla_jax":
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name, []) for a in node.names if a.name.split(".")[0] == "mla_jax")


def part(module):
    return module.split(".")[1] if "." in module else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_go_one_way(path):
    here = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module, names in imports(path):
        for there in [part(module)] if part(module) else names:
            if there in LEVEL and there != here and (here, there) not in ALLOWED:
                assert LEVEL[there] <= LEVEL[here], f"{here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_uses_another_s_underscore_name(path):
    tree = ast.parse(path.read_text())
    modules = set()
    for module, names in imports(path):
        assert not [name for name in names if name.startswith("_") and not name.startswith("__")]
        modules |= {name for name in names if (ROOT / module.replace("mla_jax", "").replace(
            ".", "/").lstrip("/") / f"{name}.py").exists()}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            hidden = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not (hidden and node.value.id in modules), f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("path", sorted((ROOT / "ops").rglob("*.py")), ids=lambda path: path.name)
def test_ops_are_formatted_without_exceptions(path):
    assert "fmt: skip" not in path.read_text()


def test_only_target_asks_for_the_device():
    asked = ("default_backend(", "jax.devices(", "local_devices(", ".device_kind")
    for path in FILES:
        text = path.read_text()
        found = [word for word in asked if word in text]
        code = "\n".join(line for line in text.splitlines() if ">>>" not in line)
        found = [word for word in found if word in code]
        if path.relative_to(ROOT).parts[0] not in ("target.py", "cli"):
            assert not found, f"{path.name}: {found}"
