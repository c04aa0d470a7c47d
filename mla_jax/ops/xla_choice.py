"""An indexer's scores and the choice of the best slots through XLA: everywhere, in bounded memory.

Letters: B batch, T query tokens, S slots, J index heads, I index-key channels, K chosen slots.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import target
from mla_jax.cache import Store
from mla_jax.ops.seen import Seen

BLOCK_PRODUCTS = 2**24  # of index heads and slots made at once, 64 MiB in float32


def why_not(call, device: target.Target) -> str | None:
    """XLA serves every call."""
    del call, device
    return None


def index_scores(
    queries: tuple[Float[Array, "B T J I"], Float[Array, "B T J"]], store: Store, seen: Seen, call
) -> Float[Array, "B T S"]:
    """Scores of the slots that a query sees, and -inf of all others."""
    visible = seen.visible(jnp.arange(call.slots, dtype=jnp.int32))[:, 0]
    return jnp.where(visible, all_scores(*queries, store), -jnp.inf)


def best_slots(scores: Float[Array, "B T S"], store: None, seen: Seen, call) -> Int[Array, "B T K"]:
    """The K best of the last axis, the best first, then S where only -inf is left."""
    del store, seen
    # `lax.top_k` puts the lower of two equal ones first, but holds -0.0 for less than 0.0, and a
    # NaN with a sign for the least. A score that is not a number is chosen and seen, not dropped.
    bits = lax.bitcast_convert_type(scores, f"int{8 * scores.dtype.itemsize}")
    nothing = bits << 1 == 0  # of the numbers themselves a CPU takes 1e-40 for 0, too
    scores = jnp.where(nothing, 0, jnp.where(jnp.isnan(scores), jnp.nan, scores))
    best, places = lax.top_k(scores, call.value_dim)
    return jnp.where(jnp.isneginf(best), call.slots, places).astype(jnp.int32)


def all_scores(
    query: Float[Array, "B T J I"], weights: Float[Array, "B T J"], store: Store
) -> Float[Array, "B T S"]:
    """Scores of all slots, visible or not, in float32; nothing of size [B, T, J, S] is made."""
    batch, tokens, heads, _ = query.shape
    slots = store.slots

    wide = jnp.promote_types(query.dtype, jnp.float32)

    def block(start, size):
        products = jnp.einsum(
            "BTJI,BSI->BTJS",
            query,
            store.block(start, size, pages=True)["index_key"],
            precision="highest",
            preferred_element_type=wide,
        )
        return (jax.nn.relu(products) * weights.astype(wide)[..., None]).sum(2)

    sizes = (batch, tokens, heads, slots)
    if not all(isinstance(size, int) for size in sizes):  # under jax.export they may be symbols
        return block(0, slots)
    size = max(128, BLOCK_PRODUCTS // (batch * tokens * heads) // 128 * 128)
    if size >= slots:
        return block(0, slots)
    count = -(-slots // size)
    # The last block starts early rather than run over the end.
    starts = jnp.minimum(jnp.arange(count, dtype=jnp.int32) * size, slots - size)
    made = jnp.moveaxis(lax.map(lambda start: block(start, size), starts), 0, 2)
    whole = made[:, :, :-1].reshape(batch, tokens, -1)
    return jnp.concatenate([whole, made[:, :, -1, count * size - slots :]], axis=-1)
