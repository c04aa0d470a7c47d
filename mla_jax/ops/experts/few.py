"""Gated MLPs of a few tokens on Hopper GPUs: weights are the left side of every product.

For up to 64 tokens an expert's products are bound by its weights' bytes. So nothing is sorted: each
expert that some token has chosen multiplies all tokens, which are the columns of the matrix unit,
and XLA takes from the result what each token asked for. The shared expert, which all tokens see,
goes through the same two kernels as one expert more:

    gate_up   silu(x gate) * (x up)          down   hidden down

`linears` are single matrices that meet the same x, whose inputs several thread blocks share out.

Weights are 16-bit, [K N] as a layer has them; or, as a checkpoint stores them, 8 bits wide, [N K]
with scales: they come into shared memory as they are stored, and are made 16-bit in registers, from
where the matrix unit takes its left side. 8-bit numbers are exact there. Scales of blocks multiply
a block's sums in float32, those of rows the whole sum. More tokens with such weights come sorted
into tiles of 64, each tile at a place of its own.

Letters: J chosen experts, M tokens (8, 16, 32 or 64, padded), E experts, K inputs, N outputs.
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

from mla_jax.ops.experts.ring import Plan, Ring, launch, swizzled
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.order import in_order, restored
from mla_jax.ops.hopper.widen import all_have_read, widened
from mla_jax.ops.weights import Weight

ROWS = (8, 16, 32, 64)  # M
WIDTH = 128  # outputs of a tile of both warpgroups
DEPTH = {2: 64, 1: 128}  # inputs of a step, by bytes of a weight
_ROOM, _MOST = 190 * 1024, 12  # bytes of all stages, and how many of them
_CHUNK = 64  # inputs of one product: 128 bytes of a token

Kernel = Float[Array, "_ _ _"] | Weight  # [E K N], of two groups of experts: E and N may differ


def rows_of(tokens: int) -> int:
    """M for so many tokens, at most 64."""
    return next(rows for rows in ROWS if tokens <= rows)


def why_not_stored(stored: tuple[str, tuple], dtype: str) -> str | None:
    """Why weights of this dtype and these blocks are not taken, or None."""
    kind, (rows, columns) = stored
    if dtype != "bfloat16":
        return f"takes weights as a checkpoint stores them in bfloat16, not in {dtype}"
    if kind not in ("float8_e4m3fn", "int8"):
        return f"takes no weights in {kind}"
    whole = columns is None and rows in (None, 1)
    if not whole and (not rows or not columns or rows % WIDTH or columns % DEPTH[1]):
        return f"takes scales of rows, or of blocks of {WIDTH} x {DEPTH[1]}, not {rows} x {columns}"
    return None


def order_of(kernels: Sequence[Kernel]) -> int | None:
    """How `gate_up` may leave hidden states so that products with these kernels take them as is.

    Their thread blocks read activations in the order of `in_order`, which XLA would make by a
    kernel. None where `gate_up` cannot: scales of rows would have to go along.
    """
    by_block = all(isinstance(k, Weight) and k.block[1] is not None for k in kernels)
    return row_of(kernels) if by_block else None


def padded(x: Float[Array, "B K"], kernels: Sequence[Kernel], plan: Plan) -> Float[Array, "M K"]:
    """X with rows of zeros behind, for products with these kernels.

    Where they ask for an order x is brought into it before: what makes x may then do that, and what
    else takes x in order has it from there.
    """
    behind = ((0, plan.rows - len(x)), (0, 0))
    if not isinstance(kernels[0], Weight):
        return jnp.pad(x, behind)
    row = row_of(kernels)
    return restored(jnp.pad(in_order(x, row), behind), row)


def row_of(kernels: Sequence[Kernel]) -> int:
    """Bytes of a row of shared memory: arrays must be whole tiles, and K may be an odd 64."""
    stored = [kernel.shape[-1] for kernel in kernels if isinstance(kernel, Weight)]
    return 64 if any(inputs % DEPTH[1] for inputs in stored) else 128


@functools.partial(jax.jit, static_argnames=("plan", "apart", "order"))
def gate_up(
    x: Float[Array, "M K"] | Float[Array, "L K"],
    kernels: tuple[tuple[Kernel, Kernel], ...],
    chosen: Chosen | None,
    *,
    plan: Plan,
    apart: bool = False,
    order: int | None = None,
) -> tuple[Float[Array, "_ _"], ...]:
    """`silu(x gate) * (x up)`, in x's dtype.

    Args:
        x: tokens.
        kernels: gate and up of the experts, and, where there is one, of the shared expert [1 K N].
        chosen: which experts; None where there is the shared one alone.
        plan: `plan.rows` is M.
        apart: every place has tokens of its own.
        order: of the result's N, as `order_of` the kernels behind says; both must be by blocks.

    Returns:
        of every chosen expert, what is behind those in use being anything; of the shared one.
    """

    def finish(sums):
        a, b = sums
        return a / (1 + jnp.exp(-a)) * b

    splits = (1,) * len(kernels)
    xs = (x,) * len(kernels)
    return _products(
        xs, kernels, chosen, finish, plan, "few_gate_up", not apart, splits, order=order
    )


@functools.partial(jax.jit, static_argnames=("plan", "ordered"))
def down(
    x: tuple[Float[Array, "_ _"], ...],
    kernels: tuple[Kernel, ...],
    chosen: Chosen,
    *,
    plan: Plan,
    ordered: bool = False,
) -> tuple[Float[Array, "_ _"], ...]:
    """Each expert's hidden states times its kernel; arguments as in `gate_up`.

    `ordered` says that they come in `order_of(kernels)`.

    A shared expert some times as wide as the others is cut into so many parts, which thread blocks
    take like experts: its result is their sum, in float32.
    """
    groups = tuple((kernel,) for kernel in kernels)
    steps = [_steps(kernel) for kernel in kernels]
    splits = (1, *(n // steps[0] if n % steps[0] == 0 else 1 for n in steps[1:]))
    first = lambda sums: sums[0]  # noqa: E731
    made, *shared = _products(
        x, groups, chosen, first, plan, "few_down", False, splits, ordered=ordered
    )
    return made, *(_summed(*one, plan) for one in zip(shared, splits[1:], strict=True))


@functools.partial(jax.jit, static_argnames=("plan", "ordered"))
def linears(
    x: Float[Array, "M K"], kernels: tuple[Kernel, ...], *, plan: Plan, ordered: bool = False
) -> tuple[Float[Array, "M _"], ...]:
    """X times each kernel [1 K N], in x's dtype; K and N are multiples of 64.

    `ordered` is as in `down`.
    """
    parts = sum(-(-_outputs(kernel) // WIDTH) for kernel in kernels)
    steps, count = _steps(kernels[0]), len(kernels)
    # As many items as multiprocessors, or nearly, each of at least two steps.
    fitting = [n for n in range(1, steps // 2 + 1) if steps % n == 0 and n * parts <= plan.cores]
    split = max(fitting, default=1)
    first = lambda sums: sums[0]  # noqa: E731
    result = jnp.float32 if split > 1 else x.dtype
    groups, splits = tuple((kernel,) for kernel in kernels), (split,) * count
    made = _products(
        (x,) * count, groups, None, first, plan, "few_linear", True, splits, result, ordered=ordered
    )
    return tuple(_summed(one, split, plan).astype(x.dtype) if split > 1 else one for one in made)


def _steps(kernel: Kernel) -> int:
    """Steps of all of K; copies past its end bring zeros."""
    stored = isinstance(kernel, Weight)
    return -(-kernel.shape[2 if stored else 1] // DEPTH[1 if stored else 2])


def _outputs(kernel: Kernel) -> int:
    """N: a layer's matrix is [K N], a checkpoint's [N K]."""
    return kernel.shape[1 if isinstance(kernel, Weight) else 2]


def _summed(made, split, plan):
    """The sum [M N] of the parts of K that `_products` leaves one below the other, in float32."""
    return made.astype(jnp.float32).reshape(split, plan.rows, -1).sum(0)


def block_of(tile, tiles: int, blocks: int):
    """The block of scales that a tile lies in; of one past the last, the last."""
    return lax.div(jnp.minimum(tile, tiles - 1), jnp.int32(-(-tiles // blocks)))


class _Part(NamedTuple):
    """The experts, or one matrix, within a kernel: references of its arrays.

    Attributes:
        x, values, scales, out: references.
        columns: tiles of N.
        steps: of an item.
        depth: steps of all of K.
        first: its first item.
        routed: whether its items are of the chosen experts, else parts of K of the only one.
    """

    x: Any
    values: Any
    scales: Any
    out: Any
    columns: int
    steps: int
    depth: int
    first: int
    routed: bool

    @property
    def items(self) -> int:
        """How many, where they are not routed."""
        return self.columns * (self.depth // self.steps)

    def tile(self, at):
        """The place, or the part of K, and the tile of N of item `at` of the kernel."""
        at = jnp.maximum(at - self.first, 0)
        at = at if self.routed else jnp.minimum(at, self.items - 1)
        return lax.div(at, jnp.int32(self.columns)), lax.rem(at, jnp.int32(self.columns))


def _products(
    xs, groups, chosen, finish, plan, name, one_x, splits, result=None, order=None, ordered=False
):
    """One kernel over all parts: `groups[p]` are the kernels that meet `xs[p]`.

    With `chosen` the first part is the experts'. The sums of the `splits[p]` parts of K come apart,
    one below the other, in the dtype `result`, x's by default. `ordered` says that x is in order
    already, `order` in which one the result is left.
    """
    stored = isinstance(groups[0][0], Weight)
    blocks, parts, size = len(groups[0]), len(groups), 1 if stored else 2
    depth, rows = DEPTH[size], plan.rows
    stages = min(_MOST, _ROOM // (depth * (2 * rows + size * WIDTH * blocks)))
    if plan.interpret:  # every room of every stage is a slow one there
        stages = 3
    if chosen is None:  # as many as are ever filled: each has barriers to be made at the start
        each = [(group[0], split) for group, split in zip(groups, splits, strict=True)]
        items = sum(-(-_outputs(kernel) // WIDTH) * split for kernel, split in each)
        steps = max(_steps(kernel) // split for kernel, split in each)
        stages = min(stages, steps * -(-items // plan.cores))
    values = [kernel.values if stored else kernel for group in groups for kernel in group]
    scales = [kernel.scale for group in groups for kernel in group] if stored else []
    by_row = stored and groups[0][0].block[1] is None
    if by_row:
        scales = [
            jnp.broadcast_to(table[..., 0], values[i].shape[:2]) for i, table in enumerate(scales)
        ]
    narrow, wide = values[0].dtype, xs[0].dtype
    row = row_of([group[0] for group in groups])
    if stored and not ordered:
        xs = (in_order(xs[0], row),) * parts if one_x else tuple(in_order(x, row) for x in xs)
    result = wide if result is None else result
    copies = [*splits] if chosen is None else [chosen.owner.shape[0], *splits[1:]]
    out = [
        like(x, (count * rows, _outputs(group[0])), result)
        for x, group, count in zip(xs, groups, copies, strict=True)
    ]
    cut = 1 if one_x else parts
    tables = [] if chosen is None else [chosen.owner, chosen.rank]

    def body(*refs):
        x_refs, refs = refs[:cut], refs[cut:]
        value_refs, refs = refs[: len(values)], refs[len(values) :]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        table_refs, out_refs = refs[: len(tables)], refs[len(tables) :]
        every, fixed = [], 0
        for p in (*range(1, parts), 0):  # the experts' items come last: their number is not known
            own, kernel = slice(p * blocks, (p + 1) * blocks), groups[p][0]
            steps = _steps(kernel)
            columns = -(-_outputs(kernel) // WIDTH)
            part = _Part(
                x=x_refs[0 if one_x else p],
                values=value_refs[own],
                scales=scale_refs[own],
                out=out_refs[p],
                columns=columns,
                steps=steps // splits[p],
                depth=steps,
                first=fixed,
                routed=chosen is not None and p == 0,
            )
            fixed += 0 if part.routed else part.items
            every.append(part)
        total = fixed
        if chosen is not None:
            owner_ref, rank_ref = table_refs
            total = fixed + rank_ref[rank_ref.shape[0] - 1] * every[-1].columns

        def expert_of(part, j):
            return owner_ref[j] if part.routed else 0

        def each(at, f):
            """`f(part, place, expert, tile of N)` of the part that item `at` belongs to."""
            for part in every:

                def call(part=part):
                    j, n = part.tile(at)
                    f(part, j, expert_of(part, j), n)

                inside = at >= part.first
                if not part.routed:
                    inside &= at < part.first + part.items
                pl.when(inside)(call) if parts > 1 else call()

        def pick(at, of):
            """The scalar `of(part)` of the part that item `at` belongs to."""
            found = of(every[-1])
            for part in every[-2::-1]:
                found = jnp.where(at < part.first + part.items, of(part), found)
            return found

        def scope(*refs):
            *operands, full, empty, rooms = refs
            park = operands.pop() if plan.interpret and stored else None
            ring = Ring(operands, full, empty, stages, plan.cores)
            tokens = depth // _CHUNK

            def fetch(at):
                def copy(step, slot):
                    def of(part, j, expert, n):
                        first = j * rows if part.routed and not one_x else 0
                        begin = (step if part.routed else step + j * part.steps) * depth
                        for i in range(tokens):
                            inner = pl.ds(begin + i * _CHUNK, _CHUNK)
                            ring.copy(part.x.at[pl.ds(first, rows), inner], i, slot)
                        inner, outer = pl.ds(begin, depth), pl.ds(n * WIDTH, WIDTH)
                        where = (outer, inner) if stored else (inner, outer)
                        for b, ref in enumerate(part.values):
                            ring.copy(ref.at[expert].at[where], tokens + b, slot)

                    each(at, of)

                return pick(at, lambda part: part.steps), copy

            wg = lax.axis_index("wg")
            half = pl.ds(wg * (WIDTH // 2), WIDTH // 2)

            def multiply(slot, sums):
                for b, acc in enumerate(sums):
                    kernel = ring.at(tokens + b, slot)
                    if not stored:
                        plgpu.wgmma(acc, kernel.at[:, half].T, ring.at(0, slot).T)
                        continue
                    if plan.interpret:
                        left = kernel[...].astype(wide)
                        left = left if order is None else in_order(left.T, order).T
                        left = in_order(lax.dynamic_slice_in_dim(left, wg * 64, 64), row)
                    else:
                        left = widened(kernel, row, order)
                    for i in range(tokens):
                        part = left[:, i * _CHUNK : (i + 1) * _CHUNK]
                        if park is not None:  # the interpreter has no left side in registers
                            mine = park.at[wg]
                            mine[...] = part
                            part = mine
                        plgpu.wgmma(acc, part, ring.at(i, slot).T)
                if stored:  # a thread loads for itself alone; copies come next
                    # The interpreter asks for a fence between loads and copies: it costs hundreds
                    # of cycles, and a GPU needs none once the loads are done.
                    plgpu.commit_smem() if plan.interpret else all_have_read()

            def scale(b, at, expert, step):
                """Of the block that a step of item `at` meets; past its last step any."""

                def of(part):
                    j, n = part.tile(at)
                    table = part.scales[b]
                    at_step = step if part.routed else step + j * part.steps
                    column = block_of(at_step, part.depth, table.shape[2])
                    own = expert if part.routed else 0
                    return table[own, block_of(n, part.columns, table.shape[1]), column]

                return pick(at, of)

            def take(at, done):
                """An item of weights whose scales change from step to step."""
                steps, _ = fetch(at)
                # Read once: in the loop every scale would wait for it.
                expert = expert_of(every[-1], every[-1].tile(at)[0])
                factors_of = lambda step: [  # noqa: E731
                    scale(b, at, expert, step) for b in range(blocks)
                ]

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
                    return done + 1, factors_of(k + 1), sums

                zero = jnp.zeros((WIDTH // 2, rows), jnp.float32)
                sums = [plgpu.layout_cast(zero, plgpu.Layout.WGMMA)] * blocks
                done, _, sums = lax.fori_loop(0, steps, step, (done, factors_of(0), sums))
                write(at, sums)
                return done

            def write(at, sums):
                def of(part, j, expert, n):
                    first, scaled = n * WIDTH + wg * (WIDTH // 2), sums
                    if by_row:
                        layout, mine = plgpu.Layout.WGMMA.reduce(1), pl.ds(first, WIDTH // 2)
                        over = lambda f: lax.broadcast_in_dim(f, sums[0].shape, (0,))  # noqa: E731
                        scaled = [
                            a * over(plgpu.load(f.at[expert, mine], layout=layout, optimized=False))
                            for a, f in zip(sums, part.scales, strict=True)
                        ]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    room = rooms.at[wg]
                    made = finish(scaled).astype(result)
                    room.T[...] = plgpu.layout_cast(made, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    goal = part.out.at[pl.ds(j * rows, rows), pl.ds(first, WIDTH // 2)]
                    plgpu.copy_smem_to_gmem(room, goal)

                def inside(part, j, expert, n):
                    if part.out.shape[1] % WIDTH == 0:
                        of(part, j, expert, n)
                    else:  # the last tile is half of one
                        first = n * WIDTH + wg * (WIDTH // 2)
                        pl.when(first < part.out.shape[1])(lambda: of(part, j, expert, n))

                each(at, inside)

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
            *[swizzled((stages, *kernel), narrow, row)] * blocks,
            *parking,
            plgpu.Barrier(num_arrivals=depth // _CHUNK + blocks, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            swizzled((2, rows, WIDTH // 2), result),
            collective_axes="wg",
        )

    arrays = (*xs[:cut], *values, *scales, *tables)
    return tuple(launch(body, out, plan, name)(*arrays))
