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
SLACK = 2  # steps; see make_schedule


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

    Args:
        lengths: slots in use of every batch row, the T new ones included.
        rows: T N, query rows of one batch row.
        slots: S, the most a length can be.
        num_sms: multiprocessors of the device; thread blocks wait for each other in the merge, so
            all must run at once.
        slack: steps by which the longest part may exceed the balanced cut where that keeps every
            row whole: splitting a row costs about as much, for writing and merging its parts.
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
    total = row_step[batch]
    each = lax.div(total + (parts - 1), jnp.int32(parts))
    rows_each = -(-batch // parts)
    whole = rows_each * steps.max() <= each + slack
    part_step = jnp.where(
        whole, row_step[np.minimum(p * rows_each, batch)], jnp.minimum(p * each, total)
    )
    begin, end = part_step[:-1], part_step[1:]

    def row_of(step):  # as many rows end at or before it
        before = jnp.sum(row_step[None, 1:] <= step[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(before, batch - 1)

    here, there = row_of(begin), row_of(end - 1)
    here_step, there_step = row_step[here], row_step[there]
    part = [
        begin, end, here, here_step, lengths[here], there,
        (here_step < begin) | (row_step[here + 1] > end),
        (there_step < begin) | (row_step[there + 1] > end),
    ]  # fmt: skip
    first = jnp.where(whole, b // rows_each, lax.div(row_step[:-1], each))
    last = jnp.where(whole, b // rows_each, lax.div(row_step[1:] - 1, each))
    # Zeros that no compiler can fold: as a literal they would be filled anew before every call.
    zero = jnp.where(lengths < 0, 1, 0)
    return Schedule(
        lengths=lengths,
        row_step=row_step,
        row_first=first,
        row_parts=last - first + 1,
        part=jnp.stack([x.astype(jnp.int32) for x in part], axis=1),
        arrivals=jnp.broadcast_to(zero[:, None], (batch, tiles)).reshape(-1),
    )
