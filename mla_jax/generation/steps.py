"""Jitted steps and an on-device loop for whatever has `prefill` and `decode`: layer or model.

The cache is donated: the new one lives in the old one's memory, so the old must not be used again.
A step compiles once per shape; lengths are data.

Letters: B batch rows, T tokens, W words of the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mla_jax.cache import Cache


@functools.partial(jax.jit, donate_argnames=("cache",))
def prefill_step(model, x, cache, lengths: Int[Array, "B"] | None = None):
    """`model.prefill(x, cache, lengths)`, jitted, the cache donated.

    Args:
        model: a `MultiHeadLatentAttention`, a `models.Decoder`, or anything with their `prefill`.
        x: activations [B T D] of a layer, tokens [B T] of a model; rows right-padded.
        cache: as the model's `init_cache` made it; invalid afterwards.
        lengths: int [B], tokens of each row; None is T for all.

    Returns:
        (outputs [B T ...], new cache). A row that overflows has `overflowed` set: jit cannot raise.

    >>> import jax.numpy as jnp, mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> x, cache = jnp.ones((2, 5, 128)), layer.init_cache(batch_size=2, max_length=8)
    >>> y, cache = prefill_step(layer, x, cache, jnp.array([5, 3]))
    >>> y.shape, cache.length
    ((2, 5, 128), Array([5, 3], dtype=int32))
    """
    return model.prefill(x, cache, lengths)


@functools.partial(jax.jit, donate_argnames=("cache",))
def decode_step(model, x, cache):
    """`model.decode(x, cache)`, jitted, the cache donated: see `prefill_step`.

    >>> import jax.numpy as jnp, mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> y, cache = decode_step(layer, jnp.ones((2, 1, 128)), layer.init_cache(2, max_length=8))
    >>> y.shape, cache.length
    ((2, 1, 128), Array([1, 1], dtype=int32))
    """
    return model.decode(x, cache)


def sample(
    logits: Float[Array, "B W"],
    key: Key[Array, ""] | None,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Array, "B"]:
    """Draws a token per row.

    Args:
        logits: [B W].
        key: of jax.random; not needed where temperature is 0.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely only.
        top_p: draw among the fewest tokens whose probabilities reach top_p (nucleus sampling,
            Holtzman et al. 2019, arXiv 1904.09751); after top_k where both are given.

    Returns:
        int32 [B].

    Raises:
        ValueError: an argument out of range, or no key where one is needed.

    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 0.0, 1.0]])
    >>> sample(logits, None)
    Array([1, 0], dtype=int32)
    >>> sample(logits, jax.random.key(0), temperature=1.0, top_k=1)
    Array([1, 0], dtype=int32)
    >>> sample(logits, None, temperature=1.0)
    Traceback (most recent call last):
    ValueError: temperature=1.0 draws at random: give key=jax.random.key(0).
    """
    words = logits.shape[-1]
    _check_sampling(words, key, temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    assert key is not None  # checked above
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits).astype(jnp.int32)
    kept, tokens = lax.top_k(logits, words if top_k is None else min(top_k, words))
    if top_p is not None:
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.where(before < top_p, kept, -jnp.inf)  # the first always stays: 0 < top_p
    choice = jax.random.categorical(key, kept)[:, None]
    return jnp.take_along_axis(tokens, choice, axis=-1)[:, 0].astype(jnp.int32)


def decode_loop(
    model,
    tokens: Int[Array, "B"],
    cache: Any,
    *,
    steps: int,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: tuple[int, ...] = (),
) -> tuple[Int[Array, "B steps"], Int[Array, "B"], Any]:
    """Generates up to `steps` tokens per row on the device, in one call.

    Args:
        model: maps tokens [B T] and a cache to logits [B T W] by `prefill`, e.g. `models.Decoder`.
        tokens: int [B], each row's newest token, which its cache does not hold yet.
        cache: the model's cache, prefilled; donated.
        steps: tokens to generate, at least 1.
        key: of jax.random; needed where temperature is above 0.
        temperature, top_k, top_p: as in `sample`; 0 is greedy.
        stop_tokens: a row that draws one of these stops; its cache grows no further.

    Returns:
        tokens [B steps] int32, where a row goes on after its stop token with that token repeated;
        lengths [B], how many of them count, the stop token included; and the cache, which holds
        all counted tokens but each row's last.

    Raises:
        ValueError: arguments out of range; or, outside jit, a row without room for `steps` tokens.

    >>> import mla_jax
    >>> from flax import nnx
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(attention=mla_jax.MLAConfig.from_preset("tiny"))
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> cache = model.init_cache(batch_size=2, max_length=8)
    >>> tokens, lengths, cache = decode_loop(model, jnp.array([7, 8]), cache, steps=4)
    >>> tokens.shape, lengths, cache.length
    ((2, 4), Array([4, 4], dtype=int32), Array([4, 4], dtype=int32))
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: it must be a whole number of at least 1.")
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B], the newest "
            "token of each row."
        )
    _check_sampling(None, key, temperature, top_k, top_p)
    _check_room(cache, steps)
    return _loop(
        model, tokens, cache, key, steps=steps, temperature=float(temperature), top_k=top_k,
        top_p=top_p, stop_tokens=tuple(int(token) for token in stop_tokens),
    )  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("steps", "temperature", "top_k", "top_p", "stop_tokens"),
    donate_argnames=("cache",),
)
def _loop(model, tokens, cache, key, *, steps, temperature, top_k, top_p, stop_tokens):
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def step(carry, step_key):
        token, active, cache = carry
        lengths = active.astype(jnp.int32) if stop_tokens else None
        logits, cache = model.prefill(token[:, None], cache, lengths)
        drawn = sample(logits[:, 0], step_key, temperature=temperature, top_k=top_k, top_p=top_p)
        token = jnp.where(active, drawn, token)
        stopped = (token[:, None] == stops[None]).any(-1)
        return (token, active & ~stopped, cache), (token, active)

    keys = None if key is None else jax.random.split(key, steps)
    active = jnp.ones(tokens.shape, bool)
    carry = (tokens.astype(jnp.int32), active, cache)
    (_, _, cache), (drawn, counted) = lax.scan(step, carry, keys, length=steps)
    return drawn.T, counted.sum(0, dtype=jnp.int32), cache


def _check_sampling(words, key, temperature, top_k, top_p) -> None:
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: it must be at least 0; 0 is greedy.")
    if temperature > 0 and key is None:
        raise ValueError(f"temperature={temperature} draws at random: give key=jax.random.key(0).")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k={top_k!r}: it must be a whole number of at least 1, or None.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: it must be above 0 and at most 1, or None.")
    if words == 0:
        raise ValueError("logits have no words: their last axis must not be empty.")


def _check_room(cache: Cache, steps: int) -> None:
    if isinstance(cache.length, jax.core.Tracer):
        return
    held = np.asarray(cache.length)
    if (held + steps > cache.max_length).any():
        raise ValueError(
            f"steps={steps} do not fit: rows hold {held.tolist()} of max_length="
            f"{cache.max_length} tokens. Make the cache longer."
        )
