"""Gated MLPs of a few tokens on Hopper GPUs: weights are the left side of every product.

For up to 64 tokens an expert's products are bound by its weights' bytes. So nothing is sorted: each
expert that some token has chosen multiplies all tokens, which are the columns of the matrix unit,
and XLA takes from the result what each token asked for. The shared expert, which all tokens see,
goes through the same two kernels as one expert more:

    gate_up   silu(x gate) * (x up)          down   hidden down

Weights are 16-bit, [K N] as a layer has them; or, as a checkpoint stores them, 8 bits wide, [N K]
with scales: they come into shared memory as they are stored, and are made 16-bit in registers, from
where the matrix unit takes its left side. 8-bit numbers are exact there. Scales of blocks multiply
a block's sums in float32, those of rows the whole sum.

Letters: J chosen experts, M tokens (8, 16, 32 or 64, padded), E experts, K inputs, N outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from mla_jax.ops.experts.ring import Plan, Ring, launch, swizzled
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.widen import widened
from mla_jax.ops.weights import Weight

ROWS = (8, 16, 32, 64)  # M
WIDTH = 128  # outputs of a tile of both warpgroups: what N must be a multiple of
DEPTH = {2: 64, 1: 128}  # inputs of a step, by bytes of a weight: what K must be a multiple of
_STAGES = {2: 5, 1: 4}
_CHUNK = 64  # inputs of one product: 128 bytes of a token

Kernel = Float[Array, "E K N"] | Weight


def rows_of(tokens: int) -> int:
    """M for so many tokens, at most 64."""
    return next(rows for rows in ROWS if tokens <= rows)


def why_not_stored(stored: tuple[str, tuple], tokens: int, dtype: str) -> str | None:
    """Why weights of this dtype and these blocks are not taken, or None."""
    kind, (rows, columns) = stored
    if tokens > max(ROWS):
        return f"takes weights as a checkpoint stores them for up to {max(ROWS)} tokens"
    if dtype != "bfloat16":
        return f"takes weights as a checkpoint stores them in bfloat16, not in {dtype}"
    if kind not in ("float8_e4m3fn", "int8"):
        return f"takes no weights in {kind}"
    whole = columns is None and rows in (None, 1)
    if not whole and (not rows or not columns or rows % WIDTH or columns % DEPTH[1]):
        return f"takes scales of rows, or of blocks of {WIDTH} x {DEPTH[1]}, not {rows} x {columns}"
    return None


@functools.partial(jax.jit, static_argnames=("plan",))
def gate_up(
    x: Float[Array, "M K"],
    kernels: tuple[tuple[Kernel, Kernel], ...],
    chosen: Chosen,
    *,
    plan: Plan,
) -> tuple[Float[Array, "J*M N"], ...]:
    """`silu(x gate) * (x up)`, in x's dtype.

    Args:
        x: tokens.
        kernels: gate and up of the experts, and, where there is one, of the shared expert [1 K N].
        chosen: which experts.
        plan: `plan.rows` is M.

    Returns:
        of every chosen expert, what is behind those in use being anything; of the shared one.
    """

    def finish(sums):
        a, b = sums
        return a / (1 + jnp.exp(-a)) * b

    return _products((x,) * len(kernels), kernels, chosen, finish, plan, "few_gate_up", True)


@functools.partial(jax.jit, static_argnames=("plan",))
def down(
    x: tuple[Float[Array, "J*M K"], ...], kernels: tuple[Kernel, ...], chosen: Chosen, *, plan: Plan
) -> tuple[Float[Array, "J*M N"], ...]:
    """Each expert's hidden states times its kernel; arguments as in `gate_up`."""
    groups = tuple((kernel,) for kernel in kernels)
    return _products(x, groups, chosen, lambda sums: sums[0], plan, "few_down", False)


def block_of(tile, tiles: int, blocks: int):
    """The block of scales that a tile lies in; of one past the last, the last."""
    return lax.div(jnp.minimum(tile, tiles - 1), jnp.int32(-(-tiles // blocks)))


class _Part(NamedTuple):
    """The experts, or the shared one, within a kernel: references of its arrays."""

    x: Any
    values: Any
    scales: Any
    out: Any
    columns: int  # tiles of N
    steps: int
    shared: bool

    def tile(self, at):
        """The place and the tile of N of its item `at`."""
        return lax.div(at, jnp.int32(self.columns)), lax.rem(at, jnp.int32(self.columns))


def _products(xs, groups, chosen, finish, plan, name, one_x):
    """One kernel over all parts: `groups[p]` are the kernels that meet `xs[p]`."""
    stored = isinstance(groups[0][0], Weight)
    blocks, parts, size = len(groups[0]), len(groups), 1 if stored else 2
    depth, stages, rows = DEPTH[size], _STAGES[size], plan.rows
    values = [kernel.values if stored else kernel for group in groups for kernel in group]
    # A layer's matrix is [K N], a checkpoint's [N K].
    inputs, outputs = (2, 1) if stored else (1, 2)
    scales = [kernel.scale for group in groups for kernel in group] if stored else []
    by_row = stored and groups[0][0].block[1] is None
    if by_row:
        scales = [
            jnp.broadcast_to(table[..., 0], values[i].shape[:2]) for i, table in enumerate(scales)
        ]
    places = chosen.owner.shape[0]
    out = [
        like(x, (rows if p else places * rows, group[0].shape[outputs]), x.dtype)
        for p, (x, group) in enumerate(zip(xs, groups, strict=True))
    ]
    cut = 1 if one_x else parts
    narrow, wide = values[0].dtype, xs[0].dtype

    def body(*refs):
        x_refs, refs = refs[:cut], refs[cut:]
        value_refs, refs = refs[: len(values)], refs[len(values) :]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        (owner_ref, rank_ref), out_refs = refs[:2], refs[2:]
        every = []
        for p, group in enumerate(groups):
            own = slice(p * blocks, (p + 1) * blocks)
            every.append(
                _Part(
                    x_refs[0 if one_x else p], value_refs[own], scale_refs[own], out_refs[p],
                    group[0].shape[outputs] // WIDTH, group[0].shape[inputs] // depth, bool(p),
                )
            )  # fmt: skip
        few = every[1].columns if parts > 1 else 0  # items of the shared expert, which come first

        def scope(*refs):
            *operands, full, empty, rooms = refs
            park = operands.pop() if plan.interpret and stored else None
            ring = Ring(operands, full, empty, stages, plan.cores)
            tokens = depth // _CHUNK

            def each(at, f):
                """`f(part, place, expert, tile of N)` of the part that item `at` belongs to."""
                if parts > 1:
                    pl.when(at < few)(lambda: f(every[1], 0, 0, at))

                def routed():
                    j, n = every[0].tile(at - few)
                    f(every[0], j, owner_ref[j], n)

                pl.when(at >= few)(routed) if parts > 1 else routed()

            def fetch(at):
                steps = every[0].steps
                if parts > 1:
                    steps = jnp.where(at < few, every[1].steps, steps)

                def copy(step, slot):
                    def of(part, j, expert, n):
                        first = pl.ds(0 if one_x else j * rows, rows)
                        for i in range(tokens):
                            inner = pl.ds(step * depth + i * _CHUNK, _CHUNK)
                            ring.copy(part.x.at[first, inner], i, slot)
                        inner, outer = pl.ds(step * depth, depth), pl.ds(n * WIDTH, WIDTH)
                        where = (outer, inner) if stored else (inner, outer)
                        for b, ref in enumerate(part.values):
                            ring.copy(ref.at[expert].at[where], tokens + b, slot)

                    each(at, of)

                return steps, copy

            wg = lax.axis_index("wg")
            half = pl.ds(wg * (WIDTH // 2), WIDTH // 2)

            def multiply(slot, sums):
                for b, acc in enumerate(sums):
                    kernel = ring.at(tokens + b, slot)
                    if not stored:
                        plgpu.wgmma(acc, kernel.at[:, half].T, ring.at(0, slot).T)
                        continue
                    if plan.interpret:
                        left = kernel.at[half][...].astype(wide)
                    else:
                        left = widened(kernel.at[half], wide)
                    for i in range(tokens):
                        part = left[:, i * _CHUNK : (i + 1) * _CHUNK]
                        if park is not None:  # the interpreter has no left side in registers
                            mine = park.at[wg]
                            mine[...] = part
                            part = mine
                        plgpu.wgmma(acc, part, ring.at(i, slot).T)

            def scale(b, at, step):
                """Of the block that a step of item `at` meets; past its last step any."""

                def of(part, expert, n):
                    table = part.scales[b]
                    row = block_of(n, part.columns, table.shape[1])
                    return table[expert, row, block_of(step, part.steps, table.shape[2])]

                j, n = every[0].tile(jnp.maximum(at - few, 0))
                routed = of(every[0], owner_ref[j], n)
                if parts == 1:
                    return routed
                return jnp.where(at < few, of(every[1], 0, jnp.minimum(at, few - 1)), routed)

            def take(at, done):
                """An item of weights whose scales change from step to step."""
                steps, _ = fetch(at)
                scales = lambda step: [scale(b, at, step) for b in range(blocks)]  # noqa: E731

                def step(k, carry):
                    done, factors, sums = carry
                    slot = lax.rem(done, stages)
                    plgpu.barrier_wait(ring.full.at[slot])

                    def product(*acc):
                        multiply(slot, acc)
                        return [one[...] for one in acc]

                    tile = plgpu.ACC((WIDTH // 2, rows), jnp.float32)
                    made = pl.run_scoped(product, *[tile] * blocks)
                    plgpu.barrier_arrive(ring.empty.at[slot])
                    sums = [a + f * b for a, f, b in zip(sums, factors, made, strict=True)]
                    return done + 1, scales(k + 1), sums

                zero = jnp.zeros((WIDTH // 2, rows), jnp.float32)
                sums = [plgpu.layout_cast(zero, plgpu.Layout.WGMMA)] * blocks
                done, _, sums = lax.fori_loop(0, steps, step, (done, scales(0), sums))
                write(at, sums)
                return done

            def write(at, sums):
                def of(part, j, expert, n):
                    sums_ = sums
                    if by_row:
                        mine = pl.ds(n * WIDTH + wg * (WIDTH // 2), WIDTH // 2)
                        factors = [table.at[expert, mine] for table in part.scales]
                        layout = plgpu.Layout.WGMMA.reduce(1)
                        factors = [plgpu.load(f, layout=layout, optimized=False) for f in factors]
                        over = lambda f: lax.broadcast_in_dim(f, sums[0].shape, (0,))  # noqa: E731
                        sums_ = [a * over(f) for a, f in zip(sums, factors, strict=True)]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    room = rooms.at[wg]
                    room.T[...] = plgpu.layout_cast(
                        finish(sums_).astype(wide), plgpu.Layout.WGMMA_TRANSPOSED
                    )
                    plgpu.commit_smem()
                    goal = part.out.at[pl.ds(j * rows, rows)]
                    first = n * WIDTH + wg * (WIDTH // 2)
                    plgpu.copy_smem_to_gmem(room, goal.at[:, pl.ds(first, WIDTH // 2)])

                each(at, of)

            total = rank_ref[rank_ref.shape[0] - 1] * every[0].columns + few
            if stored and not by_row:
                ring.share(total, fetch, take)
                return
            end = lambda at, accumulators: write(at, [acc[...] for acc in accumulators])  # noqa: E731
            ring.stream(total, fetch, multiply, end, (WIDTH // 2, rows), blocks)

        kernel = (WIDTH, depth) if stored else (depth, WIDTH)
        parking = [swizzled((2, WIDTH // 2, _CHUNK), wide)] if plan.interpret and stored else []
        pl.run_scoped(
            scope,
            *[swizzled((stages, rows, _CHUNK), wide)] * (depth // _CHUNK),
            *[swizzled((stages, *kernel), narrow)] * blocks,
            *parking,
            plgpu.Barrier(num_arrivals=depth // _CHUNK + blocks, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            swizzled((2, rows, WIDTH // 2), wide),
            collective_axes="wg",
        )

    arrays = (*xs[:cut], *values, *scales, chosen.owner, chosen.rank)
    return tuple(launch(body, out, plan, name)(*arrays))
