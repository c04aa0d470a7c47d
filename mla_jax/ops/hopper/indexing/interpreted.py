"""Scores and the choice of slots for Pallas's interpreter, which lacks what `mosaic.py` adds.

`InterpretedRow` overrides what the algorithm in `select.py` asks of the hardware: warpgroups count
each for itself, blocks read each other's counts in device memory, and positions are stored in place
of slots, which are put there afterwards. `InterpretedTile` stores whole tiles of scores.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mla_jax.ops.hopper.indexing import scores as scoring
from mla_jax.ops.hopper.indexing.mosaic import BINS, GROUP, WARP
from mla_jax.ops.hopper.indexing.select import Row, Shape, launch
from mla_jax.ops.hopper.schedule import TILE


def select(scores, limits, shape: Shape, interpret: Any):
    """`select.select` in the interpreter, with its parameters."""
    whole = shape.blocks * shape.part
    scores = jnp.pad(scores, ((0, 0), (0, whole - shape.slots)), constant_values=jnp.nan)
    positions = launch(InterpretedRow, scores, limits, shape, interpret=interpret)[1]
    chosen = jnp.full((shape.rows, shape.count), shape.slots, jnp.int32)
    to = jnp.where(positions < 0, shape.count, positions)
    slots = jnp.arange(whole, dtype=jnp.int32)
    return chosen.at[jnp.arange(shape.rows)[:, None], to].set(slots[None], mode="drop")


class InterpretedRow(Row):
    """`Row` with what the interpreter has in place of atomics, shuffles and others' memory."""

    @classmethod
    def outputs(cls, shape: Shape) -> list[tuple[int, ...]]:
        """Also positions, and what blocks tell each other: counts and totals."""
        return [
            *super().outputs(shape),
            (shape.rows, shape.blocks * shape.part),
            (shape.rows, shape.blocks, shape.warpgroups, 4, BINS),
            (shape.rows, shape.blocks),
        ]

    @classmethod
    def scratch(cls, shape: Shape) -> dict[str, Any]:
        """Also the barriers."""
        smem = super().scratch(shape) | {"block_bar": plgpu.Barrier(num_arrivals=shape.warpgroups)}
        if shape.blocks > 1:
            smem["cluster_bar"] = plgpu.ClusterBarrier(
                collective_axes=("block",), num_arrivals=shape.warpgroups
            )
        return smem

    def load_group(self, first, limit):
        del limit
        return self.scores[self.row, pl.ds(first, GROUP)]

    def clear(self):
        _, counts, _ = self.more
        counts[self.row, self.block, self.wg] = jnp.zeros((4, BINS), jnp.int32)

    def count(self, index, key, known):
        shift = 24 - 8 * index
        key = (key ^ -(2**31)).astype(jnp.uint32)
        digit = (key >> shift) & 255
        above = key >> (shift + 8) if index else jnp.zeros_like(key)
        agrees = (above == known.astype(jnp.uint32)) & (key != jnp.uint32(2**32 - 1))
        bins = jnp.arange(BINS, dtype=jnp.uint32)
        found = ((digit[:, None] == bins[None]) & agrees[:, None]).sum(0, dtype=jnp.int32)
        own = self.more[1].at[self.row, self.block, self.wg, index]
        own[...] = own[...] + found

    def add_lanes(self):
        pass

    def find(self, index, want):
        counts = self.more[1][self.row][:, :, index].sum((0, 1))
        up_to = jnp.cumsum(counts)
        digit = jnp.minimum((up_to < want).sum(dtype=jnp.int32), BINS - 1)
        self.smem["found"][0] = digit
        self.smem["found"][1] = jnp.where(jnp.arange(BINS) < digit, counts, 0).sum()

    def tally(self, group, flags):
        sums = flags.reshape(-1, WARP).sum(1, dtype=jnp.int32)
        self.smem["tally"][pl.ds(4 * group, 4)] = sums

    def scan(self):
        used = 4 * self.shape.groups * self.shape.warpgroups
        tally = jnp.where(jnp.arange(BINS) < used, self.smem["tally"][...], 0)
        self.smem["tally"][...] = jnp.cumsum(tally) - tally
        self.more[2][self.row, self.block] = tally.sum(dtype=jnp.int32)

    def before(self, group, flags):
        apart = flags.reshape(-1, WARP)
        before = jnp.cumsum(apart, axis=1) - apart
        return (before + self.smem["tally"][pl.ds(4 * group, 4)][:, None]).reshape(-1)

    def of_earlier_blocks(self):
        if self.shape.blocks == 1:
            return jnp.int32(0), jnp.int32(0)
        totals = self.more[2][self.row].astype(jnp.uint32)
        totals = jnp.where(jnp.arange(self.shape.blocks) < self.block, totals, 0)
        return (totals >> 16).sum(dtype=jnp.int32), (totals & 0xFFFF).sum(dtype=jnp.int32)

    def put(self, g, flags, before, earlier, equals):
        less = lax.shift_right_logical(before, jnp.full_like(before, 16)) + earlier[0]
        equal = (before & 0xFFFF) + earlier[1]
        chosen = (flags > 1) | ((flags == 1) & (equal < equals))
        position = jnp.where(chosen, less + jnp.minimum(equal, equals), -1)
        self.more[0][self.row, pl.ds(self.first(g), GROUP)] = position

    def fill(self, first):
        pass

    def block_sync(self):
        plgpu.barrier_arrive(self.smem["block_bar"])
        plgpu.barrier_wait(self.smem["block_bar"])

    def cluster_sync(self):
        plgpu.barrier_arrive(self.smem["cluster_bar"])
        plgpu.barrier_wait(self.smem["cluster_bar"])


def score(operands, limits, table, shape: scoring.Shape, interpret: Any):
    """`scores.score` in the interpreter, with its parameters."""
    stride = -(-shape.slots // TILE) * TILE
    (made,) = scoring.launch(
        InterpretedTile, operands, limits, table, shape, stride, interpret=interpret
    )
    return made.reshape(shape.batch, shape.queries, stride)[..., : shape.slots]


class InterpretedTile(scoring.Tile):
    """`Tile` that stores whole tiles: there is room behind every query's scores."""

    def load_weights(self, start):
        weights = self.weights[pl.ds(start, self.shape.columns)]
        return lax.broadcast_in_dim(weights, (TILE, self.shape.columns), [1])

    def store(self, at, value, count):
        @pl.when(count > 0)
        def _():
            self.out[pl.ds(at, TILE)] = value

    def warpgroup_sync(self):
        pass
