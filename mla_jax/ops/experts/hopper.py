"""The experts on Hopper GPUs, forward and backward, for any M: only the chosen experts are read.

Between the kernels of `grouped.py` XLA gathers each tile's rows, and sums each token's outputs.
The backward pass keeps x and the two products of the gated MLP, x gate and x up, and takes the rest
anew. With s = sigmoid(a), h = a s b, w the pair's weight, and t = dy down^T:

    dw = h . t      da = w t b s (1 + a (1 - s))      db = w t a s      dx = da gate^T + db up^T
    d gate = x^T da      d up = x^T db      d down = (w h)^T dy

Rows that fill a tile up are zeros in x and in dy, hence in everything that the sums over rows see.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size, J tiles.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.tiles import Tiles, make_tiles
from mla_jax.ops.hopper import multiprocessors, not_hopper
from mla_jax.target import Target

_INTERPRETED_CORES = 2  # enough to share work, few enough to be interpreted on a CPU


@functools.cache
def _kernels() -> Any:
    """The kernels' module, or None for a jax without Mosaic GPU; Pallas takes long to import."""
    try:
        from mla_jax.ops.experts import grouped
    except ImportError:
        return None
    return grouped


def why_not(call: Call, target: Target) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if reason := not_hopper(target):
        return reason
    if _kernels() is None:
        return "this version of jax has no Mosaic GPU"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    if any(width % _kernels().WIDTH for width in call.widths):
        width, inner = call.widths
        return f"widths must be multiples of {_kernels().WIDTH}, not {width} and {inner}"
    if not call.static:
        return "the number of tokens must be static"
    return None


def run(x, experts, weights, gate, up, down, *, precision, call: Call, target: Target):
    """See `routed_experts`."""
    rows = tile_rows(call)
    cores = _INTERPRETED_CORES if target.interprets else multiprocessors(target)
    plan = _kernels().Plan(rows, cores, target.interpret)
    tiles = make_tiles(experts, call.experts, rows, call.partial)
    return _mixed(plan, call.partial, x, weights, gate, up, down, tiles)


def tile_rows(call: Call) -> int:
    """Rows of a tile: many where an expert's tokens fill half of one in the mean, else few."""
    return _kernels().MANY if call.pairs >= call.experts * _kernels().MANY // 2 else _kernels().FEW


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed(plan, partial, x, weights, gate, up, down, tiles: Tiles):
    return _forward(plan, partial, x, weights, gate, up, down, tiles, save=False)[0]


def _forward(plan, partial, x, weights, gate, up, down, tiles: Tiles, save=True):
    gate_, up_, down_ = (kernel.astype(x.dtype) for kernel in (gate, up, down))
    rows = tiles.rows_of(x)
    hidden, *products = _kernels().gate_up(rows, gate_, up_, tiles, plan=plan, save=save)
    own = tiles.of_pairs(_kernels().product((hidden,), (down_,), tiles, plan=plan), partial)
    mixed = (own * weights[..., None]).sum(1).astype(x.dtype)
    return mixed, (x, weights, gate, up, down, tiles, *products)


def _backward(plan, partial, residuals, dy):
    x, weights, gate, up, down, tiles, a, b = residuals
    wide, narrow = jnp.promote_types(x.dtype, jnp.float32), x.dtype
    gate_, up_, down_ = (kernel.astype(narrow) for kernel in (gate, up, down))
    share = jnp.zeros(tiles.token.shape, wide).at[tiles.place].set(weights, unique_indices=True)
    dy = tiles.rows_of(dy.astype(narrow))
    towards = _kernels().product((dy,), (down_,), tiles, plan=plan, transposed=True).astype(wide)
    # Elementwise in XLA: inside the kernel this was no faster.
    a, b, share = a.astype(wide), b.astype(wide), share[:, None]
    s = jax.nn.sigmoid(a)
    hidden = a * s * b
    dweights = tiles.of_pairs((hidden * towards).sum(1), partial).astype(weights.dtype)
    towards = share * towards
    da = (towards * b * s * (1 + a * (1 - s))).astype(narrow)
    db = (towards * a * s).astype(narrow)
    dx = _kernels().product((da, db), (gate_, up_), tiles, plan=plan, transposed=True)
    dx = tiles.of_pairs(dx, partial).astype(wide).sum(1).astype(narrow)
    dgate, dup = _gradient(plan, tiles.rows_of(x), (da, db), tiles, (gate, up))
    (ddown,) = _gradient(plan, (share * hidden).astype(narrow), (dy,), tiles, (down,))
    return dx, dweights, dgate, dup, ddown, None


def _gradient(plan, x, y, tiles: Tiles, parameters):
    """Gradients of these parameters in their dtypes, of which the kernel writes one."""
    dtypes = {parameter.dtype for parameter in parameters}
    dtype = dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float32")
    dtype = dtype if dtype in ("bfloat16", "float16") else jnp.dtype("float32")
    made = _kernels().gradient(x, y, tiles, plan=plan, dtype=dtype)
    return [grad.astype(own.dtype) for grad, own in zip(made, parameters, strict=True)]


_mixed.defvjp(_forward, _backward)
