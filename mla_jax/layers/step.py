"""A step: what one call appends to every row of a cache, made once for all layers.

    step = Step.begin(cache, tokens=x.shape[1], lengths=lengths)
    for layer, store in zip(layers, cache.stores):
        y, store, _ = layer.extend(x, store, step)
        ...
    cache = cache.end(stores, step)

Letters: B batch rows, T new tokens, S cache slots.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Bool, Int

from mla_jax import rope, sharding
from mla_jax.cache import Cache, Dense, Paged, Pages, Store
from mla_jax.ops import checked_ids, dense, dispatch
from mla_jax.ops.seen import Seen
from mla_jax.plain import Plain

Form = Literal["auto", "absorbed", "expanded"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """T new tokens of every row, the same for all layers.

    Attributes:
        start: int32 [B], tokens that each row held before.
        positions: int32 [B T] or [T], where each token stands in its text.
        place: int32 [B T], the slot that each token goes to; at S or beyond it is dropped.
        seen: what each token may attend to, itself the last.
        length, overflowed: of the cache after the step.
        valid: bool [B T], which tokens count; None is all.
        pages: of the cache after the step; None where rows have slots of their own.
        slots: S.
        form: which form the attention takes, "absorbed" or "expanded"; "auto" leaves the choice to
            every layer.
        fresh: rows with tokens held none before.
        copies: activations of the only token come as so many equal rows: see `ops.dense.copies`.

    >>> import mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layers = [mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> cache = mla_jax.Cache.init(layers, batch_size=2, max_length=8)
    >>> x, stores = jnp.ones((2, 3, 128)), []
    >>> step = Step.begin(cache, tokens=3)
    >>> for layer, store in zip(layers, cache.stores):
    ...     y, store, _ = layer.extend(x, store, step)
    ...     x, stores = x + y, [*stores, store]
    >>> cache = cache.end(stores, step)
    >>> cache.length
    Array([3, 3], dtype=int32)
    """

    start: Int[Array, "B"]
    positions: Int[Array, "B T"] | Int[Array, "T"]
    place: Int[Array, "B T"]
    seen: Seen
    length: Int[Array, "B"]
    overflowed: Bool[Array, "B"]
    valid: Bool[Array, "B T"] | None
    pages: Pages | None
    slots: int = dataclasses.field(metadata={"static": True})
    form: Form = dataclasses.field(default="auto", metadata={"static": True})
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})
    copies: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self):
        # What layers have asked for, by key. It does not go through jax's transformations, and what
        # an inner one made is not given to an outer one.
        object.__setattr__(self, "_made", {})

    @classmethod
    def begin(
        cls,
        cache: Cache,
        tokens: int,
        lengths: Int[Array, "B"] | Plain | None = None,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | Plain | None = None,
        form: Form = "auto",
    ) -> "Step":
        """What appending `lengths[b]` of T tokens to row b of a cache means.

        Args:
            cache: before the step.
            tokens: T, at least 1.
            lengths: int [B], tokens of each row, 0 to T, the first ones; None is T for all.
            positions: int [T] or [B T]; by default they continue from `cache.length`. Causality and
                a sliding window go by cache slot all the same.
            form: for layers that do not choose themselves.

        Raises:
            ValueError: arguments that do not go together, or, outside jit, a row that would
                overflow (under jit its `overflowed` is set), or one that is not empty as the cache
                says.
        """
        check_form(form)
        batch, slots = cache.batch_size, cache.max_length
        token = jnp.arange(tokens, dtype=jnp.int32)[None]
        start = cache.length
        place = start[:, None] + token
        # Lengths are whole on every device of a mesh, as the cache's are.
        counts = None if lengths is None else sharding.move(row_counts(lengths, batch, tokens))
        if cache.fresh and not isinstance(start, jax.core.Tracer):
            given = np.ones(batch, bool) if counts is None else np.asarray(counts) > 0
            if (np.asarray(start) > 0)[given].any():
                raise ValueError(f"as_fresh: rows hold {np.asarray(start).tolist()} tokens.")
        if positions is None:
            positions = place
        else:
            positions = sharding.move(check_positions(positions, batch, tokens))
        grown = cache.grow(start + (tokens if counts is None else counts))
        valid = None if counts is None else token < counts[:, None]
        limits = jnp.minimum(place + 1, grown.length[:, None])
        if valid is not None:
            limits = jnp.where(valid, limits, 0)
            # Padding is dropped, each token at a slot of its own.
            place = jnp.where(valid, place, slots + token)
        return cls(
            start=start, positions=positions, place=place,
            seen=Seen(limits=limits, ends=grown.length, counts=counts),
            length=grown.length, overflowed=grown.overflowed, valid=valid, pages=grown.pages,
            slots=slots, form=form, fresh=cache.fresh,
        )  # fmt: skip

    def view(self, store: Dense) -> Store:
        """What a layer sees of its store: itself, or rows of S slots in the step's `pages`.

        These are the cache's after the step, with room for the new tokens.
        """
        return store if self.pages is None else Paged(store, self.pages.table)

    @property
    def before(self) -> Seen:
        """What each token may attend to of what the rows held before."""
        limits = jnp.broadcast_to(self.start[:, None], self.place.shape)
        return Seen(limits=limits if self.valid is None else jnp.where(self.valid, limits, 0))

    def rotation(self, config) -> rope.Rotation | None:
        """Of the step's positions, for layers whose rotary embedding is alike."""
        make = lambda: rope.rotation(self.positions, config, self.slots)  # noqa: E731
        return self._once(("rotation", rope.spec(config)), make)

    def planned(self, seen: Seen, call: dispatch.Call, implementation) -> Seen:
        """`seen` with the plan of the backend that serves the call, for all layers alike.

        Pass the step's own `seen`, of which only the window may differ, and no chosen slots. The
        plan that the first layer makes is kept, and all layers of the same call and window get it.
        """
        key = ("plan", call, seen.window, tuple(dispatch.normalized(implementation).items()))
        return self._once(key, lambda: dispatch.plan(seen, call, implementation))

    def clear(self, x: Array) -> Array:
        """`x` [B T D] with zeros in place of tokens that do not count, which may be NaN."""
        if self.valid is None:
            return x
        return jnp.where(self.valid[..., None], x, jnp.zeros((), x.dtype))

    def own(self, x: Array) -> Array:
        """X [B T ...], of whose equal rows the first is taken: a single row travels as several."""
        return x if self.copies == 1 else x[:1]

    def copied(self, x: Array) -> Array:
        """X [B T ...], whose single row becomes several equal ones again."""
        return dense.copied(x, self.copies)

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        # Within a scan, a rematerialised function or the like, arrays belong to that trace alone.
        trace = get_opaque_trace_state(convention="flax")
        made: dict = self._made  # pyrefly: ignore
        if key not in made or made[key][0] != trace:
            made[key] = (trace, make())
        return made[key][1]


def check_form(form: str) -> None:
    """Raises ValueError unless `form` is one that there is."""
    if form not in ("auto", "absorbed", "expanded"):
        raise ValueError(f"form={form!r}: it must be 'auto', 'absorbed' or 'expanded'.")


def check_positions(positions, batch: int, tokens: int):
    """Positions as an integer array [T] or [B T]; ValueError where they are neither."""
    positions = positions if isinstance(positions, jax.Array) else np.asarray(positions)
    if positions.shape not in ((tokens,), (batch, tokens)) or not jnp.issubdtype(
        positions.dtype, jnp.integer
    ):
        raise ValueError(
            f"positions is {positions.dtype} of shape {positions.shape}: it must be an integer "
            f"array [T] = ({tokens},) or [B T] = ({batch}, {tokens})."
        )
    return jnp.asarray(positions).astype(jnp.int32)


def row_counts(lengths, batch: int, tokens: int) -> Int[Array, "B"]:
    """How many of T tokens each row is given, int32 [B].

    Raises:
        ValueError: not integers [B]; or, outside jit, a number that is not between 0 and T.
    """
    lengths = checked_ids("lengths", lengths, (batch,), "B")
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)  # jax would trace the comparison under jit
        if (known < 0).any() or (known > tokens).any():
            raise ValueError(
                f"lengths={known}: each must be between 0 and the {tokens} tokens given."
            )
    return jnp.clip(lengths.astype(jnp.int32), 0, tokens)
