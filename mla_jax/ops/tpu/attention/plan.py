"""How the attention kernels are built for a shape and a chip, and which blocks they visit.

Letters: B batch, T query tokens, S slots, N heads.
"""

import tomllib
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from mla_jax.config import configs_dir
from mla_jax.ops import blocks
from mla_jax.ops.tpu.planning import LANES

RUN = 4  # numbers of a run of blocks: first, open, close and last


class Sizes(NamedTuple):
    """Blocks of a kernel: queries and slots of a step, and queries and slots computed at once.

    Attributes:
        rows: queries of a step of the grid.
        slots: slots of a step.
        columns: queries that are computed at once; they stand in columns.
        piece: slots that are computed at once.
        vmem_bytes: limit on the scoped VMEM of the kernel.
    """

    rows: int
    slots: int
    columns: int
    piece: int
    vmem_bytes: int


class Shape(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
        batch, tokens, slots, heads: B, T, S, N, the lengths in whole blocks.
        nope, rope, value: H, P, V.
        dtype: name of the operands'.
        bounds: rows of `Plan.bounds` by name; () where every query sees itself and all before it,
            which is known when it is compiled.
        clean: whether slots that nobody sees may hold anything.
        forward, backward: blocks of the two kernels.
    """

    batch: int
    tokens: int
    slots: int
    heads: int
    nope: int
    rope: int
    value: int
    dtype: str
    bounds: tuple[str, ...]
    clean: bool
    forward: Sizes
    backward: Sizes


class Plan(NamedTuple):
    """What the kernels read beside the operands; made by `make_plan`.

    Attributes:
        queries: of each block of queries its `RUN`, for the forward kernel.
        slots: of each block of slots its `RUN` of blocks of queries, for the backward kernel.
        bounds: end, start and id of every query, those that `Shape.bounds` names; or None.
        ids: of every slot; None without segments.
    """

    queries: Int[Array, "forward"]
    slots: Int[Array, "backward"]
    bounds: Int[Array, "B bounds T"] | None
    ids: Int[Array, "B 1 S"] | None


def tuning(kind: str) -> dict[str, Any]:
    """What `configs/tuning/tpu.toml` says of a device kind, or of `other`."""
    table = tomllib.loads((configs_dir() / "tuning" / "tpu.toml").read_text(encoding="utf-8"))
    return table.get(kind, table["other"])


def make_sizes(tokens: int, slots: int, itemsize: int, kind: str) -> tuple[Sizes, Sizes]:
    """Blocks of the forward and of the backward kernel."""
    tuned = tuning(kind)
    made = []
    for name in ("forward", "backward"):
        largest = tuned[f"{name}_block"] * 2 // itemsize
        rows, cut = _block(tokens, largest), _block(slots, largest)
        columns = min(rows, tuned[f"{name}_columns"])
        piece = min(cut, tuned[f"{name}_piece"])
        made.append(Sizes(rows, cut, columns, piece, tuned["attention_vmem_mib"] << 20))
    return made[0], made[1]


def _block(length, largest):
    """The largest size of equal blocks that pads a length by no more than a quarter."""
    size = largest
    while size > LANES and 4 * padded(length, size) > 5 * padded(length, LANES):
        size //= 2
    return size


def padded(length: int, *sizes: int) -> int:
    """A length up to whole blocks."""
    return -(-length // max(sizes)) * max(sizes)


def make_plan(
    shape: Shape,
    limits: Int[Array, "B T"],
    slots: int,
    window: int | None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
) -> Plan:
    """The plan of one call.

    Args:
        shape: what the kernels are compiled for.
        limits: how many slots each query sees; may be below 0 or beyond S.
        slots: S before it was padded.
        window: a query sees only the last `window` slots below its limit.
        segment_ids: of queries and of slots.
    """
    # Rows past the last token repeat it: they are never stored, and no block is masked for them.
    wide = [(0, 0), (0, shape.tokens - limits.shape[1])]
    limits = jnp.pad(limits.astype(jnp.int32), wide, mode="edge")
    start = jnp.zeros_like(limits) if window is None else jnp.maximum(limits - window, 0)
    end = jnp.clip(limits, 0, slots)  # of a piece of the slots, limits may lie beyond
    rows, ids = {"end": end, "start": start}, None
    if segment_ids is not None:
        of_query, of_slot = (x.astype(jnp.int32) for x in segment_ids)
        rows["id"] = jnp.pad(of_query, wide, mode="edge")
        ids = jnp.pad(of_slot, [(0, 0), (0, shape.slots - slots)], mode="edge")
    live = end.max(1)

    def run(sizes, transposed=False):
        bounds = [start, end, *([rows["id"]] if ids is not None else [])]
        some, whole = blocks.visible(bounds, ids, shape.slots, sizes.rows, sizes.slots)
        if transposed:
            some, whole = some.swapaxes(1, 2), whole.swapaxes(1, 2)
        return blocks.runs(some, whole, live)[..., :RUN].reshape(-1)

    return Plan(
        queries=run(shape.forward),
        slots=run(shape.backward, transposed=True),
        bounds=jnp.stack([rows[name] for name in shape.bounds], axis=1) if shape.bounds else None,
        ids=None if ids is None else ids[:, None],
    )
