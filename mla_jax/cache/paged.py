"""Pages: rows share one pool of pages of 128 slots, and a table says which pages a row has.

A pool is an ordinary `Dense` store whose rows are pages. `Paged` is the address map over it: what a
row calls slot s lies at slot s mod 128 of page table[row, s // 128]. The table exists once for all
layers, with the list of free pages and how many rows use each page; all of them are arrays, so that
a loop inside jit can take pages and give them back.

A page that several rows share is full, and nobody writes to it: `fork` and `truncate` copy the one
partly filled page, so that a write never has to.

Letters: B batch rows, M pages that a row may have, G pages of the pool, S = 128 M slots of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mla_jax.cache import narrow
from mla_jax.cache.dense import Dense

PAGE = 128  # slots: a step of the Hopper kernel, a lane of a TPU, the stripe of meshes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Paged:
    """The address map over a pool: to layers and attention it is a store of B rows.

    Attributes:
        pool: `Dense` whose rows are the G pages of 128 slots.
        table: int32 [B M], the page of every 128 slots of a row; G where the row has none.

    >>> pool = Dense({"latent": jnp.zeros((3, 128, 4))})
    >>> store = Paged(pool, jnp.array([[2], [0]]))
    >>> store = store.write(jnp.array([[5], [127]]), latent=jnp.ones((2, 1, 4)))
    >>> store.pool.latent[2, 5, 0], store.pool.latent[0, 127, 0]
    (Array(1., dtype=float32), Array(1., dtype=float32))
    """

    pool: Dense
    table: Int[Array, "B M"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.__dict__.get("pool", Dense({})).arrays:
            raise AttributeError(f"this store has no {name!r}.")
        return getattr(self.pool, name)

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.table.shape[0]

    @property
    def slots(self) -> int:
        """S, the slots that a row may have."""
        return self.table.shape[1] * PAGE

    @property
    def letters(self) -> Self:
        """As `Dense.letters`; pages are split by nothing."""
        pool = jax.tree.map(lambda _: "G", self.pool)
        return dataclasses.replace(self, pool=pool, table="BM")

    @property
    def encoding(self) -> str | None:
        """As `Dense.encoding`."""
        return self.pool.encoding

    def encode(self, new: dict[str, Array]) -> dict[str, Array]:
        """As `Dense.encode`."""
        return self.pool.encode(new)

    def decode(self, held: dict[str, Array]) -> dict[str, Array]:
        """As `Dense.decode`."""
        return self.pool.decode(held)

    def write(self, at: Int[Array, "B T"], **new: Array) -> Self:
        """As `Dense.write`; what goes to a page that the row does not have is dropped, too."""
        # Every token is a row of its own to the pool, which sees pages as rows.
        self.pool.check(at, new)
        return self.put(at, self.encode(new))

    def put(self, at: Int[Array, "B T"], held: dict[str, Array]) -> Self:
        """As `Dense.put`."""
        page, slot = self._split(at)

        def put(array, fresh):
            if narrow.serves(array, at):
                return narrow.write(array, fresh, at, self._place)
            return jax.lax.optimization_barrier(array.at[page, slot].set(fresh, mode="drop"))

        arrays = {name: put(array, held[name]) for name, array in self.pool.arrays.items()}
        return dataclasses.replace(self, pool=dataclasses.replace(self.pool, arrays=arrays))

    def block(
        self, start: Int[Array, ""] | int, size: int, *, pages: bool = False
    ) -> dict[str, Array]:
        """As `Dense.block`: slots start to start + size of every row, gathered."""
        return self.decode(self.cut(start, size, pages=pages))

    def cut(
        self, start: Int[Array, ""] | int, size: int, *, pages: bool = False
    ) -> dict[str, Array]:
        """As `Dense.cut`."""
        pages = pages or (isinstance(start, int) and start % PAGE == 0)
        if pages and size % PAGE == 0:
            table = jax.lax.dynamic_slice_in_dim(self.table, start // PAGE, size // PAGE, axis=1)
            parts = {name: held.at[table] for name, held in self.pool.arrays.items()}
            whole = (table.shape[0], size)
            return {
                name: part.get(mode="clip").reshape(*whole, *self.pool.arrays[name].shape[2:])
                for name, part in parts.items()
            }
        slots = start + jnp.arange(size, dtype=jnp.int32)[None]
        return self._gather(jnp.broadcast_to(slots, (self.batch_size, size)))

    def at(self, slots: Int[Array, "B K"]) -> dict[str, Array]:
        """As `Dense.at`."""
        return self.decode(self._gather(slots))

    def _gather(self, slots):
        place = self._split(slots)
        return {name: held.at[place].get(mode="clip") for name, held in self.pool.arrays.items()}

    def _place(self, row, slot):
        page = self.table.at[row, slot // PAGE].get(mode="fill", fill_value=self.pool.batch_size)
        return page, slot % PAGE, page < self.pool.batch_size

    def _split(self, slots):
        """Page and slot within it; page G where the row has no such slot."""
        return self._place(jnp.arange(self.batch_size, dtype=jnp.int32)[:, None], slots)[:2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Which pages rows have, which are free, and by how many rows each is used.

    Attributes:
        table: int32 [B M]: see `Paged`.
        free: int32 [G], a stack: its first `available` entries are the free pages.
        available: int32 [], how many pages are free.
        uses: int32 [G], rows that have each page.

    >>> pages = Pages.init(batch_size=2, per_row=2, count=3)
    >>> pages, held = pages.grow(jnp.array([2, 2]))  # the last row gets one page instead of two
    >>> held, pages.available
    (Array([2, 1], dtype=int32), Array(0, dtype=int32))
    """

    table: Int[Array, "B M"]
    free: Int[Array, "G"]
    available: Int[Array, ""]
    uses: Int[Array, "G"]

    @classmethod
    def init(cls, batch_size: int, per_row: int, count: int) -> "Pages":
        """All `count` pages free, rows without any; `per_row` is M."""
        return cls(
            table=jnp.full((batch_size, per_row), count, jnp.int32),
            free=jnp.arange(count - 1, -1, -1, dtype=jnp.int32),
            available=jnp.int32(count),
            uses=jnp.zeros((count,), jnp.int32),
        )

    @property
    def count(self) -> int:
        """G, pages of the pool."""
        return self.uses.shape[0]

    def held(self) -> Int[Array, "B"]:
        """How many pages each row has."""
        return (self.table < self.count).sum(1, dtype=jnp.int32)

    def grow(self, wanted: Int[Array, "B"]) -> tuple["Pages", Int[Array, "B"]]:
        """Gives rows pages until they have `wanted`, the first rows first, while there are any.

        Returns:
            the pages, and how many each row has now.
        """
        held = self.held()
        needed = jnp.clip(wanted - held, 0, self.table.shape[1] - held)
        before = jnp.cumsum(needed) - needed
        given = jnp.clip(self.available - before, 0, needed)
        index = jnp.arange(self.table.shape[1], dtype=jnp.int32)[None]
        nth = index - held[:, None]  # of the row's new pages
        fresh = (nth >= 0) & (nth < given[:, None])
        from_top = self.available - 1 - (before[:, None] + nth)
        taken = self.free.at[jnp.where(fresh, from_top, 0)].get(mode="clip")
        table = jnp.where(fresh, taken, self.table)
        uses = self.uses.at[jnp.where(fresh, taken, self.count)].add(1, mode="drop")
        left = self.available - given.sum(dtype=jnp.int32)
        return dataclasses.replace(self, table=table, uses=uses, available=left), held + given

    def shrink(self, kept: Int[Array, "B"]) -> "Pages":
        """Takes from rows the pages past their first `kept`; what no row has then is free."""
        index = jnp.arange(self.table.shape[1], dtype=jnp.int32)[None]
        dropped = (index >= kept[:, None]) & (self.table < self.count)
        return self._release(dropped, jnp.where(dropped, self.count, self.table))

    def _release(self, dropped: Bool[Array, "B M"], table: Int[Array, "B M"]) -> "Pages":
        gone = jnp.where(dropped, self.table, self.count)
        uses = self.uses.at[gone].add(-1, mode="drop")
        freed = (uses == 0) & (self.uses > 0)
        place = self.available + jnp.cumsum(freed, dtype=jnp.int32) - 1
        place = jnp.where(freed, place, self.count)
        pages = jnp.arange(self.count, dtype=jnp.int32)
        free = self.free.at[place].set(pages, mode="drop")
        left = self.available + freed.sum(dtype=jnp.int32)
        return dataclasses.replace(self, table=table, uses=uses, free=free, available=left)

    def share(
        self, source: Int[Array, ""], rows: Bool[Array, "B"], full: Int[Array, ""]
    ) -> "Pages":
        """Gives `rows`, which have none, the first `full` pages of row `source`."""
        index = jnp.arange(self.table.shape[1], dtype=jnp.int32)[None]
        given = rows[:, None] & (index < full)
        table = jnp.where(given, self.table[source][None], self.table)
        uses = self.uses.at[jnp.where(given, table, self.count)].add(1, mode="drop")
        return dataclasses.replace(self, table=table, uses=uses)

    def own(
        self, lengths: Int[Array, "B"], stores: tuple[Dense, ...]
    ) -> tuple["Pages", tuple[Dense, ...], Bool[Array, "B"]]:
        """Gives rows a copy of their own of the partly filled page that they share with others.

        Args:
            lengths: tokens that the rows hold.
            stores: of all layers, whose pages are copied.

        Returns:
            pages and stores, and the rows for which no page was free: these still share theirs.
        """
        last = jnp.minimum(lengths // PAGE, self.table.shape[1] - 1)
        row = jnp.arange(self.table.shape[0], dtype=jnp.int32)
        old = self.table[row, last]
        shared = self.uses.at[old].get(mode="fill", fill_value=0) > 1
        shared &= lengths % PAGE > 0
        # Of several rows that share a page, all take copies; what nobody has then is free again.
        rank = jnp.cumsum(shared, dtype=jnp.int32) - 1
        served = shared & (rank < self.available)
        taken = self.free.at[self.available - 1 - rank].get(mode="clip")
        new = jnp.where(served, taken, self.count)
        stores = _when(served.any(), lambda stores: _copy_pages(stores, old, new), stores)
        table = self.table.at[row, last].set(jnp.where(served, taken, old))
        gone = jnp.zeros(self.table.shape, bool).at[row, last].set(served)
        uses = self.uses.at[new].add(1, mode="drop")
        left = self.available - served.sum(dtype=jnp.int32)
        pages = dataclasses.replace(self, uses=uses, available=left)
        return pages._release(gone, table), stores, shared & ~served


def _copy_pages(stores, old, new):
    """Pages `old` [B] of every store copied to pages `new`; at G or beyond it is dropped."""
    return jax.tree.map(
        lambda held: held.at[new].set(held.at[old].get(mode="clip"), mode="drop"), stores
    )


def _when(condition: Bool[Array, ""], change: Callable[[Any], Any], value: Any) -> Any:
    """`change(value)` where the condition holds, at no cost where it does not."""
    if not isinstance(condition, jax.core.Tracer):  # where `cond` would be compiled in every call
        return change(value) if condition else value
    return jax.lax.cond(condition, change, lambda value: value, value)
