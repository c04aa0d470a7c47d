"""Which blocks the TPU kernel works on: one list for all rows, and where each of its blocks begins.

The list is cut into blocks of C slots and these into pieces, which are multiples of 128 slots. Rows
follow each other in it, each from the next piece on, so that a block may hold the end of one row
and several short ones. Where a chip has two cores, each takes half of the list.

Letters: B batch, T query tokens, S cache slots, N heads, C slots of a block, M pages of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mla_jax.ops.tpu.planning import Plan


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the kernel knows at compile time beside the shapes of its refs."""

    batch: int  # B
    tokens: int  # T
    heads: int  # N
    slots: int  # S
    per_query: bool  # lengths are [B T], not [B]
    scale: float  # in base 2
    plan: Plan
    held: int  # of how many rows the queries have a place in VMEM
    known: Callable | None  # gives the length of a row where lengths are no operand


class Place(NamedTuple):
    """Where a block, or a piece, begins."""

    row: Any
    piece: Any  # of the row


class Walk:
    """One core's list of blocks, and what each of them is.

    Attributes:
        pieces: pieces of a block.
        count: blocks of this core.
        first: the place of its first block.
        own: the first row that begins on this core.

    `step` is a block's number in the list, `start` the place where it begins, and `number` the
    number of a piece within its block. A block that is `whole` holds slots of one row that each of
    the row's queries sees.
    """

    def __init__(self, sizes: Sizes, lengths):
        self.sizes, self.plan, self.batch, self.lengths = sizes, sizes.plan, sizes.batch, lengths
        self.pieces = self.plan.block // self.plan.piece
        self.core = pl.program_id(0) if self.plan.cores > 1 else 0
        self.count, self.first = self._share()
        self.own = self.first.row + (self.first.piece > 0)

    def limits(self, row):
        """Slots that each query token of a row may see."""
        sizes, tokens = self.sizes, range(self.sizes.tokens)
        if self.lengths is None and sizes.known is None:
            return [sizes.slots - (sizes.tokens - 1 - t) for t in tokens]
        row = jnp.minimum(row, self.batch - 1)
        if sizes.per_query:
            limits = [self.lengths[row * sizes.tokens + t] for t in tokens]
        else:
            length = self.lengths[row] if sizes.known is None else sizes.known(row)
            limits = [length - (sizes.tokens - 1 - t) for t in tokens]
        return [jnp.clip(limit, 0, sizes.slots) for limit in limits]

    def length(self, row):
        """Slots of a row up to the last that some query sees."""
        return functools.reduce(jnp.maximum, self.limits(row))

    def pieces_of(self, row):
        """Pieces of a row; an empty row has one too."""
        return jnp.maximum(pl.cdiv(self.length(row), self.plan.piece), 1)

    def left(self, place):
        """Pieces of a row from a place on; past the last row their number has no bound."""
        return jnp.where(place.row < self.batch, self.pieces_of(place.row) - place.piece, 2**24)

    def following(self, place, pieces):
        """The place so many pieces of its row after a place."""
        ends = self.left(place) == pieces
        return Place(
            jnp.where(ends, place.row + 1, place.row), jnp.where(ends, 0, place.piece + pieces)
        )

    def whole(self, place):
        """Whether the block at a place is of one row, and each of its queries sees all of it."""
        low = functools.reduce(jnp.minimum, self.limits(place.row))
        return low >= place.piece * self.plan.piece + self.plan.block

    def opens(self, step, number, place):
        """Whether a piece is the first of its row on this core."""
        return (place.piece == 0) | (step == 0) & (number == 0)

    def units(self, start, whole):
        """(first piece, the one after the last, place) of what to compute at once of a block."""
        if whole:
            return [(0, self.pieces, start)]
        units, place = [], start
        for first in range(self.pieces):
            units.append((first, first + 1, place))
            place = self.following(place, 1)
        return units

    def buffer(self, step):
        """The buffer of the ring that holds a block."""
        ring = self.plan.ring
        return lax.rem(step, ring) if ring & (ring - 1) else step & (ring - 1)

    def held(self, row):
        """Where the queries of a row lie in VMEM."""
        return row & (self.sizes.held - 1)

    def _share(self):
        """This core's count of blocks, and the place where its first one begins."""
        zero = jnp.int32(0)
        total = lax.fori_loop(0, self.batch, lambda r, n: n + self.pieces_of(r), zero, unroll=4)
        blocks = pl.cdiv(total, self.pieces)
        if self.plan.cores == 1:
            return blocks, Place(zero, zero)
        half = (blocks + 1) // 2

        def find(row, state):
            left, of_row, of_piece = state
            here = (of_row == self.batch) & (left < self.pieces_of(row))
            return left - self.pieces_of(row), *(
                jnp.where(here, new, old) for new, old in ((row, of_row), (left, of_piece))
            )

        start = (self.core * half * self.pieces, jnp.int32(self.batch), zero)
        _, row, piece = lax.fori_loop(0, self.batch, find, start, unroll=4)
        return jnp.where(self.core == 0, half, blocks - half), Place(row, piece)
