"""The cache of a whole model: how many tokens every row holds, once, and where layers keep them.

A functional pytree: every method returns a new cache, and under `jax.jit` with donation the new one
lives in the old one's memory. Rows are filled from slot 0 without gaps and have lengths of their
own; slots past a row's length hold anything and are never read. A row's tokens lie either in slots
of its own (`Dense`) or in pages of a common pool (`Paged`), which rows take as they grow and may
share.

`dense` has the arrays of one layer, `paged` the table that maps a row's slots to pages, `scaled`
latents of a byte a number. `stripes` says where slots lie on several devices, and `spread` moves
whole rows there; `narrow` writes to arrays that TPUs lay out with slots last.

Letters: B batch rows, S slots per row (capacity), T new tokens, G pages of the pool.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Int

from mla_jax.cache import spread, stripes
from mla_jax.cache.dense import LETTERS as LETTERS
from mla_jax.cache.dense import Dense as Dense
from mla_jax.cache.paged import PAGE as PAGE
from mla_jax.cache.paged import Paged as Paged
from mla_jax.cache.paged import Pages as Pages
from mla_jax.cache.scaled import ENCODINGS as ENCODINGS
from mla_jax.cache.scaled import Scaled as Scaled
from mla_jax.cache.scaled import is_encoding as is_encoding
from mla_jax.sharding import Rules, mesh_of, move, spec
from mla_jax.sharding import count as parts_of

Store = Dense | Paged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """Rows of up to S tokens, and what every layer keeps of them.

    Attributes:
        stores: of all mixers (attention layers), in the order in which the model declares them.
        length: int32 [B], tokens that each row holds, the same for all stores.
        overflowed: bool [B], rows that were given more tokens than they had room for since they
            were last empty or cut back: the tokens beyond were dropped, nothing was overwritten.
        pages: which pages of the pool rows have; None where every row has slots of its own.
        fresh: rows with new tokens are known to hold none yet, so that what attends to cached
            context is not compiled: see `as_fresh`.

    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> cache = Cache.init([layer], batch_size=2, max_length=8)
    >>> _, cache = layer.prefill(jnp.ones((2, 3, 128)), cache, jnp.array([3, 1]))
    >>> cache.length, cache.stores[0].latent.shape
    (Array([3, 1], dtype=int32), (2, 8, 64))
    """

    stores: tuple[Dense, ...]
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    pages: Pages | None = None
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def init(
        cls,
        mixers: Sequence[Any],
        batch_size: int,
        max_length: int,
        dtype=None,
        pages: int | None = None,
        sharding: Rules | None = None,
    ) -> "Cache":
        """An empty cache of `batch_size` rows with up to `max_length` tokens each.

        Args:
            mixers: what keeps something of every token, such as attention layers: their
                `init_store(rows, slots, dtype)` makes a store each.
            batch_size: B.
            max_length: S; a multiple of 128 where there are pages.
            dtype: of the stores; None lets every mixer choose. With float8_e4m3fn and int8 latents
                take a byte a number and have scales: see `Scaled`.
            pages: G, how many pages of 128 slots all rows share; None gives every row S slots.
            sharding: which axes of the mesh in use split rows (B) and slots (S): stores are made
                where they lie. Lengths are whole on every device.

        Raises:
            ValueError: a size that is not a whole number of at least 1, a dtype that attention does
                not compute in, or sizes that do not divide over the mesh.
            NotImplementedError: pages whose rows or slots would be split.
        """
        sizes = {"batch_size": batch_size, "max_length": max_length}
        for name, value in (sizes if pages is None else sizes | {"pages": pages}).items():
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            # Under jax.export a size may be a symbol, which is no int.
            if not (whole or jax.export.is_symbolic_dim(value)) or (whole and value < 1):
                raise ValueError(f"{name}={value!r}: {name} must be a whole number of at least 1.")
        if dtype is not None:
            dtype = checked_dtype("dtype", dtype)
        rows, slots, held = batch_size, max_length, None
        if pages is not None:
            if max_length % PAGE:
                raise ValueError(
                    f"max_length={max_length}: with pages it must be a multiple of their {PAGE} "
                    f"slots, such as {-(-max_length // PAGE) * PAGE}."
                )
            rows, slots = pages, PAGE
            held = Pages.init(batch_size, max_length // PAGE, pages)

        def make():
            return cls(
                stores=tuple(mixer.init_store(rows, slots, dtype) for mixer in mixers),
                length=jnp.zeros((batch_size,), jnp.int32),
                overflowed=jnp.zeros((batch_size,), bool),
                pages=held,
            )

        if sharding is None:
            return make()
        if pages is not None and (sharding.B or sharding.S):
            raise NotImplementedError(
                f"pages={pages} on a mesh: rows would share pages across devices. Give every row "
                f"slots of its own (pages=None), or split neither B={sharding.B} nor "
                f"S={sharding.S}."
            )
        places = sharding.of(jax.eval_shape(make))
        least = stripes.step(sharding)
        if max_length % least:
            raise ValueError(
                f"max_length={max_length}: S={sharding.S} splits it over {least // stripes.STRIPE} "
                f"devices in blocks of {stripes.STRIPE} slots: it must be a multiple of {least}."
            )
        return jax.jit(lambda: jax.tree.map(jax.sharding.reshard, make(), places))()

    @property
    def batch_size(self) -> int:
        """B, rows."""
        return self.length.shape[0]

    @property
    def max_length(self) -> int:
        """S, the most tokens that a row can hold."""
        if self.pages is not None:
            return self.pages.table.shape[1] * PAGE
        return self.stores[0].slots

    @property
    def nbytes(self) -> int:
        """Bytes of all stores."""
        return sum(store.nbytes for store in self.stores)

    @property
    def latent(self) -> Array:
        """Latents [B S R] (of pages: [G 128 R]) where there is one store."""
        return self._only().latent

    @property
    def k_rope(self) -> Array:
        """Rotary keys [B S P] (of pages: [G 128 P]) where there is one store."""
        return self._only().k_rope

    def _only(self) -> Dense:
        if len(self.stores) != 1:
            raise AttributeError(f"this cache has {len(self.stores)} stores: ask cache.stores[i].")
        return self.stores[0]

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def as_fresh(self) -> Self:
        """The same cache, said to hold nothing in rows that are given tokens next.

        Half of a prefill's program attends to cached context; where there is none it need not be
        compiled. The cache that comes back from the model does not say so any more.

        Raises:
            ValueError: outside jit, all rows hold tokens.
        """
        if not isinstance(self.length, jax.core.Tracer) and np.asarray(self.length).all():
            raise ValueError(f"rows hold {np.asarray(self.length).tolist()} tokens: none is empty.")
        return dataclasses.replace(self, fresh=True)

    @property
    def parts(self) -> int:
        """Over how many parts of a mesh rows are split; 0 without a mesh."""
        mesh = mesh_of(self.stores)
        return 0 if mesh is None else parts_of(mesh, spec(jax.tree.leaves(self.stores)[0])[0])

    def beside(self, x: Array) -> Array:
        """`x` [B ...] with its rows where the cache's rows lie, unless a mesh splits it already."""
        mesh = mesh_of(self.stores)
        if mesh is None or self.pages is not None or any(spec(x)):
            return x
        return move(x, spec(jax.tree.leaves(self.stores)[0])[0], mesh=mesh)

    def view(self, store: Dense) -> Store:
        """What layers and attention see of a store: itself, or its pages as rows of S slots."""
        return store if self.pages is None else Paged(store, self.pages.table)

    def end(self, stores: Sequence[Dense], step: Any) -> Self:
        """The cache after a `layers.step.Step` on it, with the stores that the layers gave back.

        Raises:
            ValueError: another number of stores than the cache has.
        """
        if len(stores) != len(self.stores):
            raise ValueError(f"{len(stores)} stores were given: the cache has {len(self.stores)}.")
        return self.replace(
            stores=tuple(stores), length=step.length, overflowed=step.overflowed, pages=step.pages,
            fresh=False,
        )  # fmt: skip

    def grow(self, ends: Int[Array, "B"]) -> Self:
        """The cache with `ends` tokens in every row, or as many as there is room for.

        Outside jit rows that have no room are an error; under jit `overflowed` says so.
        """
        if self.pages is None:
            room = self.max_length
            self._check_room(ends, room)
            return self.replace(
                length=jnp.minimum(ends, room), overflowed=self.overflowed | (ends > room)
            )
        wanted = -(-jnp.minimum(ends, self.max_length) // PAGE)
        pages, held = self.pages.grow(wanted)
        room = held * PAGE
        self._check_room(ends, room, self.pages, wanted - self.pages.held())
        return self.replace(
            length=jnp.minimum(ends, room), overflowed=self.overflowed | (ends > room), pages=pages
        )

    def truncate(self, lengths: Int[Array, "B"] | int) -> Self:
        """Forgets the tokens past `lengths`, e.g. rejected drafts. Longer than a row: no change.

        Raises:
            ValueError: outside jit, a length below 0; or no page is free for the copy of one that a
                row would go on from and other rows hold too (under jit that row is cut to its whole
                pages and `overflowed` is set).
        """
        if not isinstance(lengths, jax.core.Tracer) and (np.asarray(lengths) < 0).any():
            raise ValueError(f"lengths={np.asarray(lengths)}: they must be at least 0.")
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (self.batch_size,))
        length = jnp.minimum(self.length, jnp.maximum(lengths, 0))
        # A row cut below its capacity holds exactly the tokens it says, whatever was dropped.
        overflowed = self.overflowed & (lengths >= self.length)
        if self.pages is None:
            return self.replace(length=length, overflowed=overflowed)
        pages = self.pages.shrink(-(-length // PAGE))
        pages, stores, failed = pages.own(length, self.stores)
        self._check_pages(failed, self.pages)
        length = jnp.where(failed, length // PAGE * PAGE, length)
        return self.replace(
            stores=stores, length=length, overflowed=overflowed | failed,
            pages=pages.shrink(-(-length // PAGE)),
        )  # fmt: skip

    def reset(self, rows: Bool[Array, "B"] | None = None) -> Self:
        """Empties the rows where `rows` is True; all of them where it is None.

        Raises:
            ValueError: rows that are not bool [B].
        """
        rows = jnp.ones((self.batch_size,), bool) if rows is None else self._check_rows(rows)
        length = jnp.where(rows, 0, self.length)
        pages = self.pages if self.pages is None else self.pages.shrink(-(-length // PAGE))
        return self.replace(length=length, overflowed=self.overflowed & ~rows, pages=pages)

    def insert(self, row: "Cache", index: Int[Array, ""] | int) -> Self:
        """Puts the one row of another cache, of at most as many slots, into row `index`.

        Either cache may have pages.

        Raises:
            ValueError: not one row, more slots, other stores; or, outside jit, an index that is not
                a row, or too few free pages (under jit such an index changes nothing, and a row
                that lacks pages holds what fits and has `overflowed` set).
        """
        if row.batch_size != 1 or row.max_length > self.max_length:
            raise ValueError(
                f"row has {row.batch_size} rows of {row.max_length} slots: insert takes one row of "
                f"at most {self.max_length} slots."
            )
        self._check_alike(row)
        if not isinstance(index, jax.core.Tracer) and not 0 <= index < self.batch_size:
            raise ValueError(f"index={index}: this cache has rows 0 to {self.batch_size - 1}.")
        index = jnp.asarray(index, jnp.int32)
        index = jnp.where(index < 0, self.batch_size, index)  # negative would count from the end
        chosen = jnp.arange(self.batch_size, dtype=jnp.int32) == index
        cache = self.reset(chosen).grow(jnp.where(chosen, row.length[0], self.length))
        cache = cache.replace(overflowed=cache.overflowed | (chosen & row.overflowed[0]))
        slot = jnp.arange(row.max_length, dtype=jnp.int32)[None]
        slot = jnp.where(slot < row.length[0], slot, self.max_length + slot)

        def put(store, other):
            new = row.view(other).cut(0, row.max_length)
            if cache.pages is None:
                here = {
                    name: held.at[index, : row.max_length].set(new[name][0], mode="drop")
                    for name, held in store.arrays.items()
                }
                return dataclasses.replace(store, arrays=here)
            table = cache.pages.table.at[index].get(mode="fill", fill_value=cache.pages.count)
            return Paged(store, table[None]).put(slot, new).pool

        def put_parts(store, other):
            split = mesh_of(other) is not None and row.pages is None
            new = spread.row(other, jnp.int32(0)) if split else row.view(other).cut(0, ends)
            return spread.give(store, new if split else jax.tree.map(lambda x: x[0], new), chosen)

        ends, on_mesh = row.max_length, cache.pages is None and mesh_of(self.stores) is not None
        stores = tuple(map(put_parts if on_mesh else put, self.stores, row.stores))
        return cache.replace(stores=stores)

    def fork(
        self,
        source: Int[Array, ""] | int,
        rows: Bool[Array, "B"],
        length: Int[Array, ""] | int | None = None,
    ) -> Self:
        """Gives the rows where `rows` is True the first tokens of row `source`, not their own.

        With pages the rows share the whole ones; only the last, partly filled page is copied.

        Args:
            source: the row that is copied; it stays as it is.
            rows: bool [B].
            length: how many of its tokens; None is all.

        Raises:
            ValueError: rows that are not bool [B]; or, outside jit, a source that is not a row, a
                length that it does not hold, or too few free pages for the copies (under jit a row
                that lacks one is cut to its whole pages and has `overflowed` set).
        """
        rows = self._check_rows(rows)
        if not isinstance(source, jax.core.Tracer) and not 0 <= source < self.batch_size:
            raise ValueError(f"source={source}: this cache has rows 0 to {self.batch_size - 1}.")
        source = jnp.asarray(source, jnp.int32)
        held = self.length[source]
        known = not any(isinstance(x, jax.core.Tracer) for x in (length, held))
        if length is not None and known and not 0 <= length <= held:
            raise ValueError(f"length={length}: row {source} holds {held} tokens.")
        length = held if length is None else jnp.clip(jnp.asarray(length, jnp.int32), 0, held)
        rows = rows & (jnp.arange(self.batch_size) != source)
        ends = jnp.where(rows, length, self.length)
        overflowed = jnp.where(rows, False, self.overflowed)
        if self.pages is None and mesh_of(self.stores) is not None:
            stores = tuple(spread.give(one, spread.row(one, source), rows) for one in self.stores)
            return self.replace(stores=stores, length=ends, overflowed=overflowed)
        if self.pages is None:

            def copy(held):
                chosen = rows.reshape(-1, *[1] * (held.ndim - 1))
                return jnp.where(chosen, held[source][None], held)

            return self.replace(
                stores=jax.tree.map(copy, self.stores), length=ends, overflowed=overflowed
            )
        pages = self.pages.shrink(jnp.where(rows, 0, self.pages.held()))
        pages = pages.share(source, rows, -(-length // PAGE))
        pages, stores, failed = pages.own(jnp.where(rows, length, 0), self.stores)
        self._check_pages(failed, self.pages)
        ends = jnp.where(failed, length // PAGE * PAGE, ends)
        return self.replace(
            stores=stores, length=ends, overflowed=overflowed | failed,
            pages=pages.shrink(jnp.where(failed, length // PAGE, pages.held())),
        )  # fmt: skip

    def rows(self, start: Int[Array, ""] | int, count: int) -> Self:
        """The rows start to start + count as a cache of their own; pages stay in the common pool.

        Put them back with `with_rows` before another use of this cache.

        Raises:
            NotImplementedError: not all rows of a cache whose slots are split over devices, where a
                row's number says on which device it begins.
        """
        if mesh_of(self.stores) is not None:
            if count == self.batch_size:
                return self
            if self.pages is None and any(spec(x)[1] for x in jax.tree.leaves(self.stores)):
                raise NotImplementedError(
                    f"count={count}: slots are split over devices, so take all "
                    f"{self.batch_size} rows."
                )
        cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, count)  # noqa: E731
        stores, pages = self.stores, self.pages
        if pages is None:
            stores = jax.tree.map(cut, stores)
        else:
            pages = dataclasses.replace(pages, table=cut(pages.table))
        return self.replace(
            stores=stores, length=cut(self.length), overflowed=cut(self.overflowed), pages=pages
        )

    def with_rows(self, start: Int[Array, ""] | int, part: "Cache") -> Self:
        """This cache with what became of `rows(start, count)`."""
        put = lambda array, new: jax.lax.dynamic_update_slice_in_dim(array, new, start, 0)  # noqa: E731
        stores, pages = part.stores, part.pages
        if pages is None:
            stores = jax.tree.map(put, self.stores, stores)
        elif self.pages is not None:
            pages = dataclasses.replace(pages, table=put(self.pages.table, pages.table))
        return self.replace(
            stores=stores, length=put(self.length, part.length), pages=pages,
            overflowed=put(self.overflowed, part.overflowed), fresh=False,
        )  # fmt: skip

    def _check_rows(self, rows) -> Bool[Array, "B"]:
        rows = rows if isinstance(rows, jax.Array) else np.asarray(rows)
        if rows.shape != (self.batch_size,) or rows.dtype != jnp.bool_:
            raise ValueError(
                f"rows is {rows.dtype} of shape {rows.shape}: it must be bool [{self.batch_size}]."
            )
        return jnp.asarray(rows)

    def _check_alike(self, other: "Cache") -> None:
        if len(self.stores) != len(other.stores):
            raise ValueError(
                f"row has {len(other.stores)} stores, this cache {len(self.stores)}: they must be "
                "of the same model."
            )
        for here, there in zip(self.stores, other.stores, strict=True):
            if here.arrays.keys() != there.arrays.keys():
                raise ValueError(
                    f"row holds {', '.join(there.arrays)}; this cache {', '.join(here.arrays)}."
                )
            for name, held in here.arrays.items():
                new = there.arrays[name]
                if new.shape[2:] != held.shape[2:] or new.dtype != held.dtype:
                    raise ValueError(
                        f"row.{name} is {new.dtype} of width {new.shape[-1]}; this cache holds "
                        f"{held.dtype} of width {held.shape[-1]}."
                    )

    def _check_room(self, ends, room, pages: Pages | None = None, needed=0) -> None:
        if any(isinstance(x, jax.core.Tracer) for x in (ends, room)):
            return
        over = np.flatnonzero(np.asarray(ends) > np.asarray(room))
        if not over.size:
            return
        wanted = np.asarray(ends)[over].tolist()
        if pages is not None and (np.asarray(ends)[over] <= self.max_length).all():
            raise ValueError(
                f"pages run out: rows {over.tolist()} would hold {wanted} tokens, which takes "
                f"{int(np.asarray(needed).sum())} more pages, and {int(pages.available)} of "
                f"{pages.count} are free: make the cache with more pages, or reset rows."
            )
        raise ValueError(
            f"rows {over.tolist()} would hold {wanted} tokens, the cache has max_length="
            f"{self.max_length} slots: make it longer or truncate rows."
        )

    def _check_pages(self, failed, pages: Pages) -> None:
        if not isinstance(failed, jax.core.Tracer) and np.asarray(failed).any():
            raise ValueError(
                f"pages run out: rows {np.flatnonzero(np.asarray(failed)).tolist()} need a copy of "
                f"a page that other rows hold too, and {int(pages.available)} of "
                f"{pages.count} are free: make the cache with more pages, or reset rows."
            )


def checked_dtype(name: str, dtype: Any) -> np.dtype:
    """The dtype of a cache.

    Raises:
        ValueError: one that a cache does not hold; the message begins with `name`.

    >>> checked_dtype("dtype", "float8_e4m3fn")
    dtype(float8_e4m3fn)
    """
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    floats = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
    if found is None or (found not in floats and not is_encoding(found)):
        raise ValueError(
            f"{name}={dtype if found is None else found.name}: a cache holds bfloat16, float16, "
            f"float32 or float64, or latents in {' or '.join(ENCODINGS)}."
        )
    return found


for _cls in (Dense, Scaled, Paged, Pages):
    export.register_pytree_node_serialization(
        _cls,
        serialized_name=f"mla_jax.{_cls.__name__}",
        serialize_auxdata=lambda aux: b"",
        deserialize_auxdata=lambda data: (),
    )
export.register_pytree_node_serialization(
    Cache,
    serialized_name="mla_jax.Cache",
    serialize_auxdata=lambda aux: bytes(map(bool, aux)),
    deserialize_auxdata=lambda data: tuple(map(bool, data)),
)
