"""MLA attention in plain jax.numpy: the backend that runs on every device.

Scores are made at once while they fit (`_WHOLE_SCORES`), which on a GPU is two matmuls, one fused
softmax and one matmul; above that, block by block with a running softmax (Milakov and Gimelshein
2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135), skipping blocks that no query sees.

Operands stay in their dtype, products accumulate in float32, softmax runs in float32.

Slots that no query may see can hold anything, so they are cleaned before they meet a weight of
zero: block by block, or at once in a copy of a small store. On an H200 such a copy takes 1.4 to 2
times the whole op, so on GPUs the one-shot path checks its output instead, and where that is not
finite the blocks compute it again. Its derivatives are always those of the blocks.

Letters: B batch, T query tokens, S slots, N heads, R latent, P rotary, H key and V value channels,
C of both.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mla_jax import target
from mla_jax.cache import Store
from mla_jax.ops.seen import Seen, visible

_WHOLE_SCORES = (
    2**27
)  # scores, 512 MiB in float32: what decode of 128 rows x 4096 x 128 heads x 2 needs
_CLEAN_NUMBERS = 2**23  # of a store, cleaned at once in a copy: above, CPUs are faster by blocks
_BLOCK_SCORES = 2**24  # scores of one block of the long path
_BLOCK_SLOTS = 1024
# Rows up to here are one fused softmax kernel on a GPU; for longer ones XLA takes three passes, and
# dividing the output instead of the weights saves one of them.
_FUSED_ROW = 8192
_GATHERED = 2**26  # numbers of chosen slots in memory at once, 128 MiB in bfloat16
_MASKED = -1e30  # finite, so that a fully masked row is not NaN


def why_not(call, target) -> str | None:
    """None: XLA serves every shape on every device."""
    del call, target
    return None


# Names of a store's arrays that are the keys of the queries' two parts, and the values.
_ARRAYS = {
    "latent_attention": ("latent", "k_rope", "latent"),
    "expanded_attention": ("k_nope", "k_rope", "value"),
}


# Jitted here too, so that eager calls do not compile their loops anew each time.
@functools.partial(jax.jit, static_argnames="call")
def latent_attention(
    queries: tuple[Float[Array, "B T N R"], Float[Array, "B T N P"]],
    store: Store,
    seen: Seen,
    call,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The absorbed form: see `ops.latent_attention`. The expanded form differs in its store."""
    if seen.chosen is None:
        return _attend(queries, store, seen, call)
    if call.op == "latent_attention":
        return _over_chosen(queries, store, seen, call)
    return _attend(queries, store, seen.masked(store.slots), call)


expanded_attention = latent_attention


@functools.partial(jax.jit, static_argnames="call")
def context_attention(
    queries: tuple[Float[Array, "B T N H"], Float[Array, "B T N P"]],
    store: Store,
    seen: Seen,
    call,
    *,
    kv_b: Float[Array, "R N C"],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """The expanded form over cached latents: see `ops.context_attention`.

    They are expanded to keys and values block by block, so that these never stand in memory for all
    S at once; blocks that no query sees are neither expanded nor computed.
    """
    nope, seen = queries[0].shape[-1], seen.masked(store.slots)

    def load(start, size, alive):
        held = _clean(store.block(start, size), alive)
        expanded = jnp.einsum(
            "BSR,RNK->BSNK",
            held["latent"],
            kv_b.astype(held["latent"].dtype),
            precision=call.precision,
        )
        k_nope, value = jnp.split(expanded, [nope], axis=-1)
        return (k_nope, held["k_rope"]), value

    (batch, tokens), slots = queries[0].shape[:2], store.slots
    if not all(isinstance(size, int) for size in (batch, tokens, slots)):  # under jax.export
        visible = seen.visible(jnp.arange(slots, dtype=jnp.int32))
        alive = jnp.broadcast_to(visible.any(axis=(1, 2)), (batch, slots))
        keys, value = load(0, slots, alive)
        return _whole(queries, keys, value, visible, call)
    zero = varying_zero(queries, store, kv_b, seen)
    return _blocks(queries, load, seen, store.slots, kv_b.shape[-1] - nope, False, zero, call)


def _attend(queries, store, seen, call):
    """Attention with scores summed over pairs of a query and a key.

    Keys and values are [B S K], shared by all heads, or [B S N K], per head.
    """
    nope, rope, of_value = _ARRAYS[call.op]
    pick = lambda held: ((held[nope], held[rope]), held[of_value])  # noqa: E731
    batch, tokens, heads = queries[0].shape[:3]
    slots, shared = store.slots, call.op == "latent_attention"

    def by_blocks(queries, store, seen, size=None):
        load = lambda start, size, alive: pick(_clean(store.block(start, size), alive))  # noqa: E731
        zero = varying_zero(queries, store, seen)
        return _blocks(queries, load, seen, slots, call.value_dim, shared, zero, call, size)

    sizes = (batch, tokens, heads, slots)
    known = all(isinstance(size, int) for size in sizes)  # under jax.export they may be symbols
    if known and math.prod(sizes) > _WHOLE_SCORES:
        return by_blocks(queries, store, seen)

    def whole(queries, store, seen, clean):
        visible = seen.visible(jnp.arange(slots, dtype=jnp.int32))
        held = store.block(0, slots)
        if clean:
            alive = jnp.broadcast_to(visible.any(axis=(1, 2)), (batch, slots))
            held = _clean(held, alive)
        keys, value = pick(held)
        return _whole(queries, keys, value, visible, call)

    checked = target.current().platform == "gpu" and call.store == "dense" and known
    checked = checked and call.encoding is None  # else the store is copied anyway, decoded
    if not (seen.full or checked) and known:
        width = sum(call.key_dims) if shared else heads * (sum(call.key_dims) + call.value_dim)
        if batch * slots * width > _CLEAN_NUMBERS:
            return by_blocks(queries, store, seen)
    if seen.full or not checked:
        return whole(queries, store, seen, clean=not seen.full)

    @jax.custom_jvp
    def cached(queries, store, seen):
        out, lse = whole(queries, store, seen, clean=False)
        # Small blocks: this branch hardly ever runs, and its buffers always count.
        careful = lambda: by_blocks(queries, store, seen, -(-slots // 64))[0]  # noqa: E731
        return lax.cond(jnp.isfinite(out).all(), lambda: out, careful), lse

    @cached.defjvp
    def cached_jvp(primals, tangents):
        queries, store, seen = primals
        blocks = lambda queries, store: by_blocks(queries, store, seen)  # noqa: E731
        return jax.jvp(blocks, (queries, store), tangents[:2])

    return cached(queries, store, seen)


def _over_chosen(queries, store, seen, call):
    """The absorbed form over the chosen slots alone, gathered for some queries at a time."""
    batch, tokens, heads = queries[0].shape[:3]
    chosen = seen.chosen
    count = chosen.shape[-1]
    if seen.segments is not None or seen.mask is not None or seen.window is not None:
        slots = jnp.arange(store.slots, dtype=jnp.int32)
        rest = jnp.broadcast_to(
            seen.replace(chosen=None).visible(slots)[:, 0], (batch, tokens, store.slots)
        )
        inside = jnp.minimum(chosen, store.slots - 1)
        alive = (chosen < store.slots) & jnp.take_along_axis(rest, inside, axis=-1)
    else:
        alive = chosen < seen.limits[..., None]

    @jax.checkpoint
    def attend(pattern, q_rope, chosen, alive):
        rows = batch * chosen.shape[1]
        held = store.at(chosen.reshape(batch, -1))
        own = {
            name: array.reshape(rows, count, *array.shape[2:])
            for name, array in held.items()
            if name in ("latent", "k_rope")
        }
        own = _clean(own, alive.reshape(rows, count))
        fold = lambda array: array.reshape(rows, 1, *array.shape[2:])  # noqa: E731
        keys = (own["latent"], own["k_rope"])
        seen = alive.reshape(rows, 1, 1, count)
        out, lse = _whole((fold(pattern), fold(q_rope)), keys, own["latent"], seen, call)
        return out.reshape(pattern.shape), lse.reshape(pattern.shape[:3])

    arrays = (*queries, chosen, alive)
    if not all(isinstance(size, int) for size in (batch, tokens, heads)):
        return attend(*arrays)
    numbers = batch * count * max(sum(call.key_dims), 2 * heads)  # float32 scores count twice
    rows = max(1, _GATHERED // numbers)
    if rows >= tokens:
        return attend(*arrays)

    def some(first):
        first = jnp.minimum(first, tokens - rows)
        return attend(*(lax.dynamic_slice_in_dim(array, first, rows, axis=1) for array in arrays))

    starts = jnp.arange(math.ceil(tokens / rows), dtype=jnp.int32) * rows
    out, lse = lax.map(some, starts)
    return _join(out, tokens), _join(lse, tokens)


def _scores(queries, keys, shared, call):
    """Scale (sum of query . key), soft-capped: float32 [B T N S] if shared, else [B N T S].

    The two orders are those in which the matmul leaves its result.
    """

    def product(query, key):
        einsum = functools.partial(
            jnp.einsum, precision=call.precision, preferred_element_type=jnp.float32
        )
        if shared and key.shape[0] == 1 and target.current().platform == "cpu":
            # On CPU, XLA copies and transposes the right operand of a matmul without batch: let
            # that be the query, not the cache.
            swapped = lax.optimization_barrier(einsum("BSK,BTNK->BSTN", key, query))
            return jnp.moveaxis(swapped, 1, 3)
        of_key = "BSK" if key.ndim == 3 else "BSNK"
        return einsum(f"BTNK,{of_key}->{'BTNS' if shared else 'BNTS'}", query, key)

    pairs = [(q, k) for q, k in zip(queries, keys, strict=True) if q.shape[-1]]
    scores = call.scale * sum(product(query, key) for query, key in pairs)
    soft_cap = call.soft_cap
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)


def _mix(weights, value, shared, call):
    """Weights x value in float32: [B T N V] if shared, else [B N T V]."""
    letters = "BTNS,BSV->BTNV" if shared else "BNTS,BSNV->BNTV"
    return jnp.einsum(
        letters,
        weights.astype(value.dtype),
        value,
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )


def _whole(queries, keys, value, seen, call):
    """Attention with all scores at once. Not safe from NaN in values that nobody sees."""
    shared = value.ndim == 3
    if shared:
        seen = jnp.swapaxes(seen, 1, 2)  # [B T #N S], as the scores
    scores = _scores(queries, keys, shared, call)
    scores = scores + jnp.where(seen, 0.0, _MASKED)
    any_seen = seen.any(-1, keepdims=True)
    some = any_seen.astype(scores.dtype)
    slots = scores.shape[-1]
    if isinstance(slots, int) and slots <= _FUSED_ROW:
        out = _mix(jax.nn.softmax(scores, axis=-1) * some, value, shared, call)
    else:
        weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * some
        total = weights.sum(-1, keepdims=True)
        out = _mix(weights, value, shared, call) / jnp.where(any_seen, total, 1)
    lse = jax.nn.logsumexp(jnp.where(seen, scores, _MASKED), axis=-1)
    lse = jnp.where(any_seen[..., 0], lse, -jnp.inf)
    if not shared:
        out, lse = jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)
    return out.astype(value.dtype), lse


def varying_zero(*arrays):
    """0.0 that varies, inside shard_map, over every mesh axis over which one of the arrays does."""
    arrays = [array for array in jax.tree.leaves(arrays) if array.size]
    return sum(jnp.where(array[(0,) * array.ndim] == 0, 0.0, 0.0) for array in arrays)


def _clean(held, alive):
    """The arrays of a block of slots with zeros in the slots that are not alive [B size]."""
    return {
        name: jnp.where(
            alive.reshape(*alive.shape, *[1] * (block.ndim - 2)), block, jnp.zeros((), block.dtype)
        )
        for name, block in held.items()
    }


def _blocks(queries, load, seen, slots, width, shared, zero, call, size=None):
    """Attention by blocks of queries and of slots, with a running maximum and sum.

    `load(start, size, alive [B size])` gives the keys and the value of a block of slots. `zero` is
    `varying_zero` all operands: the carry of a loop inside shard_map must vary as its results do.
    """
    batch, tokens, heads = queries[0].shape[:3]
    size = min(size or _BLOCK_SLOTS, slots)
    rows = max(1, min(tokens, _BLOCK_SCORES // (batch * heads * size)))

    def query_block(first):
        # The last block of queries, and below of slots, starts early rather than run over.
        first = jnp.minimum(first, tokens - rows)
        cut_queries = lambda array: lax.dynamic_slice_in_dim(array, first, rows, axis=1)  # noqa: E731
        part = tuple(map(cut_queries, queries))
        limits = cut_queries(seen.limits)

        def seen_in(start, fresh_from):
            slot = start + jnp.arange(size, dtype=jnp.int32)
            ids, mask = None, seen.mask
            if seen.segments is not None:
                of_slots = lax.dynamic_slice_in_dim(seen.segments[1], start, size, axis=1)
                ids = (cut_queries(seen.segments[0]), of_slots)
            if mask is not None:
                if mask.shape[2] > 1:
                    mask = lax.dynamic_slice_in_dim(mask, first, rows, axis=2)
                if mask.shape[3] > 1:
                    mask = lax.dynamic_slice_in_dim(mask, start, size, axis=3)
            now = visible(limits, slot, window=seen.window, segment_ids=ids, mask=mask)
            now &= (slot >= fresh_from)[None, None, None]
            return jnp.swapaxes(now, 1, 2) if shared else now

        @jax.checkpoint
        def step(carry, index):
            start = jnp.minimum(index * size, slots - size)
            now = seen_in(start, index * size)

            def update(top, total, mixed):
                alive = jnp.broadcast_to(now.any(axis=(1, 2)), (batch, size))
                keys, value = load(start, size, alive)
                scores = _scores(part, keys, shared, call)
                scores = jnp.where(now, scores, _MASKED)
                new_top = jnp.maximum(top, scores.max(-1))
                weights = jnp.where(now, jnp.exp(scores - new_top[..., None]), 0.0)
                fade = jnp.exp(top - new_top)
                total = total * fade + weights.sum(-1)
                mixed = mixed * fade[..., None] + _mix(weights, value, shared, call)
                return new_top, total, mixed

            return lax.cond(now.any(), update, lambda *state: state, *carry), None

        grid = (batch, rows, heads) if shared else (batch, heads, rows)
        empty = (
            jnp.full(grid, _MASKED, jnp.float32),
            jnp.zeros(grid, jnp.float32),
            jnp.zeros((*grid, width), jnp.float32),
        )
        empty = jax.tree.map(lambda array: array + zero, empty)
        indices = jnp.arange(math.ceil(slots / size), dtype=jnp.int32)
        (top, total, mixed), _ = lax.scan(step, empty, indices)
        some = total != 0  # NaN is a sum of weights, too
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
