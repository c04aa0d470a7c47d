"""Drafts: tokens that are guessed, to be verified by one step of the model over all of them.

A drafter is a hashable object, and its state a pytree that goes through the loop on the device: see
`Drafter`. The chunks of a prefill call its `prefill`, `loop.begin` its `begin`, and every round of
`loop.run_block` its `propose` and then its `heard`.

Letters: B rows, T tokens of a chunk, S tokens of a text, D hidden size, K drafted tokens,
C = K + 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax.cache import Cache

_NGRAM = 3  # tokens of the text's end that a prompt lookup looks for, then fewer


class Drafter(Protocol):
    """What guesses a few tokens ahead."""

    @property
    def count(self) -> int:
        """K, how many it guesses; where that is 0, the loop decodes plainly."""

    def init(self, model: Any, rows: int, slots: int, **options: Any) -> Any:
        """The state before the prompts; options as of the model's `init_cache`."""

    def caches(self, state: Any) -> tuple[Cache, ...]:
        """The caches in a state."""

    def map_caches(self, change: Callable[[Cache], Cache], state: Any) -> Any:
        """The state with its caches changed."""

    def prefill(
        self,
        model: Any,
        hidden: Float[Array, "B T D"],
        following: Int[Array, "B T"],
        known: Int[Array, "B"],
        state: Any,
    ) -> Any:
        """Hears of the prompts' states; of the first `known` the next token is in `following`."""

    def begin(self, hidden: Float[Array, "B D"], state: Any) -> Any:
        """Hears of the states of the prompts' last tokens, before the first `propose`."""

    def propose(
        self, model: Any, text: Int[Array, "B S"], length: Int[Array, "B"], state: Any
    ) -> tuple[Int[Array, "B K"], Any]:
        """Guesses what follows the first `length` tokens of each row."""

    def heard(self, hidden: Float[Array, "B C D"], state: Any) -> Any:
        """Hears of the model's states of each row's last token and the guesses."""


@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Looks the text's last tokens up in the text so far (Saxena 2023, prompt lookup).

    The longest match of up to three tokens wins, then the latest. Without one the last token is
    repeated: a draft costs nothing and may be right. It has no state.
    """

    count: int

    def init(self, model, rows, slots, **options):
        return ()

    def caches(self, state):
        return ()

    def map_caches(self, change, state):
        return state

    def prefill(self, model, hidden, following, known, state):
        return state

    def begin(self, hidden, state):
        return state

    def heard(self, hidden, state):
        return state

    def propose(self, model, text, length, state):
        if not self.count:
            return jnp.zeros((text.shape[0], 0), jnp.int32), state
        return look_up(text, length, self.count), state


@dataclasses.dataclass(frozen=True)
class MultiToken:
    """Asks the model's block for multi-token prediction (`models.MultiTokenPredictor`).

    Its first guess is made from the model's states, each further one from its own state of the
    guess before. Its cache then forgets what it made of guesses, and takes the model's states of
    what was written instead. The state is that cache, and the model's states [B K+1 D] of the
    positions that follow those in it.
    """

    count: int

    def init(self, model, rows, slots, **options):
        return (model.init_draft_cache(rows, slots, **options),)

    def caches(self, state):
        return state[:1]

    def map_caches(self, change, state):
        return (change(state[0]), *state[1:])

    def prefill(self, model, hidden, following, known, state):
        return (model.draft(hidden, following, state[0], known)[1],)

    def begin(self, hidden, state):
        hidden = jnp.pad(hidden[:, None], ((0, 0), (0, self.count), (0, 0)))
        return state[0], state[0].beside(hidden)

    def heard(self, hidden, state):
        return state[0], hidden

    def propose(self, model, text, length, state):
        # The states count up to position `length - 2`, the last with a known next token.
        cache, hidden = state
        start = cache.length[:, None]
        offsets = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
        following = jnp.take_along_axis(text, start + 1 + offsets, axis=1, mode="clip")
        states, cache = model.draft(hidden, following, cache)
        cache = cache.truncate(length - 1)
        last = jnp.maximum(length[:, None] - 2 - start, 0)  # a row that is done has none
        state = jnp.take_along_axis(states, last[..., None], axis=1)

        def guess(state):
            return sharding.move(model.draft_logits(state).argmax(-1).astype(jnp.int32))

        def step(carry, _):
            state, token, cache = carry
            state, cache = model.draft(state, token, cache)
            token = guess(state)
            return (state, token, cache), token[:, 0]

        first = guess(state)
        (_, _, cache), more = lax.scan(step, (state, first, cache), None, length=self.count - 1)
        guesses = jnp.concatenate([first, more.T], axis=1)
        return guesses, (cache.truncate(length - 1), hidden)


def look_up(text: Int[Array, "B S"], length: Int[Array, "B"], drafts: int) -> Int[Array, "B K"]:
    """What followed the last place where the text's last tokens stood before; see `PromptLookup`.

    >>> text = jnp.array([[1, 2, 3, 9, 1, 2, 3, 0]])
    >>> look_up(text, jnp.array([7]), 3)
    Array([[9, 1, 2]], dtype=int32)
    """
    slots = text.shape[1]
    text, length = text.astype(jnp.int32), length.astype(jnp.int32)
    index = jnp.arange(slots, dtype=jnp.int32)[None]
    rows = jnp.arange(text.shape[0], dtype=jnp.int32)[:, None]
    matched = jnp.ones(text.shape, bool)
    score = jnp.zeros(text.shape, jnp.int32)  # tokens that match, ending at each slot
    for back in range(_NGRAM):
        wanted = text[rows, jnp.maximum(length[:, None] - 1 - back, 0)]
        shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :slots]
        matched &= shifted == wanted
        score += matched
    score = jnp.where(index < length[:, None] - 1, score, 0)
    end = jax.lax.argmax(score * slots + index, 1, jnp.int32)[:, None]
    found = jnp.take_along_axis(score, end, axis=1) > 0
    ahead = end + 1 + jnp.arange(drafts, dtype=jnp.int32)[None]
    ahead = jnp.where(found, ahead, length[:, None] - 1)
    return text[rows, jnp.minimum(ahead, length[:, None] - 1)]
