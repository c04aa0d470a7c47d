"""Attention over parts of a context, merged by their log-sum-exp.

Letters: B any leading axes, V channels.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
    *parts: tuple[Float[Array, "*B V"], Float[Array, "*B"]],
) -> tuple[Float[Array, "*B V"], Float[Array, "*B"]]:
    """Attention over disjoint sets of slots, merged: split caches, shared prefixes, devices.

    Args:
        parts: (out, lse) pairs of the same shapes, as the attention functions return them.

    Returns:
        (out, lse) as if computed over the union; where no part saw a slot, zeros and -inf.

    >>> whole = [jnp.ones((1, 1, 4, 64)), jnp.ones((1, 1, 4, 16)),
    ...          jnp.ones((1, 8, 64)), jnp.ones((1, 8, 16))]
    >>> import functools, mla_jax
    >>> attend = functools.partial(mla_jax.latent_attention, lengths=None, scale=48**-0.5)
    >>> first, last = ([*whole[:2], *(a[:, part] for a in whole[2:])]
    ...                for part in (slice(0, 3), slice(3, 8)))
    >>> merged, lse = merge_attention(attend(*first), attend(*last))
    >>> bool(jnp.allclose(merged, attend(*whole)[0])), bool(jnp.allclose(lse, attend(*whole)[1]))
    (True, True)
    """
    outs = jnp.stack([out for out, _ in parts])
    lses = jnp.stack([lse for _, lse in parts])
    top = lses.max(0)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - top[None])
    total = weights.sum(0)
    safe = jnp.where(total > 0, total, 1)
    out = ((weights / safe[None])[..., None] * outs.astype(weights.dtype)).sum(0)
    return out.astype(outs.dtype), jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
