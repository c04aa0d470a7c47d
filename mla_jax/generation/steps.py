"""Jitted steps and an on-device loop for a layer or a model.

`generate` takes none of these steps: its loop on the device, with drafts, is in `loop`.

A model is whatever has `init_cache`, `extend` and `logits`, as `models.Decoder` has; `prefill` and
`decode` are made of these where it has none. A layer has `prefill` and `decode` alone.

The cache is donated: the new one lives in the old one's memory, so the old must not be used again.
A step compiles once per shape; lengths are data.

Letters: B batch rows, T tokens, W words of the vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mla_jax import sharding
from mla_jax.cache import Cache
from mla_jax.generation import bound as _bound
from mla_jax.generation.request import stop_ids
from mla_jax.generation.sampling import Sampling, check_sampling
from mla_jax.generation.sampling import sample as sample
from mla_jax.plain import Plain, Whole


@functools.partial(jax.jit, donate_argnames=("cache",))
def prefill_step(model, x, cache, lengths: Int[Array, "B"] | Plain | None = None):
    """`model.prefill(x, cache, lengths)`, jitted, the cache donated.

    Args:
        model: a `MultiHeadLatentAttention`, a `models.Decoder`, or what has `extend` and `logits`.
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
    return _bound.prefill(model, x, cache, lengths)


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
    return _bound.decode(model, x, cache)


def decode_loop(
    model,
    tokens: Int[Array, "B"] | Plain,
    cache: Any,
    *,
    steps: Whole,
    key: Key[Array, ""] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
) -> tuple[Int[Array, "B steps"], Int[Array, "B"], Any]:
    """Generates up to `steps` tokens per row on the device, in one call.

    Args:
        model: `models.Decoder`, or what has `extend` and `logits`.
        tokens: int [B], each row's newest token, which its cache does not hold yet.
        cache: the model's cache, prefilled; donated.
        steps: tokens to generate, at least 1.
        key: of jax.random; needed where temperature is above 0.
        temperature, top_k, top_p, min_p: as in `sample`; 0 is greedy.
        stop_tokens: a row that draws one of these stops; its cache grows no further. A row whose
            newest token already is one stays as it is.

    Returns:
        tokens [B steps] int32, where a row goes on after its stop token with that token repeated;
        lengths [B], how many of them count, the stop token included; and the cache, which holds
        all counted tokens but each row's last.

    Raises:
        ValueError: arguments out of range; or, outside jit, a negative token, or a row without
            room for `steps` tokens.
        FloatingPointError: outside jit, logits that are not finite; the message names row and step.

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
    if not isinstance(steps, int | np.integer) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps={steps!r}: it must be a whole number of at least 1.")
    if not isinstance(tokens, jax.Array):
        tokens = jnp.asarray(np.asarray(tokens))
    if tokens.ndim != 1 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B], the newest "
            "token of each row."
        )
    if not isinstance(tokens, jax.core.Tracer) and (np.asarray(tokens) < 0).any():
        raise ValueError(f"tokens={np.asarray(tokens)}: a token is at least 0.")
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    check_sampling(None, key, **options)
    _check_room(cache, steps)
    drawn, lengths, cache, bad = _loop(
        model, tokens, cache, key, steps=steps, sampling=Sampling(**options),
        stop_tokens=stop_ids(stop_tokens),
    )  # fmt: skip
    if not isinstance(bad, jax.core.Tracer):
        check_finite(np.asarray(bad))
    return drawn, lengths, cache


def finite(logits: Float[Array, "... W"]) -> Bool[Array, "..."]:
    """Whether a word can be drawn from logits: some may be -inf, none NaN or +inf, not all -inf.

    >>> finite(jnp.array([[0.0, -jnp.inf], [0.0, jnp.nan], [-jnp.inf, -jnp.inf]]))
    Array([ True, False, False], dtype=bool)
    """
    return jnp.isfinite(logits.max(-1))


def check_finite(bad: np.ndarray) -> None:
    """Raises FloatingPointError for the first row whose logits were not finite.

    Args:
        bad: int [B], the step at which that was so; -1 where it never was.

    >>> check_finite(np.array([-1, 3]))
    Traceback (most recent call last):
    FloatingPointError: row 1, step 3: the logits are not finite. float16 ends at 65504, where...
    """
    rows = np.flatnonzero(bad >= 0)
    if rows.size:
        row = rows[0]
        raise FloatingPointError(
            f"row {row}, step {bad[row]}: the logits are not finite. float16 ends at 65504, where "
            "bfloat16 and float32 reach 3e38; or weights hold NaN, or a token is no word."
        )


@functools.partial(
    jax.jit, static_argnames=("steps", "sampling", "stop_tokens"), donate_argnames=("cache",)
)
def _loop(model, tokens, cache, key, *, steps, sampling, stop_tokens):
    stops = jnp.asarray(stop_tokens, jnp.int32)

    def ended(token):
        return (token[:, None] == stops[None]).any(-1)

    def step(carry, given):
        token, active, cache, bad = carry
        number, step_key = given
        lengths = active.astype(jnp.int32) if stop_tokens else None
        logits, cache = _bound.prefill(model, token[:, None], cache, lengths)
        drawn = sharding.move(sampling.draw(logits[:, 0], step_key))
        token = jnp.where(active, drawn, token)
        fine = sharding.move(finite(logits[:, 0]))
        bad = jnp.where((bad < 0) & active & ~fine, number, bad)
        return (token, active & ~ended(token), cache, bad), (token, active)

    keys = None if key is None else jax.random.split(key, steps)
    token = tokens.astype(jnp.int32)
    state = token, ~ended(token), jnp.full(tokens.shape, -1, jnp.int32)
    token, active, bad = sharding.whole(state, cache.length)
    carry = (token, active, cache, bad)
    numbers = jnp.arange(steps, dtype=jnp.int32)
    (_, _, cache, bad), (drawn, counted) = lax.scan(step, carry, (numbers, keys))
    return drawn.T, counted.sum(0, dtype=jnp.int32), cache, bad


def _check_room(cache: Cache, steps: Whole) -> None:
    if isinstance(cache.length, jax.core.Tracer):
        return
    held = np.asarray(cache.length)
    if (held + steps > cache.max_length).any():
        raise ValueError(
            f"steps={steps} do not fit: rows hold {held.tolist()} of max_length="
            f"{cache.max_length} tokens. Make the cache longer."
        )
