"""The backward kernel of the expanded form on TPU: all gradients in one pass.

As in the forward kernel, scores stand transposed. A step takes a block of slots and a block of
queries of one head; the gradients of the slots are summed over the queries of a row of steps, those
of all queries stay in VMEM until the last block of slots has been seen. So every pair of blocks is
computed once, with five products (FlashAttention-2, arXiv 2307.08691, without its second pass).

Letters: B batch, T query tokens, S slots, N heads, H, P and V key, rotary and value channels, I and
J blocks of queries and of slots.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.ops.tpu.attention import tiles
from mla_jax.ops.tpu.attention.plan import Plan, Shape
from mla_jax.ops.tpu.attention.tiles import NN, NT, TN
from mla_jax.ops.tpu.kernel import shaped


def backward(arrays: dict[str, jax.Array], plan: Plan, shape: Shape, known=None):
    """The gradients of q0 [B N T H], q1 [B N T P], k0 [B N S H], k1 [B N S P] and v [B N S V].

    That of k1 comes per head: the caller sums it. Parts of no channels are missing.

    Products with base 2: a factor of ln 2 is in all of them.

    Args:
        arrays: those of `forward`; d_out [B N T V]; and statistics [B N 2 T], float32: lse in base
            2, and delta, the sum of out times d_out less the gradient of lse.
        plan: of `make_plan`.
        shape: what the kernel is compiled for.
        known: (batch row, block of slots) -> its run of blocks of queries, in place of the plan's.
    """
    sizes = shape.backward
    rows, cut = sizes.rows, sizes.slots
    count, steps = shape.tokens // rows, shape.slots // cut
    width = shape.nope + shape.rope

    def run(table, b, j):
        return tiles.run_of(known, table, steps, b, j)

    def of_queries(*block, at):
        return pl.BlockSpec(
            block, lambda h, b, j, i, table: at(h, b, tiles.within(run(table, b, j), i))
        )

    def of_slots(*block, at):
        return pl.BlockSpec(block, lambda h, b, j, i, table: at(h, b, j))

    def of_result(channels):
        # Queries are stored while the last block of slots runs; until then nothing is.
        return pl.BlockSpec(
            (None, None, rows, channels),
            lambda h, b, j, i, table: (b, h, jnp.where(j == steps - 1, i, 0), 0),
        )

    per_head = lambda h, b, n: (b, h, n, 0)  # noqa: E731
    specs = {
        "q0": of_queries(None, None, rows, shape.nope, at=per_head),
        "q1": of_queries(None, None, rows, shape.rope, at=per_head),
        "k0": of_slots(None, None, cut, shape.nope, at=per_head),
        "k1": of_slots(None, cut, shape.rope, at=lambda h, b, n: (b, n, 0)),
        "v": of_slots(None, None, cut, shape.value, at=per_head),
        "d_out": of_queries(None, None, rows, shape.value, at=per_head),
        "statistics": of_queries(None, None, 2, rows, at=lambda h, b, n: (b, h, 0, n)),
        "bounds": of_queries(None, len(shape.bounds), rows, at=lambda h, b, n: (b, 0, n)),
        "ids": of_slots(None, 1, cut, at=lambda h, b, n: (b, 0, n)),
    }
    operands = arrays | {"bounds": plan.bounds, "ids": plan.ids}
    operands = {name: x for name, x in operands.items() if x is not None}
    make = shaped([*operands.values()])
    results, out_specs = {}, []
    widths = {"q0": shape.nope, "q1": shape.rope, "k0": shape.nope, "k1": shape.rope}
    for name, channels in (widths | {"v": shape.value}).items():
        if name in operands:
            length = shape.tokens if name[0] == "q" else shape.slots
            results["d_" + name] = make((shape.batch, shape.heads, length, channels), shape.dtype)
            block = of_slots(None, None, cut, channels, at=per_head)
            out_specs.append(of_result(channels) if name[0] == "q" else block)
    scratch = {
        "of_queries": pltpu.VMEM((count, width, rows), jnp.float32),
        "of_keys": pltpu.VMEM((cut, width), jnp.float32),
        "of_values": pltpu.VMEM((cut, shape.value), jnp.float32),
    }

    def kernel(table, *refs):
        of = dict(zip([*operands, *results, *scratch], refs, strict=True))
        b, j, i = (pl.program_id(axis) for axis in (1, 2, 3))
        now = run(table, b, j)

        @pl.when(j == 0)
        def _():
            of["of_queries"][i] = jnp.zeros((width, rows), jnp.float32)

        @pl.when(i == 0)
        def _():
            for name in ("of_keys", "of_values"):
                of[name][...] = jnp.zeros_like(of[name])

        tiles.visit(shape, now, i, lambda kind: _attend(of, shape, kind, i, j * cut))

        @pl.when(i == count - 1)
        def _():
            _store(of, "d_k", of["of_keys"][...] * math.log(2), shape)
            of["d_v"][...] = of["of_values"][...].astype(shape.dtype)

        @pl.when(j == steps - 1)
        def _():
            _store(of, "d_q", of["of_queries"][i].T * math.log(2), shape)

    pairs = shape.batch * shape.heads * shape.tokens * shape.slots // (1 if shape.bounds else 2)
    size = jnp.dtype(shape.dtype).itemsize
    moved = 2 * (width + shape.value) * (shape.slots + shape.tokens * steps)
    made = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.heads, shape.batch, steps, count),
            in_specs=[specs[name] for name in operands],
            out_specs=out_specs,
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(results.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=sizes.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (3 * width + 2 * shape.value),
            transcendentals=pairs,
            bytes_accessed=size * shape.batch * shape.heads * moved,
        ),
        name="mla_attention_backward",
    )(plan.slots, *operands.values())
    return {name[2:]: x for name, x in zip(results, made, strict=True)}


def _store(of, name: str, gradient, shape: Shape):
    """A gradient of joined parts to the results of its parts."""
    first = 0
    for part, channels in (("0", shape.nope), ("1", shape.rope)):
        if name + part in of:
            result = gradient[:, first : first + channels]
            of[name + part][...] = result.astype(shape.dtype)
        first += channels


def _attend(of, shape: Shape, kind: str, i, begin):
    """A pair of blocks; slots begin with slot `begin`."""
    dot, columns, dtype = tiles.product(shape.dtype), shape.backward.columns, shape.dtype
    dirty = kind == "masked" and shape.clean
    for unit in tiles.units(shape.backward, kind):
        at, part = pl.ds(unit.column, columns), slice(unit.first, unit.end)
        query = tiles.joined([of[name][at] for name in ("q0", "q1") if name in of])
        key = tiles.joined([of[name][part] for name in ("k0", "k1") if name in of])
        value, d_out = of["v"][part], of["d_out"][at]
        scores = dot(key, query, NT)
        if unit.free < unit.end:
            free, rest = unit.free - unit.first, unit.end - unit.first
            seen = tiles.masked(of, shape, scores[free:rest], unit, begin, kind == "diagonal")
            scores = jnp.concatenate([scores[:free], seen]) if free else seen
        if dirty:
            key, value = (tiles.cleaned(x, scores) for x in (key, value))
        weights = jnp.exp2(scores - of["statistics"][:1, at])
        d_weights = dot(value, d_out, NT)
        d_scores = (weights * (d_weights - of["statistics"][1:, at])).astype(dtype)
        of["of_values"][part] += dot(weights.astype(dtype), d_out, NN)
        of["of_keys"][part] += dot(d_scores, query, NN)
        of["of_queries"][i, :, at] += dot(key, d_scores, TN)
