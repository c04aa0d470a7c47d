"""Both forms of MLA attention, as short as the algebra: what every other backend is held to.

Softmax over S slots of scale (pattern . latent + q_rope . k_rope), weights times latents: that is
the absorbed form. The expanded form is the same with per-head keys and values. Everything runs in
float32, or in float64 where the operands are; a [B N T S] array is made.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def why_not(spec, device) -> str | None:
    """None: the reference serves every shape on every device."""
    del spec, device
    return None


def query_limits(
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None, batch: int, queries: int, slots: int
) -> Int[Array, "B T"]:
    """How many slots each query may see, the one place that says what `lengths` means.

    [B]: the queries are the last T of `lengths[b]` tokens, so query t sees lengths[b] - (T-1-t)
    slots, itself the last. [B T]: given per query. None: the queries are the last T of S.
    """
    if lengths is None:
        lengths = jnp.full((batch,), slots, jnp.int32)
    if lengths.ndim == 1:
        lengths = lengths[:, None] - (queries - 1 - jnp.arange(queries, dtype=jnp.int32))[None]
    return jnp.clip(lengths.astype(jnp.int32), 0, slots)


def visible(
    limits: Int[Array, "B T"],
    slots: Int[Array, "S"],
    *,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
) -> Bool[Array, "B #N T S"]:
    """Which slots a query attends to: causal, within its window and segment, and unmasked."""
    limits, slots = limits[:, None, :, None], slots[None, None, None]
    seen = slots < limits
    if window is not None:
        seen &= slots >= limits - window
    if segment_ids is not None:
        of_query, of_slot = segment_ids
        seen &= of_query[:, None, :, None] == of_slot[:, None, None, :]
    if mask is not None:
        seen = seen & mask
    return seen


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
    >>> attend = functools.partial(latent_attention, lengths=None, scale=48**-0.5)
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


def _attend(pairs, value, seen, scale, soft_cap):
    """Softmax attention where scores are the sum over (query, key) pairs of their products."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    used = seen.any(axis=(1, 2))  # [B S]: any other slot may hold NaN, and 0 x NaN is NaN
    scores = jnp.zeros((), dtype)
    for query, key in pairs:
        key = jnp.where(used.reshape(*used.shape, *[1] * (key.ndim - 2)), key, 0)
        letters = "BTNK,BSK->BNTS" if key.ndim == 3 else "BTNK,BSNK->BNTS"
        scores += jnp.einsum(letters, query.astype(dtype), key.astype(dtype), precision="highest")
    scores *= scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0, top))
    total = weights.sum(-1)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top[..., 0], -jnp.inf)
    weights /= jnp.where(total > 0, total, 1)[..., None]
    value = jnp.where(used.reshape(*used.shape, *[1] * (value.ndim - 2)), value, 0)
    letters = "BNTS,BSV->BTNV" if value.ndim == 3 else "BNTS,BSNV->BTNV"
    out = jnp.einsum(letters, weights, value.astype(dtype), precision="highest")
    return out, jnp.swapaxes(lse, 1, 2)


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "window", "precision"))
def latent_attention(
    pattern: Float[Array, "B T N R"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"],
    k_rope: Float[Array, "B S P"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    precision=None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """The absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2): see `dispatch`."""
    del precision  # always the highest here
    (batch, queries), slots = pattern.shape[:2], latent.shape[1]
    seen = visible(
        query_limits(lengths, batch, queries, slots),
        jnp.arange(slots),
        window=window,
        segment_ids=None if segment_ids is None else (segment_ids[:, -queries:], segment_ids),
        mask=mask,
    )
    out, lse = _attend([(pattern, latent), (q_rope, k_rope)], latent, seen, scale, soft_cap)
    return out.astype(pattern.dtype), lse


@functools.partial(jax.jit, static_argnames=("scale", "soft_cap", "window", "precision"))
def expanded_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    k_nope: Float[Array, "B S N H"],
    k_rope: Float[Array, "B S P"],
    value: Float[Array, "B S N V"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    precision=None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The expanded form (arXiv 2405.04434, equations 9 to 19): see `dispatch`."""
    del precision
    (batch, queries), slots = q_nope.shape[:2], value.shape[1]
    seen = visible(
        query_limits(lengths, batch, queries, slots),
        jnp.arange(slots),
        window=window,
        segment_ids=None if segment_ids is None else (segment_ids[:, -queries:], segment_ids),
        mask=mask,
    )
    out, lse = _attend([(q_nope, k_nope), (q_rope, k_rope)], value, seen, scale, soft_cap)
    return out.astype(q_nope.dtype), lse
