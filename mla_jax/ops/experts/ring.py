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
from mla_jax.ops.hopper.mosaic import arrive_global, fence_copies, kernel, meet_global

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


class Work(NamedTuple):
    """Output tiles that thread blocks share out.

    Attributes:
        total: how many there are.
        fetch: gives, for an output tile, the number of its steps and what copies one of them.
        take: does all of an output tile, given the number of steps that were taken before it; gives
            that number after it. It waits for and frees the stages of its steps.
    """

    total: Any
    fetch: Callable
    take: Callable


class Meeting(NamedTuple):
    """Where the copying warpgroup of every thread block waits for all multiplying ones.

    Attributes:
        arrivals: int32 [1] in global memory: zero before and after.
        here: a barrier of two arrivals for the interpreter, which has one thread block; or None.
        plan: of the kernel.
    """

    arrivals: Any
    here: Any
    plan: Plan

    def arrive(self) -> None:
        """Says that all that this warpgroup has written may be read."""
        if self.plan.interpret:
            plgpu.barrier_arrive(self.here)
        else:
            arrive_global(self.arrivals, jnp.int32(0))

    def wait(self) -> None:
        """Waits for all; then copies bring what they have written."""
        if self.plan.interpret:
            plgpu.barrier_wait(self.here)
            return
        cores = self.plan.cores
        meet_global(self.arrivals, jnp.int32(0), jnp.int32(2 * cores), jnp.int32(cores))
        fence_copies()


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
        """Takes this thread block's share of `total` output tiles; the rest as in `streamed`."""
        take = self.streamed(fetch, multiply, finish, tile, accumulators)
        self.share(Work(total, fetch, take))

    def streamed(
        self,
        fetch: Callable,
        multiply: Callable,
        finish: Callable,
        tile: tuple[int, int],
        accumulators: int,
    ) -> Callable:
        """`take` of a `Work` whose sums stay in accumulators.

        Args:
            fetch: as in `Work`.
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

        return take

    def share(self, first: Work, then: tuple[Work, Meeting] | None = None):
        """Takes this thread block's share of the output tiles, of one work or of two in turn.

        The second reads what all thread blocks have written of the first, after the meeting. Its
        first output tile is for the thread block that comes after the one of the first's last.
        """
        cores, me = self.cores, lax.axis_index("sm")
        count_from = lambda start, work: lax.div(  # noqa: E731
            work.total - start + (cores - 1), jnp.int32(cores)
        )
        count = count_from(me, first)
        if then is not None:
            second, meeting = then
            start = lax.rem(me + cores - lax.rem(first.total, jnp.int32(cores)), jnp.int32(cores))
            second_count = count_from(start, second)

        def produce():
            plgpu.set_max_registers(_COPYING, action="decrease")

            def step_of(copy, **which):
                def step(k, filled):
                    slot = lax.rem(filled, self.stages)

                    @pl.when(filled >= self.stages)
                    def _():
                        plgpu.barrier_wait(self.empty.at[slot])

                    copy(k, slot, **which)
                    return filled + 1

                return step

            def item_of(work, start):
                def item(index, filled):
                    steps, copy = work.fetch(start + index * cores)
                    return lax.fori_loop(0, steps, step_of(copy), filled)

                return item

            filled = lax.fori_loop(0, count, item_of(first, me), jnp.int32(0))
            if then is not None:
                steps, copy = second.fetch(start)
                steps = jnp.where(second_count > 0, steps, 0)
                early = jnp.minimum(steps, self.stages)
                begun = lax.fori_loop(0, early, step_of(copy, tokens=False), filled)
                meeting.wait()

                def late(k, _):
                    copy(k, lax.rem(filled + k, self.stages), weights=False)

                lax.fori_loop(0, early, late, None)
                filled = lax.fori_loop(early, steps, step_of(copy), begun)
                filled = lax.fori_loop(1, second_count, item_of(second, start), filled)

            def drain(step, _):  # a barrier must not be left with an arrival that nobody awaited
                plgpu.barrier_wait(self.empty.at[lax.rem(step, self.stages)])

            lax.fori_loop(jnp.maximum(filled - self.stages, 0), filled, drain, None)

        def consume():
            plgpu.set_max_registers(_MULTIPLYING, action="increase")
            item = lambda index, done: first.take(me + index * cores, done)  # noqa: E731
            done = lax.fori_loop(0, count, item, jnp.int32(0))
            if then is not None:
                plgpu.wait_smem_to_gmem(0)
                meeting.arrive()
                item = lambda index, done: second.take(start + index * cores, done)  # noqa: E731
                lax.fori_loop(0, second_count, item, done)
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
    made = kernel(
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
    return guard.unsplit(made, name, plan.interpret)
