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
BLIND = -1e30  # lse of a query that sees nothing, as the kernel has it
_MOST_BYTES = 2**24  # of the gradients of a row's queries in VMEM; longer rows take several passes


def why_not(call, device: target.Target) -> str | None:
    """Why the kernels cannot serve `call` on `device`, or None."""
    if device.platform != "tpu" and device.interprets != "tpu":
        return f"needs a TPU, this is {device}"
    if device.partitioned:
        return device.partitioned
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
    q_nope, q_rope = queries
    return attention(
        q_nope,
        q_rope,
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
    tokens, slots = q_nope.shape[1], value.shape[1]
    bounds = () if causal else ("end",)
    bounds += ("start",) if window is not None else ()
    bounds += ("id",) if segment_ids is not None else ()
    queries = ready_queries((q_nope, q_rope), scale, slots)
    shape = _shape(queries, tokens, slots, value.shape[-1], bounds, not full)
    arrays = queries | _ready_slots(shape, k_nope, k_rope, value)
    out, lse = _attention((shape, slots, window), arrays, None, limits, segment_ids)
    return finished(out, lse, tokens)


def _shape(queries, tokens, slots, value, bounds, clean) -> Shape:
    """What the kernels are compiled for, of queries as `ready_queries` makes them."""
    batch, heads = next(iter(queries.values())).shape[:2]
    nope, rope = (queries[name].shape[-1] if name in queries else 0 for name in ("q0", "q1"))
    dtype = next(iter(queries.values())).dtype
    sizes = make_sizes(tokens, slots, dtype.itemsize, target.current().kind)
    return Shape(
        batch=batch,
        tokens=padded(tokens, *(s.rows for s in sizes)),
        slots=padded(slots, *(s.slots for s in sizes)),
        heads=heads,
        nope=nope,
        rope=rope,
        value=value,
        dtype=dtype.name,
        bounds=bounds,
        clean=clean,
        forward=sizes[0],
        backward=sizes[1],
    )


def ready_queries(queries, scale: float, slots: int) -> dict[str, Array]:
    """q_nope [B T N H] and q_rope [B T N P] as the kernels take them: q0 and q1 [B N T' K].

    They are scaled, and T' is T up to whole blocks. A part of no channels is missing.
    """
    dtype, tokens = queries[0].dtype, queries[0].shape[1]
    sizes = make_sizes(tokens, slots, dtype.itemsize, target.current().kind)
    length = padded(tokens, *(s.rows for s in sizes))
    # The kernel's exponents are in base 2: a factor of the queries, in float32.
    temperature = scale * math.log2(math.e)
    scaled = lambda x: (x.astype(jnp.float32) * temperature).astype(dtype)  # noqa: E731
    named = zip(("q0", "q1"), queries, strict=True)
    return {name: _ready(scaled(x), length) for name, x in named if x.shape[-1]}


def _ready_slots(shape: Shape, k_nope, k_rope, value) -> dict[str, Array]:
    parts = {"k0": k_nope, "k1": k_rope, "v": value}
    return {name: _ready(x, shape.slots) for name, x in parts.items() if x.shape[-1]}


def _ready(x, length):
    """[B T N K] as [B N T K], or [B T K], with zeros up to whole blocks of tokens."""
    if x.ndim == 4:
        x = jnp.swapaxes(x, 1, 2)
    more = length - x.shape[-2]
    return x if not more else jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])


def finished(out, lse, tokens: int):
    """The kernel's out [B N T' V] and lse [B N 1 T'] as [B T N V] and [B T N]."""
    blind = lse[:, :, 0] < -1e29
    lse = jnp.where(blind, -jnp.inf, lse[:, :, 0] * math.log(2))
    return jnp.swapaxes(out, 1, 2)[:, :tokens], jnp.swapaxes(lse, 1, 2)[:, :tokens]


def nothing_yet(queries: dict[str, Array], value: int, zero):
    """The result over no slots, from which `go_on` begins; `zero` says where it varies."""
    batch, heads, length, _ = next(iter(queries.values())).shape
    out = jnp.zeros((batch, heads, length, value), jnp.float32) + zero
    return out, jnp.full((batch, heads, 1, length), BLIND, jnp.float32) + zero


def go_on(before, queries, k_nope, k_rope, value, limits, *, window: int | None):
    """`attention` to more slots than those of the result `before`, as the kernel has both.

    Args:
        before: out [B N T' V] and lse [B N 1 T'], float32; the new result takes their memory.
        queries: of `ready_queries`.
        k_nope, k_rope, value, limits, window: as in `attention`.
    """
    slots, bounds = value.shape[1], ("end",) + (("start",) if window is not None else ())
    shape = _shape(queries, limits.shape[1], slots, value.shape[-1], bounds, True)
    arrays = queries | _ready_slots(shape, k_nope, k_rope, value)
    return _attention((shape, slots, window), arrays, before, limits, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, arrays, before, limits, segment_ids):
    return _run_forward(static, arrays, before, limits, segment_ids)


def _forward_rule(static, arrays, before, limits, segment_ids):
    out, lse = _run_forward(static, arrays, before, limits, segment_ids)
    return (out, lse), (arrays, before, limits, segment_ids, out, lse)


def _backward_rule(static, residuals: Any, cotangents: Any):
    arrays, before, *rest = residuals
    of_before = None if before is None else _gradients_before(before, *rest[2:], *cotangents)
    return _run_backward(static, arrays, *rest, *cotangents), of_before, None, None


def _gradients_before(before, out, lse, d_out, d_lse):
    """Of the result before: its weight is 2^(its lse - lse)."""
    weight = jnp.exp2(before[1] - jnp.where(lse < -1e29, 0, lse))[:, :, 0]
    along = ((before[0] - out) * d_out).sum(-1) * math.log(2) + d_lse[:, :, 0]
    return weight[..., None] * d_out, (weight * along)[:, :, None]


_attention.defvjp(_forward_rule, _backward_rule)


# Jitted, so that the layers of a model share one lowering. The kernels' modules are imported where
# they run, since Pallas takes long to import.
@functools.partial(jax.jit, static_argnums=0)
def _run_forward(static, arrays, before, limits, segment_ids):
    from mla_jax.ops.tpu.attention.forward import forward

    shape, slots, window = static
    plan = make_plan(shape, limits, slots, window, segment_ids)
    return forward(arrays, plan, shape, before)


@functools.partial(jax.jit, static_argnums=0)
def _run_backward(static, arrays, limits, segment_ids, out, lse, d_out, d_lse):
    from mla_jax.ops.tpu.attention.backward import backward

    shape, slots, window = static
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
    delta -= d_lse[:, :, 0] / math.log(2)
    statistics = jnp.stack([jnp.where(lse < -1e29, 0, lse)[:, :, 0], delta], axis=2)
    of_queries = {name: x for name, x in arrays.items() if name[0] == "q"}
    of_queries |= {"d_out": d_out.astype(shape.dtype), "statistics": statistics}
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
