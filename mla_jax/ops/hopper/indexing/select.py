"""The best K of a row's scores by thresholds, in the order of the slots: no sort.

A row is cut over a cluster of up to eight thread blocks, which read its scores once and keep them
in registers as integers that order as the scores do, the best first. Four passes find the K-th of
them, eight bits a pass: every block counts how often each digit occurs among the numbers that agree
with what is known, and all blocks add up all counts. A last pass numbers the chosen ones by sums of
how many lie before, so that every thread knows where its own go.

    score              integer
    NaN                the least, chosen first: who asked must see it
    the highest        ...
    0.0 and -0.0       one and the same
    the lowest         ...
    -inf, unseen       the greatest, never chosen

Shared memory of a block:

    name    shape       holds
    lanes   [4, 2048]   of the first digit, how often it occurs in each lane of all warps
    counts  [4, 256]    of every pass and digit, how often it occurs in this block
    tally   [256]       how many are chosen of 128 neighbours; then, how many before them
    found   [8]         a pass's digit and how many digits are less; scratch
    total   [4]         how many are chosen of this block; the last counts what nobody asks for

Letters: B rows, S slots, K chosen.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper import mosaic as hopper_mosaic
from mla_jax.ops.hopper.indexing import mosaic
from mla_jax.ops.hopper.indexing.mosaic import BINS, FOURS, GROUP, LANES
from mla_jax.ops.hopper.merge import like

WARPGROUPS = 4
MOST_BLOCKS = 8  # of a cluster on every Hopper GPU
FEW_GROUPS = 8  # of a warpgroup: more take more registers than leave room for two blocks
_LEAST, _GREATEST = -(2**31), 2**31 - 1
_SHIFTS = (24, 16, 8, 0)
_MEETING = 6  # a named barrier; Mosaic GPU uses those below
PAIR = plgpu.Layout.WG_STRIDED((BINS,), vec_size=2)


class Shape(NamedTuple):
    """What one kernel is compiled for: a row is cut over `blocks`.

    Each of their warpgroups has `groups` of 512 slots. First digits, which are signs and exponents,
    are nearly all alike: `apart` has every lane count them for itself.
    """

    rows: int
    slots: int
    count: int
    blocks: int
    groups: int
    apart: bool
    warpgroups: int = WARPGROUPS

    @property
    def part(self) -> int:
        """Slots of one block."""
        return self.warpgroups * self.groups * GROUP


def shape_of(
    rows: int, slots: int, count: int, sms: int, blocks: int | None = None, apart: bool = False
) -> Shape:
    """How rows are cut: over as many blocks as keep registers few and multiprocessors busy.

    Few rows are cut finer, up to half of the multiprocessors: a cluster's blocks must find room at
    once in one part of the GPU, and wait for each other at every pass.
    """
    unit = WARPGROUPS * GROUP
    if blocks is None:
        blocks = 1
        while blocks < MOST_BLOCKS and (
            slots > FEW_GROUPS * blocks * unit
            or (4 * blocks * rows <= sms and slots > blocks * unit)
        ):
            blocks *= 2
    return Shape(rows, slots, count, blocks, -(-slots // (blocks * unit)), apart)


def select(scores, limits, shape: Shape):
    """The chosen slots [B K] of scores [B S], ascending, then S where there are fewer.

    Args:
        scores: float32, S a multiple of 4; NaN is better than all, -inf is never chosen.
        limits: int32 [B]; slots from there on are not chosen, and not read.
        shape: what it is compiled for.
    """
    return launch(Row, scores, limits, shape)[0]


def launch(kind, scores, limits, shape: Shape, **options):
    """Runs the kernel of a class."""

    def body(*refs, **smem):
        kind(refs, smem, shape).run()

    if shape.blocks > 1:
        options |= {"cluster": (shape.blocks,), "cluster_names": ("block",)}
    return hopper_mosaic.kernel(
        body,
        out_type=[like(scores, s, jnp.int32) for s in kind.outputs(shape)],
        scratch_types=kind.scratch(shape),
        grid=(shape.rows,),
        grid_names=("row",),
        num_threads=shape.warpgroups,
        thread_name="wg",
        kernel_name="mla_select",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        **options,
    )(scores, limits)


class Row:
    """One warpgroup of a block of a row's cluster."""

    def __init__(self, refs, smem, shape: Shape):
        self.scores, self.limits, self.chosen, *self.more = refs
        self.shape, self.smem = shape, smem
        self.row, self.wg = lax.axis_index("row"), lax.axis_index("wg")
        self.block = lax.axis_index("block") if shape.blocks > 1 else jnp.int32(0)

    @classmethod
    def outputs(cls, shape: Shape) -> list[tuple[int, ...]]:
        """Shapes of the int32 results."""
        return [(shape.rows, shape.count)]

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """The shared memory of the table above."""
        sizes = {"counts": (len(_SHIFTS), BINS), "tally": (BINS,), "found": (8,), "total": (4,)}
        if shape.apart:
            sizes["lanes"] = (shape.warpgroups, BINS * LANES // shape.warpgroups)
        return {name: plgpu.SMEM(size, jnp.int32) for name, size in sizes.items()}

    def run(self):
        """Finds the K-th best of the row, then numbers and stores what is chosen."""
        keys = self.load()
        self.clear()
        self.block_sync()
        want, known = jnp.int32(self.shape.count), jnp.int32(0)
        for index, shift in enumerate(_SHIFTS):
            for key in keys:
                self.count(index, key, known)
            if self.shape.apart and index == 0:
                self.block_sync()
                self.add_lanes()
            self.sync()
            pl.when(self.wg == 0)(lambda index=index, want=want: self.find(index, want))
            self.block_sync()
            digit, less = self.found()
            want, known = want - less, known * BINS + digit
            del shift
        self.store(keys, known ^ _LEAST, want)

    def load(self):
        """This warpgroup's scores as integers, the best least: a list of [512]."""
        limit = jnp.minimum(self.limits[self.row] + 0, self.shape.slots)
        loaded = [self.load_group(self.first(g), limit) for g in range(self.shape.groups)]
        return [key_of(x, self.slots(g) < limit) for g, x in enumerate(loaded)]

    def store(self, keys, threshold, equals):
        """Stores all slots below the threshold, and the first so many of those equal to it."""
        shape, some = self.shape, threshold != _GREATEST
        flags = []
        for key in keys:
            # Both counts in one word: a block has less than 2^16 slots.
            equal = jnp.where((key == threshold) & some, 1, 0)
            flags.append(jnp.where(key < threshold, 1 << 16, equal))
        for g, flag in enumerate(flags):
            self.tally(self.group(g), flag)
        self.block_sync()
        pl.when(self.wg == 0)(self.scan)
        self.sync()
        earlier = self.of_earlier_blocks()
        for g, flag in enumerate(flags):
            before = self.before(self.group(g), flag)
            self.put(g, flag, before, earlier, equals)

        @pl.when((self.block == 0) & ~some)
        def _():  # fewer than K can be chosen: these are `count - equals`
            self.fill(shape.count - equals)

        if shape.blocks > 1:
            self.sync()  # no block leaves while another reads its shared memory

    def group(self, g):
        """The number of this warpgroup's g-th group in the block."""
        return self.wg * self.shape.groups + g

    def first(self, g):
        """The first slot of this warpgroup's g-th group."""
        return self.block * self.shape.part + self.group(g) * GROUP

    def slots(self, g):
        return plgpu.broadcasted_iota(jnp.int32, (GROUP,), 0, layout=FOURS) + self.first(g)

    def sync(self):
        """Waits for all blocks of the row."""
        if self.shape.blocks > 1:
            self.cluster_sync()
        else:
            self.block_sync()

    # -- what the interpreter does in another way

    def load_group(self, first, limit):
        return mosaic.load_scores(self.scores, self.row, first, limit)

    def clear(self):
        self.smem["counts"][self.wg] = plgpu.layout_cast(jnp.zeros((BINS,), jnp.int32), PAIR)
        self.smem["tally"][...] = plgpu.layout_cast(jnp.zeros((BINS,), jnp.int32), PAIR)
        if self.shape.apart:
            size = BINS * LANES // self.shape.warpgroups
            layout = plgpu.Layout.WG_STRIDED((size,), vec_size=4)
            zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.int32), layout)
            self.smem["lanes"][self.wg] = zeros

    def count(self, index, key, known):
        apart = self.shape.apart and index == 0
        counts = self.smem["lanes"] if apart else self.smem["counts"].at[index]
        dummy = self.smem["total"].at[pl.ds(3, 1)]
        mosaic.count_digits(counts, key, known, _SHIFTS[index], dummy, apart)

    def add_lanes(self):
        mosaic.add_lanes(self.smem["counts"].at[0], self.smem["lanes"], self.shape.warpgroups)

    def find(self, index, want):
        mosaic.find_digit(
            self.smem["counts"].at[index], self.smem["found"], want, self.shape.blocks
        )

    def found(self):
        return self.smem["found"][0], self.smem["found"][1]

    def tally(self, group, flags):
        mosaic.tally(self.smem["tally"], group, flags)

    def scan(self):
        mosaic.scan_tallies(self.smem["tally"], self.smem["total"], self.smem["found"])

    def before(self, group, flags):
        return mosaic.sums_before(self.smem["tally"], group, flags)

    def of_earlier_blocks(self):
        if self.shape.blocks == 1:
            return jnp.int32(0), jnp.int32(0)
        return mosaic.sum_of_earlier(self.smem["total"], self.block, self.shape.blocks)

    def put(self, g, flags, before, earlier, equals):
        mosaic.store_chosen(self.chosen, self.row, self.slots(g), flags, before, earlier, equals)

    def fill(self, first):
        threads = 128 * self.shape.warpgroups
        mosaic.fill(self.chosen, self.row, first, jnp.int32(self.shape.slots), threads)

    def block_sync(self):
        hopper_mosaic.named_barrier("sync", _MEETING, 128 * self.shape.warpgroups)

    def cluster_sync(self):
        mosaic.cluster_sync()


def key_of(score, seen):
    """int32 that orders as the table above says: the better a score, the less."""
    bits = lax.bitcast_convert_type(score, jnp.int32)
    # Of a number from 0 on (-0.0 too) more bits are better, of one below 0 fewer.
    key = jnp.where(score < 0, bits ^ _LEAST, ~(bits & _GREATEST))
    key = jnp.where(score != score, _LEAST, key)
    return jnp.where(seen & (score != -jnp.inf), key, _GREATEST)
