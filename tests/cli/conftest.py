"""Running the command: in this process, as a process of its own, and on a terminal."""

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import tokenizers

from mla_jax import cli

MODULE = (sys.executable, "-m", "mla_jax.cli")


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    """Commands in this process leave its compilation cache as it is."""
    monkeypatch.setattr("mla_jax.cli.compilation.keep_compiled", lambda: None)


@pytest.fixture(autouse=True)
def _ctrl_c():
    """A shell's background job ignores Ctrl-C, and so would these tests and their processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


DECODER = pathlib.Path(__file__).parents[1] / "testdata" / "decoders" / "deepseek_v3"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': '%', 'user': '!', 'assistant': '#'}[message.role] }}{{ message.content }}$"
    "{% endfor %}{% if add_generation_prompt %}#{% endif %}"
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A checkpoint of 40 words, whose tokens are ASCII's codes, with a chat template."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    shutil.copytree(DECODER, folder)
    ascii_ = {chr(code): code for code in range(128)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(ascii_, []))
    library.decoder = tokenizers.decoders.Fuse()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command in this process; its standard output and standard error."""

    def run(*args):
        cli.main(list(map(str, args)))
        return capsys.readouterr()

    return run


@pytest.fixture
def fails(capsys):
    """Runs a command that must end with one line on standard error; that line."""

    def fails(*args, code=2):
        with pytest.raises(SystemExit) as caught:
            cli.main(list(map(str, args)))
        captured = capsys.readouterr()
        assert caught.value.code == code, captured.err
        line = captured.err.splitlines()[-1]
        assert line.startswith("mla-jax: ")
        assert "Traceback" not in captured.out + captured.err
        if code == 2:  # before any work, so nothing else was said
            assert (captured.out, captured.err) == ("", line + "\n")
        return line

    return fails


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """The environment of processes, which share a compilation cache of the tests' own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "COLUMNS"))}
    cache = str(tmp_path_factory.mktemp("cache"))
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    return kept | {
        "XDG_CACHE_HOME": cache, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # also what is quick to compile
    }  # fmt: skip


@pytest.fixture
def process(environment):
    """Runs the command as a process; a CompletedProcess with texts."""

    def process(*args, env=(), **more):
        return subprocess.run(
            [*MODULE, *map(str, args)], env=environment | dict(env), capture_output=True,
            text=True, encoding="utf-8", timeout=300, **more,
        )  # fmt: skip

    return process


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, args, columns, environment):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self._file, self.shown = ours, ""
        self._process = subprocess.Popen(
            [*MODULE, *map(str, args)], stdin=theirs, stdout=theirs, stderr=theirs,
            env=environment | {"TERM": "xterm"}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def wait_for(self, pattern, seconds=300):
        """Reads until `pattern` was shown."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self.shown):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.shown!r}"
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"ended before {pattern!r}: {self.shown!r}")

    def send(self, number):
        """Sends a signal."""
        os.kill(self._process.pid, number)

    def end(self, seconds=300):
        """Reads until the command ends: its exit code, and all that was shown."""
        while self._read(seconds):
            pass
        return self._process.wait(seconds), re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.shown)

    def close(self):
        """Ends what is left."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.close(self._file)

    def _read(self, seconds):
        if not select.select([self._file], [], [], seconds)[0]:
            return False
        try:
            read = os.read(self._file, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.shown += read.decode(errors="replace")
        return bool(read)


@pytest.fixture
def terminal(environment):
    """Starts the command on a terminal of so many columns."""
    started = []

    def terminal(*args, columns=80):
        started.append(Terminal(args, columns, environment))
        return started[-1]

    yield terminal
    for each in started:
        each.close()
