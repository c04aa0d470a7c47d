"""The loop on the device: rounds of draft, verify and write; without drafts it decodes plainly.

At every place the model's own token is drawn, and drafts count as far as they are those (Leviathan
et al. 2023, arXiv 2211.17192, for drafts that are certain): sampled output is as likely as without
them, and greedy output the same up to rounding.

Letters: B rows, S tokens of a text, W words, D hidden size, K drafted tokens, C = K + 1.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mla_jax import sharding
from mla_jax.cache import Cache
from mla_jax.generation.sampling import Sampling, mark_seen
from mla_jax.generation.steps import finite
from mla_jax.plain import Ready

_GRAPHS = "xla_gpu_enable_command_buffer"  # kinds of operations, by default no loops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Writing:
    """What goes from round to round.

    Attributes:
        text: int32 [B S], the prompts of this call and what was written.
        length: int32 [B], tokens of every text.
        held: int32 [B], tokens that the cache held before this call's. It holds `held + length - 1`
            of every row: all but the last.
        goal: int32 [B], the length at which a row ends.
        active: bool [B], rows that go on.
        cache: of the model.
        state: of the drafter.
        key: of the sampling.
        seen: bool [B W], tokens that a repetition penalty is for; None without one.
        logprobs: float32 [B S], log probabilities of the written tokens; None unless asked for.
        bad: int32 [B], the step at which a row's logits were not finite, or -1.
        drafted: int32 [2], drafts, and those of them that were right.
    """

    text: Int[Array, "B S"]
    length: Int[Array, "B"]
    held: Int[Array, "B"]
    goal: Int[Array, "B"]
    active: Bool[Array, "B"]
    cache: Cache
    state: Any
    key: Key[Array, ""]
    seen: Bool[Array, "B W"] | None
    logprobs: Float[Array, "B S"] | None
    bad: Int[Array, "B"]
    drafted: Int[Array, "2"]

    def put(
        self, drawn: Int[Array, "B C"], logits: Float[Array, "B C W"], count: Int[Array, "B"],
        stops: Int[Ready, "stops"], prompt_lengths: Int[Ready, "B"],
    ) -> Self:  # fmt: skip
        """Writes the first `count` drawn tokens of every active row, or up to a stop token.

        `prompt_lengths` are those of this call's prompts, from which steps are counted.
        """
        rows = jnp.arange(drawn.shape[0], dtype=jnp.int32)[:, None]
        offsets = jnp.arange(drawn.shape[1], dtype=jnp.int32)[None]
        count = jnp.where(self.active, jnp.minimum(count, self.goal - self.length), 0)
        stopping = (drawn[..., None] == stops[None, None]).any(-1) & (offsets < count[:, None])
        stopped = stopping.any(1)
        count = jnp.where(stopped, lax.argmax(stopping, 1, jnp.int32) + 1, count)
        counts = offsets < count[:, None]
        place = jnp.where(counts, self.length[:, None] + offsets, self.text.shape[1])
        wrong = counts & ~sharding.move(finite(logits))
        step = self.length - prompt_lengths + lax.argmax(wrong, 1, jnp.int32)
        changes: dict[str, Any] = {
            "text": self.text.at[rows, place].set(drawn, mode="drop"),
            "length": self.length + count,
            "active": self.active & ~stopped & (self.length + count < self.goal),
            "bad": jnp.where((self.bad < 0) & wrong.any(1), step, self.bad),
        }
        if self.seen is not None:
            changes["seen"] = mark_seen(self.seen, drawn, count)
        if self.logprobs is not None:
            new = sharding.move(log_probabilities(logits, drawn))
            changes["logprobs"] = self.logprobs.at[rows, place].set(new, mode="drop")
        return dataclasses.replace(self, **changes)


class News(NamedTuple):
    """What the host hears of some rounds, in arrays of its own: the `Writing` is donated on.

    Attributes:
        tokens: int32 [B L], what each row wrote and, behind that, anything.
        length, active, bad: see `Writing`.
        rounds: how many there were.
    """

    tokens: Int[Array, "B L"]
    length: Int[Array, "B"]
    active: Bool[Array, "B"]
    bad: Int[Array, "B"]
    rounds: Int[Array, ""]

    @classmethod
    def of(cls, writing: Writing, tokens: Int[Array, "B L"], rounds: Int[Array, ""]) -> Self:
        """Of the `Writing` after these rounds."""
        return cls(tokens, writing.length, writing.active, writing.bad, rounds)


def log_probabilities(
    logits: Float[Array, "B T W"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Log probabilities of tokens, float32.

    >>> log_probabilities(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]])).round(3)
    Array([[-1.386, -1.386]], dtype=float32)
    """
    rows = sharding.spec(logits)[:2]
    logits, tokens = sharding.move(logits, *rows), sharding.move(tokens, *rows)
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("drafter", "sampling", "logprobs", "samples"),
    donate_argnames=("cache", "state"),
)  # fmt: skip
def begin(
    last, text, prompt_lengths, held, goal, seen, stops, key, cache, state, *, drafter, sampling,
    logprobs, samples,
):  # fmt: skip
    """A `Writing` with every row's first token, out of what the prefill left, and its `News`.

    Args:
        last: logits [P W] and states [P D] of the P prompts' last tokens; row j P + p of B = P n is
            sample j of prompt p.
        text: int32 [B S] with the prompts.
        prompt_lengths: int32 [B], tokens of this call's prompts.
        held, goal, seen, cache, state: see `Writing`.
        stops: int32, stop tokens.
        key: of the sampling.
        drafter, sampling, logprobs, samples: how to go on; `samples` is n.
    """
    logits, hidden = (jnp.tile(each, (samples, 1)) for each in last)
    key, own = jax.random.split(key)
    drawn = sampling.draw(logits, own, seen)
    none = jnp.full(prompt_lengths.shape, -1, jnp.int32)
    writing = Writing(
        text=text, length=prompt_lengths, held=held, goal=goal, active=prompt_lengths < goal,
        cache=cache, state=drafter.begin(hidden, state), key=key, seen=seen,
        logprobs=jnp.zeros(text.shape, jnp.float32) if logprobs else None, bad=none,
        drafted=jnp.zeros((2,), jnp.int32),
    )  # fmt: skip
    one = jnp.ones_like(prompt_lengths)
    writing = writing.put(drawn[:, None], logits[:, None], one, stops, prompt_lengths)
    return writing, News.of(writing, drawn[:, None], jnp.int32(0))


_jit_block = functools.partial(
    jax.jit, static_argnames=("drafter", "sampling", "steps"), donate_argnames=("writing",)
)


@_jit_block
def run_block(bound, writing, stops, prompt_lengths, *, drafter, sampling, steps):
    """Up to `steps` rounds; fewer where all rows have ended.

    Args:
        bound: the model, as a `Bound`.
        writing: donated.
        stops: int32, stop tokens.
        prompt_lengths: int32 [B], tokens of this call's prompts.
        drafter, sampling, steps: how.

    Returns:
        the new `Writing` and its `News`, with tokens [B steps (K+1)].
    """
    model = bound.model
    before = writing.length

    def round_(carry):
        writing, done = carry
        rows = jnp.arange(before.shape[0], dtype=jnp.int32)
        last = writing.text[rows, writing.length - 1][:, None]
        draft, state = drafter.propose(model, writing.text, writing.length, writing.state)
        given = jnp.concatenate([last, draft], axis=1)
        counts = jnp.where(writing.active, jnp.int32(1 + drafter.count), 0)
        hidden, cache = model.extend(given, writing.cache, counts)
        logits = model.logits(hidden)
        key, own = jax.random.split(writing.key)
        # What is written is whole on every device: the host of every process reads it.
        drawn = sharding.move(_draw(sampling, logits, own, writing.seen, draft))
        right = jnp.cumprod(draft == drawn[:, :-1], axis=1).sum(1, dtype=jnp.int32)
        counted = jnp.stack([
            jnp.where(writing.active, jnp.int32(drafter.count), 0).sum(dtype=jnp.int32),
            jnp.where(writing.active, right, 0).sum(dtype=jnp.int32),
        ])  # fmt: skip
        writing = dataclasses.replace(
            writing, cache=cache, key=key, state=drafter.heard(hidden, state),
            drafted=writing.drafted + counted,
        ).put(drawn, logits, right + 1, stops, prompt_lengths)  # fmt: skip
        if drafter.count:
            cut = writing.cache.truncate(writing.held + writing.length - 1)
            writing = dataclasses.replace(writing, cache=cut)
        return writing, done + 1

    def goes_on(carry):
        writing, done = carry
        return (done < steps) & writing.active.any()

    writing, done = lax.while_loop(goes_on, round_, (writing, jnp.int32(0)))
    offsets = jnp.arange(steps * (1 + drafter.count), dtype=jnp.int32)[None]
    new = jnp.take_along_axis(writing.text, before[:, None] + offsets, axis=1, mode="clip")
    return writing, News.of(writing, new, done)


@functools.cache
def block_for(platform: str) -> Callable:
    """`run_block` as it is compiled for a platform, "cpu", "gpu" or "tpu".

    XLA for GPUs launches kernels in graphs, but leaves loops out of these, so that the host hears
    of every round before it launches the next. As part of a graph a block is launched once, which
    saves 0.2 ms a round. `XLA_FLAGS` that name the kinds of a graph count instead.
    """
    if platform != "gpu" or _GRAPHS in os.environ.get("XLA_FLAGS", ""):
        return run_block
    kinds = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
    plain = run_block.__wrapped__  # pyrefly: ignore
    return _jit_block(plain, compiler_options={_GRAPHS: kinds})


def _draw(sampling: Sampling, logits, key, seen, draft):
    """The model's own token at every place; each draft before it counts as seen."""
    batch, places, words = logits.shape
    if seen is not None:
        known = [seen]
        for place in range(places - 1):
            known.append(mark_seen(known[-1], draft[:, place : place + 1]))
        seen = jnp.stack(known, axis=1).reshape(-1, words)
    return sampling.draw(logits.reshape(-1, words), key, seen).reshape(batch, places)


@functools.partial(jax.jit, donate_argnames="cache")
def cut(cache: Cache, lengths: Int[Array, "B"]) -> Cache:
    """`cache.truncate`, jitted, the cache donated."""
    return cache.truncate(lengths)


@functools.partial(jax.jit, donate_argnames="cache")
def fork(cache: Cache, source, rows, length) -> Cache:
    """`cache.fork`, jitted, the cache donated."""
    return cache.fork(source, rows, length)
