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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from mla_jax.ops import guard
from mla_jax.ops.experts.tiles import Tiles
from mla_jax.ops.hopper.merge import like

FEW, MANY = 64, 128  # M: the least that a warpgroup multiplies, and one tile for two of them
WIDTH = 128  # columns of a block of a kernel: what K and N must be a multiple of
_DEPTH = 64  # of K, or rows of a gradient, that a step takes
_EPILOGUE = 64  # rows of an accumulator that are written at a time, and 16-bit columns
_COPYING, _MULTIPLYING = 40, 232  # registers of a thread of each kind of warpgroup


class Plan(NamedTuple):
    """What these kernels are compiled for, beside their shapes.

    Attributes:
        rows: M, `FEW` or `MANY`.
        cores: thread blocks, the device's multiprocessors.
        interpret: parameters of the interpreter, to run on a CPU, or None.
    """

    rows: int
    cores: int
    interpret: Any = None


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
            own = pl.ds(wg * _EPILOGUE, _EPILOGUE)

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
                (expert, m, n), store = place(at), _Writer(staging, wg)
                for b, acc in enumerate(accumulators):
                    column = n * blocks + b if apart else n
                    goal = outputs[0 if apart else b].at[expert, _block(m)].at[own]

                    @pl.when(column < width // WIDTH)
                    def _(acc=acc, column=column, goal=goal):
                        store(acc[...], goal, column * WIDTH)

            ring.stream(experts * each, fetch, multiply, finish, (_EPILOGUE, WIDTH), blocks)

        stage = [(_DEPTH, WIDTH)] * (1 + blocks)
        _with_ring(scope, stage, x.dtype, dtype, plan, stages=4, rooms=2)

    arrays = (x, *operands, tiles.first, tiles.needed)
    return tuple(_launch(body, out, plan, "grouped_gradient")(*arrays))


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
                finish(item, outputs, accumulators, _Writer(staging, wg))

            ring.stream(used_ref[0] * columns, fetch, multiply, end, tile, blocks)

        block = (WIDTH, _DEPTH) if transposed else (_DEPTH, WIDTH)
        stages, rooms = (4, 2) if not few else (5, 1) if blocks == 2 else (8, 1)
        stage = [(plan.rows, _DEPTH)] + [block] * blocks
        _with_ring(scope, stage, x[0].dtype, x[0].dtype, plan, stages=stages, rooms=rooms)

    return tuple(_launch(body, out, plan, name)(*x, *flat, tiles.owner, tiles.used))


def _block(index):
    return pl.ds(index * WIDTH, WIDTH)


def _column(n, b, blocks, total, apart):
    """Block b of item n; a pair's second block that is not there is its first again."""
    return jnp.minimum(n * blocks + b, total - 1) if apart else n


class _Ring(NamedTuple):
    """Stages of shared memory that one warpgroup fills and two empty, across output tiles."""

    operands: list[Any]  # [stages, ...] each
    full: Any  # a barrier per stage
    empty: Any
    stages: int
    cores: int

    def at(self, operand: int, slot):
        """An operand's tile in a stage."""
        return self.operands[operand].at[slot]

    def copy(self, source, operand: int, slot) -> None:
        """Starts the copy of a tile into a stage."""
        plgpu.copy_gmem_to_smem(source, self.at(operand, slot), self.full.at[slot])

    def stream(
        self,
        total: Any,
        fetch: Callable,
        multiply: Callable,
        finish: Callable,
        tile: tuple[int, int],
        accumulators: int,
    ) -> None:
        """Takes this thread block's share of `total` output tiles.

        Args:
            total: output tiles of all thread blocks.
            fetch: gives, for an output tile, the number of its steps and what copies one of them.
            multiply: issues a step's products, one for each accumulator.
            finish: writes an output tile from the accumulators.
            tile: shape of a warpgroup's accumulator.
            accumulators: how many.
        """
        cores, first = self.cores, lax.axis_index("sm")
        count = lax.div(total - first + (cores - 1), jnp.int32(cores))

        def produce():
            plgpu.set_max_registers(_COPYING, action="decrease")

            def item(index, filled):
                steps, copy = fetch(first + index * cores)

                def step(k, filled):
                    slot = lax.rem(filled, self.stages)

                    @pl.when(filled >= self.stages)
                    def _():
                        plgpu.barrier_wait(self.empty.at[slot])

                    copy(k, slot)
                    return filled + 1

                return lax.fori_loop(0, steps, step, filled)

            filled = lax.fori_loop(0, count, item, jnp.int32(0))

            def drain(step, _):  # a barrier must not be left with an arrival that nobody awaited
                plgpu.barrier_wait(self.empty.at[lax.rem(step, self.stages)])

            lax.fori_loop(jnp.maximum(filled - self.stages, 0), filled, drain, None)

        def consume():
            plgpu.set_max_registers(_MULTIPLYING, action="increase")

            def item(index, done):
                at = first + index * cores
                steps, _ = fetch(at)

                def scope(*acc):
                    def step(k, done):
                        slot = lax.rem(done, self.stages)
                        plgpu.barrier_wait(self.full.at[slot])
                        multiply(slot, acc)
                        plgpu.wgmma_wait(accumulators)  # the step before has been multiplied

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(self.empty.at[lax.rem(done - 1, self.stages)])

                        return done + 1

                    after = lax.fori_loop(0, steps, step, done)
                    plgpu.wgmma_wait(0)

                    @pl.when(steps > 0)
                    def _():
                        plgpu.barrier_arrive(self.empty.at[lax.rem(after - 1, self.stages)])

                    finish(at, acc)
                    return after

                return pl.run_scoped(scope, *[plgpu.ACC(tile, jnp.float32)] * accumulators)

            lax.fori_loop(0, count, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(lax.axis_index("wg") == 2, produce, consume)


def _with_ring(scope, tiles, dtype, out_dtype, plan: Plan, *, stages, rooms):
    """Runs `scope(ring, staging)` with `stages` of these operand tiles and `rooms` for results."""

    def run(*refs):
        *operands, full, empty, staging = refs
        scope(_Ring(operands, full, empty, stages, plan.cores), staging)

    pl.run_scoped(
        run,
        *[_swizzled((stages, *tile), dtype) for tile in tiles],
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        _swizzled((2, rooms, _EPILOGUE, _row_elements(out_dtype)), out_dtype),
        collective_axes="wg",
    )


class _Writer:
    """Writes what a warpgroup made through shared memory, one room while the other is copied."""

    def __init__(self, staging, wg):
        self.rooms, self.turn = staging.at[wg], 0
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # copies of the output tile before

    def __call__(self, result, output, first) -> None:
        """To these rows of an output, from column `first` on."""
        count, _, width = self.rooms.shape
        result = result.astype(self.rooms.dtype)
        for start in range(0, result.shape[1], width):
            room = self.rooms.at[self.turn % count]
            if self.turn >= count:
                plgpu.wait_smem_to_gmem(count - 1, wait_read_only=True)
            room[...] = result[:, start : start + width]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(room, output.at[:, pl.ds(first + start, width)])
            self.turn += 1


def _row_elements(dtype) -> int:
    """Elements in a row of swizzled shared memory, 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def _swizzled(shape, dtype):
    """Shared memory in the layout of matrix operands."""
    transforms = (plgpu.TilingTransform((8, _row_elements(dtype))), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _launch(body, out_type, plan: Plan, name: str):
    kernel = plgpu.kernel(
        body,
        out_type=out_type,
        grid=(plan.cores,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        kernel_name=name,
        interpret=plan.interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
    )
    return guard.unsplit(kernel, name, plan.interpret)
