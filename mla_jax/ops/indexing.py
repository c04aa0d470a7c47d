"""Which slots a query of sparse attention attends to: an indexer's scores, and the best K of them.

DeepSeek sparse attention (arXiv 2512.02556, equation 1): every token has one index key, every query
J small heads with a weight each,

    score(t, s) = sum_j weight[t, j] relu(query[t, j] . index_key[s])

and the query attends to the K visible slots that score best, to all of them where fewer are
visible. Of equal scores the lower slot wins: relu gives exact zeros, so they do occur. Products
accumulate in float32 and float32 operands are not rounded, whatever the device's default is: in
bfloat16 other slots would win.

An index key may also stand for a pool of tokens (GLM-5.3-Flash): the mean of their keys, weighted
per channel by a softmax. Whole pools are chosen then.

Scores and the choice among them are two ops, `index_scores` and `best_slots`, each by the backend
that serves it (`dispatch`). Nothing of size [B, T, J, S] is made: slots come in blocks, and queries
in chunks.

Letters: B batch, T query tokens, S slots, J index heads, I index-key channels, K chosen slots,
L tokens of a pool, M whole pools.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax.cache import Dense, Paged, Store
from mla_jax.ops import dispatch, mesh, xla_choice
from mla_jax.ops.seen import Seen

_CHUNK_SCORES = 2**24  # of queries and slots chosen from at once


def index_scores(
    query: Float[Array, "B T J I"], weights: Float[Array, "B T J"], store: Store
) -> Float[Array, "B T S"]:
    """What an indexer's queries say to every slot, visible or not, in float32.

    Args:
        query: rotated queries of the index heads.
        weights: of the heads, with what scales the scores.
        store: with `index_key` [B S I], dense or paged; slots that hold no token may hold anything.

    >>> store = Dense({"index_key": jnp.eye(4)[None]})
    >>> index_scores(jnp.ones((1, 1, 2, 4)), jnp.array([[[2.0, 1.0]]]), store)
    Array([[[3., 3., 3., 3.]]], dtype=float32)
    """
    return xla_choice.all_scores(query, weights, store)


@functools.partial(jax.jit, static_argnames=("count", "tail", "implementation"))
def choose_slots(
    query: Float[Array, "B T J I"],
    weights: Float[Array, "B T J"],
    store: Store,
    seen: Seen,
    *,
    count: int,
    pool_bias: Float[Array, "L I"] | None = None,
    tail: bool = True,
    implementation: dispatch.Implementation = None,
) -> Int[Array, "B T K"]:
    """The slots that each query attends to, as `Seen.chosen` holds them; S where there are fewer.

    Nothing flows back through the choice. In what order slots come is the backend's affair: XLA
    gives the best first, the Hopper kernel the lowest.

    Args:
        query, weights: as in `index_scores`.
        store: with `index_key` [B S I]; for pools [B S 2I], keys and the gates of their means.
        seen: what each query may see; the choice is among that.
        count: how many slots, fewer than S; with pools a multiple of L.
        pool_bias: what is added to the gates of a pool's tokens; None chooses single tokens.
        tail: with pools, the visible tokens behind the last whole pool are chosen too, up to L - 1
            beyond `count`.
        implementation: None, or backends of `index_scores` and `best_slots` by name: a tuple of
            pairs, as `dispatch.frozen` makes it.

    >>> store = Dense({"index_key": jnp.array([[[1.0], [3.0], [0.0], [2.0]]])})
    >>> seen = Seen.of(None, batch=1, queries=4, slots=4)
    >>> choose_slots(jnp.ones((1, 4, 1, 1)), jnp.ones((1, 4, 1)), store, seen, count=2)
    Array([[[0, 4],
            [1, 0],
            [1, 0],
            [1, 3]]], dtype=int32)
    """
    if sharding.mesh_of(query, store) is not None:
        run = functools.partial(choose_slots, count=count, tail=tail, implementation=implementation)
        return mesh.choose(run, query, weights, store, seen, pool_bias)
    query, weights, store = lax.stop_gradient((query, weights, store))
    tokens, slots = query.shape[1], store.slots
    if pool_bias is None:

        def choose(query, weights, seen):
            scores = _scores(query, weights, store, seen, implementation)
            return _best(scores, seen.limits, count, implementation)

    else:
        pool_bias = lax.stop_gradient(pool_bias)
        choose = _choice_of_pools(store, seen, pool_bias, count, tail, implementation)
    rows = _CHUNK_SCORES // (query.shape[0] * slots)
    return _by_chunks(choose, (query, weights), seen, tokens, rows)


@functools.partial(jax.jit, static_argnames="scale")
def attention_weights(
    queries: tuple[Float[Array, "B T N R"], Float[Array, "B T N P"]],
    store: Dense,
    seen: Seen,
    *,
    scale: float,
) -> Float[Array, "B T S"]:
    """The absorbed form's softmax summed over its heads, in float32: what an indexer learns.

    Args:
        queries: pattern and q_rope.
        store: with latent and k_rope.
        seen: what each query may see; weights elsewhere are 0.
        scale: softmax temperature.
    """
    latent, k_rope = store.latent, store.k_rope
    slots = jnp.arange(store.slots, dtype=jnp.int32)
    product = functools.partial(jnp.einsum, "BTNK,BSK->BTNS", preferred_element_type=jnp.float32)

    def weigh(pattern, q_rope, seen):
        visible = jnp.swapaxes(seen.visible(slots), 1, 2)
        scores = scale * (product(pattern, latent) + product(q_rope, k_rope))
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), axis=-1)
        return jnp.where(visible, weights, 0).sum(2)

    (batch, tokens, heads, _), count = queries[0].shape, store.slots
    return _by_chunks(
        weigh, queries, seen, tokens, xla_choice.BLOCK_PRODUCTS // (batch * heads * count)
    )


def _by_chunks(function, arrays, seen, tokens, rows):
    """`function(*arrays, seen)` on at least one query and at most `rows` at a time, [B T ...]."""
    rows = max(1, rows) if isinstance(rows, int) else tokens  # under jax.export: a symbol
    if not isinstance(tokens, int) or rows >= tokens:
        return function(*arrays, seen)

    def chunk(first):
        cut = lambda array: lax.dynamic_slice_in_dim(array, first, rows, axis=1)  # noqa: E731
        return function(*map(cut, arrays), seen.queries(first, rows))

    number = -(-tokens // rows)
    # The last chunk starts early rather than run over the end.
    firsts = jnp.minimum(jnp.arange(number, dtype=jnp.int32) * rows, tokens - rows)
    made = jnp.moveaxis(lax.map(chunk, firsts), 0, 1)  # [B number rows ...]
    whole = made[:, :-1].reshape(made.shape[0], -1, made.shape[-1])
    return jnp.concatenate([whole, made[:, -1, number * rows - tokens :]], axis=1)


def _scores(query, weights, store, seen, implementation):
    """Scores of the visible slots, -inf of the others, by the backend that serves the call."""
    batch, tokens, heads, width = query.shape
    kinds = dict.fromkeys(str(x.dtype) for x in (query, store.index_key))
    call = dispatch.Call(
        "index_scores",
        batch,
        tokens,
        store.slots,
        heads,
        (width, 0),
        0,
        " and ".join(kinds),
        seen.options,
        "paged" if isinstance(store, Paged) else "dense",
    )
    return dispatch.choice((query, weights), store, seen, call, implementation)


def _best(scores, limits, count, implementation):
    """The `count` best of the last axis that are not -inf; its size where there are fewer."""
    batch, tokens, slots = scores.shape
    call = dispatch.Call(
        "best_slots", batch, tokens, slots, 1, (0, 0), count, str(scores.dtype), ("lengths",)
    )
    return dispatch.choice(scores, None, Seen(limits=limits), call, implementation)


def _choice_of_pools(store, seen, bias, count, tail, implementation):
    """A function of query, weights and Seen that chooses whole pools, and the tokens behind them.

    Pools begin at the first token that anybody sees, so that padding on the left changes nothing.
    """
    slots, length = store.slots, bias.shape[0]
    pools = slots // length
    packed = store.block(0, slots)["index_key"]
    batch = packed.shape[0]
    first = jnp.zeros((batch,), jnp.int32)
    if seen.mask is not None:
        anybody = seen.visible(jnp.arange(slots, dtype=jnp.int32)).any(axis=(1, 2))
        first = jnp.argmax(jnp.broadcast_to(anybody, (batch, slots)), axis=-1).astype(jnp.int32)
    place = first[:, None] + jnp.arange(pools * length, dtype=jnp.int32)[None]
    inside = jnp.minimum(place, slots - 1)
    key, gate = jnp.split(jnp.take_along_axis(packed, inside[..., None], axis=1), 2, axis=-1)
    apart = lambda x: x.reshape(batch, pools, length, -1).astype(jnp.float32)  # noqa: E731
    share = jax.nn.softmax(apart(gate) + bias.astype(jnp.float32)[None, None], axis=2)
    pooled = Dense({"index_key": (share * apart(key)).sum(2).astype(packed.dtype)})
    number = min(count // length, pools)

    def choose(query, weights, seen):
        tokens = query.shape[1]
        visible = seen.visible(jnp.arange(slots, dtype=jnp.int32))[:, 0]
        visible = jnp.broadcast_to(visible, (batch, tokens, slots))
        at = lambda slot: jnp.take_along_axis(visible, jnp.minimum(slot, slots - 1), axis=-1)  # noqa: E731
        if set(seen.options) <= {"lengths", "lengths per query"}:
            of_pools = Seen(limits=seen.limits // length)  # those that are seen whole
        else:
            inside = jnp.broadcast_to(place[:, None], (batch, tokens, pools * length))
            whole = (at(inside) & (inside < slots)).reshape(batch, tokens, pools, length).all(-1)
            everywhere = jnp.full((batch, tokens), pools, jnp.int32)
            of_pools = Seen(limits=everywhere, mask=whole[:, None])
        chosen = jnp.full((batch, tokens, 1), slots, jnp.int32)
        if number:
            scores = _scores(query, weights, pooled, of_pools, implementation)
            best = _best(scores, of_pools.limits, number, implementation)
            start = first[:, None, None] + best * length
            chosen = start[..., None] + jnp.arange(length, dtype=jnp.int32)[None, None, None]
            chosen = jnp.where((best == pools)[..., None], slots, chosen)
            chosen = chosen.reshape(batch, tokens, -1)
        if tail and length > 1:
            behind = jnp.maximum(seen.limits - first[:, None], 0) // length * length
            further = jnp.arange(length - 1, dtype=jnp.int32)[None, None]
            rest = (first[:, None] + behind)[..., None] + further
            there = (rest < seen.limits[..., None]) & at(rest)
            chosen = jnp.concatenate([chosen, jnp.where(there, rest, slots)], axis=-1)
        return chosen

    return choose
