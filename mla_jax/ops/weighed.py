"""Attention with its weights in memory: for a look at them, and for dropout.

Backends never make the weights [B N T S] whole; here they are, in plain jax.numpy.

Letters: B batch, T query tokens, S slots, N heads, K channels of a key, V of a value.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mla_jax.cache import Store
from mla_jax.ops.seen import Seen


def weighed_attention(
    queries: tuple[Float[Array, "B T N _"], ...],
    store: Store,
    seen: Seen,
    *,
    scale: float,
    precision=None,
    rate: float = 0.0,
    key: Array | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"], Float[Array, "B N T S"]]:
    """Attention, the lse of its scores, and the float32 weights before any dropout.

    A query that sees nothing has weights 0 and lse -inf.

    Args:
        queries: pattern and q_rope, or q_nope and q_rope.
        store: latent and k_rope, or k_nope, k_rope and value; finite in all slots.
        seen: what queries may attend to.
        scale: softmax temperature.
        precision: of the matmuls.
        rate: how likely a weight is 0; the others are divided by 1 - rate.
        key: of the dropout; None drops nothing.
    """
    held = store.block(0, store.slots)
    names = ("k_nope", "k_rope", "value") if "value" in held else ("latent", "k_rope", "latent")
    *keys, value = (held[name] for name in names)
    wide = jnp.promote_types(value.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    scores = jnp.zeros((), wide)
    for query, of_key in zip(queries, keys, strict=True):
        letters = "BTNK,BSK->BNTS" if of_key.ndim == 3 else "BTNK,BSNK->BNTS"
        scores += product(letters, query, of_key)
    visible = seen.visible(jnp.arange(value.shape[1], dtype=jnp.int32))
    scores = jnp.where(visible, scale * scores, -1e30)
    lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - lse), 0)
    lse = jnp.where(visible.any(-1), lse[..., 0], -jnp.inf)
    kept = weights
    if key is not None:
        stays = jax.random.bernoulli(key, 1 - rate, weights.shape)
        kept = jnp.where(stays, weights / (1 - rate), 0)
    letters = "BNTS,BSV->BTNV" if value.ndim == 3 else "BNTS,BSNV->BTNV"
    out = product(letters, kept.astype(value.dtype), value).astype(value.dtype)
    return out, jnp.swapaxes(lse, 1, 2), weights
