"""The copies of the TPU kernel from HBM to VMEM: blocks of the cache, and queries of its rows.

They run a few blocks ahead in a ring of buffers, and take no more slots than queries see. A row of
a dense cache is contiguous, so that one copy takes what a block has of it. In a paged cache a copy
takes 128 slots, from the page that the table names.

Letters: B batch, S cache slots, R latent, P rotary channels, C slots of a block, G pages of a pool
and M of a row.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.ops.tpu.planning import LANES, TILE
from mla_jax.ops.tpu.walk import Place, Walk

MOST_ROWS = 3  # rows of a block whose copies start without a branch
_UNITS = {"latent": TILE, "k_rope": LANES}  # slots of the least that a copy can take


class Copies:
    """Starts copies and waits for them.

    A block's copies signal the semaphore of its buffer. The first block comes in two parts, the
    smaller first, so that its scores begin early; the copies of its first part signal the semaphore
    of the ring's last buffer, whose own copies start after that.
    """

    def __init__(self, walk: Walk, hbm: dict[str, Any], vmem: dict[str, Any]):
        self.walk, self.plan, self.hbm, self.vmem = walk, walk.plan, hbm, vmem
        self.table: Any = hbm.get("table")
        self.keys = ("latent", "k_rope") if "k_rope" in hbm else ("latent",)
        self.queries = ("pattern", "q_rope") if "k_rope" in hbm else ("pattern",)

    def start(self, source, target, semaphore):
        pltpu.make_async_copy(source, target, self.vmem["loaded"].at[semaphore]).start()

    def wait(self, target, semaphore):
        """Waits until as much has been copied as a buffer takes."""
        pltpu.make_async_copy(target, target, self.vmem["loaded"].at[semaphore]).wait()

    def of_block(self, name, step, begin, count):
        """So many units (`_UNITS`) of a block's buffer, from one on."""
        return self.vmem[name].at[(self.walk.buffer(step), *_span(name, begin, count))]

    def copy_keys(self, names, place, step, number, slots, semaphore):
        """Copies slots of a row, from a place on, to a block, from piece `number` on."""
        if self.table is not None:
            self.copy_pages(names, place, step, number, slots, semaphore)
            return
        for name in names:
            each, count = self.plan.piece // _UNITS[name], pl.cdiv(slots, _UNITS[name])
            source = self.hbm[name].at[(place.row, *_span(name, place.piece * each, count))]
            self.start(source, self.of_block(name, step, number * each, count), semaphore)

    def copy_pages(self, names, place, step, number, slots, semaphore):
        """`copy_keys` where each 128 slots of the row have a page, of which the last may be cut."""
        pages = self.plan.piece // LANES  # of a piece

        def copy_page(index, used):
            page = self.page(place.row, place.piece * pages + index)
            for name in names:
                each, count = LANES // _UNITS[name], pl.cdiv(used, _UNITS[name])
                source = self.hbm[name].at[(page, *_span(name, 0, count))]
                begin = (number * pages + index) * each
                self.start(source, self.of_block(name, step, begin, count), semaphore)

        if isinstance(slots, int):  # whole pages
            for index in range(slots // LANES):
                copy_page(index, LANES)
            return
        full = slots // LANES
        pl.loop(0, full)(lambda index: copy_page(index, LANES))
        used = slots - full * LANES
        pl.when(used > 0)(lambda: copy_page(full, used))

    def page(self, row, index):
        """The page of a row's 128 slots; the last of the pool where it has none, as on XLA."""
        per_row = self.walk.sizes.slots // LANES
        return jnp.minimum(self.table[row * per_row + index], self.hbm["latent"].shape[0] - 1)

    def copy_queries(self, row, semaphore):
        for name in self.queries:
            target = self.vmem[name].at[self.walk.held(row)]
            self.start(self.hbm[name].at[row], target, semaphore)

    def wait_queries(self, rows, semaphore):
        for name in self.queries:
            self.wait(self.vmem[name].at[pl.ds(0, rows)], semaphore)

    def copy_row(self, step, end, semaphore, state):
        """Starts the copies of what queries see of one row in a block, up to its piece `end`.

        The state is `_copied` so far, the place where the block goes on, and from which of its
        pieces.
        """
        copied, place, number = state
        walk = self.walk
        pieces = jnp.minimum(walk.left(place), end - number)
        exists = (place.row < walk.batch) & (pieces > 0)
        live = walk.length(place.row) - place.piece * self.plan.piece
        live = jnp.where(exists, jnp.clip(live, 0, pieces * self.plan.piece), 0)

        @pl.when(live > 0)
        def _():
            self.copy_keys(self.keys, place, step, number, live, semaphore)

        opens = exists & walk.opens(step, number, place)
        pl.when(opens)(lambda: self.copy_queries(place.row, semaphore))
        copied += _copied(live, live, opens.astype(jnp.int32))
        return copied, walk.following(place, pieces), number + pieces

    def uncopied(self, step, start):
        """The state of `copy_row` before a block, if the block exists."""
        return jnp.int32(0), start, jnp.where(step < self.walk.count, 0, self.walk.pieces)

    def copy_some(self, step, start):
        """`copy_row` of a block's first rows, without a branch."""
        state = self.uncopied(step, start)
        for _ in range(min(MOST_ROWS, self.walk.pieces)):
            state = self.copy_row(step, self.walk.pieces, self.walk.buffer(step), state)
        return state

    def copy_rest(self, step, end, semaphore, state):
        """`copy_row` until piece `end`; returns `_copied` and where the block after begins."""
        go = functools.partial(self.copy_row, step, end, semaphore)
        if self.walk.pieces == 1:  # the block is of one row
            return go(state)[:2]
        return lax.while_loop(lambda state: state[2] < end, go, state)[:2]

    def copy_block(self, step, start):
        """Starts the copies of a block, if it exists; returns what `copy_rest` does."""
        walk, block = self.walk, self.plan.block
        semaphore = walk.buffer(step)

        # libtpu's linter believes that copies of a size known only at run time set nothing, so
        # those of a whole block have a static size.
        def whole():
            self.copy_keys(self.keys, start, step, 0, block, semaphore)
            opens = walk.opens(step, 0, start)
            pl.when(opens)(lambda: self.copy_queries(start.row, semaphore))
            copied = _copied(block, block, opens.astype(jnp.int32))
            return copied, walk.following(start, walk.pieces)

        def mixed():
            return self.copy_rest(step, walk.pieces, semaphore, self.uncopied(step, start))

        return lax.cond((step < walk.count) & walk.whole(start), whole, mixed)

    def wait_block(self, step, copied, semaphore):
        """Waits for the copies of a block, or of a part of the first one."""
        *keys, rows = _copied_of(copied)
        for name, count in zip(self.keys, keys, strict=False):
            part = self.of_block(name, step, 0, count)
            pl.when(count > 0)(functools.partial(self.wait, part, semaphore))
        pl.when(rows > 0)(lambda: self.wait_queries(rows, semaphore))

    # The first block.

    def parts(self):
        """(first piece, the one after the last, semaphore) of each part of the first block."""
        pieces = self.walk.pieces
        cut = pieces * 3 // 8 or pieces // 2
        last = (cut, pieces, 0)
        return [(0, cut, self.plan.ring - 1), last] if cut else [last]

    def copy_first(self):
        """Starts the copies of the first block.

        Returns `_copied` of each part, the place where each begins, and the place where the next
        block does.
        """
        begin = self.walk.first

        def whole():
            copied, places = [], []
            for first, end, semaphore in self.parts():
                places.append(Place(begin.row, begin.piece + first))
                slots = (end - first) * self.plan.piece
                self.copy_keys(("latent",), places[-1], 0, first, slots, semaphore)
                if first == 0:
                    self.copy_queries(begin.row, semaphore)
                copied.append(_copied(slots, 0, jnp.int32(first == 0)))
            # All at once, since libtpu's linter believes that a part would leave the rest unset.
            self.copy_keys(self.keys[1:], begin, 0, 0, self.plan.block, 0)
            copied[-1] += _copied(0, self.plan.block, 0)
            return copied, [*places, self.walk.following(begin, self.walk.pieces)]

        def mixed():
            copied, places = [], [begin]
            for first, end, semaphore in self.parts():
                state = jnp.int32(0), places[-1], jnp.int32(first)
                part, following = self.copy_rest(jnp.int32(0), end, semaphore, state)
                copied.append(part)
                places.append(following)
            return copied, places

        return lax.cond(self.walk.whole(begin), whole, mixed)

    def wait_first(self, copied, places, whole, piece):
        """Waits for the part of the first block that begins with a piece, if one does."""
        for i, (first, _, semaphore) in enumerate(self.parts()):
            if first == piece:
                self.wait_block(0, copied[i], semaphore)
                if not whole:
                    self.clear_ends(0, places[i], places[i + 1], first)

    # What copies leave in the buffers beside live slots.

    def clear_ends(self, step, start, following, first):
        """Zeros in latents past the end of each row that ends in a block, from piece `first` on.

        Weights of slots that no query sees are 0, and 0 x NaN is NaN. Copies take whole groups of 8
        latents, so that past a row's end the buffer has what the cache holds there, or what the
        buffer held before.
        """
        walk, groups, tiles = self.walk, LANES // TILE, self.plan.piece // LANES

        def each(row, number):
            number += walk.left(Place(row, jnp.where(row == start.row, start.piece, 0)))
            length = walk.length(row)
            begin = (number - walk.pieces_of(row)) * tiles  # of the row, in the block's tiles
            live = pl.cdiv(length, LANES)

            @pl.when(live * LANES > length)
            def _():
                part = self.of_block("latent", step, (begin + live - 1) * groups, groups)
                held = part[...]
                group, of_group = (lax.broadcasted_iota(jnp.int32, held.shape, i) for i in (0, 1))
                slot = (live - 1) * LANES + group * TILE + of_group
                part[...] = jnp.where(slot < length, held, jnp.zeros_like(held))

            self.clear_tiles(step, number * tiles, number * tiles - begin - live)
            return number

        ends = jnp.minimum(following.row, walk.batch)
        lax.fori_loop(start.row, ends, each, jnp.int32(first))

    def clear_tiles(self, step, end, dead, done=0):
        """Zeros in the last `dead` tiles of 128 latents, at most a piece, before tile `end`."""

        def clear():
            groups = LANES // TILE
            clear_ref(self.of_block("latent", step, (end - 1 - done) * groups, groups))
            if (done + 1) * LANES < self.plan.piece:
                self.clear_tiles(step, end, dead, done + 1)

        pl.when(dead > done)(clear)

    def unpoison(self):
        """Stores zeros, for libtpu's linter, into the buffer that nothing is copied to yet.

        The linter believes that copies of a size known only at run time set nothing. It follows
        scalars; after one store to a place that it cannot work out, because the place comes from a
        vector, it objects to nothing that these copies bring. This was found by trial.

        Where a cache on pages has one block in all it objects nevertheless: to rotary keys of slots
        past a row's end, of which no page was copied. `score` does read them; the mask then drops
        their scores, whatever they are. The interpreter's tests fill such slots with NaN.
        """
        lane = lax.broadcasted_iota(jnp.int32, (TILE, LANES), 1).astype(jnp.float32)
        zero = jnp.min(lane * self.walk.count.astype(jnp.float32)).astype(jnp.int32)
        for name in self.keys:
            clear_ref(self.of_block(name, zero + self.plan.ring - 1, 0, 1))


def clear_ref(ref):
    """Zeros in all of a buffer."""
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _copied(latents, keys, rows):
    """What copies of so many latents, rotary keys, and rows of queries take, in one number."""
    latents, keys = pl.cdiv(latents, _UNITS["latent"]), pl.cdiv(keys, _UNITS["k_rope"])
    return latents + (keys << 16) + (rows << 24)


def _copied_of(number):
    """(units of latents, units of rotary keys, rows of queries) of the sum of some `_copied`."""
    return number & 0xFFFF, (number >> 16) & 0xFF, number >> 24


def _span(name, begin, count):
    """Index of so many units of slots, from one on, in what is stored of a row or a page."""
    before = () if name == "latent" else (slice(None),)
    return (*before, pl.ds(begin, count))
