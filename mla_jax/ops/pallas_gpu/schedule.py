"""Which part of the GPU does which slots: a ragged batch cut into equal parts, on the device.

A *step* is 128 slots (two softmax blocks) of one batch row; a *part* is one thread block per tile
of 64 query rows. Steps are numbered through the batch and every part walks a range of them, so that
one long row among short ones keeps all multiprocessors busy. The cut depends on `lengths` alone:
all layers of a decoding step share it.

Letters: B batch rows, T query tokens, N heads.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

TILE = 64  # query rows of a thread block: the M of a warpgroup's matrix product
BLOCK = 64  # slots of one softmax
STEP = 2 * BLOCK  # slots of one iteration: a block for each of the two warpgroups
SLACK = 8  # steps; see make_schedule
ROW_COST = 2  # steps that beginning and ending a batch row takes the time of


class Schedule(NamedTuple):
    """The cut. Row b owns the steps row_step[b] to row_step[b + 1].

    Attributes:
        lengths: slots in use of every row.
        row_step: where each row's steps begin.
        row_first: the first part that works on a row.
        row_parts: how many parts work on it; 1 is written directly, more are merged.
        part: of every part its first step, the step after its last, its first row, where that
            row's steps begin, that row's length, its last row, and whether it has its first and
            its last row with others: one load tells a thread block where to begin.
        arrivals: counters of the merge, zero before and after every call. The kernel counts in
            place, so a schedule serves one call at a time, as a device's kernels run.
    """

    lengths: Int[Array, "B"]
    row_step: Int[Array, "B+1"]
    row_first: Int[Array, "B"]
    row_parts: Int[Array, "B"]
    part: Int[Array, "parts 8"]
    arrivals: Int[Array, "B*tiles"]


def make_schedule(
    lengths: Int[Array, "B"], *, rows: int, slots: int, num_sms: int, slack: int = SLACK
) -> Schedule:
    """Cuts a batch into equal parts: a few fused comparisons and sums, no sort, no scatter.

    Two cuts are weighed. One takes the batch for a line, on which every row costs its steps and
    ROW_COST more, and divides it equally. The other gives every part as many whole rows, or every
    row as many parts: parts then begin and end with a row, and fewer pieces are merged.

    Args:
        lengths: slots in use of every batch row.
        rows: T N, query rows of one batch row.
        slots: S, the most a length can be.
        num_sms: multiprocessors of the device; thread blocks wait for each other in the merge, so
            all must run at once.
        slack: steps by which the longest part of the second cut may exceed the first's: splitting
            a row costs about as much, for writing and merging its parts.
    """
    batch = lengths.shape[0]
    tiles = -(-rows // TILE)
    parts = max(1, num_sms // tiles)
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, slots)
    # An empty row has a step too: somebody must write its zeros.
    steps = jnp.maximum(1, lax.div(lengths + (STEP - 1), jnp.int32(STEP)))
    b, p = np.arange(batch, dtype=np.int32), np.arange(parts + 1, dtype=np.int32)
    earlier = b[None] < np.arange(batch + 1)[:, None]
    row_step = jnp.sum(jnp.where(earlier, steps[None], 0), axis=1, dtype=jnp.int32)
    starts, ends, longest = row_step[:-1], row_step[1:], steps.max()

    cost = starts + ROW_COST * b
    each = lax.div(row_step[batch] + (ROW_COST * batch + parts - 1), jnp.int32(parts))
    if batch <= parts:
        per_row = parts // batch
        size = lax.div(steps + (per_row - 1), jnp.int32(per_row))
        at, first_at, most = p, per_row * b, lax.div(longest + (per_row - 1), jnp.int32(per_row))
    else:
        per_part = -(-batch // parts)
        size, at, first_at = steps, per_part * p, b
        most = per_part * (longest + ROW_COST) - ROW_COST
    even = most <= each + slack
    # Where part p begins: at the furthest that any row not after it reaches by then.
    at = jnp.where(even, at, p * each)[None]
    first_at = jnp.where(even, first_at, cost)[:, None]
    per_at, free = jnp.where(even, size, 1)[:, None], jnp.where(even, 0, ROW_COST)
    reached = starts[:, None] + jnp.maximum(0, at - first_at - free) * per_at
    reached = jnp.minimum(reached, ends[:, None])
    part_step = jnp.max(jnp.where(first_at <= at, reached, 0), axis=0)
    begin, end = part_step[:-1], part_step[1:]

    def row_of(step):  # as many rows end at or before it
        before = jnp.sum(ends[None] <= step[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(before, batch - 1)

    here, there = row_of(begin), row_of(end - 1)
    here_step, there_step = starts[here], starts[there]
    part = [
        begin, end, here, here_step, lengths[here], there,
        (here_step < begin) | (ends[here] > end), (there_step < begin) | (ends[there] > end),
    ]  # fmt: skip
    before = end[None] <= starts[:, None]
    touching = (begin[None] < ends[:, None]) & ~before
    # Zeros that no compiler can fold: as a literal they would be filled anew before every call.
    zero = jnp.where(lengths < 0, 1, 0)
    return Schedule(
        lengths=lengths,
        row_step=row_step,
        row_first=jnp.sum(before, axis=1, dtype=jnp.int32),
        row_parts=jnp.sum(touching, axis=1, dtype=jnp.int32),
        part=jnp.stack([x.astype(jnp.int32) for x in part], axis=1),
        arrivals=jnp.broadcast_to(zero[:, None], (batch, tiles)).reshape(-1),
    )
