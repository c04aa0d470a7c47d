"""Stripes: where a row's slots lie when the slots of a cache are split over devices.

A row's slots go round the n devices in blocks of 128, and row b begins on device b mod n: slot s
lies on device (s // 128 + b) mod n, in its block s // 128 // n. So rows of any length keep all
devices busy, and what a query may see of a device's slots is a first part of them, as without a
mesh.

Letters: B rows, T tokens or queries, L slots of one device.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mla_jax import sharding

STRIPE = 128  # slots, as of a page


def step(rules: sharding.Rules | None) -> int:
    """The number of which a row's slots must be a multiple: 1 where no mesh in use splits them.

    >>> step(None)
    1
    """
    mesh = sharding.in_use()
    if rules is None or mesh is None:
        return 1
    axes: Any = rules.S
    parts = sharding.count(mesh, axes)
    return STRIPE * parts if parts > 1 else 1


@dataclasses.dataclass(frozen=True)
class Stripes:
    """What one of the devices that share rows' slots has of them.

    Attributes:
        rows: the rows' numbers in the whole cache.
        device: which of these devices it is.
        count: n, how many they are.

    >>> first, second = (Stripes(jnp.array([0]), device, 2) for device in range(2))
    >>> first.place(jnp.array([[0, 127, 128, 256]]), size=256).tolist()  # 384: dropped
    [[0, 127, 384, 128]]
    >>> limits = jnp.array([[0, 100, 128, 200, 300]])
    >>> first.seen(limits).tolist(), second.seen(limits).tolist()
    ([[0, 100, 128, 128, 172]], [[0, 0, 0, 72, 128]])
    >>> second.slots(256)[0, jnp.array([0, 127, 128])].tolist()
    [128, 255, 384]
    """

    rows: Int[Array, "B"]
    device: Any
    count: int

    @classmethod
    def here(cls, rows: sharding.Axes, slots: sharding.Axes, batch: int) -> "Stripes":
        """Those of the device that runs an island, which has `batch` rows of each group's.

        Args:
            rows, slots: the mesh axes over which the cache's are split.
            batch: rows of this device.
        """
        own = jnp.arange(batch, dtype=jnp.int32)
        if rows:
            own += lax.axis_index(rows) * batch
        return cls(own, lax.axis_index(slots), lax.axis_size(slots))

    def place(self, slots: Int[Array, "B T"], size: int) -> Int[Array, "B T"]:
        """Where the device has these slots, of `size` in all.

        A slot of another device becomes one at `size` or beyond, where a write is dropped; no two
        of them become the same.
        """
        block = slots // STRIPE
        local = block // self.count * STRIPE + slots % STRIPE
        here = ((block + self.rows[:, None]) % self.count == self.device) & (local < size)
        return jnp.where(here, local, size + slots)

    def seen(self, limits: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """How many of the device's slots lie below limits; those come first."""
        first, (whole, rest) = self._first(), (limits // STRIPE, limits % STRIPE)
        blocks = jnp.maximum(whole - first + self.count - 1, 0) // self.count
        return blocks * STRIPE + jnp.where((whole - first) % self.count == 0, rest, 0)

    def slots(self, size: int) -> Int[Array, "B L"]:
        """What the rows call the device's `size` slots."""
        local = jnp.arange(size, dtype=jnp.int32)[None]
        block = local // STRIPE * self.count + self._first()
        return block * STRIPE + local % STRIPE

    def _first(self):
        """The first block of every row that the device has, [B 1]."""
        return ((self.device - self.rows) % self.count)[:, None]
