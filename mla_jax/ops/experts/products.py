"""Products of a few tokens with weights as the left side, one or two phases of them in one kernel.

A phase takes items: a tile of 128 outputs of one matrix and a place of tokens, over all of K or a
part of it. Thread blocks share the items of a phase out. The second phase reads what the first has
written, so its thread blocks meet in between; by then the copies of the second's weights, which
need no meeting, are under way.

Letters: M tokens of a place, K inputs, N outputs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.experts.ring import Meeting, Plan, Ring, Work, launch, swizzled
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.merge import like
from mla_jax.ops.hopper.order import in_order
from mla_jax.ops.hopper.widen import all_have_read, widened
from mla_jax.ops.weights import Weight

WIDTH = 128  # outputs of a tile of both warpgroups
DEPTH = {2: 64, 1: 128}  # inputs of a step, by bytes of a weight
_ROOM, _MOST = 224 * 1024, 12  # bytes of all stages and results, and how many stages
_CHUNK = 64  # inputs of one product: 128 bytes of a token


def steps_of(kernel) -> int:
    """Steps of all of K; copies past its end bring zeros."""
    stored = isinstance(kernel, Weight)
    return -(-kernel.shape[2 if stored else 1] // DEPTH[1 if stored else 2])


def outputs_of(kernel) -> int:
    """N: a layer's matrix is [K N], a checkpoint's [N K]."""
    return kernel.shape[1 if isinstance(kernel, Weight) else 2]


def row_of(kernels: Sequence[Any]) -> int:
    """Bytes of a row of shared memory: arrays must be whole tiles, and K may be an odd 64."""
    stored = [kernel.shape[-1] for kernel in kernels if isinstance(kernel, Weight)]
    return 64 if any(inputs % DEPTH[1] for inputs in stored) else 128


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
        places: of M tokens each, where they are not routed.
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
    places: int

    @property
    def items(self) -> int:
        """How many, where they are not routed."""
        return self.columns * (self.depth // self.steps) * self.places

    def begin(self, j):
        """The place of tokens and the first step of what `tile` calls j."""
        if self.routed:
            return j, 0
        return lax.rem(j, jnp.int32(self.places)), lax.div(j, jnp.int32(self.places)) * self.steps

    def tile(self, at):
        """The place, or the part of K and in it the place, and the tile of N of item `at`."""
        at = jnp.maximum(at - self.first, 0)
        at = at if self.routed else jnp.minimum(at, self.items - 1)
        return lax.div(at, jnp.int32(self.columns)), lax.rem(at, jnp.int32(self.columns))


class Phase:
    """The products of a phase: `groups[p]` are the kernels that meet `xs[p]`.

    Args:
        xs: tokens; or one array that all meet, M of them; or of a second phase the first's `out`.
        groups: kernels.
        chosen: with it the first group is the experts'.
        finish: what becomes of the sums of an item, one of each kernel of a group.
        plan: `plan.rows` is M.
        splits: into how many parts K is cut. Their sums come apart, one below the other.
        result: dtype of the sums, by default x's.
        ordered: x is in order already.
        order: the one in which the result is left.
        beside: an operand, over whose mesh axes the results vary.
    """

    def __init__(
        self,
        xs: Sequence[Any],
        groups: Sequence[Sequence[Any]],
        chosen: Chosen | None,
        finish: Callable,
        plan: Plan,
        splits: Sequence[int],
        *,
        result: Any = None,
        ordered: bool = False,
        order: int | None = None,
        beside: Any = None,
    ):
        self.groups, self.chosen, self.finish = groups, chosen, finish
        self.plan, self.splits, self.order = plan, splits, order
        kernels = [kernel for group in groups for kernel in group]
        self.stored = stored = isinstance(kernels[0], Weight)
        self.blocks, size = len(groups[0]), 1 if stored else 2
        self.depth, self.row = DEPTH[size], row_of([group[0] for group in groups])
        self.values = [kernel.values if stored else kernel for kernel in kernels]
        self.scales = [kernel.scale for kernel in kernels] if stored else []
        self.by_row = stored and kernels[0].block[1] is None
        if self.by_row:
            self.scales = [
                jnp.broadcast_to(table[..., 0], values.shape[:2])
                for table, values in zip(self.scales, self.values, strict=True)
            ]
        self.one_x = len(xs) == 1 and (chosen is None or xs[0].shape[0] == plan.rows)
        self.wide = xs[0].dtype
        self.xs = [in_order(x, self.row) for x in xs] if stored and not ordered else list(xs)
        self.places = [x.shape[0] // plan.rows for x in xs] * (len(groups) if self.one_x else 1)
        copies = [count * split for count, split in zip(self.places, splits, strict=True)]
        if chosen is not None:
            copies[0] = chosen.owner.shape[0]
        self.result = self.wide if result is None else result
        beside = xs[0] if beside is None else beside
        self.out = [
            like(beside, (count * plan.rows, outputs_of(group[0])), self.result)
            for group, count in zip(groups, copies, strict=True)
        ]

    @property
    def chunks(self) -> int:
        """Copies of tokens in a step."""
        return self.depth // _CHUNK

    @property
    def stages(self) -> int:
        """How many steps there is room for at once."""
        if self.plan.interpret:  # every room of every stage is a slow one there
            return 3
        rows, size = self.plan.rows, 1 if self.stored else 2
        room = _ROOM - WIDTH * rows * jnp.dtype(self.result).itemsize
        stages = min(_MOST, room // (self.depth * (2 * rows + size * WIDTH * self.blocks)))
        if self.chosen is None:  # as many as are ever filled: each has barriers to be made first
            each = list(zip(self.groups, self.splits, strict=True))
            items = sum(-(-outputs_of(group[0]) // WIDTH) * split for group, split in each)
            steps = max(steps_of(group[0]) // split for group, split in each)
            stages = min(stages, steps * -(-items // self.plan.cores))
        return stages

    def scratch(self, stages) -> list[Any]:
        """Shared memory of so many stages: chunks of tokens, then a tile of every kernel."""
        kernel = (WIDTH, self.depth) if self.stored else (self.depth, WIDTH)
        return [
            *[swizzled((stages, self.plan.rows, _CHUNK), self.wide)] * self.chunks,
            *[swizzled((stages, *kernel), self.values[0].dtype, self.row)] * self.blocks,
        ]


class _Products:
    """A phase within the kernel.

    Args:
        phase: what it is compiled for.
        refs: references of x, values, scales, tables and results, each a list.
        ring: stages, with this phase's barriers.
        rooms: shared memory for a result of each warpgroup.
        park: as much for a left side, or None.
    """

    def __init__(self, phase: Phase, refs: Sequence[list], ring: Ring, rooms, park):
        self.phase, self.ring, self.rooms, self.park = phase, ring, rooms, park
        self.wg = lax.axis_index("wg")
        x_refs, value_refs, scale_refs, table_refs, out_refs = refs
        blocks, fixed, self.parts = phase.blocks, 0, []
        # The experts' items come last: their number is not known.
        for p in (*range(1, len(phase.groups)), 0):
            own, kernel = slice(p * blocks, (p + 1) * blocks), phase.groups[p][0]
            part = _Part(
                x=x_refs[0 if phase.one_x else p],
                values=value_refs[own],
                scales=scale_refs[own],
                out=out_refs[p],
                columns=-(-outputs_of(kernel) // WIDTH),
                steps=steps_of(kernel) // phase.splits[p],
                depth=steps_of(kernel),
                first=fixed,
                routed=phase.chosen is not None and p == 0,
                places=phase.places[p],
            )
            fixed += 0 if part.routed else part.items
            self.parts.append(part)
        self.total: Any = fixed
        if phase.chosen is not None:
            self.owner, rank = table_refs
            self.total = fixed + rank[rank.shape[0] - 1] * self.parts[-1].columns

    def work(self) -> Work:
        """What thread blocks do for it."""
        phase, take = self.phase, self.take
        if not phase.stored or phase.by_row:
            end = lambda at, sums: self.write(at, [acc[...] for acc in sums])  # noqa: E731
            tile = (WIDTH // 2, phase.plan.rows)
            take = self.ring.streamed(self.fetch, self.multiply, end, tile, phase.blocks)
        return Work(self.total, self.fetch, take)

    def expert_of(self, part, j):
        return self.owner[j] if part.routed else 0

    def each(self, at, f):
        """`f(part, place, expert, tile of N)` of the part that item `at` belongs to."""
        for part in self.parts:

            def call(part=part):
                j, n = part.tile(at)
                f(part, j, self.expert_of(part, j), n)

            inside = at >= part.first
            if not part.routed:
                inside &= at < part.first + part.items
            pl.when(inside)(call) if len(self.parts) > 1 else call()

    def pick(self, at, of):
        """The scalar `of(part)` of the part that item `at` belongs to."""
        found = of(self.parts[-1])
        for part in self.parts[-2::-1]:
            found = jnp.where(at < part.first + part.items, of(part), found)
        return found

    def fetch(self, at):
        """Steps of an item, and what copies the tokens or the weights of one."""
        phase, ring = self.phase, self.ring

        def copy(step, slot, tokens=True, weights=True):
            def of(part, j, expert, n):
                place, before = part.begin(j)
                first = 0 if phase.one_x else place * phase.plan.rows
                begin = (step + before) * phase.depth
                for i in range(phase.chunks if tokens else 0):
                    inner = pl.ds(begin + i * _CHUNK, _CHUNK)
                    ring.copy(part.x.at[pl.ds(first, phase.plan.rows), inner], i, slot)
                inner, outer = pl.ds(begin, phase.depth), pl.ds(n * WIDTH, WIDTH)
                where = (outer, inner) if phase.stored else (inner, outer)
                for b, ref in enumerate(part.values if weights else ()):
                    ring.copy(ref.at[expert].at[where], phase.chunks + b, slot)

            self.each(at, of)

        return self.pick(at, lambda part: part.steps), copy

    def multiply(self, slot, sums):
        phase, ring, wg = self.phase, self.ring, self.wg
        for b, acc in enumerate(sums):
            kernel = ring.at(phase.chunks + b, slot)
            if not phase.stored:
                half = pl.ds(wg * (WIDTH // 2), WIDTH // 2)
                plgpu.wgmma(acc, kernel.at[:, half].T, ring.at(0, slot).T)
                continue
            if phase.plan.interpret:
                left = kernel[...].astype(phase.wide)
                left = left if phase.order is None else in_order(left.T, phase.order).T
                left = in_order(lax.dynamic_slice_in_dim(left, wg * 64, 64), phase.row)
            else:
                left = widened(kernel, phase.row, phase.order)
            for i in range(phase.chunks):
                part = left[:, i * _CHUNK : (i + 1) * _CHUNK]
                if self.park is not None:  # the interpreter has no left side in registers
                    mine = self.park.at[wg]
                    mine[...] = part
                    part = mine
                plgpu.wgmma(acc, part, ring.at(i, slot).T)
        if phase.stored:  # a thread loads for itself alone; copies come next
            # The interpreter asks for a fence between loads and copies: it costs hundreds of
            # cycles, and a GPU needs none once the loads are done.
            plgpu.commit_smem() if phase.plan.interpret else all_have_read()

    def scale(self, b, at, expert, step):
        """Of the block that a step of item `at` meets; past its last step any."""

        def of(part):
            j, n = part.tile(at)
            table = part.scales[b]
            _, before = part.begin(j)
            column = block_of(step + before, part.depth, table.shape[2])
            own = expert if part.routed else 0
            return table[own, block_of(n, part.columns, table.shape[1]), column]

        return self.pick(at, of)

    def take(self, at, done):
        """An item of weights whose scales change from step to step."""
        phase, ring = self.phase, self.ring
        steps, _ = self.fetch(at)
        # Read once: in the loop every scale would wait for it.
        expert = self.expert_of(self.parts[-1], self.parts[-1].tile(at)[0])
        factors_of = lambda step: [  # noqa: E731
            self.scale(b, at, expert, step) for b in range(phase.blocks)
        ]
        tile = (WIDTH // 2, phase.plan.rows)

        def step(k, carry):
            done, factors, sums = carry
            slot = lax.rem(done, ring.stages)
            plgpu.barrier_wait(ring.full.at[slot])

            def product(*acc):
                self.multiply(slot, acc)
                return [one[...] for one in acc]

            made = pl.run_scoped(product, *[plgpu.ACC(tile, jnp.float32)] * phase.blocks)
            plgpu.barrier_arrive(ring.empty.at[slot])
            sums = [a + f * b for a, f, b in zip(sums, factors, made, strict=True)]
            return done + 1, factors_of(k + 1), sums

        sums = [plgpu.layout_cast(jnp.zeros(tile, jnp.float32), plgpu.Layout.WGMMA)] * phase.blocks
        done, _, sums = lax.fori_loop(0, steps, step, (done, factors_of(0), sums))
        self.write(at, sums)
        return done

    def write(self, at, sums):
        phase, wg = self.phase, self.wg

        def of(part, j, expert, n):
            first, scaled = n * WIDTH + wg * (WIDTH // 2), sums
            if phase.by_row:
                layout, mine = plgpu.Layout.WGMMA.reduce(1), pl.ds(first, WIDTH // 2)
                over = lambda f: lax.broadcast_in_dim(f, sums[0].shape, (0,))  # noqa: E731
                scaled = [
                    a * over(plgpu.load(f.at[expert, mine], layout=layout, optimized=False))
                    for a, f in zip(sums, part.scales, strict=True)
                ]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            room = self.rooms.at[wg]
            made = phase.finish(scaled).astype(phase.result)
            room.T[...] = plgpu.layout_cast(made, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            rows = pl.ds(j * phase.plan.rows, phase.plan.rows)
            plgpu.copy_smem_to_gmem(room, part.out.at[rows, pl.ds(first, WIDTH // 2)])

        def inside(part, j, expert, n):
            if part.out.shape[1] % WIDTH == 0:
                of(part, j, expert, n)
            else:  # the last tile is half of one
                first = n * WIDTH + wg * (WIDTH // 2)
                pl.when(first < part.out.shape[1])(lambda: of(part, j, expert, n))

        self.each(at, inside)


def fit(first: Phase, second: Phase) -> bool:
    """Whether one kernel may take both."""
    plan = first.plan
    one_block = plan.interpret is None or plan.cores == 1  # interpreted ones follow each other
    return one_block and first.row == second.row and first.result == second.result


def run(phases: Sequence[Phase], name: str) -> list[jax.Array]:
    """One kernel of one phase, or of two that `fit`; the results of all."""
    first, plan, chosen = phases[0], phases[0].plan, phases[0].chosen
    tables = [] if chosen is None else [chosen.owner, chosen.rank]
    two = len(phases) > 1
    arrivals = [chosen.arrivals] if chosen is not None and two else []
    stages = first.stages
    parked = plan.interpret and first.stored

    def body(*refs):
        left = list(refs)

        def next_refs(count):
            taken, left[:] = left[:count], left[count:]
            return taken

        x_refs = next_refs(len(first.xs))
        own = [(next_refs(len(p.values)), next_refs(len(p.scales))) for p in phases]
        table_refs, arrived = next_refs(len(tables)), next_refs(len(arrivals))
        out_refs = [next_refs(len(phase.out)) for phase in phases]

        def scope(*scratch):
            *operands, empty, rooms = scratch
            met = operands.pop() if two and plan.interpret else None
            full = [operands.pop() for _ in phases]
            park = operands.pop() if parked else None
            rings = [Ring(operands, bar, empty, stages, plan.cores) for bar in full]
            xs = [x_refs, *out_refs[:-1]]
            works = [
                _Products(phase, (x, *arrays, table_refs, out), ring, rooms, park).work()
                for phase, x, arrays, out, ring in zip(
                    phases, xs, own, out_refs, rings, strict=True
                )
            ]
            then = (works[1], Meeting(arrived[0], met, plan)) if two else None
            rings[0].share(works[0], then)

        bars = [
            plgpu.Barrier(num_arrivals=phase.chunks + phase.blocks, num_barriers=stages)
            for phase in reversed(phases)
        ]
        pl.run_scoped(
            scope,
            *first.scratch(stages),
            *([swizzled((2, WIDTH // 2, _CHUNK), first.wide)] if parked else []),
            *bars,
            *([plgpu.Barrier(num_arrivals=2)] if two and plan.interpret else []),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            swizzled((2, plan.rows, WIDTH // 2), first.result),
            collective_axes="wg",
        )

    arrays = [*first.xs, *(a for p in phases for a in (*p.values, *p.scales)), *tables, *arrivals]
    return list(launch(body, [kind for p in phases for kind in p.out], plan, name)(*arrays))
