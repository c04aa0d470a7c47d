"""Drawing a token from logits.

What changes the logits comes in the order of transformers: the repetition penalty, then the
temperature, then top_k, top_p and min_p, each on what the one before it kept.

Letters: B rows, S tokens of a text, W words of the vocabulary.
"""

import dataclasses
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mla_jax import sharding
from mla_jax.plain import Number, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn from logits, checked once.

    Attributes:
        temperature, top_k, top_p, min_p, repetition_penalty: as in `sample`; temperature 0 takes
            the most likely token.

    Raises:
        ValueError: a value out of range.

    >>> Sampling(temperature=0.6, top_p=0.95).top_p
    0.95
    >>> Sampling(top_p=2.0)
    Traceback (most recent call last):
    ValueError: top_p=2.0: it must be above 0 and at most 1, or None.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            values[name] = value = plain(value)
            object.__setattr__(self, name, value)
        check_sampling(None, jax.random.key(0), **values)

    @property
    def penalizes(self) -> bool:
        """Whether `draw` needs to know which tokens were seen."""
        return self.repetition_penalty not in (None, 1)

    def draw(
        self,
        logits: Float[Array, "B W"],
        key: Key[Array, ""] | None,
        seen: Bool[Array, "B W"] | None = None,
    ) -> Int[Array, "B"]:
        """`sample` with these values."""
        return sample(logits, key, seen=seen, **dataclasses.asdict(self))


def sample(
    logits: Float[Array, "B W"],
    key: Key[Array, ""] | None,
    *,
    temperature: Number = 0.0,
    top_k: Whole | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
    seen: Bool[Array, "B W"] | None = None,
) -> Int[Array, "B"]:
    """Draws a token per row.

    Args:
        logits: [B W].
        key: of jax.random; not needed where temperature is 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely only.
        top_p: draw among the fewest tokens whose probabilities reach top_p (nucleus sampling,
            Holtzman et al. 2019, arXiv 1904.09751); after top_k where both are given.
        min_p: draw among tokens at least min_p times as likely as the most likely one (Nguyen et
            al. 2024, arXiv 2407.01082); after top_k and top_p.
        repetition_penalty: divides the positive logits of tokens that were seen, and multiplies
            the negative ones (Keskar et al. 2019, arXiv 1909.05858, as transformers has it); before
            the temperature, and for the most likely token too. 1 changes nothing.
        seen: bool [B W], the tokens that a penalty is for, prompt included: see `mark_seen`.

    Returns:
        int32 [B].

    Raises:
        ValueError: an argument out of range, no key where one is needed, or a penalty without
            what was seen.

    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    >>> sample(logits, None)
    Array([1, 0], dtype=int32)
    >>> sample(logits, jax.random.key(0), temperature=1.0, top_k=1)
    Array([1, 0], dtype=int32)
    >>> sample(logits, jax.random.key(0), temperature=1.0, min_p=0.5)
    Array([1, 0], dtype=int32)
    >>> seen = mark_seen(jnp.zeros((2, 3), bool), jnp.array([[1], [2]]))
    >>> sample(logits, None, repetition_penalty=3.0, seen=seen)
    Array([2, 0], dtype=int32)
    >>> sample(logits, None, temperature=1.0)
    Traceback (most recent call last):
    ValueError: temperature=1.0 draws at random: give key=jax.random.key(0).
    """
    words = logits.shape[-1]
    logits = sharding.move(logits, sharding.spec(logits)[0])  # a row's words together
    check_sampling(words, key, temperature, top_k, top_p, min_p, repetition_penalty)
    if repetition_penalty is not None and repetition_penalty != 1:
        logits = _penalized(logits, float(repetition_penalty), seen)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert key is not None  # checked above
    kept, tokens = logits.astype(jnp.float32) / float(temperature), None
    if top_k is not None or top_p is not None:
        kept, tokens = lax.top_k(kept, words if top_k is None else min(int(top_k), words))
    if top_p is not None:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < float(top_p), kept, -jnp.inf)  # the first stays: 0 < top_p
    if min_p:
        least = kept.max(axis=-1, keepdims=True) + math.log(min_p)
        kept = jnp.where(kept >= least, kept, -jnp.inf)
    choice = jax.random.categorical(key, kept)
    if tokens is not None:
        choice = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return choice.astype(jnp.int32)


def mark_seen(
    seen: Bool[Array, "B W"], tokens: Int[Array, "B S"], lengths: Int[Array, "B"] | None = None
) -> Bool[Array, "B W"]:
    """Marks tokens as seen, for the repetition penalty of `sample`.

    A loop on the device carries W bools a row (160 KiB for the largest vocabularies) and marks the
    drawn token: neither the memory nor the time of a step grows with the text, and no token counts
    twice.

    Args:
        seen: what was seen before; at the start `jnp.zeros((rows, words), bool)`.
        tokens: int [B S], new tokens of each row; those outside the vocabulary are left out.
        lengths: int [B], how many of each row's tokens count, the first ones; None is all. For one
            token a row, whether that row still writes.

    Returns:
        bool [B W].

    >>> mark_seen(jnp.zeros((2, 4), bool), jnp.array([[3, 1], [2, 0]]), jnp.array([2, 1]))
    Array([[False,  True, False,  True],
           [False, False,  True, False]], dtype=bool)
    """
    rows, words = seen.shape
    tokens = tokens.astype(jnp.int32)
    counts = tokens >= 0  # a negative index would count from the end
    if lengths is not None:
        place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        counts &= place < lengths.astype(jnp.int32)[:, None]
    tokens = jnp.where(counts, tokens, words)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return seen.at[row, tokens].set(True, mode="drop")


def check_sampling(
    words: int | None,
    key: Key[Array, ""] | None,
    temperature: Number,
    top_k: Whole | None,
    top_p: Number | None,
    min_p: Number | None = None,
    repetition_penalty: Number | None = None,
) -> None:
    """Raises ValueError where an argument of `sample` is out of range.

    Args:
        words: W of the logits; None where they are not known yet.
        key, temperature, top_k, top_p, min_p, repetition_penalty: as in `sample`.

    >>> check_sampling(None, None, 0.0, None, None, min_p=2.0)
    Traceback (most recent call last):
    ValueError: min_p=2.0: it must be at least 0 and at most 1, or None.
    """
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature}: it must be at least 0; 0 is greedy.")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random: give key=jax.random.key(0).")
    whole = isinstance(top_k, numbers.Integral) and not isinstance(top_k, bool)
    if top_k is not None and (not whole or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: it must be a whole number of at least 1, or None.")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p={top_p}: it must be above 0 and at most 1, or None.")
    if min_p is not None and (not _is_number(min_p) or not 0 <= min_p <= 1):
        raise ValueError(f"min_p={min_p}: it must be at least 0 and at most 1, or None.")
    if repetition_penalty is not None and (
        not _is_number(repetition_penalty) or not 0 < repetition_penalty < math.inf
    ):
        raise ValueError(
            f"repetition_penalty={repetition_penalty}: it must be above 0, or None; above 1 it "
            "makes repetitions less likely."
        )
    if words == 0:
        raise ValueError("logits have no words: their last axis must not be empty.")


def plain(value: Any) -> Any:
    """A number of NumPy or JAX as Python's own; everything else as it is.

    >>> import numpy as np
    >>> plain(np.int32(3)), plain(np.float32(0.5)), plain("x")
    (3, 0.5, 'x')
    """
    scalar = hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "ndim", 1) == 0
    return value.item() if scalar else value


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _penalized(logits, penalty: float, seen):
    if seen is None or seen.shape != logits.shape or seen.dtype != bool:
        have = "None" if seen is None else f"{seen.dtype} of shape {seen.shape}"
        raise ValueError(
            f"repetition_penalty={penalty} needs seen as bool of shape {logits.shape}, it is "
            f"{have}: make it by mark_seen, of the prompts and what was drawn."
        )
    logits = logits.astype(jnp.float32)
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
