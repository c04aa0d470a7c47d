"""Attention of the expanded form on Hopper GPUs, forward and backward, in MLA's own shape.

q_nope, q_rope, k_nope, the one k_rope that all heads share, and value go in as the layer has them:
nothing is joined or repeated in memory. `plan.py` says which blocks meet, `forward.py` and
`backward.py` are the kernels, `tiles.py` what they share. Results repeat bit for bit.

Letters: B batch, T query tokens, S slots, N heads, H, P and V key, rotary and value channels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mla_jax.ops.guard import alike
from mla_jax.ops.hopper import multiprocessors, not_hopper
from mla_jax.ops.hopper.attention.plan import Plan, limits_of, make_plan, padded
from mla_jax.target import current

_WIDEST = 256
_CHANNELS = 32  # unit of the channels: a swizzled tile, and the stores of results
_OPTIONS = {"lengths", "lengths per query", "window", "segment_ids"}


@functools.cache
def _kernels() -> Any:
    """The kernels' module; Pallas takes a third of a second to import, so only where it runs."""
    try:
        from mla_jax.ops.hopper.attention import backward
    except ImportError:  # a jax without Mosaic GPU
        return None
    return backward


def why_not(call, target) -> str | None:
    """Why the kernels cannot serve `call` on `target`, or None.

    Args:
        call: a `dispatch.Call`.
        target: a `mla_jax.target.Target`.
    """
    reason = not_hopper(target)
    if reason is not None:
        return reason
    if _kernels() is None:
        return "this version of jax has no Mosaic GPU"
    if not all(isinstance(size, int) for size in (call.batch, call.queries, call.slots)):
        return "needs sizes that are known when it is compiled"
    if call.dtype not in ("bfloat16", "float16"):
        return f"takes bfloat16 and float16, not {call.dtype}"
    options = sorted(set(call.options) - _OPTIONS)
    options += ["soft_cap"] if call.soft_cap is not None else []
    if options:
        return f"takes lengths, a window and segments, not {', '.join(options)}"
    key, value = sum(call.key_dims), call.value_dim
    if any(width % 8 for width in (*call.key_dims, value)):
        return f"head widths must be multiples of 8, not {(*call.key_dims, value)}"
    if not 0 < key <= _WIDEST or not 0 < value <= _WIDEST:
        return f"takes keys and values of up to {_WIDEST} channels, not {key} and {value}"
    rows, heads = max(padded(call.queries), padded(call.slots)), call.heads
    if call.batch * rows * heads * max(*call.key_dims, value) >= 2**31:
        return f"{call.batch} x {rows} rows of {heads} heads: indices would not fit 32 bits"
    return None


def expanded_attention(
    q_nope: Float[Array, "B T N H"],
    q_rope: Float[Array, "B T N P"],
    k_nope: Float[Array, "B S N H"],
    k_rope: Float[Array, "B S P"],
    value: Float[Array, "B S N V"],
    *,
    scale: float,
    limits: Int[Array, "B T"] | Int[Array, "B 1"] | None = None,
    lengths: Int[Array, "B"] | None = None,
    query_lengths: Int[Array, "B"] | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    plan: Plan | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Attention with per-head keys and values and one rotary key, as the layer has them.

    out[b,t,n] = sum_s softmax_s(scale (q_nope[b,t,n] . k_nope[b,s,n] + q_rope[b,t,n] .
    k_rope[b,s])) value[b,s,n] over the slots s that query t sees (DeepSeek-V2, arXiv 2405.04434,
    equations 9 to 19), after FlashAttention-2 and -3 (arXiv 2307.08691, 2407.08608).

    Args:
        q_nope, q_rope: queries without and with position; H or P may be 0.
        k_nope, k_rope, value: keys per head, the rotary key of all heads, and values.
        scale: softmax temperature.
        limits: how many slots each query sees; 0 sees nothing. What follows makes them where they
            are None.
        lengths: slots in use of each row; what lies past them may be anything. None is all S.
        query_lengths: queries in use of each row; the others see nothing. None is all T.
        causal: the T queries are the last of the slots in use, and see those up to themselves.
        window: a query sees only the last `window` slots below its limit.
        segment_ids: of queries and slots, in any order; a query sees slots of its own segment.
        plan: what `plan_for` made of the same shapes, limits, window and segments, for many
            layers; None makes it here.
        interpret: parameters of Pallas' interpreter, to run on a CPU.

    Returns:
        out [B T N V] in the operands' dtype and lse [B T N] float32; zeros and -inf for a query
        that sees nothing. Both differentiate.
    """
    batch, tokens = q_nope.shape[:2]
    slots, width = value.shape[1], value.shape[3]
    shape = shape_of(q_nope, q_rope, value, scale, segment_ids is not None, interpret)
    if plan is None:
        limits = limits_of(
            batch,
            tokens,
            slots,
            limits=limits,
            lengths=lengths,
            query_lengths=query_lengths,
            causal=causal,
        )
        plan = make_plan(
            limits, slots, _kernels().sizes(shape), window=window, segment_ids=segment_ids
        )
    arrays = {"v": _pad(value)}
    pairs = [pair for pair in ((q_nope, k_nope), (q_rope, k_rope)) if pair[0].shape[-1]]
    for i, (query, key) in enumerate(pairs):
        arrays |= {f"q{i}": _pad(query), f"k{i}": _pad(key)}
    out, lse = _attention((shape, interpret), *alike(arrays, plan))
    return out[:, :tokens, :, :width], lse[:, :tokens]


def plan_for(
    limits: Int[Array, "b T"],
    slots: int,
    key_dims: tuple[int, int],
    value_dim: int,
    *,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Plan:
    """The plan of all calls with these limits, S, (H, P), V, window and segments.

    Calls that take it take the same `segment_ids`, which say that ids are compared.
    """
    nope, rope, value = (
        jax.ShapeDtypeStruct((1, 1, 1, w), jnp.bfloat16) for w in (*key_dims, value_dim)
    )
    sizes = _kernels().sizes(shape_of(nope, rope, value, 1.0, segment_ids is not None))
    return make_plan(limits, slots, sizes, window=window, segment_ids=segment_ids)


def shape_of(q_nope, q_rope, value, scale: float, segments: bool, interpret: Any = None):
    """What the kernels are compiled for."""
    batch, tokens, heads = q_nope.shape[:3]
    parts = tuple(_round(x.shape[-1], _CHANNELS) for x in (q_nope, q_rope) if x.shape[-1])
    return _kernels().Shape(
        batch=batch,
        tokens=_round(tokens, 8),
        slots=_round(value.shape[1], 8),
        heads=heads,
        parts=parts,
        shared=q_rope.shape[-1] > 0,
        value=_round(value.shape[-1], _CHANNELS),
        scale=float(scale),
        dtype=value.dtype,
        segments=segments,
        cores=multiprocessors(current()),
        native=not interpret,
    )


def _round(size, unit):
    return -(-size // unit) * unit


def _pad(x):
    """Tokens in eights, as copies want them; channels as tiles do: no known model needs more."""
    more = _round(x.shape[1], 8) - x.shape[1], _round(x.shape[-1], _CHANNELS) - x.shape[-1]
    if not any(more):
        return x
    return jnp.pad(x, [(0, 0), (0, more[0]), *[(0, 0)] * (x.ndim - 3), (0, more[1])])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, arrays, plan):
    return _forward_rule(static, arrays, plan)[0]


def _forward_rule(static, arrays, plan):
    out, lse = _batched(_run_forward, static, (arrays, plan))
    # Named here too, where the backward finds them: a policy that keeps both saves this kernel.
    out, lse = checkpoint_name(out, "heads"), checkpoint_name(lse, "lse")
    return (out, jnp.swapaxes(lse, 1, 2)[:, : out.shape[1]]), (arrays, plan, out, lse)


def _backward_rule(static, residuals, cotangents):
    return _batched(_run_backward, static, (*residuals, *cotangents)), None


_attention.defvjp(_forward_rule, _backward_rule)


def _batched(run, static, arguments):
    """run(*arguments, *static), which `jax.vmap` turns into a call with more batch rows."""

    @jax.custom_batching.custom_vmap
    def call(*arguments):
        return run(*arguments, *static)

    @call.def_vmap
    def _(size, mapped, *arguments):
        shape, interpret = static

        def join(x, is_mapped):  # one row of a plan serves all rows of its batch only
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            x = jnp.broadcast_to(x, (size, shape.batch, *x.shape[2:]))
            return x.reshape(size * shape.batch, *x.shape[2:])

        arguments = jax.tree.map(join, tuple(arguments), tuple(mapped))
        more = shape._replace(batch=size * shape.batch), interpret
        results = _batched(run, more, arguments)
        split = lambda x: x.reshape(size, shape.batch, *x.shape[1:])  # noqa: E731
        return jax.tree.map(split, results), jax.tree.map(lambda _: True, results)

    return call(*arguments)


# Jitted, so that the layers of a model share one lowering, which takes seconds.
@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _run_forward(arrays, plan, shape, interpret):
    return _kernels().forward(arrays, plan, shape, interpret or None)


@functools.partial(jax.jit, static_argnames=("shape", "interpret"))
def _run_backward(arrays, plan, out, lse, d_out, d_lse, shape, interpret):
    interpret = interpret or None
    blind = lse == -jnp.inf
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1) - d_lse
    delta = jnp.pad(jnp.swapaxes(delta, 1, 2), [(0, 0), (0, 0), (0, lse.shape[2] - out.shape[1])])
    lse2 = jnp.where(blind, 0, lse * math.log2(math.e))
    operands = arrays | {"do": d_out, "delta": jnp.where(blind, 0, delta), "lse": lse2}
    dq = _kernels().query_gradient(operands, plan, shape, interpret)
    if interpret is not None:
        # One kernel after the other: the interpreter's threads would wait for each other. What is
        # added is 0, which no compiler can know.
        first = jax.tree.leaves(dq)[0].ravel()[0]
        nothing = jnp.minimum(jnp.abs(first), 0)
        operands = jax.tree.map(lambda x: x + nothing.astype(x.dtype), operands)
    dk, dv = _kernels().key_gradient(operands, plan, shape, interpret)
    if shape.shared:
        dk[-1] = dk[-1].astype(jnp.float32).sum(2).astype(shape.dtype)
    gradients = {f"q{i}": x for i, x in enumerate(dq)} | {f"k{i}": x for i, x in enumerate(dk)}
    return gradients | {"v": dv}
