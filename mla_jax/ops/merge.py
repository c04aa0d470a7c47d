"""Attention over parts of a context, merged by their log-sum-exp.

Letters: B any leading axes, V channels.
"""

import functools

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
    outs, lses = zip(*parts, strict=True)
    top = functools.reduce(jnp.maximum, lses)
    top = jnp.where(top == -jnp.inf, 0, top)
    # One part after the other: of a stack, XLA for TPUs makes a reduction that takes longer than
    # the attention.
    weights = [jnp.exp(lse - top) for lse in lses]
    total = functools.reduce(jnp.add, weights)
    safe = jnp.where(total != 0, total, 1)
    shares = [(weight / safe)[..., None] for weight in weights]
    terms = [share * out.astype(share.dtype) for share, out in zip(shares, outs, strict=True)]
    out = functools.reduce(jnp.add, terms).astype(jnp.result_type(*outs))
    return out, jnp.where(total != 0, top + jnp.log(safe), -jnp.inf)
