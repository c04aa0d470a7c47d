"""Which part of the GPU does which slots: a ragged batch cut into equal parts, on the device.

A *step* is here 128 slots (two softmax blocks) of one batch row, not a step of decoding. Steps are
numbered through the batch, and a *part* is a range of them, so that one long row among short ones
keeps all multiprocessors busy. One thread block works on a part for each tile of 64 query rows. The
cut depends on `lengths` alone: all layers of one pass of the model share it.

Letters: B batch rows, T query tokens, N heads.
"""

import enum
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

TILE = 64  # query rows of a thread block: the M of a warpgroup's matrix product
# Query rows of a batch row up to which latents of (512, 64) have kernels of their own.
FEW_ROWS = 16
BLOCK = 64  # slots of one softmax
STEP = 2 * BLOCK  # slots of one iteration: a block for each of the two warpgroups
SLACK = 8  # steps: the default of `make_schedule`, which says what it means
ROW_COST = 2  # steps that take as long as to begin and to end a batch row


class Column(enum.IntEnum):
    """The columns of `Schedule.part`: what a thread block must know of its part to begin."""

    FIRST_STEP = 0
    END_STEP = 1  # the step after the part's last
    FIRST_ROW = 2
    FIRST_ROW_STEP = 3  # where the steps of the first row begin, maybe in an earlier part
    FIRST_ROW_LENGTH = 4
    LAST_ROW = 5
    LAST_ROW_SHARED = 6  # 1 where other parts work on the last row too


class Schedule(NamedTuple):
    """The cut. Row b owns the steps row_step[b] to row_step[b + 1].

    Attributes:
        lengths: slots in use of every row.
        row_step: where each row's steps begin.
        row_parts: the first and the last part that work on a row. If they are one part, it writes
            the row; if they are not, those that end with the row merge it: all but the last, where
            that goes on with another row.
        part: one row of `Column` values for every part, which lie side by side so that they come
            from one line of memory.
        arrivals: counters of the merge, zero before and after every call. The kernel counts in
            place, so a schedule serves one call at a time, as a device runs its kernels.
    """

    lengths: Int[Array, "B"]
    row_step: Int[Array, "edges"]
    row_parts: Int[Array, "2 B"]
    part: Int[Array, "parts 7"]
    arrivals: Int[Array, "counters"]


def make_schedule(
    lengths: Int[Array, "B"], *, rows: int, slots: int, num_sms: int, slack: int = SLACK
) -> Schedule:
    """Cuts a batch into equal parts, by a few fused comparisons and sums without sort or scatter.

    It weighs two cuts. The first takes the batch for a line, on which every row costs its steps and
    ROW_COST more, and divides the line equally. The second gives every part equally many whole
    rows, or every row equally many parts: parts then begin and end with a row, and fewer pieces
    are merged.

    Args:
        lengths: slots in use of every batch row.
        rows: T N, query rows of one batch row.
        slots: S, the most that a length can be.
        num_sms: multiprocessors of the device. Thread blocks wait for each other in the merge, so
            all of them must run at once.
        slack: steps by which the longest part of the second cut may exceed the first's; to write
            and to merge the parts of a split row takes about as long.
    """
    batch = lengths.shape[0]
    tiles = -(-rows // TILE)
    parts = max(1, num_sms // tiles)
    lengths = jnp.clip(lengths.astype(jnp.int32), 0, slots)
    # An empty row has a step too, because some part must write its zeros.
    steps = jnp.maximum(1, lax.div(lengths + (STEP - 1), jnp.int32(STEP)))
    b, p = (jnp.arange(n, dtype=jnp.int32) for n in (batch, parts + 1))
    earlier = np.tri(batch + 1, batch, -1, bool)
    row_step = jnp.sum(jnp.where(earlier, steps[None], 0), axis=1, dtype=jnp.int32)
    starts, ends, longest = row_step[:-1], row_step[1:], steps.max()
    cost = starts + ROW_COST * (b + 1)  # before a row's steps
    each = lax.div(row_step[batch] + (ROW_COST * batch + parts - 1), jnp.int32(parts))
    if batch <= parts:
        per_row = parts // batch
        size = lax.div(steps + (per_row - 1), jnp.int32(per_row))
        at, first_at, most = p, per_row * b, lax.div(longest + (per_row - 1), jnp.int32(per_row))
        first, last = first_at, first_at + lax.div(steps - 1, size)
    else:
        per_part = -(-batch // parts)
        size, at, first_at = steps, per_part * p, b
        most = per_part * (longest + ROW_COST) - ROW_COST
        first = last = b // per_part
    even = most <= each + slack
    line = lax.div(cost, each), lax.div(cost + steps - 1, each)
    row_parts = jnp.where(even, jnp.stack([first, last]), jnp.stack(line))
    # Part p begins in the first row that the parts before it do not complete, after the steps of
    # that row that they take.
    begun, over = jnp.sum(row_parts[:, :, None] < p[None, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(over, batch - 1)
    done = jnp.where(even, (at - first_at[row]) * size[row], p * each - cost[row])
    step = row_step[row] + jnp.clip(done, 0, steps[row])
    begin, end, here, there = step[:-1], step[1:], row[:-1], begun[1:] - 1
    part = {
        Column.FIRST_STEP: begin,
        Column.END_STEP: end,
        Column.FIRST_ROW: here,
        Column.FIRST_ROW_STEP: starts[here],
        Column.FIRST_ROW_LENGTH: lengths[here],
        Column.LAST_ROW: there,
        Column.LAST_ROW_SHARED: (starts[there] < begin) | (ends[there] > end),
    }
    # No compiler can fold these zeros; a literal would be filled anew before every call.
    zero = jnp.where(lengths < 0, 1, 0)
    return Schedule(
        lengths=lengths,
        row_step=row_step,
        row_parts=row_parts,
        part=jnp.stack([part[column].astype(jnp.int32) for column in Column], axis=1),
        arrivals=jnp.broadcast_to(zero[:, None], (batch, tiles)).reshape(-1),
    )


def equal_rows(count: int, steps: int, *, rows: int, num_sms: int, slack: int = SLACK) -> Schedule:
    """The cut of `count` batch rows of equally many steps, in numpy: it costs no time on a device.

    As `make_schedule`, which weighs the same two cuts: parts of equal length that begin anywhere,
    or parts that begin and end with a row. `arrivals` is left to the caller, who must not hand a
    constant to a kernel that counts in place.

    Args:
        count: batch rows.
        steps: of each of them.
        rows, num_sms, slack: as there.
    """
    tiles = -(-rows // TILE)
    parts = max(1, num_sms // tiles)
    p = np.arange(parts + 1)
    each = -(-count * (steps + ROW_COST) // parts)
    if count <= parts:
        per_row = parts // count
        size = -(-steps // per_row)
        row, done = p // per_row, np.minimum(p % per_row * size, steps)
        longest = size
    else:
        row, done = p * count // parts, np.zeros_like(p)
        longest = -(-count // parts) * (steps + ROW_COST) - ROW_COST
    if longest > each + slack:
        row, done = np.divmod(p * each, steps + ROW_COST)
        done = np.clip(done - ROW_COST, 0, steps)
    cut = np.where(row < count, row * steps + done, count * steps)
    begin, end = cut[:-1], cut[1:]
    row_step = np.arange(count + 1) * steps
    first = np.searchsorted(end, row_step[:-1], side="right")
    last = np.searchsorted(begin, row_step[1:], side="left") - 1
    here, there = np.minimum(begin // steps, count - 1), np.maximum(end - 1, 0) // steps
    part = {
        Column.FIRST_STEP: begin,
        Column.END_STEP: end,
        Column.FIRST_ROW: here,
        Column.FIRST_ROW_STEP: row_step[here],
        Column.FIRST_ROW_LENGTH: np.full_like(begin, steps * STEP),
        Column.LAST_ROW: there,
        Column.LAST_ROW_SHARED: first[there] < last[there],
    }
    fields: dict[str, Any] = {
        "lengths": np.full(count, steps * STEP),
        "row_step": row_step,
        "row_parts": np.stack([first, last]),
        "part": np.stack([part[column] for column in Column], axis=1),
        "arrivals": np.zeros(count * tiles),
    }
    return Schedule(**{name: x.astype(np.int32) for name, x in fields.items()})


def source_slot(row, slot, length, slots, total, page=None):
    """Where a block begins in the flat cache: [B S], or [G 128] where the row's slots have a page.

    Blocks past the row's length begin past the end of the cache, where a copy fills its buffer with
    zeros and reads no memory.
    """
    in_use = slot < length
    place = row * slots + slot if page is None else page * STEP + lax.rem(slot, jnp.int32(STEP))
    return jnp.where(in_use, place, total)
