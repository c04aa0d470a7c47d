"""The command `mla-jax`: errors and exit codes.

`options` has the flags, and what a command does is in a module of its name; `presets` and `devices`
are in `costs`.

Text is on standard output, everything else on standard error. Exit codes: 0 done, 1 an error in the
run, 2 flags that cannot be, 130 interrupted by Ctrl-C (143 by SIGTERM where a training was kept).
An error is one line; MLA_JAX_TRACEBACK=1 shows where it came from.
"""

import contextlib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mla_jax.cli.options import COMMANDS, BadFlags, Compiling, Options, parse

# What is reported by its message alone; of other errors the type is said, too.
_EXPECTED = (
    BadFlags, ValueError, NotImplementedError, OSError, ImportError, FloatingPointError,
)  # fmt: skip
_MODULES = {"presets": "costs", "devices": "costs"}  # of the commands that share another's


class Interrupted(KeyboardInterrupt):
    """A signal ended the command, which kept something: the message says what."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command of `mla-jax`.

    Args:
        args: the words after the program's name; None takes the process's own.

    Raises:
        SystemExit: with the exit code, where it is not 0, or after --help.

    >>> main(["costs", "deepseek_v33"])
    Traceback (most recent call last):
    SystemExit: 2
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks is no error
            stream.reconfigure(errors="replace")
    try:
        _run(parse(args))
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader had enough, as `head` has
        _drop_unwritable()
        raise SystemExit(0) from None
    except KeyboardInterrupt as error:
        _fail(error, str(error) or "interrupted", 128 + getattr(error, "number", signal.SIGINT))
    except Exception as error:
        _fail(error, _message(error), 2 if isinstance(error, BadFlags) else 1)


def _run(options: Options) -> None:
    """Runs a command; only now is anything imported that needs JAX."""
    name = next(name for name, cls in COMMANDS.items() if type(options) is cls)
    module = importlib.import_module(f"mla_jax.cli.{_MODULES.get(name, name)}")
    if isinstance(options, Compiling) and options.compilation_cache:
        importlib.import_module("mla_jax.cli.compilation").keep_compiled()
    getattr(module, name)(options)


def _message(error: BaseException) -> str:
    """What is wrong, in the error's own words; of one that nobody expects its type, too."""
    if isinstance(error, BadFlags) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, _EXPECTED) else f"{type(error).__name__}: {error}"


def _fail(error: BaseException, message: str, code: int) -> NoReturn:
    """Ends the process with a line on standard error."""
    if os.environ.get("MLA_JAX_TRACEBACK"):
        traceback.print_exception(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    with contextlib.suppress(OSError):
        print(
            f"mla-jax: {lines[0] if lines else type(error).__name__}", file=sys.stderr, flush=True
        )
    _drop_unwritable()
    raise SystemExit(code) from error


def _drop_unwritable() -> None:
    """Lets the interpreter's last flush succeed where a stream takes nothing any more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
