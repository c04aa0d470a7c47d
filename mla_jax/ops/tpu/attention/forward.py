"""The forward kernel of the expanded form on TPU.

A step of the grid takes a block of queries and a block of slots of one head. Scores stand
transposed, slots in rows and queries in columns: maxima over slots then compare whole vector
registers, statistics are single rows, and the second product keeps the weights in the matrix unit
while the channels of the values stream through (a unit 256 wide takes two thirds of the time of the
other way round, where 128 channels fill half of it). A row of ones under the values sums the
weights in the same product. The two parts of a key are joined in registers, so that the unit sees
one depth of H + P.

The units of a block (`tiles.units`) are computed one after the other, the scores of the next before
the weights of the last, so that the matrix unit and the vector unit work at the same time.

Letters: B batch, T query tokens, S slots, N heads, H, P and V key, rotary and value channels, I and
J blocks of queries and of slots.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.ops.tpu.attention import tiles
from mla_jax.ops.tpu.attention.plan import Plan, Shape
from mla_jax.ops.tpu.attention.tiles import MASKED, NN, NT
from mla_jax.ops.tpu.kernel import shaped
from mla_jax.ops.tpu.planning import TILE

_ONES = 16  # rows of ones under the values: a tile of 16-bit numbers


def forward(arrays: dict[str, jax.Array], plan: Plan, shape: Shape, before=None, known=None):
    """Out [B N T V], and lse [B N 1 T] in base 2; -1e30 where a query sees nothing.

    Args:
        arrays: q0 [B N T H] and q1 [B N T P], times the scale in base 2; k0 [B N S H], k1 [B S P]
            and v [B N S V]. A part of no channels is missing.
        plan: of `make_plan`.
        shape: what the kernel is compiled for.
        before: out and lse over other slots, both float32: the result is over these slots too, of
            the same dtype, and takes their memory.
        known: (batch row, block of queries) -> its run, in place of the plan's: libtpu's static
            profiler takes what is read at run time for 0.
    """
    sizes = shape.forward
    rows, cut = sizes.rows, sizes.slots
    count, steps = shape.tokens // rows, shape.slots // cut

    def run(table, b, i):
        return tiles.run_of(known, table, count, b, i)

    def of_queries(width):
        return pl.BlockSpec((None, None, rows, width), lambda h, b, i, j, table: (b, h, i, 0))

    def of_slots(*block, at):
        def index(h, b, i, j, table):
            first = run(table, b, i)[0]
            return at(h, b, tiles.within(run(table, b, i), first + j))

        return pl.BlockSpec(block, index)

    specs = {
        "q0": of_queries(shape.nope),
        "q1": of_queries(shape.rope),
        "k0": of_slots(None, None, cut, shape.nope, at=lambda h, b, n: (b, h, n, 0)),
        "k1": of_slots(None, cut, shape.rope, at=lambda h, b, n: (b, n, 0)),
        "v": of_slots(None, None, cut, shape.value, at=lambda h, b, n: (b, h, n, 0)),
        "bounds": pl.BlockSpec(
            (None, len(shape.bounds), rows), lambda h, b, i, j, table: (b, 0, i)
        ),
        "ids": of_slots(None, 1, cut, at=lambda h, b, n: (b, 0, n)),
    }
    operands = arrays | {"bounds": plan.bounds, "ids": plan.ids}
    if before is not None:
        operands |= {"before_out": before[0], "before_lse": before[1]}
    operands = {name: x for name, x in operands.items() if x is not None}
    dtype = shape.dtype if before is None else jnp.float32
    results = {
        "out": ((shape.batch, shape.heads, shape.tokens, shape.value), dtype),
        "lse": ((shape.batch, shape.heads, 1, shape.tokens), jnp.float32),
    }
    specs |= {
        "out": of_queries(shape.value),
        "lse": pl.BlockSpec((None, None, 1, rows), lambda h, b, i, j, table: (b, h, 0, i)),
    }
    specs |= {f"before_{name}": specs[name] for name in results}
    aliases = {}
    if before is not None:  # the table comes before the operands
        aliases = {1 + [*operands].index(f"before_{name}"): n for n, name in enumerate(results)}
    scratch = {
        "top": pltpu.VMEM((TILE, rows), jnp.float32),  # the first row is used
        "mixed": pltpu.VMEM((shape.value + _ONES, rows), jnp.float32),
        "scores": pltpu.VMEM((2, sizes.piece, sizes.columns), jnp.float32),
    }

    def kernel(table, *refs):
        of = dict(zip([*operands, *results, *scratch], refs, strict=True))
        b, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
        now = run(table, b, i)
        index = now[0] + j

        @pl.when(j == 0)
        def _():
            _begin(of, shape)

        tiles.visit(shape, now, index, lambda kind: _attend(of, shape, kind, index * cut))
        pl.when(j == steps - 1)(lambda: _finish(of, shape))

    make = shaped([*operands.values()])
    pairs = shape.batch * shape.heads * shape.tokens * shape.slots // (1 if shape.bounds else 2)
    channels = shape.nope + shape.rope + shape.value
    size = jnp.dtype(shape.dtype).itemsize
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(shape.heads, shape.batch, count, steps),
            in_specs=[specs[name] for name in operands],
            out_specs=[specs[name] for name in results],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[make(*result) for result in results.values()],
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=sizes.vmem_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * channels,
            transcendentals=pairs,
            bytes_accessed=size
            * shape.batch
            * shape.heads
            * channels
            * (shape.tokens + count * shape.slots),
        ),
        name="mla_attention",
    )(plan.queries, *operands.values())


def _begin(of, shape: Shape):
    """What the queries have before the first block of slots."""
    if "before_out" not in of:
        of["top"][...] = jnp.full_like(of["top"], MASKED)
        of["mixed"][...] = jnp.zeros_like(of["mixed"])
        return
    # A normalized result is a sum of weights of 1 under a maximum of lse.
    of["top"][...] = jnp.broadcast_to(of["before_lse"][...], of["top"].shape)
    of["mixed"][: shape.value] = of["before_out"][...].T
    of["mixed"][shape.value :] = jnp.ones((_ONES, of["top"].shape[1]), jnp.float32)


def _attend(of, shape: Shape, kind: str, begin):
    """A block of slots, of which the first is slot `begin`."""
    dot, columns = tiles.product(shape.dtype), shape.forward.columns
    todo = tiles.units(shape.forward, kind)

    def score(turn: int):
        """Scores of a unit to their buffer; returns the largest of each query."""
        unit = todo[turn]
        at = pl.ds(unit.column, columns)
        query = tiles.joined([of[name][at] for name in ("q0", "q1") if name in of])
        tops = []
        for first, end in ((unit.first, unit.free), (unit.free, unit.end)):
            if first == end:
                continue
            key = tiles.joined([of[name][first:end] for name in ("k0", "k1") if name in of])
            scores = dot(key, query, NT)
            if first == unit.free:
                scores = tiles.masked(of, shape, scores, unit, begin, kind == "diagonal")
            of["scores"][turn % 2, first - unit.first : end - unit.first] = scores
            tops.append(scores.max(axis=0, keepdims=True))
        return tops[0] if len(tops) == 1 else jnp.maximum(*tops)

    def mix(turn: int, largest):
        """Values by the weights of a unit, to what the queries have so far."""
        unit = todo[turn]
        at, size = pl.ds(unit.column, columns), unit.end - unit.first
        value, scores = of["v"][unit.first : unit.end], of["scores"][turn % 2, :size]
        if kind == "masked" and shape.clean:
            value = tiles.cleaned(value, scores)
        value = jnp.concatenate([value.T, jnp.ones((_ONES, size), value.dtype)])
        before = of["top"][:1, at]
        top = jnp.maximum(before, largest)
        weights = jnp.exp2(scores - top)
        new = dot(value, weights.astype(value.dtype), NN)
        of["mixed"][:, at] = of["mixed"][:, at] * jnp.exp2(before - top) + new
        of["top"][:1, at] = top

    ready = score(0)
    for turn in range(len(todo)):
        now = ready
        if turn + 1 < len(todo):
            ready = score(turn + 1)
        mix(turn, now)


def _finish(of, shape: Shape):
    """Normalizes what the blocks of slots left."""
    top, total = of["top"][:1], of["mixed"][shape.value : shape.value + 1]
    some = ~(top <= MASKED / 2)  # NaN is a score, too
    share = jnp.where(some, 1 / total, 0.0)
    of["out"][...] = (of["mixed"][: shape.value] * share).T.astype(of["out"].dtype)
    of["lse"][...] = jnp.where(some, top + jnp.log2(total), MASKED)
