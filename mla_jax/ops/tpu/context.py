"""Context attention on TPU: pieces of the cache (`ops/pieces.py`) by the expanded kernel.

The kernel goes on from the result over the pieces before, so that nothing is merged around it, and
queries are brought to its layout once for all pieces.
"""

import functools

from mla_jax.ops import pieces
from mla_jax.ops.tpu import attention


def _begin(queries, call, part, zero):
    ready = attention.ready_queries(queries, call.scale, part.slots)
    return ready, attention.nothing_yet(ready, call.value_dim, zero)


def _attend(so_far, ready, store, seen, call):
    arrays = store.k_nope, store.k_rope, store.value
    return attention.go_on(so_far, ready, *arrays, seen.limits, window=seen.window)


def _end(so_far, call):
    out, lse = so_far
    out, lse = attention.finished(out, lse, call.queries)
    return out.astype(call.dtype), lse


why_not = functools.partial(pieces.why_not, backend="pallas_tpu")
context_attention = functools.partial(
    pieces.context_attention, core=pieces.Core(_begin, _attend, _end)
)
