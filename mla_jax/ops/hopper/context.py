"""Context attention on Hopper: pieces of the cache (`ops/pieces.py`) by the expanded kernel."""

import functools

from mla_jax.ops import pieces

why_not = functools.partial(pieces.why_not, backend="pallas_gpu")
context_attention = functools.partial(pieces.context_attention, core=pieces.merging("pallas_gpu"))
