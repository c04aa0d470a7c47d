"""MLA attention in plain jax.numpy: the backend that runs on every device.

Scores are made at once while they fit (`_WHOLE_SCORES`), which on a GPU is two matmuls, one fused
softmax and one matmul; above that, block by block with a running softmax (Milakov and Gimelshein
2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), skipping blocks that no query sees.

Operands stay in their dtype, products accumulate in float32, softmax runs in float32.

Slots that no query may see can hold anything. Masking the latents themselves would cost a copy of
the cache (on an H200 1.4 to 2 times the whole op), so the one-shot path does not: it checks its
output instead, and where that is not finite the blocks, which do mask, compute it again. Its
derivatives are always those of the blocks.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla_jax.ops.reference import merge_attention, query_limits, visible

_WHOLE_SCORES = (
    2**27
)  # scores, 512 MiB in float32: what decode of 128 rows x 4096 x 128 heads x 2 needs
_BLOCK_SCORES = 2**24  # scores of one block of the long path
_BLOCK_SLOTS = 1024
# Rows up to here are one fused softmax kernel on a GPU; for longer ones XLA takes three passes, and
# dividing the output instead of the weights saves one of them.
_FUSED_ROW = 8192
# Jitted here too, so that eager calls do not compile their loops anew each time.
_STATIC = ("scale", "soft_cap", "window", "precision")
_MASKED = -1e30  # finite, so that a fully masked row is not NaN


def why_not(spec, device) -> str | None:
    """None: XLA serves every shape on every device."""
    del spec, device
    return None


@functools.partial(jax.jit, static_argnames=_STATIC)
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
    """The absorbed form: see `dispatch.latent_attention`."""
    return _attend(
        (pattern, q_rope), (latent, k_rope), latent, lengths=lengths, mask=mask,
        segment_ids=segment_ids, scale=scale, soft_cap=soft_cap, window=window,
        precision=precision,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=_STATIC)
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
    """The expanded form: see `dispatch.expanded_attention`."""
    return _attend(
        (q_nope, q_rope), (k_nope, k_rope), value, lengths=lengths, mask=mask,
        segment_ids=segment_ids, scale=scale, soft_cap=soft_cap, window=window,
        precision=precision,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("scale", "window", "precision"))
def add_cached_context(
    fresh: tuple[Float[Array, "B T N V"], Float[Array, "B T N"]] | None,
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    latent: Float[Array, "B S R"],
    k_rope: Float[Array, "B S P"],
    kv_b: Float[Array, "R N H+V"],
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    precision=None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Adds what a chunk of a long prompt attends to before itself, in the expanded form.

    Cached latents are expanded to keys and values block by block, so that they never stand in
    memory for all S at once; blocks past every row's length are neither expanded nor computed.

    Args:
        fresh: (out, lse) of the chunk's tokens among themselves; None where the cache holds them.
        q_nope, q_rope: their queries, the rotary part rotated.
        latent, k_rope: the cache's arrays.
        kv_b: the kernel that expands latents.
        lengths: slots of the cache that row b attends to, [B]; or of each query, [B T].
        scale: softmax temperature.
        window: a query attends only to the last `window` of its slots.
        precision: of the matmuls.

    Returns:
        out [B T N V] and lse [B T N] over cached and fresh tokens.
    """
    (batch, tokens), nope = q_nope.shape[:2], q_nope.shape[-1]
    limits = lengths if lengths.ndim == 2 else lengths[:, None]
    limits = jnp.broadcast_to(limits, (batch, tokens))

    def load(start, size, alive):
        block = _slice_clean(latent, start, size, alive)
        expanded = jnp.einsum("BSR,RNK->BSNK", block, kv_b.astype(block.dtype), precision=precision)
        k_nope, value = jnp.split(expanded, [nope], axis=-1)
        return (k_nope, _slice_clean(k_rope, start, size, alive)), value

    def cached():
        return _blocks(
            (q_nope, q_rope), load, limits, latent.shape[1], kv_b.shape[-1] - nope, shared=False,
            zero=_zero_of(q_nope, q_rope, latent, k_rope, kv_b, lengths), mask=None,
            segment_ids=None, scale=scale, soft_cap=None, window=window, precision=precision,
        )  # fmt: skip

    if fresh is None:
        return cached()
    return lax.cond((lengths > 0).any(), lambda: merge_attention(fresh, cached()), lambda: fresh)


def _attend(queries, keys, value, *, lengths, mask, segment_ids, **options):
    """Attention with scores summed over the pairs (queries[i], keys[i]).

    Keys and values are [B S K], shared by all heads, or [B S N K], per head.
    """
    batch, tokens, heads = queries[0].shape[:3]
    slots = value.shape[1]
    limits = query_limits(lengths, batch, tokens, slots)
    if segment_ids is not None:
        segment_ids = (segment_ids[:, slots - tokens :], segment_ids)

    seers = (limits, mask, segment_ids)

    def by_blocks(queries, keys, value, seers, size=_BLOCK_SLOTS):
        def load(start, size, alive):
            cut = functools.partial(_slice_clean, start=start, size=size, alive=alive)
            return tuple(cut(key) for key in keys), cut(value)

        limits, mask, segment_ids = seers
        return _blocks(
            queries, load, limits, slots, value.shape[-1], shared=value.ndim == 3,
            zero=_zero_of(queries, keys, value, seers), mask=mask, segment_ids=segment_ids,
            size=size, **options,
        )  # fmt: skip

    if batch * tokens * heads * slots > _WHOLE_SCORES:
        return by_blocks(queries, keys, value, seers)

    def whole(queries, keys, value, seers):
        limits, mask, segment_ids = seers
        seen = visible(
            limits, jnp.arange(slots), window=options["window"], segment_ids=segment_ids, mask=mask
        )
        return _whole(queries, keys, value, seen, options)

    if lengths is None:
        return whole(queries, keys, value, seers)  # every slot is some query's own

    @jax.custom_jvp
    def cached(queries, keys, value, seers):
        out, lse = whole(queries, keys, value, seers)
        # Small blocks: this branch hardly ever runs, and its buffers always count.
        careful = lambda: by_blocks(queries, keys, value, seers, -(-slots // 64))[0]  # noqa: E731
        return lax.cond(jnp.isfinite(out).all(), lambda: out, careful), lse

    @cached.defjvp
    def cached_jvp(primals, tangents):
        *arrays, seers = primals
        blocks = lambda queries, keys, value: by_blocks(queries, keys, value, seers)  # noqa: E731
        return jax.jvp(blocks, tuple(arrays), tangents[:3])

    return cached(queries, keys, value, seers)


def _scores(queries, keys, shared, scale, soft_cap, precision):
    """Scale (sum of query . key), soft-capped: float32 [B T N S] if shared, else [B N T S].

    The two orders are those in which the matmul leaves its result.
    """

    def product(query, key):
        einsum = functools.partial(
            jnp.einsum, precision=precision, preferred_element_type=jnp.float32
        )
        if shared and key.shape[0] == 1 and jax.default_backend() == "cpu":
            # On CPU, XLA copies and transposes the right operand of a matmul without batch: let
            # that be the query, not the cache.
            swapped = lax.optimization_barrier(einsum("BSK,BTNK->BSTN", key, query))
            return jnp.moveaxis(swapped, 1, 3)
        of_key = "BSK" if key.ndim == 3 else "BSNK"
        return einsum(f"BTNK,{of_key}->{'BTNS' if shared else 'BNTS'}", query, key)

    pairs = [(q, k) for q, k in zip(queries, keys, strict=True) if q.shape[-1]]
    scores = scale * sum(product(query, key) for query, key in pairs)
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _mix(weights, value, shared, precision):
    """Weights x value in float32: [B T N V] if shared, else [B N T V]."""
    letters = "BTNS,BSV->BTNV" if shared else "BNTS,BSNV->BNTV"
    return jnp.einsum(
        letters, weights.astype(value.dtype), value, precision=precision,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _whole(queries, keys, value, seen, options):
    """Attention with all scores at once. Not safe from NaN in slots that nobody sees."""
    shared, precision = value.ndim == 3, options["precision"]
    if shared:
        seen = jnp.swapaxes(seen, 1, 2)  # [B T #N S], as the scores
    scores = _scores(queries, keys, shared, options["scale"], options["soft_cap"], precision)
    scores = scores + jnp.where(seen, 0.0, _MASKED)
    any_seen = seen.any(-1, keepdims=True)
    if scores.shape[-1] <= _FUSED_ROW:
        out = _mix(jax.nn.softmax(scores, axis=-1) * any_seen, value, shared, precision)
    else:
        weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * any_seen
        total = weights.sum(-1, keepdims=True)
        out = _mix(weights, value, shared, precision) / jnp.where(any_seen, total, 1)
    lse = jax.nn.logsumexp(jnp.where(seen, scores, _MASKED), axis=-1)
    lse = jnp.where(any_seen[..., 0], lse, -jnp.inf)
    if not shared:
        out, lse = jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)
    return out.astype(value.dtype), lse


def _zero_of(*arrays):
    """0.0 that varies, inside shard_map, over every mesh axis over which one of the arrays does."""
    arrays = [array for array in jax.tree.leaves(arrays) if array.size]
    return sum(jnp.where(array[(0,) * array.ndim] == 0, 0.0, 0.0) for array in arrays)


def _slice_clean(array, start, size, alive):
    """array[:, start:start+size] with zeros in the slots that are not alive [B size]."""
    block = lax.dynamic_slice_in_dim(array, start, size, axis=1)
    alive = alive.reshape(*alive.shape, *[1] * (block.ndim - 2))
    return jnp.where(alive, block, jnp.zeros((), block.dtype))


def _blocks(
    queries, load, limits, slots, width, *, shared, zero, mask, segment_ids, scale, soft_cap,
    window, precision, size=_BLOCK_SLOTS,
):  # fmt: skip
    """Attention by blocks of queries and of slots, with a running maximum and sum.

    `load(start, size, alive [B size])` gives the keys and the value of a block of slots. `zero` is
    `_zero_of` all operands: the carry of a loop inside shard_map must vary as its results do.
    """
    batch, tokens, heads = queries[0].shape[:3]
    size = min(size, slots)
    rows = max(1, min(tokens, _BLOCK_SCORES // (batch * heads * size)))

    def query_block(first):
        # The last block of queries, and below of slots, starts early rather than run over.
        first = jnp.minimum(first, tokens - rows)
        part = tuple(lax.dynamic_slice_in_dim(query, first, rows, axis=1) for query in queries)
        limit = lax.dynamic_slice_in_dim(limits, first, rows, axis=1)

        def seen_in(start, fresh_from):
            slot = start + jnp.arange(size, dtype=jnp.int32)
            ids = None
            if segment_ids is not None:
                ids = (
                    lax.dynamic_slice_in_dim(segment_ids[0], first, rows, axis=1),
                    lax.dynamic_slice_in_dim(segment_ids[1], start, size, axis=1),
                )
            cut = mask
            if mask is not None:
                if mask.shape[2] > 1:
                    cut = lax.dynamic_slice_in_dim(cut, first, rows, axis=2)
                if mask.shape[3] > 1:
                    cut = lax.dynamic_slice_in_dim(cut, start, size, axis=3)
            seen = visible(limit, slot, window=window, segment_ids=ids, mask=cut)
            seen &= (slot >= fresh_from)[None, None, None]
            return jnp.swapaxes(seen, 1, 2) if shared else seen

        @jax.checkpoint
        def step(carry, index):
            start = jnp.minimum(index * size, slots - size)
            seen = seen_in(start, index * size)

            def update(top, total, mixed):
                alive = jnp.broadcast_to(seen.any(axis=(1, 2)), (batch, size))
                keys, value = load(start, size, alive)
                scores = _scores(part, keys, shared, scale, soft_cap, precision)
                scores = jnp.where(seen, scores, _MASKED)
                new_top = jnp.maximum(top, scores.max(-1))
                weights = jnp.where(seen, jnp.exp(scores - new_top[..., None]), 0.0)
                fade = jnp.exp(top - new_top)
                total = total * fade + weights.sum(-1)
                mixed = mixed * fade[..., None] + _mix(weights, value, shared, precision)
                return new_top, total, mixed

            return lax.cond(seen.any(), update, lambda *state: state, *carry), None

        grid = (batch, rows, heads) if shared else (batch, heads, rows)
        empty = (
            jnp.full(grid, _MASKED, jnp.float32),
            jnp.zeros(grid, jnp.float32),
            jnp.zeros((*grid, width), jnp.float32),
        )
        empty = jax.tree.map(lambda array: array + zero, empty)
        indices = jnp.arange(math.ceil(slots / size), dtype=jnp.int32)
        (top, total, mixed), _ = lax.scan(step, empty, indices)
        some = total > 0
        safe = jnp.where(some, total, 1)
        out = (mixed / safe[..., None]).astype(queries[0].dtype)
        lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
        return (out, lse) if shared else (jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2))

    if rows == tokens:
        return query_block(0)
    count = math.ceil(tokens / rows)
    out, lse = lax.map(query_block, jnp.arange(count, dtype=jnp.int32) * rows)
    # [count B rows ...] to [B tokens ...]: only the last block overlaps, with the one before it.
    return _join(out, tokens), _join(lse, tokens)


def _join(blocks, tokens):
    count, _, rows = blocks.shape[:3]
    full = jnp.concatenate(list(blocks[:-1]), axis=1) if count > 1 else blocks[0][:, :0]
    return jnp.concatenate([full, blocks[-1][:, count * rows - tokens :]], axis=1)
