"""Attention of the expanded form on TPU, forward and backward, in MLA's own shape.

q_nope, q_rope, k_nope, the one k_rope that all heads share, and value go in as the layer has them,
heads before tokens: nothing is joined or repeated in memory. `plan.py` says which blocks meet,
`forward.py` and `backward.py` are the kernels, `tiles.py` what they share.

Letters: B batch, T query tokens, S slots, N heads, H, P and V key, rotary and value channels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mla_jax import target
from mla_jax.ops.tpu.attention.plan import RUN, Shape, make_plan, make_sizes, padded

_OPTIONS = {"lengths", "lengths per query", "window", "segment_ids"}
_WIDEST = 256  # channels of a query and of a value
_MOST_RUNS = 2**16 // RUN  # the plan lies in scalar memory, which is 1 MiB
_MOST_BYTES = 2**24  # of the gradients of a row's queries in VMEM; longer rows take several passes


def why_not(call, device: target.Target) -> str | None:
    """Why the kernels cannot serve `call` on `device`, or None."""
    if device.platform != "tpu" and device.interprets != "tpu":
        return f"needs a TPU, this is {device}"
    if not all(isinstance(size, int) for size in (call.batch, call.queries, call.slots)):
        return "needs sizes that are known when it is compiled"
    if call.dtype not in ("bfloat16", "float32"):
        return f"takes bfloat16 and float32, not {call.dtype}"
    others = sorted(set(call.options) - _OPTIONS) + (["soft_cap"] if call.soft_cap else [])
    if others:
        return f"takes lengths, a window and segments, not {', '.join(others)}"
    if any(width % 16 for width in (*call.key_dims, call.value_dim)):
        return f"head widths must be multiples of 16, not {call.key_dims} and {call.value_dim}"
    if max(sum(call.key_dims), call.value_dim) > _WIDEST:
        return f"head widths must be up to {_WIDEST}, not {sum(call.key_dims)}, {call.value_dim}"
    size = jnp.dtype(call.dtype).itemsize
    runs = [
        call.batch * max(-(-call.queries // sizes.rows), -(-call.slots // sizes.slots))
        for sizes in make_sizes(call.queries, call.slots, size, device.kind)
    ]
    if max(runs) > _MOST_RUNS:
        return f"has {max(runs)} blocks in its plan, scalar memory takes {_MOST_RUNS}"
    return None


def expanded_attention(queries, store, seen, call):
    """The expanded form: see `ops.expanded_attention`."""
    causal = seen.full and call.queries == call.slots and seen.ends is not None
    return attention(
        *queries,
        store.k_nope,
        store.k_rope,
        store.value,
        seen.limits,
        scale=call.scale,
        window=seen.window,
        segment_ids=seen.segments,
        causal=causal and seen.window is None and seen.segments is None,
        full=seen.full,
    )


def attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    k_nope: Float[Array, "B S N H"],
    k_rope: Float[Array, "B S P"],
    value: Float[Array, "B S N V"],
    limits: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    causal: bool = False,
    full: bool = False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention with per-head keys and values, the rotary key shared.

    Args:
        q_nope, q_rope: queries; H or P may be 0.
        k_nope, k_rope, value: keys per head, the rotary key of all heads, and values.
        limits: how many slots each query sees; 0 sees nothing.
        scale: softmax temperature.
        window: a query sees only the last `window` slots below its limit.
        segment_ids: of queries and slots, in any order; a query sees slots of its own segment.
        causal: the limits are 1 to T = S, known when it is compiled.
        full: no slot holds garbage.

    Returns:
        out [B T N V] in the operands' dtype and lse [B T N] float32; zeros and -inf for a query
        that sees nothing. Both differentiate.
    """
    (batch, tokens, heads, nope), rope = q_nope.shape, q_rope.shape[-1]
    slots, dtype = value.shape[1], jnp.dtype(value.dtype)
    sizes = make_sizes(tokens, slots, dtype.itemsize, target.current().kind)
    bounds = () if causal else ("end",)
    bounds += ("start",) if window is not None else ()
    bounds += ("id",) if segment_ids is not None else ()
    shape = Shape(
        batch=batch,
        tokens=padded(tokens, *(s.rows for s in sizes)),
        slots=padded(slots, *(s.slots for s in sizes)),
        heads=heads,
        nope=nope,
        rope=rope,
        value=value.shape[-1],
        dtype=dtype.name,
        bounds=bounds,
        clean=not full,
        forward=sizes[0],
        backward=sizes[1],
    )
    # The kernel's exponents are in base 2: a factor of the queries, in float32.
    temperature = scale * math.log2(math.e)
    scaled = lambda x: (x.astype(jnp.float32) * temperature).astype(dtype)  # noqa: E731
    parts = {"q0": scaled(q_nope), "q1": scaled(q_rope), "k0": k_nope, "k1": k_rope, "v": value}
    arrays = {
        name: _ready(x, shape.tokens if name[0] == "q" else shape.slots)
        for name, x in parts.items()
        if x.shape[-1]
    }
    out, lse = _attention((shape, slots, window), arrays, limits, segment_ids)
    blind = lse[:, :, 0] < -1e29
    lse = jnp.where(blind, -jnp.inf, lse[:, :, 0] * math.log(2))
    return jnp.swapaxes(out, 1, 2)[:, :tokens], jnp.swapaxes(lse, 1, 2)[:, :tokens]


def _ready(x, length):
    """[B T N K] as [B N T K], or [B T K], with zeros up to whole blocks of tokens."""
    if x.ndim == 4:
        x = jnp.swapaxes(x, 1, 2)
    more = length - x.shape[-2]
    return x if not more else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, arrays, limits, segment_ids):
    return _run_forward(static, arrays, limits, segment_ids)


def _forward_rule(static, arrays, limits, segment_ids):
    out, lse = _run_forward(static, arrays, limits, segment_ids)
    return (out, lse), (arrays, limits, segment_ids, out, lse)


def _backward_rule(static, residuals: Any, cotangents: Any):
    return _run_backward(static, *residuals, *cotangents), None, None


_attention.defvjp(_forward_rule, _backward_rule)


# Jitted, so that the layers of a model share one lowering. The kernels' modules are imported where
# they run, since Pallas takes long to import.
@functools.partial(jax.jit, static_argnums=0)
def _run_forward(static, arrays, limits, segment_ids):
    from mla_jax.ops.tpu.attention.forward import forward

    shape, slots, window = static
    plan = make_plan(shape, limits, slots, window, segment_ids)
    return forward(arrays, plan, shape)


@functools.partial(jax.jit, static_argnums=0)
def _run_backward(static, arrays, limits, segment_ids, out, lse, d_out, d_lse):
    from mla_jax.ops.tpu.attention.backward import backward

    shape, slots, window = static
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    delta -= d_lse[:, :, 0] / math.log(2)
    statistics = jnp.stack([jnp.where(lse < -1e29, 0, lse)[:, :, 0], delta], axis=2)
    of_queries = {name: x for name, x in arrays.items() if name[0] == "q"}
    of_queries |= {"d_out": d_out, "statistics": statistics}
    rest = {name: x for name, x in arrays.items() if name[0] != "q"}
    passes = -(-shape.tokens * (shape.nope + shape.rope) * 4 // _MOST_BYTES)
    length = -(-shape.tokens // passes // shape.backward.rows) * shape.backward.rows
    limits = jnp.pad(limits, [(0, 0), (0, shape.tokens - limits.shape[1])], mode="edge")
    made = []
    for first in range(0, shape.tokens, length):
        end = min(first + length, shape.tokens)
        axis = lambda name: 3 if name == "statistics" else 2  # noqa: E731
        part = {
            name: jax.lax.slice_in_dim(x, first, end, axis=axis(name))
            for name, x in of_queries.items()
        }
        ids = segment_ids
        if segment_ids is not None:
            ids = jnp.pad(ids[0], [(0, 0), (0, shape.tokens - ids[0].shape[1])], mode="edge")
            ids = (ids[:, first:end], segment_ids[1])
        bounds = shape.bounds or (() if passes == 1 else ("end",))
        now = shape._replace(tokens=end - first, bounds=bounds)
        plan = make_plan(now, limits[:, first:end], slots, window, ids)
        made.append(backward(part | rest, plan, now))
    gradients = {}
    for name in arrays:
        found = [each[name] for each in made]
        if name[0] == "q":
            gradients[name] = jnp.concatenate(found, axis=2) if passes > 1 else found[0]
            continue
        if name == "k1":
            found = [x.astype(jnp.float32).sum(1) for x in found]
        total = functools.reduce(lambda a, b: a.astype(jnp.float32) + b.astype(jnp.float32), found)
        gradients[name] = total.astype(shape.dtype)
    return gradients
