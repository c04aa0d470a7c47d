"""A ring of shared memory that one warpgroup fills and two empty, across output tiles, on Hopper.

A thread block stays on its multiprocessor and takes one output tile after the other. One warpgroup
copies, running ahead into the next tile; two multiply.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops import guard

EPILOGUE = 64  # rows of an accumulator that are written at a time, and 16-bit columns
_COPYING, _MULTIPLYING = 40, 232  # registers of a thread of each kind of warpgroup


class Plan(NamedTuple):
    """What these kernels are compiled for, beside their shapes.

    Attributes:
        rows: of a tile of tokens.
        cores: thread blocks, the device's multiprocessors.
        interpret: parameters of the interpreter, to run on a CPU, or None.
    """

    rows: int
    cores: int
    interpret: Any = None


class Ring(NamedTuple):
    """Stages of shared memory, each with a barrier for full and one for empty."""

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

        def take(at, done):
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

        self.share(total, fetch, take)

    def share(self, total: Any, fetch: Callable, take: Callable) -> None:
        """The same where `take` does all of an output tile.

        Args:
            total, fetch: as in `stream`.
            take: of an output tile and the number of steps that were taken before it; gives that
                number after it. It waits for and frees the stages of its steps.
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
                return take(first + index * cores, done)

            lax.fori_loop(0, count, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        lax.cond(lax.axis_index("wg") == 2, produce, consume)


def with_ring(scope, tiles, dtype, out_dtype, plan: Plan, *, stages, rooms):
    """Runs `scope(ring, staging)` with `stages` of these operand tiles and `rooms` for results."""

    def run(*refs):
        *operands, full, empty, staging = refs
        scope(Ring(operands, full, empty, stages, plan.cores), staging)

    pl.run_scoped(
        run,
        *[swizzled((stages, *tile), dtype) for tile in tiles],
        plgpu.Barrier(num_arrivals=len(tiles), num_barriers=stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        swizzled((2, rooms, EPILOGUE, row_elements(out_dtype)), out_dtype),
        collective_axes="wg",
    )


class Writer:
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


def row_elements(dtype) -> int:
    """Elements in a row of swizzled shared memory, 128 bytes."""
    return 128 // jnp.dtype(dtype).itemsize


def swizzled(shape, dtype, row=128):
    """Shared memory in the layout of matrix operands, in rows of so many bytes."""
    elements = row // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(row))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(body, out_type, plan: Plan, name: str):
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
