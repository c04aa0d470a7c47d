"""The set-up cell: what it asks pip for on Colab's runtimes, and what it says afterwards."""

import importlib.metadata
import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest

FOLDER = pathlib.Path(__file__).parent
COLAB = {"jax": "0.7.2", "numpy": "2.1.3", "scipy": "1.16.3", "ipykernel": "6.17.1"}
PINS = ["numpy==2.1.3", "scipy==1.16.3", "ipykernel==6.17.1", "tornado==6.5.7"]


def cells():
    """The first code cell of every notebook."""
    start, end = "```{code-cell} ipython3\n", "\n```"
    texts = [path.read_text() for path in sorted(FOLDER.glob("0*.md"))]
    return [text.split(start, 1)[1].split(end, 1)[0] for text in texts]


@pytest.fixture
def colab(monkeypatch):
    """Runs the cell where `held` is installed and pip adds `becomes`: what it asks pip."""

    def run(held, becomes, returncode=0, missing=True):
        versions, asked = held | {"tornado": "6.5.7"}, []

        def pip(command, **_):
            asked.append(command)
            versions.update(becomes)
            return types.SimpleNamespace(returncode=returncode, stderr="No matching distribution")

        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name: None if missing and name == "mla_jax" else found(name),
        )
        monkeypatch.setattr(subprocess, "run", pip)
        monkeypatch.setattr(
            importlib.metadata,
            "distributions",
            lambda: [types.SimpleNamespace(name=n, version=v) for n, v in versions.items()],
        )
        owners = {"sys": ["jax"]} if "imported" in held else {"a_module_not_loaded": ["jax"]}
        monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
        exec(cells()[0], {})
        return asked

    return run


def test_the_cell_is_the_same_in_every_notebook():
    assert len(set(cells())) == 1


@pytest.mark.parametrize(
    ("plugin", "extra"),
    [
        ({}, ""),
        ({"jax-cuda12-plugin": "0.7.2"}, "[cuda12]"),
        ({"jax-cuda13-plugin": "0.7.2"}, "[cuda13]"),
        ({"libtpu": "0.0.21.1"}, "[tpu]"),
    ],
    ids=["cpu", "cuda12", "cuda13", "tpu"],
)
def test_jax_moves_with_its_plugin_and_the_kernel_s_packages_stay(plugin, extra, colab, capsys):
    (command,) = colab(COLAB | plugin, {"jax": "0.11.2", "mla-jax": "1.0"})
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert f"mla-jax{extra} @ git+https://github.com/mla-jax/mla_jax" in command
    assert command[-4:] == PINS
    assert not [word for word in command if word.startswith("jax")]
    said = capsys.readouterr().out
    assert said == (
        f"Installed: jax 0.11.2, mla-jax 1.0. Kept: {', '.join(PINS)}. No restart is needed.\n"
    )


def test_a_package_that_was_imported_before_it_moved_asks_for_a_restart(colab, capsys):
    colab(COLAB | {"imported": "1"}, {"jax": "0.11.2"})
    assert "Restart the runtime now: jax had been imported." in capsys.readouterr().out


def test_pip_s_words_are_shown_where_it_fails(colab):
    with pytest.raises(RuntimeError, match=r"could not install mla-jax @ .*\nNo matching"):
        colab(COLAB, {}, returncode=1)


def test_nothing_is_installed_where_mla_jax_is(colab, capsys):
    assert colab(COLAB, {}, missing=False) == []
    assert capsys.readouterr().out == ""


def test_pip_finds_versions_for_every_runtime_of_colab():
    command = [sys.executable, FOLDER / "colab.py", "--dry"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert [line.split(":")[0] for line in told.splitlines()] == ["cpu", "cuda12", "tpu"]
