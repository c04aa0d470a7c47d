"""An attention core on a mesh: every device attends from its own rows and heads to its own slots.

Queries come to where the store's rows lie. Where slots are split, the heads that are split over the
same axes are gathered, every device attends with all of them to what it holds, and then trades what
it found for all devices' parts of a share of the heads, which are merged by their log-sum-exp
(Helix, arXiv 2507.07120): one gather and one exchange of a step's size, and never of the cache's.

Letters: B batch, T query tokens, S slots, N heads, V value channels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax.cache import Store
from mla_jax.cache.stripes import STRIPE, Stripes
from mla_jax.ops.merge import merge_attention
from mla_jax.ops.seen import Seen
from mla_jax.sharding import Axes

_PLANNED = "*"  # stands for the first dimension of a plan's arrays, one device's behind the other
_MORE = {"kv_b": "RNK"}  # letters of what an op takes besides


@dataclasses.dataclass(frozen=True)
class Layout:
    """Over which axes of a mesh a call is split while it runs.

    Attributes:
        mesh: with Explicit axes.
        rows, slots: of the store.
        heads: those of the queries that do not split the store.
    """

    mesh: Any
    rows: Axes = ()
    slots: Axes = ()
    heads: Axes = ()

    @classmethod
    def of(cls, queries: tuple[Array, ...], store: Store) -> "Layout | None":
        """By the types of the operands; None without a mesh.

        Raises:
            NotImplementedError: query tokens that are split.
        """
        mesh = sharding.mesh_of(queries, store)
        if mesh is None:
            return None
        _, tokens, heads = sharding.spec(queries[0])[:3]
        if tokens:
            raise NotImplementedError(
                f"tokens T are split over {', '.join(tokens)}: attention takes a row's tokens "
                "whole; split rows (B), heads (N) or the slots of a cache (S)."
            )
        rows, slots = sharding.spec(jax.tree.leaves(store)[0])[:2]
        return cls(mesh, rows, slots, sharding.without(heads, rows, slots))

    def part(self, call: Any) -> Any:
        """What one device is asked of a `dispatch.Call`."""
        names = set(call.options)
        if self.slots and "window" in names:  # a device's first slot in sight is no fixed distance
            names = names - {"window"} | {"mask"}
        if self.slots and call.queries != 1 and "lengths" in names:
            names = names - {"lengths"} | {"lengths per query"}
        return dataclasses.replace(
            call,
            batch=call.batch // sharding.count(self.mesh, self.rows),
            slots=call.slots // sharding.count(self.mesh, self.slots),
            heads=call.heads // sharding.count(self.mesh, self.heads),
            options=tuple(sorted(names)),
            layout=None,
        )

    def specs(self, letters: str) -> jax.P:
        """The partition spec of an array with these letters within the call."""
        return sharding.pspec(*self._axes(letters))

    def moved(self, x: Array, letters: str) -> Array:
        """An array with these letters, where the call wants it."""
        return sharding.move(x, *self._axes(letters), mesh=self.mesh)

    def _axes(self, letters):
        axes = {"B": self.rows, "S": self.slots, "N": self.heads, _PLANNED: self.rows + self.slots}
        return [axes.get(letter, ()) for letter in letters]


def attend(
    run: Callable, queries: tuple[Array, Array], store: Store, seen: Seen, call: Any, **more: Array
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """`run(queries, store, seen, call, **more)` for every device's part of a call with a layout.

    The results lie as the queries came.

    Raises:
        NotImplementedError: a mask or segments for slots that are split.
    """
    layout = call.layout
    came = sharding.spec(queries[0])
    operands, letters = _operands(layout, queries, store, seen, more)
    moved = jax.tree.map(layout.moved, operands, letters)
    over = layout.rows + layout.slots + layout.heads

    def own(operands):
        operands = sharding.varying(operands, over)
        queries, part = operands.pop("queries"), operands.pop("seen")
        if len(queries) == 1:
            queries = jnp.split(queries[0], [call.key_dims[0]], axis=-1)
        local = layout.part(call)
        held = operands.pop("store")
        part = _part(layout, part, local)
        out, lse = run(tuple(queries), held, part, local, **operands)
        return _merged(layout, out, lse, call.heads) if layout.slots else (out, lse)

    heads = layout.heads
    if layout.slots and _trades(layout, call.heads):
        heads += layout.slots
    ends = tuple(sharding.pspec(layout.rows, (), heads) for _ in range(2))
    specs = jax.tree.map(lambda _, own: layout.specs(own), moved, letters)
    out, lse = sharding.island(own, layout.mesh, (specs,), ends)(moved)
    return sharding.move(out, *came[:3]), sharding.move(lse, *came[:3])


def plan(make: Callable, seen: Seen, call: Any) -> Any:
    """`make(seen, call)` for every device's part: its arrays lie one device's behind the other."""
    layout = call.layout
    letters = _letters_of(seen)
    moved = jax.tree.map(layout.moved, seen, letters)

    def own(seen):
        local = layout.part(call)
        return make(_part(layout, seen, local), local)

    specs = jax.tree.map(lambda _, own: layout.specs(own), moved, letters)
    every = sharding.pspec(layout.rows + layout.slots)
    return sharding.island(own, layout.mesh, (specs,), every)(moved)


def choose(
    run: Callable,
    query: Float[Array, "B T J I"],
    weights: Float[Array, "B T J"],
    store: Store,
    seen: Seen,
    pool_bias: Float[Array, "L I"] | None,
) -> Int[Array, "B T K"]:
    """`run(query, weights, store, seen, pool_bias=)` for every device's rows (sparse attention).

    Raises:
        NotImplementedError: slots that are split, where the best of all would have to be found.
    """
    layout: Any = Layout.of((query,), store)
    if layout.slots:
        raise NotImplementedError(
            f"slots S are split over {', '.join(layout.slots)}: sparse attention chooses among a "
            "row's slots on one device. Split rows (B) and heads (N) instead."
        )
    operands = {"query": query, "weights": weights, "store": store, "seen": seen}
    letters = {"query": "BTJI", "weights": "BTJ", "store": store.letters, "seen": _letters_of(seen)}
    if pool_bias is not None:
        operands["pool_bias"], letters["pool_bias"] = pool_bias, "LI"
    moved = jax.tree.map(layout.moved, operands, letters)
    specs = jax.tree.map(lambda _, own: layout.specs(own), moved, letters)
    own = lambda operands: run(**sharding.varying(operands, layout.rows))  # noqa: E731
    return sharding.island(own, layout.mesh, (specs,), layout.specs("BTK"))(moved)


def _operands(layout, queries, store, seen, more):
    """What a call works on, and the letters of all that."""
    if layout.slots and any(x is not None for x in (seen.mask, seen.segments, seen.chosen)):
        raise NotImplementedError(
            f"slots S are split over {', '.join(layout.slots)}: there attention takes lengths and "
            "a window, no mask, no segment_ids and no chosen slots."
        )
    parts = sharding.count(layout.mesh, layout.slots)
    if parts > 1 and store.slots % (STRIPE * parts):
        raise ValueError(
            f"S = {store.slots} slots: split over {parts} devices they must be a multiple of "
            f"{STRIPE * parts}."
        )
    if set(sharding.spec(queries[0])[2]) - set(layout.heads):  # then one collective moves both
        queries = (jnp.concatenate(queries, axis=-1),)
    operands = {"queries": queries, "store": store, "seen": seen, **more}
    letters = {
        "queries": ("BTNK",) * len(queries),
        "store": store.letters,
        "seen": _letters_of(seen),
        **{name: _MORE[name] for name in more},
    }
    return operands, letters


def _letters_of(seen: Seen) -> Any:
    mask = seen.mask
    if mask is not None:
        mask = "".join(
            "1" if size == 1 else own for own, size in zip("BNTS", mask.shape, strict=True)
        )
    letters: dict[str, Any] = {
        "limits": "BT",
        "ends": None if seen.ends is None else "B",
        "counts": None if seen.counts is None else "B",
        "segments": None if seen.segments is None else ("BT", "BS"),
        "mask": mask,
        "chosen": None if seen.chosen is None else "BTK",
        "plan": jax.tree.map(lambda _: _PLANNED, seen.plan),
    }
    return dataclasses.replace(seen, **letters)


def _part(layout: Layout, seen: Seen, call: Any) -> Seen:
    """What the queries of one device may attend to of its slots."""
    if not layout.slots:
        return seen
    stripes, mask = Stripes.here(layout.rows, layout.slots, call.batch), None
    if seen.window is not None:
        first = seen.limits - seen.window
        mask = stripes.slots(call.slots)[:, None, None] >= first[:, None, :, None]
    limits = stripes.seen(seen.limits)
    return Seen(limits=limits, mask=mask, plan=seen.plan, full=seen.full)


def _trades(layout: Layout, heads: int) -> bool:
    """Whether all devices that share slots may take a share of the heads each."""
    own = heads // sharding.count(layout.mesh, layout.heads)
    return own % sharding.count(layout.mesh, layout.slots) == 0


def _merged(layout, out, lse, heads):
    """Attention over all devices' slots: of a share of the heads where these can be shared out."""
    if _trades(layout, heads):
        parts = _exchange(layout.slots, out, lse)
        return merge_attention(*zip(*parts, strict=True))
    top = lax.stop_gradient(lax.pmax(lax.stop_gradient(lse), layout.slots))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lse - top)
    total = lax.psum(weights, layout.slots)
    safe = jnp.where(total != 0, total, 1)
    mixed = lax.psum(weights[..., None] * out.astype(weights.dtype), layout.slots)
    out = (mixed / safe[..., None]).astype(out.dtype)
    return out, jnp.where(total != 0, top + jnp.log(safe), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(axes: Axes, out: Float[Array, "B T N V"], lse: Float[Array, "B T N"]):
    """All devices' parts of a share of the heads: [n B T N/n V] and [n B T N/n], one collective."""
    n = lax.axis_size(axes)
    wide = (*out.shape[:2], n, out.shape[2] // n)
    packed = _packed(out.reshape(*wide, -1), lse.reshape(wide))
    packed = lax.all_to_all(packed, axes, split_axis=2, concat_axis=0)
    return _unpacked(packed, out.shape[-1], out.dtype, lse.dtype)


def _exchange_back(axes, _, cotangents):
    out, lse = cotangents
    packed = lax.all_to_all(_packed(out, lse), axes, split_axis=0, concat_axis=2)
    out, lse = _unpacked(packed, out.shape[-1], out.dtype, lse.dtype)
    batch, tokens = out.shape[:2]
    return out.reshape(batch, tokens, -1, out.shape[-1]), lse.reshape(batch, tokens, -1)


_exchange.defvjp(lambda axes, out, lse: (_exchange(axes, out, lse), None), _exchange_back)


def _packed(out, lse):
    """Both in one array of unsigned integers, of which no move changes a bit."""
    whole = jnp.dtype(f"uint{8 * out.dtype.itemsize}")
    lse = lse.astype(jnp.promote_types(out.dtype, lse.dtype))
    parts = [lax.bitcast_convert_type(x, whole) for x in (out, lse)]
    return jnp.concatenate([x.reshape(*lse.shape, -1) for x in parts], axis=-1)


def _unpacked(packed, width, out_dtype, lse_dtype):
    wide = jnp.promote_types(out_dtype, lse_dtype)
    out = lax.bitcast_convert_type(packed[..., :width], out_dtype)
    lse = packed[..., width:]
    lse = lse[..., 0] if lse.shape[-1] == 1 else lse
    return out, lax.bitcast_convert_type(lse, wide).astype(lse_dtype)
