"""A store: named arrays of slots, and where new tokens go in them.

Every array has its rows first and its slots second, then what belongs to one token:

    latent [B S R]    k_rope [B S P]    index_key [B S I]    latent_scale [B S C]
    k_nope [B S N H]  value [B S N V]   which no cache holds

Letters: B batch rows, S slots of a row, T new tokens, K chosen slots, N heads; R latent, P rotary,
I index-key, H key and V value channels; C groups of 128 latent channels, which share a scale.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mla_jax import sharding, target
from mla_jax.cache import narrow
from mla_jax.cache.stripes import Stripes

# The letters of every array that a store may have; a mesh axis is given to letters.
LETTERS = {
    "latent": "BSR", "latent_scale": "BSC", "k_rope": "BSP", "index_key": "BSI", "k_nope": "BSNH",
    "value": "BSNV",
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Arrays [B S ...] by name: every row has S slots of its own.

    Attributes:
        arrays: by their names.

    >>> store = Dense({"latent": jnp.zeros((2, 8, 4))})
    >>> store = store.write(jnp.array([[0], [3]]), latent=jnp.ones((2, 1, 4)))
    >>> store.latent[:, :, 0].sum(1)
    Array([1., 1.], dtype=float32)
    """

    arrays: dict[str, Array]

    def __getattr__(self, name: str) -> Any:
        # Only for what is no attribute: `store.latent` is `store.arrays["latent"]`.
        arrays = self.__dict__.get("arrays")
        if isinstance(arrays, dict) and name in arrays:
            return arrays[name]
        raise AttributeError(f"this store has no {name!r}: it holds {', '.join(arrays or ())}.")

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return next(iter(self.arrays.values())).shape[0]

    @property
    def slots(self) -> int:
        """S, slots of a row."""
        return next(iter(self.arrays.values())).shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def letters(self) -> Self:
        """The letters of every array in its place; of one that nobody knows, the first two."""
        letters: Any = {name: LETTERS.get(name, "BS") for name in self.arrays}
        return dataclasses.replace(self, arrays=letters)

    @property
    def encoding(self) -> str | None:
        """What latents are held in where that is not the dtype in which they are written."""
        return None

    @property
    def taken(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """What `write` takes of one token: shape and dtype of every name."""
        return {name: (held.shape[2:], held.dtype) for name, held in self.arrays.items()}

    def encode(self, new: dict[str, Array]) -> dict[str, Array]:
        """Arrays as the store holds them, of what is written; here the same."""
        return new

    def decode(self, held: dict[str, Array]) -> dict[str, Array]:
        """What was written, or as much of it as the store keeps, of arrays as it holds them."""
        return held

    def write(self, at: Int[Array, "B T"], **new: Array) -> Self:
        """The store with new [B T ...] at the slots `at`, no slot twice.

        What goes to slot S or beyond is dropped.

        Raises:
            ValueError: names, widths or dtypes that are not this store's.
        """
        self.check(at, new)
        return self.put(at, self.encode(new))

    def put(self, at: Int[Array, "B T"], held: dict[str, Array]) -> Self:
        """`write` of arrays as the store holds them."""
        mesh = sharding.mesh_of(self.arrays)
        if mesh is not None:
            return self._put_parts(mesh, at, held)
        arrays = {name: _put(array, held[name], at) for name, array in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def _put_parts(self, mesh, at, new):
        """Every device writes what belongs to its rows and slots."""
        rows, slots = sharding.spec(next(iter(self.arrays.values())))[:2]

        def own(arrays, at, new):
            if slots:
                size = next(iter(arrays.values())).shape[1]
                at = Stripes.here(rows, slots, at.shape[0]).place(at, size)
            follow = not slots  # of a row in stripes, a device has every other 128 tokens
            return {name: _put(held, new[name], at, follow) for name, held in arrays.items()}

        whole, own_rows = sharding.pspec(rows, slots), sharding.pspec(rows)
        at, new = jax.tree.map(lambda x: sharding.move(x, rows, mesh=mesh), (at, new))
        island = sharding.island(own, mesh, (whole, own_rows, own_rows), whole)
        return dataclasses.replace(self, arrays=island(self.arrays, at, new))

    def block(
        self, start: Int[Array, ""] | int, size: int, *, pages: bool = False
    ) -> dict[str, Array]:
        """What was written to slots start to start + size, [B size ...] by name.

        `pages` says that start, known or not, is a multiple of 128, as a paged store likes it.
        """
        return self.decode(self.cut(start, size, pages=pages))

    def cut(
        self, start: Int[Array, ""] | int, size: int, *, pages: bool = False
    ) -> dict[str, Array]:
        """`block` of arrays as the store holds them."""
        if size == self.slots:
            return dict(self.arrays)

        def cut(held):
            if pages and narrow.lies_in_tiles(held, size):
                return narrow.cut(held, start, size)
            return jax.lax.dynamic_slice_in_dim(held, start, size, axis=1)

        return {name: cut(held) for name, held in self.arrays.items()}

    def at(self, slots: Int[Array, "B K"]) -> dict[str, Array]:
        """What was written to chosen slots, [B K ...]; one out of range gives any in range."""
        row = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
        arrays = self.arrays.items()
        return self.decode({name: held.at[row, slots].get(mode="clip") for name, held in arrays})

    def check(self, at: Int[Array, "B T"], new: dict[str, Array]) -> None:
        """Raises ValueError where `write` cannot take these."""
        if new.keys() != self.taken.keys():
            raise ValueError(
                f"write was given {', '.join(new)}: this store holds {', '.join(self.taken)}."
            )
        for name, (shape, dtype) in self.taken.items():
            fresh = new[name]
            if fresh.shape != (*at.shape, *shape):
                raise ValueError(
                    f"{name} has shape {fresh.shape}: this store takes [B T "
                    f"{' '.join(map(str, shape))}] with [B T] = {at.shape}."
                )
            if fresh.dtype != dtype:
                raise ValueError(
                    f"{name} is {fresh.dtype}, the cache holds {dtype}: make the cache with "
                    f"init_cache(..., dtype=jnp.{fresh.dtype}), or give the layer that dtype."
                )


def _put(held, fresh, at, follow=True):
    """The array with new tokens; `follow` where those of a row mostly follow each other."""
    if narrow.serves(held, at, follow):
        slots = held.shape[1]
        return narrow.write(held, fresh, at, lambda row, slot: (row, slot, slot < slots))
    if at.shape == (1, 1) and target.current().platform == "gpu":
        # For a single token XLA would make three kernels: a slice, a select and an update. For two,
        # the second of which is dropped, it makes one scatter, with the token's arithmetic in it.
        at = jnp.concatenate([at, at + held.shape[1]], axis=1)
        fresh = jnp.broadcast_to(fresh, (1, 2, *fresh.shape[2:]))
    # A row at a time: XLA sees that no row's tokens go to another, and on a mesh moves nothing.
    write = lambda held, fresh, at: held.at[at].set(fresh, mode="drop", unique_indices=True)  # noqa: E731
    # Fused into a matmul that reads the cache, the write would copy it.
    return jax.lax.optimization_barrier(jax.vmap(write)(held, fresh, at))
