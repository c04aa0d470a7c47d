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
from jaxtyping import Array, Int, Key

from mla_jax.cache import Cache
from mla_jax.generation.sampling import check_sampling, sample


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
    check_sampling(None, key, temperature, top_k, top_p)
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


def _check_room(cache: Cache, steps: int) -> None:
    if isinstance(cache.length, jax.core.Tracer):
        return
    held = np.asarray(cache.length)
    if (held + steps > cache.max_length).any():
        raise ValueError(
            f"steps={steps} do not fit: rows hold {held.tolist()} of max_length="
            f"{cache.max_length} tokens. Make the cache longer."
        )
