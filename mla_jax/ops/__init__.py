"""The attention cores: they check their operands, choose a backend and call it.

Every core takes queries, a store of what is attended to, and a `Seen` that says how much of it each
query sees (`seen`). `operands` checks them and `dispatch` chooses: `xla` serves everywhere,
`hopper` and `tpu` are the kernels, `cudnn` a library's, and `reference` what all are compared with.

Letters: B batch, T query tokens, S cache slots, N heads, R kv_lora_rank, H qk_nope_head_dim,
P qk_rope_head_dim, V v_head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mla_jax.cache import Dense, Paged, Scaled, Store
from mla_jax.ops import dispatch
from mla_jax.ops.dispatch import Attended, Call, Implementation
from mla_jax.ops.indexing import attention_weights as attention_weights
from mla_jax.ops.indexing import choose_slots as choose_slots
from mla_jax.ops.indexing import index_scores as index_scores
from mla_jax.ops.merge import merge_attention as merge_attention
from mla_jax.ops.mesh import Layout
from mla_jax.ops.operands import checked_ids as checked_ids
from mla_jax.ops.operands import checked_mask as checked_mask
from mla_jax.ops.operands import (
    checked_seen,
    checked_soft_cap,
    common_dtype,
    expect_shape,
    shape_of,
)
from mla_jax.ops.seen import Seen


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
    chosen: Int[Array, "B T K"] | None = None,
    precision=None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T N R"], Float[Array, "B T N"]]:
    """Attention of per-head patterns over shared latents: the core of the absorbed form.

    out_latent[b,t,n] = sum_s softmax_s(scale (pattern[b,t,n] . latent[b,s]
    + q_rope[b,t,n] . k_rope[b,s])) latent[b,s] (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    Args:
        pattern: queries with W_UK folded in, [B T N R].
        q_rope: rotated rotary queries [B T N P]; P may be 0.
        latent: cached latents [B S R].
        k_rope: cached rotary keys, rotated, [B S P].
        lengths: int [B]: valid slots of each row, the T query tokens being the last of them, so
            that query t sees lengths - (T-1-t) slots; or int [B T]: slots each query sees. A limit
            of 0 or less gives zeros and lse = -inf. None: all S slots are valid.
        scale: softmax temperature, `MLAConfig.scale`. It does not follow from R + P.
        soft_cap: scores become soft_cap tanh(scores / soft_cap).
        window: a query sees only the last `window` slots up to its own.
        mask: boolean, True = may attend, combined with the causal rule.
        segment_ids: int [B S]; a query attends to slots of its own segment. The queries' ids are
            the last T.
        chosen: int [B T K], the slots that each query attends to, of those that it sees (sparse
            attention, `choose_slots`); no slot twice, and one at S or beyond does not count. None
            is all.
        precision: of the matmuls, as in jax.lax.dot; kernels ignore it.
        implementation: a backend's name, or None for the first that can serve.

    Returns:
        out_latent [B T N R] in the operands' dtype and lse [B T N] float32, the natural log of the
        sum of exp(scores); two results over disjoint slots merge by it (`merge_attention`).

    Raises:
        ValueError: shapes or dtypes that do not go together, or lengths beyond S.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    >>> pattern, q_rope = jnp.ones((2, 1, 4, 64)), jnp.ones((2, 1, 4, 16))
    >>> latent, k_rope = jnp.ones((2, 8, 64)), jnp.ones((2, 8, 16))
    >>> out, lse = latent_attention(
    ...     pattern, q_rope, latent, k_rope, lengths=jnp.array([8, 3]), scale=48**-0.5)
    >>> out.shape, lse.shape
    ((2, 1, 4, 64), (2, 1, 4))
    >>> latent_attention(pattern, q_rope, latent, k_rope, lengths=jnp.array([9, 3]), scale=48**-0.5)
    Traceback (most recent call last):
    ValueError: lengths=[9 3] go beyond the S = 8 slots.
    """
    batch, tokens, heads, rank = shape_of("pattern", pattern, "B T N R")
    slots = shape_of("latent", latent, "B S R")[1]
    rope = shape_of("q_rope", q_rope, "B T N P")[-1]
    expect_shape("q_rope", q_rope, (batch, tokens, heads, rope), "B T N P")
    expect_shape("latent", latent, (batch, slots, rank), "B S R")
    expect_shape("k_rope", k_rope, (batch, slots, rope), "B S P")
    common_dtype(pattern=pattern, q_rope=q_rope, latent=latent, k_rope=k_rope)
    seen = checked_seen(lengths, batch, tokens, slots, heads, window, mask, segment_ids, chosen)
    return attend_latents(
        (pattern, q_rope),
        Dense({"latent": latent, "k_rope": k_rope}),
        seen,
        scale=scale,
        soft_cap=soft_cap,
        precision=precision,
        implementation=implementation,
    )


def expanded_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    k_nope: Float[Array, "B S N H"],
    k_rope: Float[Array, "B S P"],
    value: Float[Array, "B S N V"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    chosen: Int[Array, "B T K"] | None = None,
    precision=None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention with per-head keys and values, the rotary key shared: the expanded form's core.

    Args:
        q_nope, q_rope: queries without and with (rotated) position, [B T N H] and [B T N P].
        k_nope: per-head keys [B S N H].
        k_rope: the rotary key shared by all heads, rotated, [B S P].
        value: [B S N V]; V need not be H + P.
        lengths, scale, soft_cap, window, mask, segment_ids, chosen, precision, implementation: as
            in `latent_attention`; with lengths None and T = S this is causal self-attention.

    Returns:
        out [B T N V] in the operands' dtype and lse [B T N] float32.

    Raises:
        ValueError, NotImplementedError: as `latent_attention`.

    >>> q_nope, q_rope = jnp.ones((2, 5, 4, 32)), jnp.ones((2, 5, 4, 16))
    >>> k_nope, k_rope = jnp.ones((2, 5, 4, 32)), jnp.ones((2, 5, 16))
    >>> value = jnp.ones((2, 5, 4, 24))
    >>> out, lse = expanded_attention(q_nope, q_rope, k_nope, k_rope, value, scale=48**-0.5)
    >>> out.shape, lse.shape
    ((2, 5, 4, 24), (2, 5, 4))
    """
    batch, tokens, heads, nope = shape_of("q_nope", q_nope, "B T N H")
    rope = shape_of("q_rope", q_rope, "B T N P")[-1]
    slots, value_dim = shape_of("value", value, "B S N V")[1::2]
    expect_shape("q_rope", q_rope, (batch, tokens, heads, rope), "B T N P")
    expect_shape("k_nope", k_nope, (batch, slots, heads, nope), "B S N H")
    expect_shape("k_rope", k_rope, (batch, slots, rope), "B S P")
    expect_shape("value", value, (batch, slots, heads, value_dim), "B S N V")
    common_dtype(q_nope=q_nope, q_rope=q_rope, k_nope=k_nope, k_rope=k_rope, value=value)
    seen = checked_seen(lengths, batch, tokens, slots, heads, window, mask, segment_ids, chosen)
    return attend_expanded(
        (q_nope, q_rope),
        Dense({"k_nope": k_nope, "k_rope": k_rope, "value": value}),
        seen,
        scale=scale,
        soft_cap=soft_cap,
        precision=precision,
        implementation=implementation,
    )


def attend_expanded(
    queries: tuple[Float[Array, "B T N H"], Float[Array, "B T N P"]],
    store: Dense,
    seen: Seen,
    *,
    scale: float,
    soft_cap: float | None = None,
    precision=None,
    implementation: Implementation = None,
) -> Attended:
    """`expanded_attention` over k_nope, k_rope and value, by what a `Seen` says."""
    (batch, tokens, heads, nope), rope = queries[0].shape, queries[1].shape[-1]
    call = Call(
        op="expanded_attention",
        batch=batch,
        queries=tokens,
        slots=store.slots,
        heads=heads,
        key_dims=(nope, rope),
        value_dim=store.value.shape[-1],
        dtype=jnp.dtype(queries[0].dtype).name,
        options=seen.options,
        store="dense",
        scale=float(scale),
        soft_cap=checked_soft_cap(soft_cap),
        precision=precision,
        layout=Layout.of(queries, store),
    )
    return dispatch.attend(queries, store, seen, call, implementation)


def attend_latents(
    queries: tuple[Float[Array, "B T N R"], Float[Array, "B T N P"]],
    store: Store,
    seen: Seen,
    *,
    scale: float,
    soft_cap: float | None = None,
    precision=None,
    implementation: Implementation = None,
) -> Attended:
    """`latent_attention` over a store, dense or paged, by what a step's `Seen` says."""
    call = latent_call(queries, store, seen, scale, soft_cap, precision)
    return dispatch.attend(queries, store, seen, call, implementation)


def latent_gradients(arrays, table, lengths, scale, cotangents, chosen=None) -> tuple[Array, ...]:
    """Cotangents of pattern, q_rope, latent and k_rope, for kernels without a backward.

    Args:
        arrays: these four, and latent_scale where latents have scales, which then has a cotangent
            too; with a table the cache's are the pool's.
        table: int32 [B M] of a paged store; None where rows have slots of their own.
        lengths: as in `latent_attention`.
        scale: softmax temperature.
        cotangents: of out_latent and lse.
        chosen: as in `latent_attention`.
    """

    def attend(pattern, q_rope, latent, k_rope, *scale_of_latents):
        store = Dense({"latent": latent, "k_rope": k_rope})
        if scale_of_latents:
            store = Scaled(store.arrays | {"latent_scale": scale_of_latents[0]})
        if table is not None:
            store = Paged(store, table)  # of which XLA gathers the rows
        batch, tokens = pattern.shape[:2]
        seen = Seen.of(lengths, batch=batch, queries=tokens, slots=store.slots, chosen=chosen)
        return attend_latents((pattern, q_rope), store, seen, scale=scale, implementation="xla")

    return jax.vjp(attend, *arrays)[1](cotangents)


def latent_call(queries, store, seen, scale, soft_cap=None, precision=None) -> Call:
    """What is static of such a call."""
    pattern, q_rope = queries
    batch, tokens, heads, rank = pattern.shape
    return Call(
        op="latent_attention",
        batch=batch,
        queries=tokens,
        slots=store.slots,
        heads=heads,
        key_dims=(rank, q_rope.shape[3]),
        value_dim=rank,
        dtype=jnp.dtype(pattern.dtype).name,
        options=seen.options,
        store=_kind(store),
        scale=float(scale),
        soft_cap=checked_soft_cap(soft_cap),
        precision=precision,
        layout=Layout.of(queries, store),
        encoding=store.encoding,
    )


def context_attention(
    queries: tuple[Float[Array, "B T N H"], Float[Array, "B T N P"]],
    store: Store,
    seen: Seen,
    kv_b: Float[Array, "R N H+V"],
    *,
    scale: float,
    precision=None,
    implementation: Implementation = None,
) -> Attended:
    """Attention of a chunk of a long prompt to cached latents, in the expanded form.

    Args:
        queries: q_nope and q_rope, the rotary part rotated.
        store: latents and rotary keys of the cache.
        seen: what each query sees of it.
        kv_b: the kernel that expands latents to keys and values.
        scale: softmax temperature.
        precision: of the matmuls.
        implementation: a backend's name, or None for the first that can serve.

    Returns:
        out [B T N V] and lse [B T N]; merged with the chunk's own by `merge_attention`.
    """
    (batch, tokens, heads, nope), rope = queries[0].shape, queries[1].shape[-1]
    call = Call(
        op="context_attention",
        batch=batch,
        queries=tokens,
        slots=store.slots,
        heads=heads,
        key_dims=(nope, rope),
        value_dim=kv_b.shape[-1] - nope,
        dtype=jnp.dtype(queries[0].dtype).name,
        options=seen.options,
        store=_kind(store),
        scale=float(scale),
        precision=precision,
        layout=Layout.of(queries, store),
        encoding=store.encoding,
    )
    return dispatch.attend(queries, store, seen, call, implementation, kv_b=kv_b)


def _kind(store: Store) -> str:
    return "paged" if isinstance(store, Paged) else "dense"
