"""Flags: what they become, what is said of wrong ones, and that none of it waits for JAX."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from mla_jax.cli import options


def test_values_have_their_types():
    found = options.parse([
        "generate", "--checkpoint", "folder", "--prompt", "a", "b c", "--prompt", "- d",
        "--prompt-file", "e.txt", "--max_new_tokens", "7", "--top-p", "0.5", "--draft", "mtp",
        "--no-compilation-cache", "--json", "--mesh", "data=2,model=4", "--place",
        "B=data,E=data+model", "--distributed",
    ])  # fmt: skip
    expected = options.Generate(
        checkpoint="folder", prompt=["a", "b c", "- d"], prompt_file=[pathlib.Path("e.txt")],
        max_new_tokens=7, top_p=0.5, draft="mtp", compilation_cache=False, json=True,
        mesh={"data": 2, "model": 4}, place={"B": ("data",), "E": ("data", "model")},
        distributed="",
    )  # fmt: skip
    assert found == expected


def test_defaults_are_those_of_the_dataclasses():
    given = {"costs": ["tiny"], "explain": ["tiny"]}
    for name, cls in options.COMMANDS.items():
        arguments = {"preset": "tiny"} if name in given else {}
        assert options.parse([name, *given.get(name, [])]) == cls(**arguments)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("xla", "xla"),
        ("latent_attention=xla", {"latent_attention": "xla"}),
        ("latent_attention=xla, expanded_attention=cudnn",
         {"latent_attention": "xla", "expanded_attention": "cudnn"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["demo", "generate"])
def test_backends_of_all_ops_or_of_each(command, given, found):
    assert options.parse([command, "--implementation", given]).implementation == found


def test_a_list_is_not_shared_between_two_parses():
    options.parse(["generate", "--prompt", "a"])
    assert options.parse(["generate"]).prompt == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["cost"], "invalid choice: 'cost'"),
        (["costs"], "the following arguments are required: PRESET"),
        (["costs", "tiny", "--bach", "3"], "--bach is no flag. Did you mean --batch?"),
        (["generate", "--mesh", "data"], "'data': write it like data=8,model=8"),
        (["generate", "--mesh", "data=0"], "data=0: a size is a number of devices"),
        (["generate", "--place", "B=x,B=y"], "write it like B=data,E=data+model"),
        (["costs", "tiny", "--bach=3"], "--bach is no flag. Did you mean --batch?"),
        (["costs", "tiny", "small"], "small is no argument of this command. (mla-jax costs"),
        (["generate", "folder"], "command. Did you mean --checkpoint FOLDER --prompt TEXT?"),
        (["chat", "folder"], "command. Did you mean --checkpoint FOLDER?"),
        (["generate", "prompt"], "command. Did you mean --prompt?"),
        (["costs", "tiny", "--batch", "x"], "argument --batch: invalid int value: 'x'"),
        (["costs", "tiny", "--batch"], "argument --batch: expected one argument"),
        (["costs", "tiny", "--batch", "1.5"], "invalid int value: '1.5'"),
        (["costs", "tiny", "--cont", "5"], "--cont is no flag. Did you mean --context?"),
        (["generate", "--draft", "ngram"], "argument --draft: invalid choice: 'ngram'"),
        (["generate", "--prompt"], "argument --prompt: expected at least one argument"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_flags(args, message):
    with pytest.raises(options.BadFlags) as caught:
        options.parse(args)
    assert message in str(caught.value)
    assert str(caught.value).endswith("--help lists what there is)")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [(), *((name,) for name in options.COMMANDS)])
def test_help_names_every_flag_and_wraps(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as caught:
        options.parse([*command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    if command:
        for field in dataclasses.fields(options.COMMANDS[command[0]]):
            assert field.name.replace("_", "-") in shown
    else:
        assert all(name in shown for name in options.COMMANDS)
    assert max(map(len, shown.splitlines())) <= 60


# What answers at once must not import what takes seconds.
@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--help"], 0), (["generate", "--help"], 0), (["--version"], 0), (["costs"], 2),
        (["demo", "--setps", "3"], 2), (["costs", "tiny"], 0), (["costs", "nothing"], 2),
        (["presets"], 0), (["devices"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_no_jax_before_it_is_needed(args, code, environment):
    program = f"""
import sys
from mla_jax import cli
try:
    cli.main({args!r})
    code = 0
except SystemExit as error:
    code = error.code or 0
slow = [name for name in ("jax", "flax", "optax", "orbax", "tokenizers") if name in sys.modules]
print(code, slow, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == f"{code} []"
