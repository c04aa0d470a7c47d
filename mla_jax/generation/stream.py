"""Text from tokens as they come: every character once, in time that grows with their number.

A character may be several tokens, and a token's text may depend on what is before it. So a stream
keeps the bytes of a character that is not whole yet, and the last token that says what the next one
looks like. The tokenizers library's DecodeStream keeps all tokens since the last whole character
instead: it decodes them again with each (quadratic where a model writes no UTF-8), gives up where a
sequence of byte tokens turns out to be none, and has no end that would show what it kept.
"""

import codecs
from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_jax.generation.vocabulary import UNKNOWN, Vocabulary
from mla_jax.plain import Ready

_CHARACTER = 4  # bytes of UTF-8 in a character, at most
_WAITING = 16  # tokens; more than bytes of a character, since a token may end one and begin another


class StopStrings:
    r"""Finds the first stop string of a text that comes in pieces.

    Text that may be the beginning of a stop string is held back until it is known. The time is
    linear in the text: for every stop string, the number of its characters that the text ends with
    (Knuth, Morris and Pratt 1977).

    Args:
        strings: what ends a text; one, several or none.

    Attributes:
        found: the stop string that ended the text; None as long as none did. Of several that end at
            the same character it is the longest.

    Raises:
        ValueError: a string that is empty.
        TypeError: something else than strings.

    >>> stop = StopStrings(["###", "User:"])
    >>> stop.push("Hello! #"), stop.push("1\nUs"), stop.push("er: hi")
    ('Hello! ', '#1\n', '')
    >>> stop.found, stop.finish()
    ('User:', '')
    """

    def __init__(self, strings: str | Sequence[str] = ()):
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        for string in strings:
            if not isinstance(string, str):
                raise TypeError(f"stop_strings has {string!r}: it must have strings.")
            if not string:
                raise ValueError("stop_strings has an empty string, which would end every text.")
        self.found: str | None = None
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._fallbacks = [_fallbacks(string) for string in self._strings]
        self._matched = [0] * len(self._strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the text that follows; returns what comes before any stop string for certain."""
        if not self._strings or self.found is not None:
            return text if self.found is None else ""
        matched = self._matched
        for at, character in enumerate(text):
            for which, string in enumerate(self._strings):
                count = matched[which]
                while count and string[count] != character:
                    count = self._fallbacks[which][count]
                count += string[count] == character
                if count == len(string):
                    self.found = string
                    seen, self._held = self._held + text[: at + 1], ""
                    return seen[: len(seen) - count]
                matched[which] = count
        seen, keep = self._held + text, max(matched)
        self._held = seen[len(seen) - keep :]
        return seen[: len(seen) - keep]

    def finish(self) -> str:
        """What was held back, where the text ends without a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._strings)
        return held


class TextStream:
    """The text of one row's tokens as they come: see `Tokenizer.stream`.

    Attributes:
        count: tokens taken, up to and with the one that completed a stop string.
        stopped: the stop string that ended the text, which is not part of it; None without one.

    >>> from mla_jax.generation import Tokenizer
    >>> stream = Tokenizer.bytes().stream(stop_strings=["!"])
    >>> stream.push([228, 189]), stream.push([160, 46]), stream.push([33, 33, 33])
    ('', '你.', '')
    >>> stream.stopped, stream.count
    ('!', 5)
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int] = (),
        hidden: frozenset[int] = frozenset(),
        stop_strings: str | Sequence[str] = (),
    ):
        self.count = 0
        self._vocabulary, self._hidden = vocabulary, hidden
        self._stop = StopStrings(stop_strings)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # The last token that was shown, and before it, where that one is nothing at the start of a
        # text, another that is more.
        self._context: list[int] = []
        self._before: str | None = ""  # the context's own text; None until it is needed
        self._waiting: list[int] = []  # tokens after the context that are not shown yet
        for token in self._tail(prompt):
            self._text(token)

    @property
    def stopped(self) -> str | None:
        return self._stop.found

    def push(self, tokens: Ready | Sequence[int]) -> str:
        """Takes the tokens that follow; returns what they add to the text shown so far.

        Tokens after a stop string are not looked at.
        """
        shown = []
        for token in token_ids(tokens):
            if self.stopped is not None:
                break
            self.count += 1
            shown.append(self._stop.push(self._text(token)))
        return "".join(shown)

    def finish(self) -> str:
        """What was held back: a character without its end as U+FFFD, part of a stop string."""
        if self.stopped is not None:
            return ""
        return self._stop.push(self._flush()) + self._stop.finish()

    def _text(self, token: int) -> str:
        """What a token adds."""
        if token in self._hidden:
            return ""
        raw = self._vocabulary.bytes_of(token)
        if raw is None:
            return self._utf8.decode(b"", final=True) + self._in_context(token)
        text = self._show_waiting() + self._utf8.decode(raw)
        if raw != UNKNOWN and token not in self._vocabulary.special:
            self._context, self._before = [token], None
        return text

    def _in_context(self, token: int) -> str:
        self._waiting.append(token)
        # A decoder that does more than the byte-level one may still take several tokens for a
        # character. It says so by U+FFFD, which a text may also have: so not all of them can wait.
        after = self._vocabulary.text_of([*self._context, *self._waiting])
        if after.endswith("\ufffd") and len(self._waiting) < _WAITING:
            return ""
        return self._show_waiting(after)

    def _show_waiting(self, after: str | None = None) -> str:
        if not self._waiting:
            return ""
        text_of, context = self._vocabulary.text_of, self._context
        before = text_of(context) if self._before is None else self._before
        after = text_of([*context, *self._waiting]) if after is None else after
        last = self._waiting[-1:]
        self._waiting, self._context, self._before = [], last, text_of(last)
        if not self._before and context and text_of(context[:1]):
            self._context, self._before = [context[0], *last], None
        return after[len(before) :]

    def _flush(self) -> str:
        return self._show_waiting() + self._utf8.decode(b"", final=True)

    def _tail(self, prompt: Sequence[int]) -> list[int]:
        """The end of a prompt that what follows can depend on."""
        tail: list[int] = []
        for token in reversed(prompt):
            if token in self._hidden:
                continue
            tail.append(token)
            raw = self._vocabulary.bytes_of(token)
            text = self._vocabulary.text_of([token]) if raw is None else raw
            if text and len(tail) >= _CHARACTER:
                break
        return tail[::-1]


def token_ids(tokens: Any) -> list[int]:
    """The token ids of one row, out of a list or an array.

    Raises:
        ValueError: not one row of whole numbers from 0 to 2^31 - 1.

    >>> token_ids(np.array([3, 1]))
    [3, 1]
    """
    try:
        array = np.asarray(tokens)
    except ValueError:  # rows of several lengths
        array = np.empty((0, 0), int)
    if array.ndim == 1 and not array.size:
        return []
    integers = array.ndim == 1 and np.issubdtype(array.dtype, np.integer)
    if not integers or array.min() < 0 or array.max() >= 2**31:
        raise ValueError(
            f"tokens={tokens!r:.80}: it must be one row of whole numbers from 0 to 2^31 - 1."
        )
    row: Any = array.tolist()  # whose type depends on the number of axes
    return row


def _fallbacks(string: str) -> list[int]:
    """For every prefix of a string the longest shorter prefix that it ends with."""
    table = [0, 0]
    for character in string[1:]:
        count = table[-1]
        while count and string[count] != character:
            count = table[count]
        table.append(count + (string[count] == character))
    return table
