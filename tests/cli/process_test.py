"""The command as a process: exit codes, pipes, terminals, signals, and what it keeps for later."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from common import PLAIN, drawn, slow
from flax import nnx

import mla_jax
from mla_jax import cli
from mla_jax.cli import saved
from mla_jax.models import Decoder, DecoderConfig

RANDOM = ("generate", "--preset", "tiny", "--random-weights")
SHORT = ("--max-new-tokens", "1", "--quiet")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model of one layer, of which every process compiles less than of `tiny`."""
    config = DecoderConfig(
        attention=PLAIN.replace(num_hidden_layers=1), vocab_size=256, intermediate_size=20
    )
    folder = tmp_path_factory.mktemp("small")
    saved.save(drawn(lambda: Decoder(config, rngs=nnx.Rngs(0))), folder)
    return folder


@pytest.fixture(scope="session")
def generate(small):
    """The command that continues a prompt by it."""
    return "generate", "--checkpoint", small, "--dtype", "float32"


def test_version(process):
    done = process("--version")
    assert done.stdout.startswith(f"mla-jax {mla_jax.__version__} (jax ")
    assert (done.returncode, done.stderr) == (0, "")


def test_flag_errors_are_one_line(process):
    done = process("costs", "tiny", "--bach", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "mla-jax: --bach is no flag. Did you mean --batch? (mla-jax costs --help lists what there "
        "is)\n"
    )


def test_where_an_error_came_from_is_shown_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("MLA_JAX_TRACEBACK", "1")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["costs", "tiny", "--batch", "0"])
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.endswith("\nmla-jax: batch=0: batch must be a positive whole number.\n")


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("costs deepseek_v3", "1"), ("presets", ""), slow("--help", "1")]
)
def test_a_reader_that_leaves_is_no_error(environment, command, unbuffered):
    ours, theirs = os.pipe()
    os.close(ours)  # nobody reads from the start
    done = subprocess.run(
        [sys.executable, "-m", "mla_jax.cli", *command.split()],
        env=environment | {"PYTHONUNBUFFERED": unbuffered}, stdout=theirs, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


def test_head_gets_its_line(environment):
    command = f"{sys.executable} -m mla_jax.cli costs deepseek_v3 | head -1"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("deepseek_v3: 1 new token(s) in 1 row(s) of 32,768 on h200")
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
def test_a_full_disk_is_an_error(environment):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mla_jax.cli", "costs", "tiny"], env=environment, stdout=full,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "mla-jax: [Errno 28] No space left on device\n"


def test_a_closed_standard_output_is_no_error(environment):
    command = f"exec {sys.executable} -m mla_jax.cli costs tiny >&-"
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def files(folder):
    return {file.name for file in folder.rglob("*-cache")}


@pytest.mark.parametrize(("flags", "kept"), [((), 1), (("--no-compilation-cache",), 0)], ids=str)
def test_programs_are_kept_unless_they_are_not_to_be(flags, kept, monkeypatch):
    asked = []
    monkeypatch.setattr("mla_jax.cli.compilation.keep_compiled", lambda: asked.append(1))
    monkeypatch.setattr("mla_jax.cli.generate.generate", lambda options: None)
    cli.main([*RANDOM, "--prompt", "a", *flags])
    assert len(asked) == kept


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({}, "mla_jax/compiled"),
        ({"JAX_COMPILATION_CACHE_DIR": "own"}, "own"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_where_programs_are_kept(environment, tmp_path, env, folder):
    program = """
import os
import jax
from mla_jax.cli import compilation
folder = os.environ["XDG_CACHE_HOME"]
os.environ["XDG_CACHE_HOME"] = "/dev/null"
compilation.keep_compiled()  # a folder that cannot be is no error
print(jax.config.jax_compilation_cache_dir)
os.environ["XDG_CACHE_HOME"] = folder
compilation.keep_compiled()
jax.jit(lambda x: x + 1)(1)
print(jax.config.jax_compilation_cache_dir)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path)} | env,
    )  # fmt: skip
    assert done.stderr == ""
    kept = {file.parent for file in tmp_path.rglob("*-cache")}
    assert kept == (set() if folder is None else {tmp_path / folder})
    if not env:
        assert done.stdout == f"None\n{tmp_path / folder}\n"


def test_programs_are_kept_for_the_next_run(process, generate, environment):
    command = (*generate, *SHORT, "--prompt")
    process(*command, "a")
    kept = files(pathlib.Path(environment["XDG_CACHE_HOME"]) / "mla_jax" / "compiled")
    assert kept
    again = process(*command, "\u00e9\u4f60", env={"PYTHONIOENCODING": "ascii"})
    assert (again.returncode, again.stderr) == (0, "")  # what was kept is read without a word
    assert files(pathlib.Path(environment["XDG_CACHE_HOME"])) == kept
    assert again.stdout.startswith("??")  # characters that an encoding lacks are replaced


def test_a_narrow_terminal_wraps(terminal):
    code, shown = terminal("costs", "longcat_flash", columns=30).end()
    assert code == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 30
    for number in ("63.0 KiB", "2.0 GiB", "4.6 GFLOP", "32,768"):
        assert number in shown
    assert "\u2026" not in shown


def test_a_spinner_turns_while_it_compiles_and_leaves(terminal, generate):
    started = terminal(*generate, "--prompt", "hello", "--max-new-tokens", 1)
    started.wait_for("[\u2800-\u28ff].*compiling")
    code, shown = started.end()
    assert code == 0
    last = shown.rsplit("compiling\r\n", 1)[1]  # where the spinner was is the text now
    assert re.match(r"\s*hello", last)
    assert "time to first token" in last


@pytest.mark.parametrize("work", ["making weights", "compiling"])
def test_interrupted_while_it_compiles(terminal, generate, work):
    command = RANDOM if work == "making weights" else generate
    started = terminal(*command, "--prompt", "hello", "--no-compilation-cache")
    started.wait_for(f"[\u2800-\u28ff].*{work}")
    started.send(signal.SIGINT)
    code, shown = started.end()
    assert code == 130
    assert shown.endswith("\rmla-jax: interrupted\r\n")
    assert "Traceback" not in shown


def test_interrupted_in_the_middle_of_a_text(terminal, generate):
    started = terminal(*generate, "--prompt", "hello", "--max-new-tokens", 4000, "--block", 1)
    started.wait_for("hello")
    started.send(signal.SIGINT)
    code, shown = started.end()
    assert code == 130
    assert shown.endswith("\r\nmla-jax: interrupted\r\n")
    assert "Traceback" not in shown


def test_a_killed_demo_keeps_its_training(terminal, small, tmp_path):
    folder = tmp_path / "model"
    flags = ("--steps", 90000, "--batch", 1, "--load", small, "--save", folder)
    started = terminal("demo", *flags, columns=30)
    started.wait_for(r"training [\d,]+ of\s+90,000\s+loss")
    started.send(signal.SIGINT)
    code, shown = started.end()
    assert code == 130
    noted = json.loads((folder / "training.json").read_text())
    assert noted["steps"] == 90000
    assert 1 <= noted["done"] < 90000
    line = (
        f"mla-jax: interrupted after {noted['done']} of 90000 steps, which {folder} keeps: --load "
        f"{folder} goes on."
    )
    assert shown.rstrip().endswith(line)
    bars = shown.split("training ")[1:]
    assert all(re.match(r"[\d,]+ of\s+90,000\s+loss\s+\d+\.\d\d\s+bits", bar) for bar in bars[1:-1])
