"""Text from a whole model: tokenizer, chunked prefill, decoding on the device, drafts.

    model = mla_jax.checkpoint.load_decoder(folder)
    tokenizer = Tokenizer.from_checkpoint(folder)
    result = generate(model, tokenizer.encode(["Once upon a time"]), max_new_tokens=64)
    print(tokenizer.decode(result.tokens[0]))

A block of decode steps is one compiled program with the cache donated: the host hears of tokens a
block at a time. Speculation (Leviathan et al. 2023, arXiv 2211.17192) drafts a few tokens, verifies
them by one absorbed step over all, and cuts the rejected ones out of the cache. At every place the
model's own token is drawn, and drafts count as far as they are those: greedy output stays the same,
sampled output as likely as without (their rule, for drafts that are certain).

Drafts come from looking the last tokens up in the text so far (Saxena 2023, prompt lookup), or from
the model's block for multi-token prediction (`models.MultiTokenPredictor`): its first guess after
the model's states, each further one after its own state of the guess before. Its cache then forgets
what it made of guesses, and takes the model's states of what was written instead.

Letters: B prompts, T tokens of a step, S slots of the cache, W words, K drafted tokens.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from mla_jax.cache import Cache
from mla_jax.generation.defaults import GenerationDefaults as GenerationDefaults
from mla_jax.generation.sampling import check_sampling as check_sampling
from mla_jax.generation.sampling import mark_seen as mark_seen
from mla_jax.generation.sampling import sample as sample
from mla_jax.generation.stream import StopStrings as StopStrings
from mla_jax.generation.stream import TextStream as TextStream
from mla_jax.generation.tokenizer import Tokenizer as Tokenizer

_PREFILL_TOKENS = 16384  # of all rows together, in one chunk: bounds the experts' activations
_SLOTS = 128  # a cache's length is a multiple of
_NGRAM = 3  # tokens of the text's end that a prompt lookup looks for, then fewer


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` made.

    Attributes:
        tokens: per prompt the new tokens, up to and with the one that ended it.
        first_token_seconds: from the start to the first token of all rows, compilation aside.
        decode_seconds: from there to the end.
        compile_seconds: spent compiling.
        new_tokens: of all rows, the first ones included.
        steps: passes of the model after the prefill.
        cache_bytes: of all layers.
        accepted: share of drafted tokens that were right; None without speculation.

    >>> result = Result([[7, 1], [5, 2]], first_token_seconds=0.1, decode_seconds=0.5,
    ...                 compile_seconds=3.0, new_tokens=4, steps=1, cache_bytes=1024)
    >>> result.tokens_per_second  # the first token of each row comes from its prefill
    4.0
    """

    tokens: list[list[int]]
    first_token_seconds: float
    decode_seconds: float
    compile_seconds: float
    new_tokens: int
    steps: int
    cache_bytes: int
    accepted: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows per second of decoding."""
        after_first = self.new_tokens - len(self.tokens)
        return after_first / self.decode_seconds if self.decode_seconds > 0 else 0.0


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    speculate: int = 0,
    draft: Literal["prompt", "mtp"] = "prompt",
    block: int = 16,
    on_tokens: Callable[[int, list[int]], None] | None = None,
) -> Result:
    """Continues prompts.

    Args:
        model: a `models.Decoder`, or what has its `prefill_last`, `decode`, `init_cache`.
        prompts: token ids, at least one of each; their lengths may differ.
        max_new_tokens: of each row.
        max_length: slots of the cache; None is what the longest prompt and its new tokens need.
        temperature, top_k, top_p: as in `decoding.sample`; 0 is greedy.
        seed: of the sampling.
        stop_tokens: end a row.
        speculate: K, tokens drafted and verified at once; 0 is plain decoding. A greedy text is the
            same; a sampled one is another draw from the same distribution.
        draft: by what: "prompt" looks the text's last tokens up in it, "mtp" asks the model's block
            for multi-token prediction.
        block: decode steps in one program. Tokens are seen, and rows' ends noticed, per block.
        on_tokens: called with a row's index and its next tokens as they come.

    Returns:
        a `Result`.

    Raises:
        ValueError: an argument out of range, a prompt that does not fit, or draft="mtp" for a model
            without a block for it.

    >>> import mla_jax
    >>> model = mla_jax.checkpoint.load_decoder("DeepSeek-V2-Lite")  # doctest: +SKIP
    >>> tokenizer = Tokenizer.from_checkpoint("DeepSeek-V2-Lite")  # doctest: +SKIP
    >>> prompts = tokenizer.encode(["Once upon a time"])  # doctest: +SKIP
    >>> result = generate(model, prompts, max_new_tokens=64)  # doctest: +SKIP
    >>> print(tokenizer.decode(result.tokens[0]))  # doctest: +SKIP
    """
    _check_flags(max_new_tokens, temperature, top_k, top_p, speculate, draft, block)
    if draft == "mtp" and getattr(model, "predictor", None) is None:
        raise ValueError(
            "draft='mtp': this model has no block for multi-token prediction: load it by "
            "checkpoint.load_decoder(..., mtp=True), make it with mtp=True, or use draft='prompt'."
        )
    key = jax.random.key(seed)
    slots = _slots(model.config, prompts, max_new_tokens, max_length, speculate)
    clock = _Clock()
    rows = len(prompts)
    sampling = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
    cache = model.init_cache(rows, slots)
    draft_cache = None
    if speculate and draft == "mtp":
        draft_cache = model.init_draft_cache(rows, slots)
    cache_bytes = sum(held.nbytes for held in (cache, draft_cache) if held is not None)
    logits, state, cache, draft_cache = _prefill(model, prompts, cache, draft_cache, clock)
    first, key = clock.compile(_first, logits, key, **sampling)(logits, key)
    collector = _Collector(rows, max_new_tokens, stop_tokens, on_tokens)
    collector.add(np.asarray(first)[:, None])
    first_token = clock.lap()

    steps, drafted, right = 0, 0, 0
    if speculate:
        history = _history(prompts, first, slots)
        length = jnp.asarray([len(prompt) + 1 for prompt in prompts], jnp.int32)
        goal = length - 1 + max_new_tokens
        seen = np.asarray(length)
        carry = (history, length, cache, _ahead(state, draft_cache, speculate))
        program = clock.compile(
            _speculate_block, model, goal, carry, key, drafts=speculate, steps=block, **sampling
        )
        while not collector.done:
            carry, counts, key = program(model, goal, carry, key)
            history, length = carry[:2]
            now, text = np.asarray(length), np.asarray(history)
            collector.add([text[b, seen[b] : now[b]] for b in range(rows)])
            seen, steps = now, steps + block
            drafted, right = drafted + int(counts[0]), right + int(counts[1])
            goal = jnp.where(collector.ended, length, goal)  # no drafts for rows that stopped
    else:
        token, left = first, max_new_tokens - 1
        steps_now = min(block, left)
        program = None
        while left > 0 and not collector.done:
            if program is None or steps_now > left:
                steps_now = min(steps_now, left)
                program = clock.compile(
                    _decode_block, model, token, cache, key, steps=steps_now, **sampling
                )
            drawn, token, cache, key = program(model, token, cache, key)
            left, steps = left - steps_now, steps + steps_now
            collector.add(np.asarray(drawn))
    return Result(
        tokens=collector.tokens, first_token_seconds=first_token, decode_seconds=clock.lap(),
        compile_seconds=clock.compiling, new_tokens=sum(map(len, collector.tokens)), steps=steps,
        cache_bytes=cache_bytes, accepted=(right / max(drafted, 1)) if speculate else None,
    )  # fmt: skip


def _prefill(model, prompts, cache, draft_cache, clock):
    """Logits [B W] and state [B D] of every prompt's last token, and the two caches.

    A chunk is a few rows whole rather than a piece of all rows: then no token attends to what an
    earlier chunk left in the cache, which would be expanded again for each chunk. Chunks have one
    shape, so there are one or two programs. The state is what a predictor drafts by; it sees all
    tokens but the last of a prompt, which has none after it yet. Without one the state is None.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    count, longest = len(prompts), int(lengths.max())
    rows = min(count, max(1, _PREFILL_TOKENS // longest))
    width = min(longest, _PREFILL_TOKENS)
    chunks = math.ceil(longest / width)
    tokens = np.zeros((count, chunks * width + 1), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    ends: Any = None
    caches = (cache, draft_cache)
    programs = {}  # a prompt's first chunk has no context to attend to
    keep: Any = None
    for first in range(0, count, rows):
        start = min(first, count - rows)  # the last rows overlap the ones before, given no tokens
        fresh = np.arange(start, start + rows) >= first
        own = slice(start, start + rows)
        for begin in range(0, chunks * width, width):
            inside, known = (
                jnp.asarray(np.where(fresh, np.clip(stop - begin, 0, width), 0))
                for stop in (lengths[own], lengths[own] - 1)
            )
            part, following = (
                jnp.asarray(tokens[own, at : at + width]) for at in (begin, begin + 1)
            )
            arguments = (model, part, following, caches, inside, known, jnp.int32(start))
            fresh = begin == 0
            if fresh not in programs:
                programs[fresh] = clock.compile(_prefill_chunk, *arguments, fresh=fresh)
            new, caches = programs[fresh](*arguments)
            if ends is None:
                ends = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), new)
                keep = clock.compile(_keep, ends, new, inside, jnp.int32(start))
            ends = keep(ends, new, inside, jnp.int32(start))
    return *ends, *caches


@functools.partial(jax.jit, static_argnames="fresh", donate_argnames="caches")
def _prefill_chunk(model, tokens, following, caches, lengths, known, start, *, fresh):
    """Prefills the rows from `start` on: (logits, state) of their last tokens, and the caches."""
    rows, whole = len(tokens), caches
    is_cache = lambda node: isinstance(node, Cache)  # noqa: E731
    own = jax.tree.map(lambda cache: cache.rows(start, rows), caches, is_leaf=is_cache)
    if fresh:
        own = jax.tree.map(Cache.as_fresh, own, is_leaf=is_cache)
    cache, draft_cache = own
    if draft_cache is None:
        logits, cache = model.prefill_last(tokens, cache, lengths)
        state = None
    else:
        hidden, cache = model.extend(tokens, cache, lengths)
        _, draft_cache = model.draft(hidden, following, draft_cache, known)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        state = jnp.take_along_axis(hidden, last, axis=1)
        logits, state = model.logits(state)[:, 0], state[:, 0]
    put = lambda all_rows, part: all_rows.with_rows(start, part)  # noqa: E731
    caches = jax.tree.map(put, whole, (cache, draft_cache), is_leaf=is_cache)
    return (logits, state), caches


@functools.partial(jax.jit, donate_argnames="ends")
def _keep(ends, new, lengths, start):
    """Puts what a chunk ended with in its rows' places, where it had tokens of them."""

    def put(array, part):
        old = lax.dynamic_slice_in_dim(array, start, len(part))
        part = jnp.where(lengths[:, None] > 0, part, old)
        return lax.dynamic_update_slice_in_dim(array, part, start, 0)

    return jax.tree.map(put, ends, new)


@functools.partial(jax.jit, static_argnames=("temperature", "top_k", "top_p"))
def _first(logits, key, **sampling):
    key, own = jax.random.split(key)
    return sample(logits, own, **sampling), key


@functools.partial(
    jax.jit, static_argnames=("steps", "temperature", "top_k", "top_p"), donate_argnames=("cache",)
)
def _decode_block(model, token, cache, key, *, steps, temperature, top_k, top_p):
    """`steps` tokens [B steps], the last of them [B], the cache and the next key."""
    key, *own = jax.random.split(key, steps + 1)

    def step(carry, step_key):
        token, cache = carry
        logits, cache = model.decode(token[:, None], cache)
        drawn = sample(logits[:, 0], step_key, temperature=temperature, top_k=top_k, top_p=top_p)
        return (drawn, cache), drawn

    (token, cache), drawn = lax.scan(step, (token, cache), jnp.stack(own))
    return drawn.T, token, cache, key


@functools.partial(
    jax.jit,
    static_argnames=("drafts", "steps", "temperature", "top_k", "top_p"),
    donate_argnames=("carry",),
)
def _speculate_block(model, goal, carry, key, *, drafts, steps, **sampling):
    """`steps` rounds of draft and verify; rows that reached their goal stay as they are.

    The carry: `text` [B S+1], which holds `length` [B] tokens of each row; the cache, which holds
    all but the last of them; and what `_predict` needs, or None where drafts are looked up. It is
    returned with the numbers of drafts and of those that were right, and the next key.
    """
    rows = jnp.arange(goal.shape[0])[:, None]
    offsets = jnp.arange(drafts + 1, dtype=jnp.int32)[None]

    def round_(carry, step_key):
        (text, length, cache, ahead), counts = carry
        last = text[rows, length[:, None] - 1]
        if ahead is None:
            draft = _look_up(text, length, drafts)
            logits, cache = model.decode(jnp.concatenate([last, draft], axis=1), cache)
        else:
            draft, draft_cache = _predict(model, text, length, ahead, drafts)
            hidden, cache = model.extend(jnp.concatenate([last, draft], axis=1), cache)
            logits, ahead = model.logits(hidden), (hidden, draft_cache)
        drawn = sample(logits.reshape(-1, logits.shape[-1]), step_key, **sampling)
        drawn = drawn.reshape(logits.shape[:2])
        right = jnp.cumprod(draft == drawn[:, :-1], axis=1).sum(1, dtype=jnp.int32)
        active = length < goal
        new = jnp.where(active, jnp.minimum(right + 1, goal - length), 0)
        place = jnp.where(offsets < new[:, None], length[:, None] + offsets, text.shape[1])
        text = text.at[rows, place].set(drawn, mode="drop")
        length = length + new
        cache = cache.truncate(length - 1)
        counted = jnp.stack([jnp.where(active, drafts, 0).sum(), jnp.where(active, right, 0).sum()])
        return ((text, length, cache, ahead), counts + counted), None

    counts = jnp.zeros((2,), jnp.int32)
    key, *own = jax.random.split(key, steps + 1)
    (carry, counts), _ = lax.scan(round_, (carry, counts), jnp.stack(own))
    return carry, counts, key


def _ahead(state, draft_cache, drafts):
    """What the first round's `_predict` needs, from the prefill."""
    if draft_cache is None:
        return None
    return jnp.pad(state[:, None], ((0, 0), (0, drafts), (0, 0))), draft_cache


def _predict(model, text, length, ahead, drafts):
    """Tokens [B K] by the model's predictor, and its cache without what it made of them.

    `ahead` holds the model's states [B K+1 D] of the positions that follow those in the predictor's
    cache, and that cache. They count up to `length - 2`, the last position with a known next token.
    """
    hidden, cache = ahead
    start = cache.length[:, None]
    offsets = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    following = jnp.take_along_axis(text, start + 1 + offsets, axis=1, mode="clip")
    states, cache = model.draft(hidden, following, cache)
    cache = cache.truncate(length - 1)
    last = jnp.maximum(length[:, None] - 2 - start, 0)  # a row that is done has none
    state = jnp.take_along_axis(states, last[..., None], axis=1)

    def guess(state):
        return model.draft_logits(state).argmax(-1).astype(jnp.int32)

    def step(carry, _):
        state, token, cache = carry
        state, cache = model.draft(state, token, cache)
        token = guess(state)
        return (state, token, cache), token[:, 0]

    first = guess(state)
    (_, _, cache), more = lax.scan(step, (state, first, cache), None, length=drafts - 1)
    return jnp.concatenate([first, more.T], axis=1), cache.truncate(length - 1)


def _look_up(text: Int[Array, "B S"], length: Int[Array, "B"], drafts: int) -> Int[Array, "B K"]:
    """What followed the last place where the text's last tokens stood before; K tokens.

    The longest match of up to `_NGRAM` tokens wins, then the latest. Without one the last token is
    repeated: a draft costs nothing and may be right.
    """
    slots = text.shape[1]
    index = jnp.arange(slots, dtype=jnp.int32)[None]
    rows = jnp.arange(text.shape[0])[:, None]
    matched = jnp.ones(text.shape, bool)
    score = jnp.zeros(text.shape, jnp.int32)  # tokens that match, ending at each slot
    for back in range(_NGRAM):
        wanted = text[rows, jnp.maximum(length[:, None] - 1 - back, 0)]
        shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
        matched &= shifted == wanted
        score += matched
    score = jnp.where(index < length[:, None] - 1, score, 0)
    end = (score * slots + index).argmax(-1)[:, None]
    found = jnp.take_along_axis(score, end, axis=1) > 0
    ahead = end + 1 + jnp.arange(drafts, dtype=jnp.int32)[None]
    ahead = jnp.where(found, ahead, length[:, None] - 1)
    return text[rows, jnp.minimum(ahead, length[:, None] - 1)]


def _history(prompts, first, slots):
    text = np.zeros((len(prompts), slots + 1), np.int32)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = prompt
        text[row, len(prompt)] = first[row]
    return jnp.asarray(text)


class _Collector:
    """Tokens of every row until its stop token or its number is reached."""

    def __init__(self, rows, count, stop_tokens, on_tokens):
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self._count, self._stop, self._on_tokens = count, set(map(int, stop_tokens)), on_tokens
        self.ended = np.zeros(rows, bool)

    @property
    def done(self) -> bool:
        return bool(self.ended.all())

    def add(self, new) -> None:
        for row, tokens in enumerate(new):
            fresh = []
            for token in map(int, tokens):
                if self.ended[row]:
                    break
                fresh.append(token)
                total = len(self.tokens[row]) + len(fresh)
                self.ended[row] = token in self._stop or total >= self._count
            self.tokens[row] += fresh
            if fresh and self._on_tokens is not None:
                self._on_tokens(row, fresh)


class _Clock:
    """Seconds between laps, compilation counted apart."""

    def __init__(self):
        self.compiling = 0.0
        self._start = time.perf_counter()

    def compile(self, function, *arguments, **static):
        """The compiled program of a jitted function for these arguments."""
        started = time.perf_counter()
        program = function.lower(*arguments, **static).compile()
        spent = time.perf_counter() - started
        self.compiling += spent
        self._start += spent
        return program

    def lap(self) -> float:
        now = time.perf_counter()
        spent, self._start = now - self._start, now
        return spent


def _check_flags(max_new_tokens, temperature, top_k, top_p, speculate, draft, block) -> None:
    """What can be wrong whatever the model and the prompts are."""
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("speculate", speculate, 0),
                               ("block", block, 1)):  # fmt: skip
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}: it must be a whole number of at least {least}.")
    if draft not in ("prompt", "mtp"):
        raise ValueError(f"draft={draft!r}: it must be 'prompt' or 'mtp'.")
    if draft == "mtp" and not speculate:
        raise ValueError("draft='mtp' drafts nothing with speculate=0: say how many tokens.")
    check_sampling(None, jax.random.key(0), temperature, top_k, top_p)


def _slots(config, prompts, max_new_tokens, max_length, speculate) -> int:
    """The cache's length, after a look at the prompts and at what they need."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: there must be at least one, and none may be empty.")
    for row, prompt in enumerate(prompts):
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise ValueError(
                f"prompt {row} has token {wrong[0]}: the model has {config.vocab_size} words. Is "
                "the tokenizer this model's?"
            )
    longest = max(map(len, prompts))
    need = longest + max_new_tokens + speculate
    # Kernels want whole blocks of slots.
    slots = -(-need // _SLOTS) * _SLOTS if max_length is None else max_length
    limit = config.attention.max_position_embeddings
    if slots < need or longest + max_new_tokens > limit:
        raise ValueError(
            f"max_length={slots}: a prompt of {longest} tokens, {max_new_tokens} new ones and "
            f"{speculate} drafts need {need} slots; the model has {limit} positions."
        )
    return slots
