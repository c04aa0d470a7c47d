"""What is asked of a generation, checked once: its options, and its prompts as rows of tokens."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np

from mla_jax.cache import checked_dtype
from mla_jax.check import check_choice
from mla_jax.generation.sampling import Sampling, plain
from mla_jax.generation.stream import StopStrings
from mla_jax.generation.tokenizer import Tokenizer

Draft = Literal["prompt", "mtp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `generate`, checked once; `Request.of` takes those of `Sampling` as well.

    Attributes:
        max_new_tokens: of each row.
        max_length: slots of the cache; None is what the longest prompt and its new tokens need,
            rounded up by `cache_length`.
        sampling: how tokens are drawn; by default the most likely one is taken.
        seed: of the sampling, from 0 to 2^32 - 1.
        stop_tokens: end a row, and are its last token. One or several.
        stop_strings: end a row whose text has one; they need the tokenizer. One or several.
        speculate: K, tokens drafted and verified at once; 0 is plain decoding.
        draft: by what: "prompt" looks the text's last tokens up in it, "mtp" asks the model's block
            for multi-token prediction.
        block: decode steps in one program, at most. Tokens are seen per block.
        samples: continuations of every prompt.
        pages: G, how many pages of 128 slots the rows share; None gives every row slots of its own.
        cache_dtype: of the cache, by name; float8_e4m3fn and int8 hold latents in a byte a number,
            see `Cache.init`. None is the model's own.
        logprobs: whether the result has the log probabilities of the new tokens.

    Raises:
        ValueError: a value that cannot be, with the one that was given.

    >>> request = Request.of(temperature=0.6, stop_tokens=5)
    >>> request.sampling.temperature, request.stop_tokens
    (0.6, (5,))
    >>> Request(max_new_tokens=0)
    Traceback (most recent call last):
    ValueError: max_new_tokens=0: it must be a whole number of at least 1.
    """

    max_new_tokens: int = 128
    max_length: int | None = None
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    speculate: int = 0
    draft: Draft = "prompt"
    block: int = 16
    samples: int = 1
    pages: int | None = None
    cache_dtype: str | None = None
    logprobs: bool = False

    def __post_init__(self):
        for name, least in (("max_new_tokens", 1), ("speculate", 0), ("block", 1), ("samples", 1)):
            self._set(name, _whole(name, getattr(self, name), least))
        for name in ("max_length", "pages"):
            value = getattr(self, name)
            self._set(name, None if value is None else _whole(name, value, 1))
        self._set("seed", _whole("seed", self.seed, 0, most=2**32 - 1))
        if not isinstance(self.sampling, Sampling):
            raise ValueError(f"sampling={self.sampling!r:.80}: it must be a Sampling.")
        self._set("stop_tokens", stop_ids(self.stop_tokens))
        try:
            StopStrings(self.stop_strings)
        except TypeError as error:
            raise ValueError(
                f"stop_strings={self.stop_strings!r:.80}: it must be a text or several."
            ) from error
        one = isinstance(self.stop_strings, str)
        self._set("stop_strings", (self.stop_strings,) if one else tuple(self.stop_strings))
        check_choice("draft", self.draft, get_args(Draft))
        if self.draft == "mtp" and not self.speculate:
            raise ValueError("draft='mtp' drafts nothing with speculate=0: say how many tokens.")
        if self.cache_dtype is not None:
            self._set("cache_dtype", checked_dtype("cache_dtype", self.cache_dtype).name)
        self._set("logprobs", plain(self.logprobs))
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"logprobs={self.logprobs!r:.80}: it must be True or False.")

    @classmethod
    def of(cls, request: "Request | None" = None, **options: Any) -> "Request":
        """A request with options of its own and of `Sampling` changed.

        Args:
            request: whose options count where none is given; None is the defaults.
            **options: fields of `Request` and of `Sampling`.

        Raises:
            TypeError: an option that there is not.
            ValueError: a value that cannot be.
        """
        request = cls() if request is None else request
        if not isinstance(request, Request):
            raise TypeError(f"request={request!r:.80}: it must be a Request.")
        names = [field.name for field in dataclasses.fields(cls)]
        draws = [field.name for field in dataclasses.fields(Sampling)]
        for name in options:
            if name not in names + draws:
                close = difflib.get_close_matches(name, names + draws, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"there is no option {name!r}.{hint}")
        own = {name: options[name] for name in names if name in options}
        drawn = {name: options[name] for name in draws if name in options}
        if drawn:
            own["sampling"] = dataclasses.replace(own.get("sampling", request.sampling), **drawn)
        return dataclasses.replace(request, **own)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def stop_ids(tokens: Any) -> tuple[int, ...]:
    """Stop tokens, given as one, several or an array of them.

    >>> stop_ids(5), stop_ids(np.array([5, 7]))
    ((5,), (5, 7))
    """
    tokens = plain(tokens)
    if isinstance(tokens, int | float):
        tokens = (tokens,)
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        raise ValueError(f"stop_tokens={tokens!r:.80}: it must be a token or several.")
    return tuple(_whole("stop_tokens", token, 0, most=2**31 - 1) for token in tokens)


def token_rows(prompts: Any, words: int | None, tokenizer: Tokenizer | None) -> list[np.ndarray]:
    """Prompts as rows of int32.

    Args:
        prompts: tokens as an array [B T], an array [T] or a list of them for a single prompt, or a
            list of such rows of any lengths; or a text, or a list of texts.
        words: W, size of the model's vocabulary; None where it is not known.
        tokenizer: what makes tokens of texts.

    Raises:
        ValueError: anything else, an empty prompt, or a token that is not in the vocabulary.

    >>> [row.tolist() for row in token_rows([3, 1], 10, None)]
    [[3, 1]]
    >>> token_rows([[3, -100]], 10, None)
    Traceback (most recent call last):
    ValueError: prompt 0 has token -100: the model's tokens are 0 to 9. Is the tokenizer this...
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, bytes | bytearray | dict | set) or not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r:.80}: {_FORMS}")
    if getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts={prompts!r:.80}: {_FORMS}")
    rows = np.asarray(prompts) if hasattr(prompts, "dtype") else list(prompts)
    if len(rows) and all(isinstance(row, str) for row in rows):
        if tokenizer is None:
            raise ValueError("prompts are texts: give the tokenizer, as tokenizer=...")
        rows = tokenizer.encode([str(row) for row in rows])
    elif len(rows) and all(isinstance(plain(row), int | float) for row in rows):
        rows = [rows]
    if not len(rows):
        raise ValueError("prompts: there must be at least one.")
    return [_row(number, row, words) for number, row in enumerate(rows)]


_FORMS = (
    "they must be whole numbers as an array [B T] or [T], a list of such rows, or texts with a "
    "tokenizer."
)


def _row(number: int, row: Any, words: int | None) -> np.ndarray:
    if isinstance(row, str | bytes):
        raise ValueError(f"prompts have texts among tokens, such as {row!r:.80}: {_FORMS}")
    try:
        array = np.asarray(row if hasattr(row, "dtype") else list(row))
    except (TypeError, ValueError, OverflowError):  # no sequence, or rows within rows
        array = np.empty((0, 0))
    if array.ndim == 1 and not array.size:
        raise ValueError(f"prompts: none may be empty; prompt {number} is.")
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        what = f"{array.dtype} of shape {array.shape}" if array.size else f"{row!r:.80}"
        raise ValueError(f"prompt {number} is {what}: {_FORMS}")
    most = 2**31 if words is None else words
    wrong = array[(array < 0) | (array >= most)]
    if wrong.size:
        raise ValueError(
            f"prompt {number} has token {wrong[0]}: the model's tokens are 0 to {most - 1}. Is the "
            "tokenizer this model's?"
        )
    return array.astype(np.int32)


def cache_length(need: int, limit: int | None = None, multiple: int = 1) -> int:
    """The slots of a cache for `need` tokens: one of few numbers, each a program of its own.

    They are 256, 512, 1024, 2048, 4096, and from there the multiples of a quarter of the power of
    two below: 5120, 6144, 7168, 8192, 10240, ...

    Args:
        need: tokens of the longest row.
        limit: positions that the model has; a cache that needs no more has no more than those,
            rounded up to 128.
        multiple: what the length is rounded up to in the end, as the slots of a mesh want it.

    >>> [cache_length(n) for n in (3, 300, 4097, 9000)]
    [256, 512, 5120, 10240]
    >>> cache_length(130, limit=160)
    256
    """
    power = max(256, 1 << (need - 1).bit_length())
    if power > 4096:
        step = power // 8
        power = -(-need // step) * step
    if limit is not None and need <= limit:
        power = min(power, -(-limit // 128) * 128)
    return -(-power // multiple) * multiple


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    value = plain(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        to = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r:.80}: it must be a whole number {to}.")
    return value
