"""The experts on Hopper GPUs: a kernel that reads the chosen experts only, for any M.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size, J tiles.
"""

import functools

import jax
import jax.numpy as jnp

from mla_jax.ops.experts import xla
from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.tiles import make_tiles
from mla_jax.target import Target

try:
    from mla_jax.ops.experts import grouped
except ImportError:  # a jax without Mosaic GPU
    grouped = None

WIDTH = 128  # what D and F must be a multiple of
_H200_CORES = 132  # multiprocessors where the target does not know its own
_INTERPRETED_CORES = 2  # enough to share work, few enough to be interpreted on a CPU


def why_not(call: Call, target: Target) -> str | None:
    """Why the kernel cannot serve this call, or None."""
    if target.interprets != "gpu":
        if target.platform != "gpu" or "NVIDIA" not in target.kind.upper():
            return f"needs an NVIDIA GPU, this is {target}"
        if target.capability is None or int(target.capability) != 9:
            return f"needs compute capability 9.x (Hopper), this is {target.capability}"
    if grouped is None:
        return "this version of jax has no Mosaic GPU"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    if any(width % WIDTH for width in call.widths):
        return f"widths must be multiples of {WIDTH}, not {call.widths[0]} and {call.widths[1]}"
    if not call.static:
        return "the number of tokens must be static"
    return None


def run(x, experts, weights, gate, up, down, *, precision, call: Call, target: Target):
    """See `routed_experts`."""
    many = call.pairs >= call.experts * grouped.MANY // 2
    rows = grouped.MANY if many else grouped.FEW
    tiles = make_tiles(experts, call.experts, rows)
    cores = _INTERPRETED_CORES if target.interprets else target.cores or _H200_CORES
    product = functools.partial(
        grouped.grouped_matmul, owner=tiles.owner, used=tiles.used, rows=rows, sms=cores,
        interpret=target.interpret,
    )  # fmt: skip

    @jax.custom_jvp
    def mixed(x, weights, gate, up, down):
        rows, wide = tiles.rows_of(x), jnp.promote_types(x.dtype, jnp.float32)
        hidden = jax.nn.silu(product(rows, gate.astype(x.dtype)).astype(wide))
        hidden = hidden * product(rows, up.astype(x.dtype))
        own = product(hidden.astype(x.dtype), down.astype(x.dtype))[tiles.place]
        return (own * weights[..., None]).sum(1).astype(x.dtype)

    @mixed.defjvp
    def _(primals, tangents):
        def blocks(x, weights, *kernels):
            return xla.by_block(x, experts, weights, kernels).astype(x.dtype)

        return jax.jvp(blocks, primals, tangents)

    return mixed(x, weights, gate, up, down)
