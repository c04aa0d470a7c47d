"""What a command shows and where: its answer on standard output, everything else on standard error.

On a terminal, work that takes long has a spinner, or a bar once its end is known; elsewhere there are
plain lines. Lines wrap at spaces where the terminal is narrow, and a table that does not fit becomes
one line a value: no number is ever cut.
"""

import contextlib
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn
from rich.table import Column

_WIDE = 60  # columns of a terminal from which on a bar has room beside the words
Report = Callable[..., None]


class _Bar(BarColumn):
    """A bar where the end is known."""

    def render(self, task: Task) -> Any:
        return "" if task.total is None else super().render(task)


class Terminal:
    """The two streams of a command.

    Args:
        quiet: standard error hears of nothing but errors.
        json: the answer is one JSON object.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False):
        self.quiet, self.json = quiet, json
        self._errors = Console(stderr=True, highlight=False, emoji=False, markup=False)

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
    def working(self, what: str) -> Iterator[Report]:
        """A spinner beside `what` while the body runs, where standard error is a terminal.

        Yields:
            `report(done, total, words="")`: makes it a bar, with `words` behind the numbers.
        """
        bar = [_Bar(bar_width=20)] if self._errors.width >= _WIDE else []
        words = TextColumn("{task.description}", table_column=Column(overflow="fold"))
        shown = not self.quiet and self._errors.is_terminal
        progress = Progress(
            SpinnerColumn(), *bar, words, console=self._errors, disable=not shown, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        _flush()
        with progress:
            task = progress.add_task(what, total=None)

            def report(done: int, total: int, words: str = "") -> None:
                text = f"{what} {done:,} of {total:,} {words}".rstrip()
                progress.update(task, completed=done, total=total, description=text)

            yield report


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None
) -> list[str]:
    """Lines of a table, or where one would be longer than `width`, a line for every value.

    >>> table(("name", "bytes"), [("a", "1,024"), ("b", "12")])
    ['name  bytes', 'a     1,024', 'b        12']
    >>> table(("name", "bytes"), [("a", "1,024"), ("b", "12")], width=9)
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
