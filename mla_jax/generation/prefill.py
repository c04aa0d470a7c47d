"""Prefill: prompts go into the cache in chunks of a few fixed widths. It begins in `fill`.

A prompt's last chunk is padded, so that prompts of any length make chunks of a few shapes: another
prompt compiles nothing, unless it needs a shape that was not used yet. A chunk holds a few rows'
prompts, as whole as its tokens allow, rather than a piece of every row's. For a piece attends to
those before it through the cache, whose latents are expanded again for every chunk.

Letters: B rows, P prompts, R rows of a chunk, T its width, W words, D hidden size.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mla_jax import sharding
from mla_jax.cache import PAGE, Cache
from mla_jax.generation.bound import Bound
from mla_jax.generation.clock import Clock
from mla_jax.generation.drafts import Drafter
from mla_jax.generation.loop import fork, log_probabilities
from mla_jax.generation.request import Request
from mla_jax.generation.steps import finite

WIDTHS = (128, 512, 2048, 4096, 8192)  # tokens of a row in one chunk
TOKENS = 16384  # of all rows together, in one chunk: bounds the experts' activations
_SCORED = 2048  # tokens of all rows together in one chunk whose logits are all made


def fill(
    bound: Bound, prompts: list[np.ndarray], cache: Cache, state: Any, drafter: Drafter,
    held: np.ndarray, shape: Any, request: Request, clock: Clock,
) -> tuple[Any, Cache, Any]:  # fmt: skip
    """Puts the prompts into all B rows: what they begin with in common once, and samples as copies.

    Args:
        bound: the model.
        prompts: tokens of the P prompts; row j P + p is sample j of prompt p.
        cache, state: of the model and of the drafter; donated.
        drafter: hears of the prompts.
        held: int32 [B], tokens that the rows hold already.
        shape: logits [1 1 W] and states [1 1 D], as `bound.output_shape` gives them.
        request: says how many samples there are of every prompt.
        clock: keeps the time to compile apart from the time to run.

    Returns:
        logits [P W] and states [P D] of the prompts' last tokens, the cache and the drafter's
        state. On a mesh that splits rows the first two have all B rows: there every row is
        prefilled, because a copy would come from another device.
    """
    prompts = prompts * request.samples if cache.parts else prompts
    last = tuple(np.zeros((len(prompts), one.shape[-1]), one.dtype) for one in shape)
    held, rests = held[: len(prompts)], prompts
    if cache.pages is not None and not held.any() and (common := shared_prefix(prompts)):
        last, cache, state = clock.call(
            prefill, bound, [prompts[0][:common]], cache, state, drafter, held, last
        )
        others = np.arange(cache.batch_size) < len(prompts)
        cache, state = clock.call(spread, cache, state, drafter, 0, others, common)
        held, rests = held + common, [prompt[common:] for prompt in prompts]
    last, cache, state = clock.call(prefill, bound, rests, cache, state, drafter, held, last)
    if len(prompts) < cache.batch_size:
        lengths = np.asarray(cache.length)
        for row in range(len(prompts)):
            same = np.arange(cache.batch_size) % len(prompts) == row
            cache, state = clock.call(spread, cache, state, drafter, row, same, int(lengths[row]))
    return last, cache, state


def widths(longest: int, most: int) -> list[int]:
    """The widths of the chunks that hold a prompt, one behind the other.

    More than half of all their tokens are the prompt's, unless it has 64 or fewer: then there is
    one chunk of 128.

    Args:
        longest: tokens of the prompt.
        most: tokens of a chunk, at most; below 128 it is the only width.

    >>> widths(100, TOKENS), widths(300, TOKENS), widths(700, TOKENS)
    ([128], [512], [512, 128, 128])
    """
    allowed = [width for width in WIDTHS if width <= most] or [most]
    chunks = []
    while longest > 0:
        over = [width for width in allowed if width >= longest]
        under = [width for width in allowed if width < longest]
        whole = not under
        if over and under:  # a second chunk costs about a quarter of a step between two widths
            whole = longest > max(over[0] // 2, under[-1] + (over[0] - under[-1]) // 4)
        chunks.append(over[0] if whole else under[-1])
        longest -= chunks[-1]
    return chunks


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of R rows' prompts.

    Attributes:
        start: the first of the rows.
        tokens, following: int32 [R T], the tokens, and those that come after each.
        lengths: int32 [R], how many of them count.
        known: int32 [R], of how many the next token is known: all but a prompt's last.
        first: whether the rows' prompts begin with it.
    """

    start: int
    tokens: np.ndarray
    following: np.ndarray
    lengths: np.ndarray
    known: np.ndarray
    first: bool


def chunks(prompts: Sequence[np.ndarray], tokens: int, parts: int = 0) -> Iterator[Chunk]:
    """The chunks of prompts, of at most so many tokens each.

    On a mesh that splits rows in so many `parts`, a chunk is of all rows and so many tokens on
    every device: a few rows whole would leave most devices without work.
    """
    count, longest = len(prompts), max(map(len, prompts))
    if parts:
        rows, tokens = count, max(tokens * parts, count)
    else:
        rows = min(count, max(1, tokens // widths(longest, tokens)[0]))
    plan = widths(longest, tokens // rows)
    padded = np.zeros((count, sum(plan) + 1), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    for first in range(0, count, rows):
        start = min(first, count - rows)  # the last rows overlap the ones before, given no tokens
        own, fresh = slice(start, start + rows), np.arange(start, start + rows) >= first
        begin = 0
        for width in plan:
            inside, known = (
                np.where(fresh, np.clip(stop - begin, 0, width), 0).astype(np.int32)
                for stop in (lengths[own], lengths[own] - 1)
            )
            if not inside.any():
                break
            part, following = (padded[own, at : at + width] for at in (begin, begin + 1))
            yield Chunk(start, part, following, inside, known, begin == 0)
            begin += width


def prefill(
    bound: Bound, prompts: list[np.ndarray], cache: Cache, state: Any, drafter: Drafter,
    held: np.ndarray, last: Any,
) -> tuple[Any, Cache, Any]:  # fmt: skip
    """Puts prompts into the first rows of a cache, behind what they hold.

    Args:
        bound: the model.
        prompts: tokens of the first rows.
        cache, state: of the model and of the drafter; donated.
        drafter: hears of the prompts.
        held: int [B], tokens that the cache holds already.
        last: logits [P W] and states [P D] to be replaced by those of the prompts' last tokens;
            donated.

    Returns:
        logits and states of the prompts' last tokens, the cache and the drafter's state.
    """
    last = sharding.whole(last, cache.length)
    for chunk in chunks(prompts, TOKENS, cache.parts):
        fresh = chunk.first and not held[chunk.start : chunk.start + len(chunk.tokens)].any()
        last, cache, state = _chunk(
            bound, chunk.tokens, chunk.following, chunk.lengths, chunk.known,
            np.int32(chunk.start), cache, state, last, drafter=drafter, fresh=fresh,
        )  # fmt: skip
    return last, cache, state


@functools.partial(
    jax.jit, static_argnames=("drafter", "fresh"), donate_argnames=("cache", "state", "last")
)
def _chunk(
    bound, tokens, following, lengths, known, start, cache, state, last, *, drafter, fresh
):  # fmt: skip
    """A `Chunk`, whose R rows begin at row `start`; the rest is as in `prefill`.

    In `last` its rows get what belongs to the last of their tokens in this chunk, if they have any:
    a prompt's last chunk comes last.
    """
    model, whole, whole_state = bound.model, cache, state
    rows = lambda cache: _rows(cache, start, len(tokens), fresh)  # noqa: E731
    hidden, cache = model.extend(tokens, rows(cache), lengths)
    state = drafter.prefill(model, hidden, following, known, drafter.map_caches(rows, state))
    final = jnp.maximum(lengths - 1, 0)[:, None, None]
    ended = jnp.take_along_axis(hidden, final, axis=1)
    found = sharding.move(model.logits(ended)[:, 0]), sharding.move(ended[:, 0])

    def put(array, new):
        old = lax.dynamic_slice_in_dim(array, start, len(new))
        new = jnp.where(lengths[:, None] > 0, new.astype(array.dtype), old)
        return lax.dynamic_update_slice_in_dim(array, new, start, 0)

    extended = iter(drafter.caches(state))
    put_back = lambda cache: cache.with_rows(start, next(extended))  # noqa: E731
    whole_state = drafter.map_caches(put_back, whole_state)
    return jax.tree.map(put, last, found), whole.with_rows(start, cache), whole_state


def _rows(cache, start, count, fresh):
    own = cache.rows(start, count)
    return own.as_fresh() if fresh else own


def shared_prefix(prompts: list[np.ndarray]) -> int:
    """Tokens, in whole pages, with which all prompts begin; at least one of each is left.

    >>> shared_prefix([np.arange(300), np.arange(290)])
    256
    """
    if len(prompts) < 2:
        return 0
    least = min(map(len, prompts))
    first = prompts[0][:least]
    common = min(
        least if (prompt[:least] == first).all() else int((prompt[:least] != first).argmax())
        for prompt in prompts
    )
    # The last one's next token must be known to a drafter, too.
    return max(common - 1, 0) // PAGE * PAGE


def spread(
    cache: Cache, state: Any, drafter: Drafter, source: int, rows: np.ndarray, length: int
) -> tuple[Cache, Any]:
    """Gives rows the first `length` tokens of row `source`; of a drafter, what it knows of them."""
    give = lambda cache, length: fork(cache, np.int32(source), rows, np.int32(length))  # noqa: E731
    own = [int(np.asarray(held.length)[source]) for held in drafter.caches(state)]
    lengths = iter(own)
    return give(cache, length), drafter.map_caches(lambda held: give(held, next(lengths)), state)


def score_rows(bound: Bound, rows: list[np.ndarray], cache: Cache) -> tuple[Any, np.ndarray]:
    """Log probabilities [B S] of every token but the first, and where logits were not finite [B].

    Args:
        bound: the model.
        rows: tokens.
        cache: empty, with room for the rows; donated.
    """
    longest = max(map(len, rows))
    found = np.zeros((len(rows), longest), np.float32)
    bad = np.full(len(rows), -1)
    done = np.zeros(len(rows), int)
    for chunk in chunks(rows, _SCORED, cache.parts):
        new, fine, cache = _score_chunk(
            bound, chunk.tokens, chunk.following, chunk.lengths, np.int32(chunk.start), cache,
            fresh=chunk.first,
        )  # fmt: skip
        new, fine = np.asarray(new), np.asarray(fine)
        for index, (known, length) in enumerate(zip(chunk.known, chunk.lengths, strict=True)):
            row = chunk.start + index
            found[row, done[row] + 1 : done[row] + 1 + known] = new[index, :known]
            wrong = np.flatnonzero(~fine[index, :known])
            if wrong.size and bad[row] < 0:
                bad[row] = done[row] + wrong[0]
            done[row] += length
    return found, bad


@functools.partial(jax.jit, static_argnames="fresh", donate_argnames="cache")
def _score_chunk(bound, tokens, following, lengths, start, cache, *, fresh):
    model, own = bound.model, _rows(cache, start, len(tokens), fresh)
    hidden, own = model.extend(tokens, own, lengths)
    logits = model.logits(hidden)
    found = sharding.move(log_probabilities(logits, following)), sharding.move(finite(logits))
    return *found, cache.with_rows(start, own)
