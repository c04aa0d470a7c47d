"""How the TPU kernel is built: from shapes, the tuning table and the chip."""

import dataclasses
import functools
import tomllib

from mla_jax import target
from mla_jax.config import configs_dir

LANES = 128  # slots of a tile of scores, and of a page
TILE = 8  # latents of a tile, the fewest that a copy takes


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernel is built: `make_plan` derives it from shapes, the tuning table and the chip.

    Attributes:
        block: C, slots of a block, a multiple of `piece`.
        piece: slots of a piece, a multiple of 128: a row takes whole ones.
        ring: buffers of a block in VMEM, three or more; ring - 2 are being filled during a step.
        cores: TensorCores that share the work.
        vmem_bytes: limit on the scoped VMEM of the kernel.
    """

    block: int
    piece: int
    ring: int
    cores: int
    vmem_bytes: int


@functools.cache
def _tuning() -> dict:
    return tomllib.loads((configs_dir() / "tuning" / "tpu.toml").read_text(encoding="utf-8"))


def make_plan(batch: int, queries: int, slots: int, itemsize: int, kind: str | None = None) -> Plan:
    """The plan for B rows of M queries and S slots on a device kind (None: that of the target).

    `configs/tuning/tpu.toml` has the sizes of a block and a piece for 16 and for 128 queries; with
    more, blocks shrink as M grows, so that a block's scores keep their size. A kind that is not
    there gets the table's values for `other`.
    """
    if kind is None:
        kind = target.current().kind
    table = _tuning()
    tuned = table.get(kind, table["other"])
    near = 16 if queries <= 32 else 128
    block, piece = tuned[f"block_of_{near}_queries"], tuned[f"piece_of_{near}_queries"]
    block = block * 2 // max(itemsize, 2) * LANES // max(queries, LANES)
    block = max(LANES, min(block, batch * slots) // LANES * LANES)
    piece = min(piece, block, slots)
    block -= block % piece
    ring, rows, pieces = tuned["ring"], -(-queries // 16) * 16, block // piece
    # This counts the widest R and P, whose lanes are padded in the queries. XLA keeps the limit
    # free for the kernel whether it is used or not, so it is what the buffers take and some spills.
    buffers = (ring * block + rows_held(batch, pieces, ring) * rows) * 640 * itemsize
    buffers += rows * block * 4 + pieces * rows * (512 * (4 + 2 * itemsize) + 5 * 4 * LANES)
    return Plan(block, piece, ring, tuned["cores"], buffers * 5 // 4 + 2**22)


def vmem_limit(kind: str) -> int:
    """MiB of VMEM that a core of a device kind is known to have."""
    return 60 if kind in _tuning() else 15  # a v4 core has 16


def rows_held(batch: int, pieces: int, ring: int) -> int:
    """The number of rows whose queries have a place in VMEM: a power of two."""
    rows = min(batch, (ring - 1) * pieces + 1)
    return 1 << (rows - 1).bit_length()
