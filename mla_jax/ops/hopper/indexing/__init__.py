"""Sparse attention's choice on Hopper: an indexer's scores, and the best slots of every query.

`scores.py` reads all index keys once and stores one number a slot, `select.py` finds the best by
thresholds; both in Mosaic GPU, `mosaic.py` with what Pallas lacks and `interpreted.py` with what
they do instead on a CPU. They are forward only: nothing flows back through a choice.

Letters: B batch, T query tokens, S slots, J index heads, I index-key channels, K chosen slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from mla_jax import target
from mla_jax.ops import guard
from mla_jax.ops.hopper import multiprocessors, not_hopper
from mla_jax.ops.hopper.schedule import TILE

_WIDTHS = (64, 128)
_MOST_HEADS = 128
MOST_SLOTS = 8 * 4 * 16 * 512  # blocks, warpgroups, groups and slots of `select.py`


def why_not(call, device: target.Target) -> str | None:
    """Why the kernels cannot serve `call`, an `index_scores` or a `best_slots`, or None."""
    return not_hopper(device) or unsupported(call)


def unsupported(call) -> str | None:
    """Why the kernels cannot serve `call` on any device, or None."""
    batch, queries, slots = call.batch, call.queries, call.slots
    if not all(isinstance(size, int) for size in (batch, queries, slots)):
        return "needs sizes that are known when it is compiled"
    if batch * queries * slots >= 2**31:
        return f"{batch} x {queries} queries of {slots} slots: indices would not fit 32 bits"
    if call.op == "best_slots":
        if call.dtype != "float32":
            return f"takes float32 scores, not {call.dtype}"
        if slots > MOST_SLOTS:
            return f"takes up to {MOST_SLOTS} slots a row, not {slots}"
        return None
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    options = [name for name in call.options if name not in ("lengths", "lengths per query")]
    if options:
        return f"takes lengths only, not {', '.join(options)}"
    width = call.key_dims[0]
    if width not in _WIDTHS:
        return f"index_head_dim must be one of {_WIDTHS}, not {width}"
    if call.heads % 8 or not 8 <= call.heads <= _MOST_HEADS:
        return f"index_n_heads must be a multiple of 8 up to {_MOST_HEADS}, not {call.heads}"
    if batch * slots < TILE or batch * slots >= 2**31 - TILE:
        return f"the cache must hold {TILE} to 2^31 slots in all, not {batch} x {slots}"
    return None


def index_scores(
    queries: tuple[Float[Array, "B T J I"], Float[Array, "B T J"]], store, seen, call
) -> Float[Array, "B T S"]:
    """Scores of the slots that a query sees, and -inf of all others."""
    table = store.table if call.store == "paged" else None
    return run_scores(*queries, store.index_key, seen.limits, table, slots=call.slots, **_where())


def best_slots(scores: Float[Array, "B T S"], store: None, seen, call) -> Int[Array, "B T K"]:
    """The K best below a query's limit, the lowest slot first, then S where only -inf is left."""
    del store
    return run_select(scores, seen.limits, count=call.value_dim, **_where())


def _where() -> dict[str, Any]:
    device = target.current()
    interpret = device.interpret if device.interprets == "gpu" else None
    return {"sms": multiprocessors(device), "interpret": interpret}


# These are jitted, so that the layers of a model share one lowering.
@functools.partial(jax.jit, static_argnames=("slots", "sms", "interpret", "tuning"))
def run_scores(query, weights, keys, limits, table, *, slots, sms, interpret, tuning=()):
    """The scores kernel on arrays; `tuning` are pairs of what `scores.shape_of` takes."""
    from mla_jax.ops.hopper.indexing import scores

    batch, tokens, heads, width = query.shape
    shape = scores.shape_of(
        batch, tokens, slots, heads, width, query.dtype, sms=sms, **dict(tuning)
    )

    def run(query, weights, keys, limits, table):
        operands = scores.flat(query, weights, keys, shape)
        if interpret is None:
            return scores.score(operands, limits, table, shape)
        from mla_jax.ops.hopper.indexing import interpreted

        return interpreted.score(operands, limits, table, shape, interpret)

    arrays = (query, weights, keys, limits.reshape(-1).astype(jnp.int32), table)
    return sequential_vmap(guard.unsplit(run, "pallas_gpu", interpret))(*arrays)


@functools.partial(jax.jit, static_argnames=("count", "sms", "interpret", "tuning"))
def run_select(scores, limits, *, count, sms, interpret, tuning=()):
    """The kernel of the choice on arrays; `tuning` are pairs of what `select.shape_of` takes."""
    from mla_jax.ops.hopper.indexing import select

    (batch, tokens, slots), rows = scores.shape, scores.shape[0] * scores.shape[1]
    shape = select.shape_of(rows, slots, count, sms, **dict(tuning))

    def run(scores, limits):
        if interpret is not None:
            from mla_jax.ops.hopper.indexing import interpreted

            return interpreted.select(scores, limits, shape, interpret)
        # Four scores are loaded at once, from multiples of four.
        return select.select(jnp.pad(scores, ((0, 0), (0, -slots % 4))), limits, shape)

    arrays = (scores.reshape(rows, slots), limits.reshape(rows).astype(jnp.int32))
    chosen = sequential_vmap(guard.unsplit(run, "pallas_gpu", interpret))(*arrays)
    return chosen.reshape(batch, tokens, count)
