"""Products of row tiles with experts' kernels, and those kernels' gradients, on Hopper GPUs.

Every tile of rows belongs to one expert (`tiles.py`), so no product is masked or cut, and a kernel
that no tile names is never read: a decode step moves the weights of the chosen experts once, where
a gather in XLA would move them three times and a product over all experts would read those of the
others too. Three products share one stream of operands through shared memory:

    gate_up   silu(x gate) * (x up): one pass over x, two kernels, the activation inside
    product   x kernel, or x kernel^T; of several such pairs the sum (gate and up towards dx)
    gradient  x^T y within each expert, of one y or of two (gate and up), experts of no tile zeros

A thread block stays on its multiprocessor and takes one output tile after the other. One warpgroup
copies, running ahead into the next tile; two multiply, each a half of two accumulators. Clusters of
two thread blocks that share what both read were no faster on an H200.

Letters: J tiles of rows, M rows of a tile, L rows of all tiles, E experts, K inputs, N outputs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from mla_jax.ops.experts.ring import EPILOGUE, Plan, Writer, launch, with_ring
from mla_jax.ops.experts.tiles import Tiles
from mla_jax.ops.hopper.merge import like

FEW, MANY = 64, 128  # M: the least that a warpgroup multiplies, and one tile for two of them
WIDTH = 128  # columns of a block of a kernel: what K and N must be a multiple of
_DEPTH = 64  # of K, or rows of a gradient, that a step takes


@functools.partial(jax.jit, static_argnames=("plan", "save"))
def gate_up(
    x: Float[Array, "L K"],
    gate: Float[Array, "E K N"],
    up: Float[Array, "E K N"],
    tiles: Tiles,
    *,
    plan: Plan,
    save: bool = False,
) -> tuple[Float[Array, "L N"], ...]:
    """`silu(x gate) * (x up)` of each tile with its expert's kernels, in x's dtype.

    Rows past the tiles in use hold anything. With `save` the two products come too.
    """
    width = gate.shape[2]
    out = like(x, (x.shape[0], width), x.dtype)

    def finish(item, outputs, accumulators, store):
        a, b = (acc[...] for acc in accumulators)
        parts = [a / (1 + jnp.exp(-a)) * b, *((a, b) if save else ())]
        for result, output in zip(parts, outputs, strict=True):
            store(result, output.at[item.rows], item.first(item.column))

    return _row_product(
        [x],
        [[gate, up]],
        [out] * (3 if save else 1),
        finish,
        tiles,
        plan,
        columns=width // WIDTH,
        apart=False,
        name="grouped_matmul_gate_up",
    )


@functools.partial(jax.jit, static_argnames=("plan", "transposed"))
def product(
    x: Sequence[Float[Array, "L K"]],
    kernels: Sequence[Float[Array, "E K N"]] | Sequence[Float[Array, "E N K"]],
    tiles: Tiles,
    *,
    plan: Plan,
    transposed: bool = False,
) -> Float[Array, "L N"]:
    """The sum over pairs of `x kernel`, each tile with its expert's kernel, in x's dtype.

    `transposed` kernels are [E N K]. Rows past the tiles in use hold anything.
    """
    width = kernels[0].shape[1 if transposed else 2]
    out = like(x[0], (x[0].shape[0], width), x[0].dtype)
    # A decode step has few tiles: single blocks occupy more multiprocessors.
    blocks = 1 if plan.rows == FEW else 2

    def finish(item, outputs, accumulators, store):
        for b, acc in enumerate(accumulators):
            column = item.column * blocks + b

            @pl.when(column < width // WIDTH)
            def _(acc=acc, column=column):
                store(acc[...], outputs[0].at[item.rows], item.first(column))

    (result,) = _row_product(
        x,
        [[kernel] * blocks for kernel in kernels],
        [out],
        finish,
        tiles,
        plan,
        columns=pl.cdiv(width // WIDTH, blocks),
        apart=True,
        transposed=transposed,
        name="grouped_matmul",
    )
    return result


@functools.partial(jax.jit, static_argnames=("plan", "dtype"))
def gradient(
    x: Float[Array, "L K"],
    y: Sequence[Float[Array, "L N"]],
    tiles: Tiles,
    *,
    plan: Plan,
    dtype: Any,
) -> tuple[Float[Array, "E K N"], ...]:
    """`x^T y` over each expert's rows, for one y or two, accumulated in float32, in `dtype`."""
    (_, inputs), width, experts = x.shape, y[0].shape[1], tiles.first.shape[0]
    apart, blocks = len(y) == 1, 2
    columns = pl.cdiv(width // WIDTH, blocks) if apart else width // WIDTH
    each = inputs // WIDTH * columns
    operands = [y[0]] * blocks if apart else list(y)
    out = [like(x, (experts, inputs, width), dtype)] * len(y)

    def body(x_ref, *refs):
        y_refs, (first_ref, needed_ref, *outputs) = refs[:blocks], refs[blocks:]

        def scope(ring, staging):
            wg = lax.axis_index("wg")
            own = pl.ds(wg * EPILOGUE, EPILOGUE)

            def place(at):
                """The expert and the blocks of K and of N of output tile `at`."""
                inside = lax.rem(at, each)
                return lax.div(at, each), lax.div(inside, columns), lax.rem(inside, columns)

            def fetch(at):
                expert, m, n = place(at)
                start = first_ref[expert] * plan.rows

                def copy(step, slot):
                    rows = pl.ds(start + step * _DEPTH, _DEPTH)
                    ring.copy(x_ref.at[rows, _block(m)], 0, slot)
                    for b, ref in enumerate(y_refs):
                        column = _column(n, b, blocks, width // WIDTH, apart)
                        ring.copy(ref.at[rows, _block(column)], 1 + b, slot)

                return needed_ref[expert] * (plan.rows // _DEPTH), copy

            def multiply(slot, accumulators):
                for b, acc in enumerate(accumulators):
                    plgpu.wgmma(acc, ring.at(0, slot).at[:, own].T, ring.at(1 + b, slot))

            def finish(at, accumulators):
                (expert, m, n), store = place(at), Writer(staging, wg)
                for b, acc in enumerate(accumulators):
                    column = n * blocks + b if apart else n
                    goal = outputs[0 if apart else b].at[expert, _block(m)].at[own]

                    @pl.when(column < width // WIDTH)
                    def _(acc=acc, column=column, goal=goal):
                        store(acc[...], goal, column * WIDTH)

            ring.stream(experts * each, fetch, multiply, finish, (EPILOGUE, WIDTH), blocks)

        stage = [(_DEPTH, WIDTH)] * (1 + blocks)
        with_ring(scope, stage, x.dtype, dtype, plan, stages=4, rooms=2)

    arrays = (x, *operands, tiles.first, tiles.needed)
    return tuple(launch(body, out, plan, "grouped_gradient")(*arrays))


class _Item(NamedTuple):
    """A warpgroup's part of an output tile: its rows, and which block or pair of blocks."""

    rows: Any
    column: Any
    inside: Any  # where its columns begin in a block

    def first(self, block):
        """The first of its columns in a block."""
        return block * WIDTH + self.inside


def _row_product(x, kernels, out, finish, tiles, plan, *, columns, apart, name, transposed=False):
    """Tiles of rows times kernels: `kernels[i]` has the blocks that meet `x[i]`.

    Blocks lie `apart` where they are neighbours of one kernel, else they are one of several.
    """
    blocks, count = len(kernels[0]), len(x)
    few = plan.rows == FEW  # then the two warpgroups share the columns, else the rows
    tile = (FEW, WIDTH // 2) if few else (MANY // 2, WIDTH)
    total = kernels[0][0].shape[1 if transposed else 2] // WIDTH
    depth = x[0].shape[1] // _DEPTH
    flat = [kernel for group in kernels for kernel in group]

    def body(*refs):
        x_refs, refs = refs[:count], refs[count:]
        kernel_refs, (owner_ref, used_ref, *outputs) = refs[: len(flat)], refs[len(flat) :]

        def scope(ring, staging):
            wg = lax.axis_index("wg")
            half = pl.ds(wg * (WIDTH // 2), WIDTH // 2)
            own_rows = slice(None) if few else pl.ds(wg * tile[0], tile[0])

            def fetch(at):
                j, n = lax.div(at, columns), lax.rem(at, columns)
                rows, expert = pl.ds(j * plan.rows, plan.rows), owner_ref[j]

                def copy(step, slot):
                    for i, x_ref in enumerate(x_refs):

                        def one(i=i, x_ref=x_ref):
                            inner = pl.ds((step - i * depth) * _DEPTH, _DEPTH)
                            ring.copy(x_ref.at[rows, inner], 0, slot)
                            for b in range(blocks):
                                outer = _block(_column(n, b, blocks, total, apart))
                                where = (outer, inner) if transposed else (inner, outer)
                                ref = kernel_refs[i * blocks + b].at[expert]
                                ring.copy(ref.at[where], 1 + b, slot)

                        if count == 1:
                            one()
                        else:
                            pl.when((step >= i * depth) & (step < (i + 1) * depth))(one)

                return count * depth, copy

            def multiply(slot, accumulators):
                rows = ring.at(0, slot).at[own_rows]
                for b, acc in enumerate(accumulators):
                    kernel = ring.at(1 + b, slot)
                    if few:
                        kernel = kernel.at[half] if transposed else kernel.at[:, half]
                    plgpu.wgmma(acc, rows, kernel.T if transposed else kernel)

            def end(at, accumulators):
                j, n = lax.div(at, columns), lax.rem(at, columns)
                start = j * plan.rows + (0 if few else wg * tile[0])
                item = _Item(pl.ds(start, tile[0]), n, wg * tile[1] if few else 0)
                finish(item, outputs, accumulators, Writer(staging, wg))

            ring.stream(used_ref[0] * columns, fetch, multiply, end, tile, blocks)

        block = (WIDTH, _DEPTH) if transposed else (_DEPTH, WIDTH)
        stages, rooms = (4, 2) if not few else (5, 1) if blocks == 2 else (8, 1)
        stage = [(plan.rows, _DEPTH)] + [block] * blocks
        with_ring(scope, stage, x[0].dtype, x[0].dtype, plan, stages=stages, rooms=rooms)

    return tuple(launch(body, out, plan, name)(*x, *flat, tiles.owner, tiles.used))


def _block(index):
    return pl.ds(index * WIDTH, WIDTH)


def _column(n, b, blocks, total, apart):
    """Block b of item n; a pair's second block that is not there is its first again."""
    return jnp.minimum(n * blocks + b, total - 1) if apart else n
