"""The command as a process: exit codes, pipes, terminals, signals, and what it keeps for later."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

import mla_jax

GENERATE = ("generate", "--preset", "tiny", "--random-weights", "--prompt", "hello")


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


def test_where_an_error_came_from_is_shown_on_demand(process):
    done = process("costs", "tiny", "--batch", 0, env={"MLA_JAX_TRACEBACK": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("\nmla-jax: batch=0: batch must be a positive whole number.\n")


@pytest.mark.parametrize("command", ["costs deepseek_v3", "presets", "--help"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
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
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m mla_jax.cli costs deepseek_v3 | head -1"], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
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


def test_characters_that_an_encoding_lacks_are_replaced(process):
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    done = process(*GENERATE[:-1], "a", "--max-new-tokens", 3, "--quiet", env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "")


def test_programs_are_kept_for_the_next_run(process, tmp_path):
    def seconds(*flags, **env):
        done = process(
            *GENERATE, "--max-new-tokens", 2, "--json", *flags, env={"XDG_CACHE_HOME": tmp_path} | env
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["compile_seconds"]

    kept = tmp_path / "mla_jax" / "compiled"
    seconds("--no-compilation-cache")
    seconds(JAX_ENABLE_COMPILATION_CACHE="false")
    assert not kept.exists()
    seconds(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not kept.exists()
    assert list((tmp_path / "own").iterdir())
    first = seconds()
    files = {file.name for file in kept.iterdir() if file.name.endswith("-cache")}
    assert files
    again = seconds()
    assert {file.name for file in kept.iterdir() if file.name.endswith("-cache")} == files
    assert again < first


def test_a_cache_folder_that_cannot_be_is_no_error(process):
    done = process(*GENERATE, "--max-new-tokens", 1, "--quiet", env={"XDG_CACHE_HOME": "/dev/null"})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("columns", [30, 80])
def test_a_narrow_terminal_wraps(terminal, columns):
    code, shown = terminal("costs", "longcat_flash", columns=columns).end()
    assert code == 0
    lines = shown.splitlines()
    assert max(map(len, lines)) <= columns
    for number in ("63.0 KiB", "2.0 GiB", "4.6 GFLOP", "32,768"):
        assert number in shown
    assert "\u2026" not in shown


def test_a_spinner_turns_while_it_compiles_and_leaves(terminal):
    started = terminal(*GENERATE, "--max-new-tokens", 3)
    started.wait_for("compiling")
    code, shown = started.end()
    assert code == 0
    assert re.search("[\u2800-\u28ff].*making weights", shown)
    last = shown.rsplit("compiling\r\n", 1)[1]  # where the spinner was is the text now
    assert re.match(r"\s*hello", last)
    assert "time to first token" in last


def test_interrupted_while_it_compiles(terminal):
    started = terminal(*GENERATE, "--no-compilation-cache")
    started.wait_for("compiling")
    started.send(signal.SIGINT)
    code, shown = started.end()
    assert code == 130
    assert shown.endswith("\rmla-jax: interrupted\r\n")
    assert "Traceback" not in shown


def test_interrupted_in_the_middle_of_a_text(terminal):
    started = terminal(*GENERATE, "--max-new-tokens", 900, "--block", 1)
    started.wait_for("hello")
    started.send(signal.SIGINT)
    code, shown = started.end()
    assert code == 130
    assert shown.endswith("\r\nmla-jax: interrupted\r\n")
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize("columns", [30, 80])
def test_a_killed_demo_keeps_its_training(terminal, process, tmp_path, columns):
    folder = tmp_path / "model"
    started = terminal("demo", "--steps", 40, "--batch", 1, "--save", folder, columns=columns)
    started.wait_for(r"training 2 of\s+40 loss")
    started.send(signal.SIGINT if columns == 80 else signal.SIGTERM)
    code, shown = started.end()
    assert code == (130 if columns == 80 else 143)
    noted = json.loads((folder / "training.json").read_text())
    assert noted["steps"] == 40
    assert 2 <= noted["done"] < 40
    line = (
        f"mla-jax: interrupted after {noted['done']} of 40 steps, which {folder} keeps: --load "
        f"{folder} goes on."
    )
    assert shown.rstrip().endswith(line)
    if columns == 80:
        resumed = process("demo", "--load", folder, "--tokens", 1, "--batch", 1)
        assert resumed.returncode == 0
        assert f"the training goes on after step {noted['done']} of 40" in resumed.stderr
        assert "step 40: loss" in resumed.stderr
