"""A store: named arrays of slots, and where new tokens go in them.

Every array has its rows first and its slots second, then what belongs to one token:

    latent [B S R]    k_rope [B S P]    index_key [B S I]

Letters: B batch rows, S slots of a row, T new tokens, K chosen slots; R latent, P rotary, I
    index-key
channels.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mla_jax import sharding, target
from mla_jax.cache.stripes import Stripes

# The letters of every array that a store may have; a mesh axis is given to letters.
LETTERS = {
    "latent": "BSR", "k_rope": "BSP", "index_key": "BSI", "k_nope": "BSNH", "value": "BSNV",
}  # fmt: skip
_SINGLY = 8  # tokens of a step up to which a TPU writes one after the other


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

    def write(self, at: Int[Array, "B T"], **new: Array) -> Self:
        """The store with new [B T ...] at the slots `at`, no slot twice; S and more is nowhere.

        Raises:
            ValueError: names, widths or dtypes that are not this store's.
        """
        self._check(at, new)
        mesh = sharding.mesh_of(self.arrays)
        if mesh is not None:
            return self._write_parts(mesh, at, new)
        arrays = {name: _put(held, new[name], at) for name, held in self.arrays.items()}
        return dataclasses.replace(self, arrays=arrays)

    def _write_parts(self, mesh, at, new):
        """Every device writes what belongs to its rows and slots."""
        rows, slots = sharding.spec(next(iter(self.arrays.values())))[:2]

        def own(arrays, at, new):
            if slots:
                size = next(iter(arrays.values())).shape[1]
                at = Stripes.here(rows, slots, at.shape[0]).place(at, size)
            return {name: _put(held, new[name], at) for name, held in arrays.items()}

        whole, own_rows = sharding.pspec(rows, slots), sharding.pspec(rows)
        at, new = jax.tree.map(lambda x: sharding.move(x, rows, mesh=mesh), (at, new))
        island = sharding.island(own, mesh, (whole, own_rows, own_rows), whole)
        return dataclasses.replace(self, arrays=island(self.arrays, at, new))

    def block(
        self, start: Int[Array, ""] | int, size: int, *, pages: bool = False
    ) -> dict[str, Array]:
        """Every array's slots start to start + size, [B size ...].

        `pages` says that start, known or not, is a multiple of 128, as a paged store likes it.
        """
        del pages
        if size == self.slots:
            return dict(self.arrays)
        cut = lambda held: jax.lax.dynamic_slice_in_dim(held, start, size, axis=1)  # noqa: E731
        return {name: cut(held) for name, held in self.arrays.items()}

    def at(self, slots: Int[Array, "B K"]) -> dict[str, Array]:
        """Every array's chosen slots, [B K ...]; a slot out of range gives any that is in range."""
        row = jnp.arange(slots.shape[0], dtype=slots.dtype)[:, None]
        return {name: held.at[row, slots].get(mode="clip") for name, held in self.arrays.items()}

    def _check(self, at, new) -> None:
        if new.keys() != self.arrays.keys():
            raise ValueError(
                f"write was given {', '.join(new)}: this store holds {', '.join(self.arrays)}."
            )
        for name, fresh in new.items():
            held = self.arrays[name]
            if fresh.shape != (*at.shape, *held.shape[2:]):
                raise ValueError(
                    f"{name} has shape {fresh.shape}: this store takes [B T "
                    f"{' '.join(map(str, held.shape[2:]))}] with [B T] = {at.shape}."
                )
            if fresh.dtype != held.dtype:
                raise ValueError(
                    f"{name} is {fresh.dtype}, the cache holds {held.dtype}: make the cache with "
                    f"init_cache(..., dtype=jnp.{fresh.dtype}), or give the layer that dtype."
                )


def _put(held, fresh, at):
    narrow = held.ndim == 3 and held.shape[-1] % 128
    device = target.current()
    # XLA's partitioner would gather all of it for each of these tokens.
    if narrow and device.platform == "tpu" and not device.auto and _is_few(at.shape):
        return _write_singly(held, fresh, at)
    # A row at a time: XLA sees that no row's tokens go to another, and on a mesh moves nothing.
    write = lambda held, fresh, at: held.at[at].set(fresh, mode="drop", unique_indices=True)  # noqa: E731
    # Fused into a matmul that reads the cache, the write would copy it.
    return jax.lax.optimization_barrier(jax.vmap(write)(held, fresh, at))


def _is_few(shape):
    return all(isinstance(size, int) for size in shape) and shape[1] <= _SINGLY


def _write_singly(held, new, slot):
    """held.at[row, slot].set(new, mode="drop"), one token after the other.

    On TPU an array narrower than 128 is laid out slot-minor, and a scatter would copy all of it to
    another layout and back; this writes in place.
    """
    batch, tokens, width = new.shape
    last = held.shape[1] - 1

    def step(i, held):
        row, token = i // tokens, i % tokens
        to = slot[row, token]
        at = (row, jnp.minimum(to, last), jnp.int32(0))
        fresh = jax.lax.dynamic_slice(new, (row, token, 0), (1, 1, width))
        kept = jax.lax.dynamic_slice(held, at, (1, 1, width))
        return jax.lax.dynamic_update_slice(held, jnp.where(to <= last, fresh, kept), at)

    return jax.lax.fori_loop(0, batch * tokens, step, held)
