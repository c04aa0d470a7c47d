"""Both forms of MLA attention, as short as the algebra: what every other backend is held to.

Softmax over S slots of scale (pattern . latent + q_rope . k_rope), weights times latents: that is
the absorbed form. The expanded form is the same with per-head keys and values. Everything runs in
float32, or in float64 where the operands are; a [B N T S] array is made.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels.
"""

import functools

import jax
import jax.numpy as jnp


def why_not(call, target) -> str | None:
    """None: the reference serves every shape on every device."""
    del call, target
    return None


@functools.partial(jax.jit, static_argnames="call")
def latent_attention(queries, store, seen, call):
    """The absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""
    held = store.block(0, store.slots)
    keys, value = (held["latent"], held["k_rope"]), held["latent"]
    return _attend(queries, keys, value, seen, call)


@functools.partial(jax.jit, static_argnames="call")
def expanded_attention(queries, store, seen, call):
    """The expanded form (arXiv 2405.04434, equations 9 to 19)."""
    held = store.block(0, store.slots)
    return _attend(queries, (held["k_nope"], held["k_rope"]), held["value"], seen, call)


@functools.partial(jax.jit, static_argnames="call")
def context_attention(queries, store, seen, call, *, kv_b):
    """The expanded form over cached latents, all of which are expanded at once."""
    held = store.block(0, store.slots)
    used = seen.visible(jnp.arange(store.slots, dtype=jnp.int32)).any(axis=(1, 2))
    latent = jnp.where(used[..., None], held["latent"], 0)
    wide = jnp.promote_types(latent.dtype, jnp.float32)
    expanded = jnp.einsum(
        "BSR,RNK->BSNK", latent.astype(wide), kv_b.astype(wide), precision="highest"
    )
    k_nope, value = jnp.split(expanded, [queries[0].shape[-1]], axis=-1)
    return _attend(queries, (k_nope, held["k_rope"]), value, seen, call)


def _attend(queries, keys, value, seen, call):
    """Softmax attention where scores are the sum over pairs of query and key of their products."""
    seen = seen.visible(jnp.arange(value.shape[1], dtype=jnp.int32))
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    used = seen.any(axis=(1, 2))  # [B S]: any other slot may hold NaN, and 0 x NaN is NaN
    scores = jnp.zeros((), dtype)
    for query, key in zip(queries, keys, strict=True):
        key = jnp.where(used.reshape(*used.shape, *[1] * (key.ndim - 2)), key, 0)
        letters = "BTNK,BSK->BNTS" if key.ndim == 3 else "BTNK,BSNK->BNTS"
        scores += jnp.einsum(letters, query.astype(dtype), key.astype(dtype), precision="highest")
    scores *= call.scale
    if call.soft_cap is not None:
        scores = call.soft_cap * jnp.tanh(scores / call.soft_cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1)
    lse = jnp.where(total != 0, jnp.log(jnp.where(total != 0, total, 1)) + top[..., 0], -jnp.inf)
    weights /= jnp.where(total != 0, total, 1)[..., None]
    value = jnp.where(used.reshape(*used.shape, *[1] * (value.ndim - 2)), value, 0)
    letters = "BNTS,BSV->BTNV" if value.ndim == 3 else "BNTS,BSNV->BTNV"
    out = jnp.einsum(letters, weights, value.astype(dtype), precision="highest")
    return out.astype(queries[0].dtype), jnp.swapaxes(lse, 1, 2)
