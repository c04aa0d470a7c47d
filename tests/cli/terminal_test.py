"""Tables, quantities, and which stream hears what."""

import json

import pytest

from mla_jax.cli import terminal

ROWS = [("absorbed", "8.6 GiB", "576"), ("mha", "1,488.0 GiB!", "32,768")]
HEADERS = ("attention", "cache", "read")


def test_a_table_that_fits_is_one():
    lines = terminal.table(HEADERS, ROWS)
    assert lines == [
        "attention         cache    read",
        "absorbed        8.6 GiB     576",
        "mha        1,488.0 GiB!  32,768",
    ]
    assert terminal.table(HEADERS, ROWS, width=31) == lines


@pytest.mark.parametrize("width", [30, 20, 10, 3])
def test_a_table_that_does_not_fit_has_a_line_for_every_value(width):
    lines = terminal.table(HEADERS, ROWS, width)
    assert "absorbed" in lines
    for row in ROWS:
        for cell in row[1:]:
            assert sum(line.endswith(cell) for line in lines) == 1
    if width >= 20:
        assert max(map(len, lines)) <= width


@pytest.mark.parametrize(
    ("value", "units", "step", "shown"),
    [
        (0, terminal.BYTES, 1024, "0 B"),
        (640, terminal.BYTES, 1024, "640 B"),
        (1023, terminal.BYTES, 1024, "1,023 B"),
        (1024, terminal.BYTES, 1024, "1.0 KiB"),
        (8064, terminal.BYTES, 1024, "7.9 KiB"),
        (1024**2 - 1, terminal.BYTES, 1024, "1.0 MiB"),
        (488 * 2**30, terminal.BYTES, 1024, "488.0 GiB"),
        (2**70, terminal.BYTES, 1024, "1,048,576.0 PiB"),
        (999.6, terminal.SECONDS, 1000, "1.0 ns"),
        (999_960, terminal.SECONDS, 1000, "1.0 us"),
        (2.5e15, terminal.SECONDS, 1000, "2,500.0 s"),
        (812_160, terminal.PARAMETERS, 1000, "812.2 k parameters"),
    ],
)
def test_quantity(value, units, step, shown):
    assert terminal.quantity(value, units, step) == shown


def test_answers_and_notes_have_their_streams(capsys):
    shown = terminal.Terminal()
    shown.answer("text")
    shown.note("note")
    shown.answer_json({"a": 1})
    assert capsys.readouterr() == ("text\n", "note\n")


def test_json_is_all_there_is_on_standard_output(capsys):
    shown = terminal.Terminal(json=True)
    shown.answer("text")
    shown.table(HEADERS, ROWS)
    shown.note("note")
    shown.answer_json({"a": None})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": None}
    assert captured.err == "note\n"
    with pytest.raises(ValueError, match="JSON compliant"):
        shown.answer_json({"a": float("nan")})


def test_quiet_has_answers_only(capsys):
    shown = terminal.Terminal(quiet=True)
    shown.note("note")
    shown.notes([("a", "b")])
    with shown.working("thinking") as report:
        report(1, 2)
    shown.answer("text")
    assert capsys.readouterr() == ("text\n", "")


def test_work_shows_nothing_where_there_is_no_terminal(capsys):
    with terminal.Terminal().working("thinking") as report:
        report(1, 2, "three")
    assert capsys.readouterr() == ("", "")


def test_markup_and_emoji_are_left_alone(capsys):
    terminal.Terminal().note("[red]:smile: x[/red]")
    assert capsys.readouterr().err == "[red]:smile: x[/red]\n"


@pytest.mark.parametrize(("columns", "lines"), [("40", 3), ("20", 5)])
def test_a_paragraph_wraps_at_spaces(columns, lines, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    text = "the model attends to 2,048 chosen tokens, or to 1,048,576 where it is dense, of them"
    terminal.Terminal().paragraph(text)
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == lines
    assert " ".join(shown) == text
