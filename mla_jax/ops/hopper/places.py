"""Where the steps of a part lie, one after the other: for kernels that walk block by block.

Letters: B batch, S cache slots.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from mla_jax.ops.hopper.kernel import Part
from mla_jax.ops.hopper.schedule import BLOCK, STEP, Column


class Place(NamedTuple):
    """A step of the walk."""

    row: Any
    number: Any  # of the batch row's steps
    end: Any  # the step after the row's last
    length: Any  # of the row; 0 past the part's last step
    page: Any


class WalkingPart(Part):
    """A thread block that knows the place of its next step, in this row or in the next."""

    end_row: Any

    def first_place(self) -> Place:
        """The place of the part's first step."""
        # Under shard_map a loaded number varies over the mesh's axes and a computed one does not;
        # loops carry computed ones.
        of_part = lambda column: self.parts[self.part, column] + 0  # noqa: E731
        row, begin = of_part(Column.FIRST_ROW), of_part(Column.FIRST_ROW_STEP)
        length, self.end_row = of_part(Column.FIRST_ROW_LENGTH), of_part(Column.LAST_ROW)
        number = self.first_step - begin
        end = self.row_step[row + 1] + 0
        return Place(row, number, end, length, self.page(row, number * STEP))

    def place_after(self, g, place: Place) -> Place:
        """The place of step g + 1, after that of step g."""
        over = g + 1 >= place.end
        row = jnp.where(over, jnp.minimum(place.row + 1, self.end_row), place.row)
        number = jnp.where(over, 0, place.number + 1)
        length = jnp.where(g + 1 < self.end_step, self.lengths[row], 0)
        end = self.row_step[row + 1] + 0
        return Place(row, number, end, length, self.page(row, number * STEP))

    def extent(self, place: Place, block):
        """Where a block begins in the flat cache, and how many of its slots are in use."""
        row, number, _, length, page = place
        slot = number * STEP
        start = row * self.shape.slots + slot if page is None else page * STEP
        return start + block * BLOCK, length - slot - block * BLOCK
