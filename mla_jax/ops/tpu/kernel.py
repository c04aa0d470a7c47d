"""The TPU kernel: one walk over the blocks of all rows.

The kernel walks one list of blocks of C slots. Rows follow each other in it, each from the next
piece (a fraction of a block) on, so that a block may hold the end of one row and several short
ones. Copies from HBM run a few blocks ahead in a ring, of no more than what is live. A step of the
loop holds two independent halves, so that the scheduler can fill one's waits with the other's work:

    score  block j+1: queries x keys on the matrix unit, running maximum -> scores, top, fade
    mix    block j:   exp2, sum, weights x latents on the matrix unit    -> total, mixed

A block of one row that all its queries see is computed at once; of any other, each piece by itself,
with the queries of its row, and masked. Rows keep a running maximum and sum (Milakov and Gimelshein
2018, arXiv 1805.02867) in base 2. Where a chip has two cores, each takes half of the list; a row
that straddles the halves is merged by lse.

HBM layout: XLA lays an array of 64 channels per slot out slot-minor, so k_rope goes in as [B P S]:
that transpose is a bitcast of what is stored, and its lanes hold no padding. XLA's tiles have 8
rows; arrays go in, and VMEM buffers are, as [.. /8 8 ..] so that the compiler uses the same tile in
VMEM, where it may prefer 16 rows, and a copy moves whole tiles (on tpu7x the other way takes three
times as long).

Letters: B batch, T query tokens, S cache slots, N heads, R latent, P rotary channels, M = T N
queries of a row, padded to whole tiles, C slots of a block.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mla_jax.ops.tpu.planning import LANES, Plan, rows_held

_TILE = 8
_ROWS = 3  # of a block, whose copies start without a branch
_UNITS = {"latent": _TILE, "k_rope": LANES}  # slots of the least that a copy can take
_MASKED = -1e30  # finite, so that masked minus masked is 0 and not NaN


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What the kernel knows at compile time beside the shapes of its refs."""

    tokens: int  # T
    heads: int  # N
    slots: int  # S
    per_query: bool  # lengths are [B T], not [B]
    scale: float  # in base 2
    plan: Plan
    known: Callable | None  # length of a row where lengths are no operand


def launch(pattern, q_rope, latent, k_rope, lengths, scale, plan: Plan, known=None):
    """The kernel call: out [B M/8 8 R], lse [B M/128 128] and, of two cores, parts of a shared row.

    With `lengths` None, control flow depends on nothing in memory: every row is full, or of length
    known(row). libtpu's static profiler needs that: to it, a length read at run time is 0.
    """
    (batch, tokens, heads, rank), (slots, rope) = pattern.shape, k_rope.shape[1:]
    dtype, queries = latent.dtype, tokens * heads
    rows = -(-queries // 16) * 16  # M: whole tiles, in either dtype
    groups = -(-rows // LANES)

    def by_row(x):
        x = x.reshape(batch, queries, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, rows - queries), (0, 0)))
        return x.reshape(batch, rows // _TILE, _TILE, x.shape[-1])

    arrays = {
        "pattern": by_row(pattern),
        "latent": latent.reshape(batch, slots // _TILE, _TILE, rank),
    }
    if rope:
        arrays["q_rope"] = by_row(q_rope)
        tiles = jnp.swapaxes(k_rope, 1, 2).reshape(batch, rope // _TILE, _TILE, -1, LANES)
        arrays["k_rope"] = jnp.swapaxes(tiles, 2, 3)
    if lengths is not None:
        arrays["lengths"] = lengths.astype(jnp.int32).reshape(-1)

    # The cache is read from HBM even where XLA would have moved part of it to VMEM before.
    operands = [
        x if name == "lengths" else pltpu.with_memory_space_constraint(x, pltpu.HBM)
        for name, x in arrays.items()
    ]
    shaped = _shaped(arrays.values())
    results = {
        "out": shaped((batch, rows // _TILE, _TILE, rank), dtype),
        "lse": shaped((batch, groups, LANES), jnp.float32),
    }
    if plan.cores > 1:  # of the row that two cores share, each core's part
        results |= {
            "part": shaped((plan.cores, rows, rank), jnp.float32),
            "part_lse": shaped((plan.cores, groups, LANES), jnp.float32),
        }
    vmem, pieces = pltpu.VMEM, plan.block // plan.piece
    held = rows_held(batch, pieces, plan.ring)
    scratch = {
        "pattern": vmem((held, rows // _TILE, _TILE, rank), dtype),
        "latent": vmem((plan.ring, plan.block // _TILE, _TILE, rank), dtype),
        "scores": vmem((rows, plan.block), jnp.float32),
        "top": vmem((2, pieces, rows, LANES), jnp.float32),
        "fade": vmem((pieces, rows, LANES), jnp.float32),
        "peak": vmem((pieces, rows, LANES), jnp.float32),  # top again; read by a constant index
        "total": vmem((pieces, rows, LANES), jnp.float32),
        "mixed": vmem((pieces, rows, rank), jnp.float32),
        "out": vmem((2, pieces, rows // _TILE, _TILE, rank), dtype),
        "lse": vmem((2, pieces, groups, LANES), jnp.float32),
        "loaded": pltpu.SemaphoreType.DMA((plan.ring,)),
        "stored": pltpu.SemaphoreType.DMA(()),
    }
    if rope:
        scratch["q_rope"] = vmem((held, rows // _TILE, _TILE, rope), dtype)
        scratch["k_rope"] = vmem(
            (plan.ring, rope // _TILE, plan.block // LANES, _TILE, LANES), dtype
        )
    if plan.cores > 1:
        scratch["part"] = vmem((rows, rank), jnp.float32)
        scratch["part_lse"] = vmem((groups, LANES), jnp.float32)
    sizes = _Sizes(
        tokens,
        heads,
        slots,
        lengths is not None and lengths.ndim == 2,
        scale * math.log2(math.e),
        plan,
        known,
    )

    def kernel(*refs):
        names = [*arrays, *results]
        Walk(sizes, dict(zip(names, refs, strict=False)), refs[len(names)]).run()

    work = batch * slots * rows
    size = jnp.dtype(dtype).itemsize
    specs = {name: pl.BlockSpec(memory_space=pl.ANY) for name in (*arrays, *results)}
    specs["lengths"] = pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        grid=(plan.cores,),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in results],
        out_shape=list(results.values()),
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=plan.vmem_bytes,
            # The interpreter covers both: one is a check at the kernel's end that libtpu's
            # profiler does not know on tpu7x, the other takes 100 cycles per block.
            disable_semaphore_checks=True,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * work * (2 * rank + rope),
            transcendentals=work,
            bytes_accessed=batch * (slots * (rank + rope) + rows * (2 * rank + rope)) * size,
        ),
        name="mla_decode",
    )(*operands)


class _Place(NamedTuple):
    """Where a block, or a piece, begins."""

    row: Any
    piece: Any  # of the row


class Walk:
    """The kernel: one core's walk over its blocks.

    `step` is a block's place in the list, `start` where it begins; its slots lie in ring buffer
    `step % ring`. A block that is `whole` holds slots of one row that each query sees: it is
    computed at once. Of any other each piece is computed by itself, with the queries of its row,
    and masked. What is kept of a piece has its number as an index: what its row has gathered up to
    and with it. Of a whole block that is the last number, where the next block goes on from.
    """

    def __init__(self, sizes: _Sizes, hbm: dict, at: dict):
        self.sizes, self.plan, self.hbm, self.at = sizes, sizes.plan, hbm, at
        self.batch, tiles, _, self.rank = hbm["out"].shape
        self.rows = tiles * _TILE
        self.lengths: Any = hbm.get("lengths")
        self.keys = ("latent", "k_rope") if "k_rope" in hbm else ("latent",)
        self.queries = ("pattern", "q_rope") if "k_rope" in hbm else ("pattern",)
        self.pieces = self.plan.block // self.plan.piece  # of a block
        self.core = pl.program_id(0) if self.plan.cores > 1 else 0
        exact = hbm["latent"].dtype == jnp.float32
        self.dot = functools.partial(
            lax.dot_general,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if exact else None,
        )

    # Which blocks.

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
        """Pieces of a row; an empty one has one too."""
        return jnp.maximum(pl.cdiv(self.length(row), self.plan.piece), 1)

    def left(self, at):
        """Pieces of a row from a place on; past the last row there is no end of them."""
        return jnp.where(at.row < self.batch, self.pieces_of(at.row) - at.piece, 2**24)

    def following(self, at, pieces):
        """The place so many pieces of its row after a place."""
        ends = self.left(at) == pieces
        return _Place(jnp.where(ends, at.row + 1, at.row), jnp.where(ends, 0, at.piece + pieces))

    def share(self):
        """This core's count of blocks, and where its first one begins."""
        zero = jnp.int32(0)
        total = lax.fori_loop(0, self.batch, lambda r, n: n + self.pieces_of(r), zero, unroll=4)
        blocks = pl.cdiv(total, self.pieces)
        if self.plan.cores == 1:
            return blocks, _Place(zero, zero)
        half = (blocks + 1) // 2

        def find(row, state):
            left, at_row, at_piece = state
            here = (at_row == self.batch) & (left < self.pieces_of(row))
            return left - self.pieces_of(row), *(
                jnp.where(here, new, old) for new, old in ((row, at_row), (left, at_piece))
            )

        start = (self.core * half * self.pieces, jnp.int32(self.batch), zero)
        _, row, piece = lax.fori_loop(0, self.batch, find, start, unroll=4)
        return jnp.where(self.core == 0, half, blocks - half), _Place(row, piece)

    def whole(self, at):
        """Whether a block is of one row, and each of its queries sees all of it."""
        low = functools.reduce(jnp.minimum, self.limits(at.row))
        return low >= at.piece * self.plan.piece + self.plan.block

    def opens(self, step, number, at):
        """Whether a piece is the first of its row on this core."""
        return (at.piece == 0) | (step == 0) & (number == 0)

    def units(self, start, whole):
        """(first piece, the one after the last, place) of what to compute at once of a block."""
        if whole:
            return [(0, self.pieces, start)]
        units, at = [], start
        for first in range(self.pieces):
            units.append((first, first + 1, at))
            at = self.following(at, 1)
        return units

    def slots(self, first, end):
        """Slots of a block from a piece to another, as a slice."""
        return slice(first * self.plan.piece, end * self.plan.piece)

    # Copies.

    def slot(self, step):
        ring = self.plan.ring
        return lax.rem(step, ring) if ring & (ring - 1) else step & (ring - 1)

    def held(self, row):
        """Where the queries of a row lie."""
        return row & (self.at["pattern"].shape[0] - 1)

    def copy(self, source, target, semaphore):
        pltpu.make_async_copy(source, target, self.at["loaded"].at[semaphore]).start()

    def wait(self, target, semaphore):
        """Waits until as much has been copied as a buffer takes."""
        pltpu.make_async_copy(target, target, self.at["loaded"].at[semaphore]).wait()

    def of_block(self, name, step, begin, count):
        """So many units (`_UNITS`) of a block, from one on."""
        return self.at[name].at[(self.slot(step), *_span(name, begin, count))]

    def copy_keys(self, names, at, step, number, slots, semaphore):
        """Copies slots of a row, from a place on, to a block, from piece `number` on."""
        for name in names:
            each, count = self.plan.piece // _UNITS[name], pl.cdiv(slots, _UNITS[name])
            source = self.hbm[name].at[(at.row, *_span(name, at.piece * each, count))]
            self.copy(source, self.of_block(name, step, number * each, count), semaphore)

    def copy_queries(self, row, semaphore):
        for name in self.queries:
            target = self.at[name].at[self.held(row)]
            self.copy(self.hbm[name].at[row], target, semaphore)

    def wait_queries(self, rows, semaphore):
        for name in self.queries:
            self.wait(self.at[name].at[pl.ds(0, rows)], semaphore)

    def copy_row(self, step, end, semaphore, state):
        """Starts the copies of what is live of one row in a block, up to its piece `end`.

        The state: `_copied` so far, where the block goes on, and from which of its pieces.
        """
        copied, at, number = state
        pieces = jnp.minimum(self.left(at), end - number)
        exists = (at.row < self.batch) & (pieces > 0)
        live = self.length(at.row) - at.piece * self.plan.piece
        live = jnp.where(exists, jnp.clip(live, 0, pieces * self.plan.piece), 0)

        @pl.when(live > 0)
        def _():
            self.copy_keys(self.keys, at, step, number, live, semaphore)

        opens = exists & self.opens(step, number, at)
        pl.when(opens)(lambda: self.copy_queries(at.row, semaphore))
        copied += _copied(live, live, opens.astype(jnp.int32))
        return copied, self.following(at, pieces), number + pieces

    def uncopied(self, step, start):
        """The state of `copy_row` before a block, if it exists."""
        return jnp.int32(0), start, jnp.where(step < self.count, 0, self.pieces)

    def copy_some(self, step, start):
        """`copy_row` of a block's first rows without a branch."""
        state = self.uncopied(step, start)
        for _ in range(min(_ROWS, self.pieces)):
            state = self.copy_row(step, self.pieces, self.slot(step), state)
        return state

    def copy_rest(self, step, end, semaphore, state):
        """`copy_row` until piece `end`; returns `_copied` and where the block after begins."""
        go = functools.partial(self.copy_row, step, end, semaphore)
        if self.pieces == 1:  # one row has it all
            return go(state)[:2]
        return lax.while_loop(lambda state: state[2] < end, go, state)[:2]

    def copy_block(self, step, start):
        """Starts the copies of a block, if it exists; returns what `copy_rest` does."""
        semaphore = self.slot(step)

        # To libtpu's linter, copies of a size that is known only at run time set nothing.
        def whole():
            self.copy_keys(self.keys, start, step, 0, self.plan.block, semaphore)
            opens = self.opens(step, 0, start)
            pl.when(opens)(lambda: self.copy_queries(start.row, semaphore))
            copied = _copied(self.plan.block, self.plan.block, opens.astype(jnp.int32))
            return copied, self.following(start, self.pieces)

        def mixed():
            return self.copy_rest(step, self.pieces, semaphore, self.uncopied(step, start))

        return lax.cond((step < self.count) & self.whole(start), whole, mixed)

    def wait_block(self, step, copied, semaphore):
        """Waits for the copies of a block, or of a part of the first one."""
        *keys, rows = _copied_of(copied)
        for name, count in zip(self.keys, keys, strict=False):
            part = self.of_block(name, step, 0, count)
            pl.when(count > 0)(functools.partial(self.wait, part, semaphore))
        pl.when(rows > 0)(lambda: self.wait_queries(rows, semaphore))

    def clear_ends(self, step, start, following, first):
        """Zeros in latents past the end of each row that ends in a block, from piece `first` on.

        Weights of slots that no query sees are 0, and 0 x NaN is NaN. Copied are whole groups of 8
        latents: past a row's end is what the cache holds there, or what the buffer held before.
        """
        groups, tiles = LANES // _TILE, self.plan.piece // LANES

        def each(row, number):
            number += self.left(_Place(row, jnp.where(row == start.row, start.piece, 0)))
            length = self.length(row)
            begin = (number - self.pieces_of(row)) * tiles  # of the row, in the block's tiles
            live = pl.cdiv(length, LANES)

            @pl.when(live * LANES > length)
            def _():
                part = self.of_block("latent", step, (begin + live - 1) * groups, groups)
                held = part[...]
                group, of_group = (lax.broadcasted_iota(jnp.int32, held.shape, i) for i in (0, 1))
                slot = (live - 1) * LANES + group * _TILE + of_group
                part[...] = jnp.where(slot < length, held, jnp.zeros_like(held))

            self.clear_tiles(step, number * tiles, number * tiles - begin - live)
            return number

        ends = jnp.minimum(following.row, self.batch)
        lax.fori_loop(start.row, ends, each, jnp.int32(first))

    def clear_tiles(self, step, end, dead, done=0):
        """Zeros in the last `dead` tiles of 128 latents, at most a piece, before tile `end`."""

        def clear():
            groups = LANES // _TILE
            _clear(self.of_block("latent", step, (end - 1 - done) * groups, groups))
            if (done + 1) * LANES < self.plan.piece:
                self.clear_tiles(step, end, dead, done + 1)

        pl.when(dead > done)(clear)

    # The first block comes in two parts, the smaller first, so that its scores begin early. The
    # first part's copies signal the semaphore of the ring's last block, whose own start after that.

    def parts(self):
        """(first piece, the one after the last, semaphore) of each part."""
        cut = self.pieces * 3 // 8 or self.pieces // 2
        last = (cut, self.pieces, 0)
        return [(0, cut, self.plan.ring - 1), last] if cut else [last]

    def copy_first(self):
        """Starts the copies of the first block.

        Returns `_copied` of each part, where each begins, and where the next block does.
        """

        def whole():
            copied, places = [], []
            for first, end, semaphore in self.parts():
                places.append(_Place(self.first.row, self.first.piece + first))
                slots = (end - first) * self.plan.piece
                self.copy_keys(("latent",), places[-1], 0, first, slots, semaphore)
                if first == 0:
                    self.copy_queries(self.first.row, semaphore)
                copied.append(_copied(slots, 0, jnp.int32(first == 0)))
            # At once: to libtpu's linter, a part of it would leave the rest unset.
            self.copy_keys(self.keys[1:], self.first, 0, 0, self.plan.block, 0)
            copied[-1] += _copied(0, self.plan.block, 0)
            return copied, [*places, self.following(self.first, self.pieces)]

        def mixed():
            copied, places = [], [self.first]
            for first, end, semaphore in self.parts():
                state = jnp.int32(0), places[-1], jnp.int32(first)
                part, following = self.copy_rest(jnp.int32(0), end, semaphore, state)
                copied.append(part)
                places.append(following)
            return copied, places

        return lax.cond(self.whole(self.first), whole, mixed)

    def wait_first(self, copied, places, whole, piece):
        """Waits for the part of the first block that begins with a piece, if one does."""
        for i, (first, _, semaphore) in enumerate(self.parts()):
            if first == piece:
                self.wait_block(0, copied[i], semaphore)
                if not whole:
                    self.clear_ends(0, places[i], places[i + 1], first)

    # The score half of a step.

    def score(self, step, start, whole, arrive=None):
        """Scores of a block, and the running maximum of its rows; arrive(piece) before a part."""
        at, slot = self.at, self.slot(step)
        top = at["top"][(step + 1) & 1, self.pieces - 1]
        for first, end, place in self.units(start, whole):
            parts, scores = [(first, end)], []
            if arrive and whole:
                parts = [(piece, end) for piece, end, _ in self.parts()]
            for part in parts:
                if arrive:
                    arrive(part[0])
                pattern = _rows(at["pattern"][self.held(place.row)])
                latent = self.latents(slot, *part)
                scores.append(self.dot(pattern, latent, (((1,), (1,)), ((), ()))))
            scores = jnp.concatenate(scores, axis=1)
            if "k_rope" in self.keys:
                q_rope = _rows(at["q_rope"][self.held(place.row)])
                tiles = range(*(n * self.plan.piece // LANES for n in (first, end)))
                k_rope = [_rows(at["k_rope"][slot, :, tile]) for tile in tiles]
                k_rope = jnp.concatenate(k_rope, axis=1)
                scores += self.dot(q_rope, k_rope, (((1,), (0,)), ((), ())))
            scores = scores * self.sizes.scale
            if not whole:
                scores = self.masked(place, scores)
            last = jnp.where(self.opens(step, first, place), _MASKED, top)
            top = jnp.maximum(last, scores.max(-1, keepdims=True))
            at["scores"][:, self.slots(first, end)] = scores
            at["top"][step & 1, end - 1] = top
            at["fade"][end - 1] = jnp.exp2(last - top)

    def latents(self, slot, first, end):
        """[slots R] of a block from a piece to another."""
        tiles = slice(*(n * self.plan.piece // _TILE for n in (first, end)))
        return _rows(self.at["latent"][slot, tiles])

    def masked(self, place, scores):
        """Scores of a piece, `_MASKED` where a query does not see the slot."""
        limits = [limit - place.piece * self.plan.piece for limit in self.limits(place.row)]
        token = lax.broadcasted_iota(jnp.int32, scores.shape, 0) // self.sizes.heads
        limit = functools.reduce(
            lambda rest, t: jnp.where(token >= t, limits[t], rest),
            range(1, self.sizes.tokens),
            limits[0],
        )
        where = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(where < limit, scores, _MASKED)

    # The mix half of a step.

    def weigh(self, step, start, whole):
        """Weights of a block from its scores, summed in `total` (by lane); what `mix` needs."""
        at, weighed = self.at, []
        total = at["total"][self.pieces - 1]
        for first, end, place in self.units(start, whole):
            top, fade = at["top"][step & 1, end - 1], at["fade"][end - 1]
            scores = at["scores"][:, self.slots(first, end)]
            weights = jnp.exp2(scores - _repeat(top, scores.shape[1]))
            parts = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
            opens = self.opens(step, first, place)
            total = jnp.where(opens, 0.0, total * fade) + functools.reduce(jnp.add, parts)
            at["total"][end - 1], at["peak"][end - 1] = total, top
            weighed.append((first, end, opens, weights.astype(at["latent"].dtype), fade))
        return weighed

    def mix(self, step, weighed, results):
        """Sums a block's latents by their weights in `mixed`; with the results after each piece."""
        at, slot, mixed = self.at, self.slot(step), self.at["mixed"][self.pieces - 1]
        for first, end, opens, weights, fade in weighed:
            new = self.dot(weights, self.latents(slot, first, end), (((1,), (0,)), ((), ())))
            mixed = new + jnp.where(opens, 0.0, mixed) * _repeat(fade, self.rank)
            at["mixed"][end - 1] = mixed
            if results:
                self.result(step, end - 1)

    def normalized(self, number):
        """(out [M R] float32, lse by lane [groups 128]) of a row that ends with a piece."""
        top = self.at["peak"][number]
        total = jnp.broadcast_to(self.at["total"][number].sum(-1, keepdims=True), top.shape)
        some = top > _MASKED / 2
        share = jnp.where(some, 1 / total, 0.0)
        out = self.at["mixed"][number] * _repeat(share, self.rank)
        lse = jnp.where(some, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
        groups = []
        for i in range(0, self.rows, LANES):
            part = lse[i : i + LANES]
            diagonal = lax.broadcasted_iota(jnp.int32, part.shape, 0) == lax.broadcasted_iota(
                jnp.int32, part.shape, 1
            )
            groups.append(jnp.where(diagonal, part, 0.0).sum(0, keepdims=True))
        return out, jnp.concatenate(groups)

    def result(self, step, number):
        """Puts the result of a row that ends with a piece where `store` takes it from."""
        at, slot = self.at, step & 1
        out, lse = self.normalized(number)
        at["out"][slot, number] = out.astype(at["out"].dtype).reshape(-1, _TILE, self.rank)
        at["lse"][slot, number] = lse

    def store(self, step, row, number):
        """Starts the copies of a row's result; stores it if it is but a part."""

        def go():
            for name in ("out", "lse"):
                source = self.at[name].at[step & 1, number]
                pltpu.make_async_copy(source, self.hbm[name].at[row], self.at["stored"]).start()

        if self.plan.cores == 1:
            go()
        else:
            lax.cond(row < self.own, lambda: self.store_part(number), go)

    def store_part(self, number):
        """Stores this core's part of a row that two cores share."""
        for name, value in zip(("part", "part_lse"), self.normalized(number), strict=True):
            self.at[name][...] = value
            pltpu.sync_copy(self.at[name], self.hbm[name].at[self.core])

    def finish(self, step, start, following, whole, results=False):
        """Stores the results of the rows that end in a block; returns how many copies that takes.

        Those of a block that is not whole are there; of one that is, results says so.
        """
        ends = jnp.minimum(following.row, self.batch)

        @pl.when(whole & (following.row > start.row))
        def _():
            if not results:
                self.result(step, self.pieces - 1)
            self.store(step, start.row, self.pieces - 1)

        def each(row, number):
            number += self.left(_Place(row, jnp.where(row == start.row, start.piece, 0)))
            self.store(step, row, number - 1)
            return number

        @pl.when(~whole)
        def _():
            lax.fori_loop(start.row, ends, each, jnp.int32(0))

        return ends - (start.row if self.plan.cores == 1 else jnp.maximum(start.row, self.own))

    def wait_stored(self, copies):
        @pl.when(copies > 0)
        def _():
            for name in ("out", "lse"):
                stored = self.at[name].at[0, pl.ds(0, copies)]
                pltpu.make_async_copy(stored, stored, self.at["stored"]).wait()

    def run(self):
        self.count, self.first = self.share()
        self.own = self.first.row + (self.first.piece > 0)  # first row that began on this core
        pl.when(self.count > 0)(self.walk)

    def unpoison(self):
        """A store for libtpu's linter, into the buffer that nothing is copied to yet.

        To it, copies of a size that is known only at run time set nothing. After one store to a
        place that it cannot work out (it follows scalars; this place comes from a vector) it
        objects to none of what they bring. Found by trial.
        """
        lane = lax.broadcasted_iota(jnp.int32, (_TILE, LANES), 1).astype(jnp.float32)
        zero = jnp.min(lane * self.count.astype(jnp.float32)).astype(jnp.int32)
        for name in self.keys:
            _clear(self.of_block(name, zero + self.plan.ring - 1, 0, 1))

    def walk(self):
        ring, last, zero = self.plan.ring, self.count - 1, jnp.int32(0)
        parts, first = self.copy_first()
        for name in ("total", "mixed"):  # where the first row goes on from
            _clear(self.at[name].at[self.pieces - 1])
        places, copied = [self.first, first[-1]], []
        for step in range(1, ring - 1):
            count, following = self.copy_block(jnp.int32(step), places[-1])
            copied.append(count)
            places.append(following)
        self.unpoison()
        whole = self.whole(self.first)
        arrive = functools.partial(self.wait_first, parts, first)
        _either(whole, lambda w: self.score(zero, self.first, w, functools.partial(arrive, w)))
        newest = jnp.int32(ring - 1)  # now that its semaphore is free, and a place for its queries
        begun = self.uncopied(newest, places[-1])
        count, beyond = self.copy_rest(newest, self.pieces, self.slot(newest), begun)
        places, copied = [*places, beyond], [*copied, count]

        def body(j, state):
            places, copied, stores, whole = state  # from block j on, and of copies from j + 1 on
            now, after, following, *_ = places
            self.wait_block(j + 1, copied[0], self.slot(j + 1))
            wholes = whole, self.whole(after)
            pl.when(~wholes[1])(lambda: self.clear_ends(j + 1, after, following, 0))

            def both(mixed, scored):
                # Weights first: they leave the buffer of scores, and no half waits for the other.
                weighed = self.weigh(j, now, mixed)
                self.score(j + 1, after, scored)
                self.mix(j, weighed, results=not mixed)
                # Last, into the buffer that is free now: the scheduler keeps memory's order.
                return self.copy_some(j + ring, places[-1])

            begun = _either(wholes[0], lambda w: _either(wholes[1], functools.partial(both, w)))
            if self.pieces > _ROWS:
                begun = self.copy_rest(j + ring, self.pieces, self.slot(j + ring), begun)
            count, beyond, *_ = begun
            places, copied = [*places[1:], beyond], [*copied[1:], count]
            self.wait_stored(stores)
            return places, copied, self.finish(j, now, after, wholes[0]), wholes[1]

        state = (places, copied, zero, whole)
        (now, after, *_), _, stores, whole = lax.fori_loop(0, last, body, state)
        _either(whole, lambda w: self.mix(last, self.weigh(last, now, w), results=True))
        self.wait_stored(stores)
        stores = self.finish(last, now, after, whole, results=True)
        if self.plan.cores > 1:
            goes_on = (after.piece > 0) & (after.row < self.batch)
            pl.when(goes_on)(lambda: self.store_part(self.pieces - 1))
        self.wait_stored(stores)


def _either(flag, do):
    """do(True) or do(False), as a flag says at run time."""
    return lax.cond(flag, lambda: do(True), lambda: do(False))


def _clear(ref):
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _copied(latents, keys, rows):
    """What copies of so many latents, rotary keys, and rows of queries take, in one number."""
    latents, keys = pl.cdiv(latents, _UNITS["latent"]), pl.cdiv(keys, _UNITS["k_rope"])
    return latents + (keys << 16) + (rows << 24)


def _copied_of(number):
    """(units of latents, units of rotary keys, rows of queries) of the sum of some `_copied`."""
    return number & 0xFFFF, (number >> 16) & 0xFF, number >> 24


def _span(name, begin, count):
    """Index of units of slots, from one on, in what is stored of a row."""
    before = () if name == "latent" else (slice(None),)
    return (*before, pl.ds(begin, count))


def _repeat(x, width):
    """[M 128] to [M width] by whole vector registers: no data moves."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _rows(x):
    """[.. /8 8 K] to [.. K]."""
    return x.reshape(-1, x.shape[-1])


def _shaped(operands):
    """jax.ShapeDtypeStruct for results that vary over the mesh axes that some operand does."""
    manual: Any = [getattr(jax.typeof(x), "manual_axis_type", None) for x in operands]
    axes = frozenset().union(*(m.varying for m in manual if m is not None))
    if not axes:
        return jax.ShapeDtypeStruct
    return functools.partial(jax.ShapeDtypeStruct, manual_axis_type=type(manual[0])(varying=axes))
