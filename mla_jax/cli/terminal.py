"""What a command shows and where: its answer on standard output, everything else on standard error.

On a terminal, work that takes long has a spinner, or a bar once its end is known; elsewhere there
are plain lines. Lines wrap at spaces where the terminal is narrow, and a table that does not fit
becomes one line a value: no number is ever cut.
"""

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Generator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.table import Column

import mla_jax
from mla_jax.config import MLAConfig

BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")  # these are for `quantity`
OPERATIONS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
PARAMETERS = ("parameters", "k parameters", "M parameters", "G parameters", "T parameters")
SECONDS = ("ps", "ns", "us", "ms", "s")
_WIDE = 60  # columns of a terminal from which on a bar has room beside the words


class _Bar(BarColumn):
    """A bar where the end is known."""

    def render(self, task: Task) -> Any:
        return "" if task.total is None else super().render(task)


class _Errors(Console):
    """Standard error, where a pipe that nobody reads is the command's to handle."""

    def on_broken_pipe(self) -> None:
        """Called while the error is handled."""
        raise


class Report:
    """What hears how far the work is: `report(done, total, words="")` makes the spinner a bar.

    `words` stand behind the numbers. `stop` takes it all off the screen before the work is done, so
    that text can have the lines.
    """

    def __init__(self, progress: Progress, what: str):
        self._progress, self._what = progress, what
        self._task = progress.add_task(what, total=None)
        self.stop = progress.stop

    def __call__(self, done: int, total: int, words: str = "") -> None:
        """Shows that `done` of `total` is done."""
        text = f"{self._what} {done:,} of {total:,} {words}".rstrip()
        self._progress.update(self._task, completed=done, total=total, description=text)


class Terminal:
    """The two streams of a command.

    Args:
        quiet: standard error hears of nothing but errors.
        json: the answer is one JSON object.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False):
        self.quiet, self.json = quiet, json
        self._errors = _Errors(stderr=True, highlight=False, emoji=False, markup=False)

    @property
    def animated(self) -> bool:
        """Whether there are spinners and bars."""
        return self._errors.is_terminal and not self.quiet

    def note(self, text: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            _flush()
            self._errors.print(text, soft_wrap=not self._errors.is_terminal)

    def notes(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values on standard error, one a line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.note(f"{name:{width}}  {value}")

    def explain(self, config: MLAConfig, **shapes: Any) -> None:
        """What `mla_jax.explain` prints, on standard error."""
        if not self.quiet:
            _flush()
            with contextlib.redirect_stdout(sys.stderr):
                mla_jax.explain(config, **shapes)

    def answer(self, text: str = "", end: str = "\n") -> None:
        """Text on standard output, as it is; not where the answer is JSON."""
        if not self.json:
            print(text, end=end, flush=True)

    def paragraph(self, text: str) -> None:
        """A line on standard output, wrapped at spaces."""
        width = _width() or 100
        self.answer(textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False))

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows on standard output: the first column to the left, the others to the right."""
        for line in table(headers, rows, _width()):
            self.answer(line)

    def answer_json(self, value: dict[str, Any]) -> None:
        """The answer as one JSON object, where that is asked for."""
        if self.json:
            print(json.dumps(value, allow_nan=False), flush=True)

    @contextlib.contextmanager
    def working(self, what: str) -> Generator[Report]:
        """A spinner beside `what` while the body runs, where standard error is a terminal.

        Yields:
            a `Report` for work whose end is known.
        """
        bar = [_Bar(bar_width=20)] if self._errors.width >= _WIDE else []
        words = TextColumn("{task.description}", table_column=Column(overflow="fold"))
        progress = Progress(
            SpinnerColumn(), *bar, words, console=self._errors, disable=not self.animated,
            transient=True, redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        _flush()
        with progress:
            yield Report(progress, what)


def quantity(value: float, units: tuple[str, ...], step: int = 1000) -> str:
    """A number in the largest unit that leaves it at least 1, with one decimal.

    Args:
        value: in the first of `units`, and not negative.
        units: each `step` times the one before; of the first there are no decimals.
        step: 1000, or 1024 for bytes.

    >>> [quantity(n, ("B", "KiB", "MiB"), 1024) for n in (640, 8064, 1024**2 - 1, 10**10)]
    ['640 B', '7.9 KiB', '1.0 MiB', '9,536.7 MiB']
    """
    if round(value) < step:
        return f"{value:,.0f} {units[0]}"
    power = 1
    while power < len(units) - 1 and round(value / step**power, 1) >= step:
        power += 1
    return f"{value / step**power:,.1f} {units[power]}"


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lines of a table, or where one would be longer than `width`, a line for every value.

    >>> table(("name", "bytes"), [("a", "1,024"), ("b", "12")])
    ['name  bytes', 'a     1,024', 'b        12']
    >>> table(("name", "bytes"), [("a", "1,024"), ("b", "12")], width=10)
    ['a', '  bytes', '    1,024', '', 'b', '  bytes 12']
    """
    cells = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(size) if index else cell.ljust(size)
            for index, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    if width is None or max(map(len, lines)) <= width:
        return lines
    lines = []
    for row in rows:
        lines += ["", row[0]] if lines else [row[0]]
        for header, cell in zip(headers[1:], row[1:], strict=True):
            line = f"  {header} {cell}".rstrip()
            lines += [line] if len(line) <= width else [f"  {header}", f"    {cell}"]
    return lines


def _width() -> int | None:
    """Columns of the terminal that standard output is, or what COLUMNS says; None elsewhere."""
    if os.environ.get("COLUMNS") or (sys.stdout is not None and sys.stdout.isatty()):
        return shutil.get_terminal_size().columns
    return None


def _flush() -> None:
    """So that text and notes come in their order where both streams are one terminal."""
    if sys.stdout is not None:
        sys.stdout.flush()
