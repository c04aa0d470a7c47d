"""What the forward and the backward kernel share: units of a block, masks, and products.

Letters: H, P and V key, rotary and value channels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mla_jax.ops.tpu.attention.plan import RUN, Shape, Sizes

NT = (((1,), (1,)), ((), ()))  # dimension numbers of x y^T, x^T y and x y
TN = (((0,), (0,)), ((), ()))
NN = (((1,), (0,)), ((), ()))
MASKED = -1e30  # finite, so that masked minus masked is 0 and not NaN


class Unit(NamedTuple):
    """Queries and slots of a block that are computed at once; slots from `free` on need a mask."""

    column: int
    first: int
    free: int
    end: int


def units(sizes: Sizes, kind: str) -> list[Unit]:
    """Of a block that is "whole", "masked", or the "diagonal" of causal self-attention."""
    made = []
    for column in range(0, sizes.rows, sizes.columns):
        stop = sizes.slots
        if kind == "diagonal":
            stop = min(stop, column + sizes.columns)
        free = {"whole": stop, "masked": 0, "diagonal": column}[kind]
        for first in range(0, stop, sizes.piece):
            end = min(first + sizes.piece, stop)
            made.append(Unit(column, first, min(max(free, first), end), end))
    return made


def run_of(known: Any, table, count: int, row, block):
    """First, open, close and last of a block."""
    if known is not None:
        return known(row, block)
    at = RUN * (row * count + block)
    return tuple(table[at + n] for n in range(RUN))


def within(run, index):
    """The block to copy for step `index`: the nearest of a run, so that no other is copied."""
    first, _, _, last = run
    return jnp.maximum(jnp.clip(index, first, last - 1), 0)


def visit(shape: Shape, run, index, attend):
    """attend(kind) for block `index` of the other side, if a run has it."""
    first, opened, closed, last = run
    met, whole = (index >= first) & (index < last), (index >= opened) & (index < closed)
    pl.when(met & whole)(lambda: attend("whole"))
    pl.when(met & ~whole)(lambda: attend("masked" if shape.bounds else "diagonal"))


def joined(parts: Sequence[Any]):
    """The parts of a query or of a key side by side, without moving data."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def product(dtype: str):
    """Products that accumulate in float32, exact where the operands are float32."""
    exact = lax.Precision.HIGHEST if dtype == "float32" else None
    return functools.partial(lax.dot_general, preferred_element_type=jnp.float32, precision=exact)


def masked(of, shape: Shape, scores, unit: Unit, begin, diagonal: bool):
    """Scores [slots queries], from slot unit.free of the block on, where seen; else MASKED.

    `begin` is the first slot of the block.
    """
    slot = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    if diagonal:
        query = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(slot + (unit.free - unit.column) <= query, scores, MASKED)
    columns = pl.ds(unit.column, scores.shape[1])
    first = begin + unit.free
    row = lambda name: of["bounds"][pl.ds(shape.bounds.index(name), 1), columns]  # noqa: E731
    seen = slot < row("end") - first
    if "start" in shape.bounds:
        seen &= slot >= row("start") - first
    if "id" in shape.bounds:
        ids = of["ids"][:, unit.free : unit.end]
        seen &= jnp.broadcast_to(ids, (8, ids.shape[1])).T[:, :1] == row("id")
    return jnp.where(seen, scores, MASKED)


def cleaned(x, scores):
    """A unit's slots with zeros in those that none of its queries sees, which may hold anything.

    Weights of such slots are 0, and 0 x NaN is NaN.
    """
    some = scores.max(axis=1, keepdims=True) > MASKED / 2
    return jnp.where(some, x, jnp.zeros_like(x))
