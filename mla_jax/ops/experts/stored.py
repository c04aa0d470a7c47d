"""The experts with weights as a checkpoint stores them, through XLA, on every device.

Tiles of one expert's rows are taken one after the other: an expert's values are cut out of its
layer's and multiplied as `ops.weights` says. Tiles without rows are skipped.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size, J tiles.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ops.experts.tiles import make_tiles
from mla_jax.ops.weights import Weight, matmul

_FEW, _MANY = 16, 256  # rows of a tile


def run(x, experts, weights, gate: Weight, up: Weight, down: Weight, *, precision, partial=False):
    """See `routed_experts`; gate and up are [E F D] here, down is [E D F]."""
    count, pairs = gate.shape[0], experts.size
    rows = _FEW if isinstance(pairs, int) and pairs < count * _MANY // 4 else _MANY
    tiles = make_tiles(experts, count, rows, partial)
    blocks = tiles.rows_of(x).reshape(-1, rows, x.shape[1])

    def one(block):
        tile, tokens, expert = block

        def gated(tokens):
            product = lambda x, kernel: matmul(  # noqa: E731
                x, kernel.expert(expert), precision=precision, kernel=False
            )
            a, b = product(tokens, gate), product(tokens, up)
            hidden = jax.nn.silu(a.astype(jnp.float32)) * b.astype(jnp.float32)
            return product(hidden.astype(x.dtype), down)

        return lax.cond(tile < tiles.used[0], gated, jnp.zeros_like, tokens)

    index = jnp.arange(blocks.shape[0], dtype=jnp.int32)
    own = lax.map(one, (index, blocks, tiles.owner)).reshape(-1, x.shape[1])
    own = tiles.of_pairs(own, partial)
    return (own * weights[..., None]).sum(1).astype(x.dtype)
