"""Experts that lie on several devices: tokens go to them, and their sums come back.

Devices that share the experts but not the tokens exchange tokens. Where they are few, at most K of
them, every one gathers the tokens of all and gives each its sums back. Where they are many, a token
goes only to the devices that have one of its experts, once to each: what is sent grows with K, not
with the number of devices. Devices that share the tokens too each do their own experts' part.

What a device does of the work goes through the same backends as without a mesh; pairs whose expert
lies elsewhere are marked by the number E and dropped. No kernel of an expert is ever moved.

Letters: M tokens of a device, K experts per token, E experts of a device, D hidden size, F inner
size; n devices that exchange tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding, target
from mla_jax.sharding import Axes

# Pairs of token and expert that are done at once: in a first round, at least, and in one of those
# that follow such a small one, of which there are at most so many. XLA for TPUs multiplies all of
# them by every expert of a device.
_LEAST, _MORE, _FOLLOWING = 256, 768, 6


def routed(
    run: Callable,
    x: Float[Array, "M D"],
    experts: Int[Array, "M K"],
    weights: Float[Array, "M K"],
    kernels: tuple[Any, Any, Any],
) -> Float[Array, "M D"]:
    """`run(x, experts, weights, *kernels)` with every device's own experts.

    Args:
        run: the sum of each token's experts, without pairs of the expert E.
        x, experts, weights, kernels: as in `routed_experts`, of all devices; of a `Weight` the
            scales are split as the values are.

    Returns:
        [M D], which lies as x does.

    Raises:
        NotImplementedError: kernels that are split by more than experts.
    """
    mesh, rows = sharding.mesh_of(kernels, x), sharding.spec(x)[0]
    arrays = jax.tree.leaves(kernels)
    over, *inner = sharding.spec(arrays[0])
    if any(inner) or any(sharding.spec(array) != (over, (), ()) for array in arrays):
        found = [sharding.pspec(*sharding.spec(array)) for array in arrays]
        raise NotImplementedError(
            f"experts' kernels are split as {found}: only E may be, and alike for all three."
        )
    peers = tuple(axis for axis in over if axis in rows)
    group = _Group(mesh, over, peers, sharding.without(over, peers))
    every = rows + group.others

    def own(x, experts, weights, *kernels):
        x, experts, weights, kernels = sharding.varying((x, experts, weights, kernels), every)
        count = kernels[0].shape[0]
        local = functools.partial(_local, run, kernels, parts=sharding.count(mesh, over))
        if not peers:
            y = local(x, group.mine(experts, count), weights)
        elif sharding.count(mesh, peers) <= experts.shape[1]:
            whole = lambda a: lax.all_gather(a, peers, tiled=True)  # noqa: E731
            y = local(whole(x), group.mine(whole(experts), count), whole(weights))
            y = lax.psum_scatter(y, peers, tiled=True)
        else:
            y = _exchanged(local, x, experts, weights, group, count)
        return lax.psum(y, group.others) if group.others else y

    tokens, each = sharding.pspec(rows), sharding.pspec(over)
    island = sharding.island(own, mesh, (tokens,) * 3 + (each,) * 3, tokens)
    x_, experts, weights = (sharding.move(a, rows, mesh=mesh) for a in (x, experts, weights))
    return sharding.beside(island(x_, experts, weights, *kernels), x)


class _Group(NamedTuple):
    """Who has which experts.

    Attributes:
        mesh: of all devices.
        over: the axes over which experts are split.
        peers: those of them over which the tokens are split too.
        others: the rest, along which devices have the same tokens.
    """

    mesh: Any
    over: Axes
    peers: Axes
    others: Axes

    def mine(self, experts: Int[Array, "M K"], count: int) -> Int[Array, "M K"]:
        """This device's own numbers of experts, `count` for those of others."""
        if not self.over:
            return experts
        first = lax.axis_index(self.over) * count
        inside = (experts >= first) & (experts < first + count)
        return jnp.where(inside, experts - first, count)

    def peer(self, experts: Int[Array, "M K"], count: int) -> Int[Array, "M K"]:
        """The peer that has each expert; n where the token's own copy on another device asks."""
        sizes = [self.mesh.shape[axis] for axis in self.over]
        at = dict(zip(self.over, np.unravel_index(np.arange(np.prod(sizes)), sizes), strict=True))
        n = sharding.count(self.mesh, self.peers)
        owner = _ravel(at, self.peers, self.mesh)
        there = jnp.asarray(owner)[experts // count]
        if not self.others:
            return there
        copy = jnp.asarray(_ravel(at, self.others, self.mesh))[experts // count]
        return jnp.where(copy == lax.axis_index(self.others), there, n)


def _ravel(at, axes, mesh):
    sizes = [mesh.shape[axis] for axis in axes]
    return np.ravel_multi_index([at[axis] for axis in axes], sizes).astype(np.int32)


def _exchanged(local, x, experts, weights, group: _Group, count: int):
    """Every token goes once to each device that has one of its experts; the sums come back."""
    peers, (tokens, chosen) = group.peers, experts.shape
    n = sharding.count(group.mesh, peers)
    whole = lambda a: lax.all_gather(a, peers, tiled=True)  # noqa: E731
    all_experts, all_weights = whole(experts), whole(weights)
    to = group.peer(all_experts, count)
    peer = jnp.arange(n, dtype=jnp.int32)
    goes = (to[..., None] == peer[None, None]).any(1).reshape(n, tokens, n)  # [from, token, to]
    rank = jnp.cumsum(goes, axis=1, dtype=jnp.int32) - 1  # among those of its way
    way = _Ways(peers, goes.sum(1, dtype=jnp.int32), tokens, min(n, chosen) * tokens)
    me = lax.axis_index(peers)
    # What comes to this device: from each a block of up to M rows.
    place = jnp.where(goes[:, :, me], peer[:, None] * tokens + rank[:, :, me], n * tokens)
    place = place.reshape(-1)
    put = lambda a, fill: jnp.full_like(a, fill).at[place].set(a, mode="drop")  # noqa: E731
    here, share = put(group.mine(all_experts, count), count), put(all_weights, 0)
    # What leaves it: first all that goes to the first device, and so on.
    goes, rank = goes[me], rank[me]
    leaves = jnp.where(goes, way.start[me][None] + rank, way.leaving)
    token = jnp.full((way.leaving,), tokens, jnp.int32)
    token = token.at[leaves].set(jnp.arange(tokens, dtype=jnp.int32)[:, None], mode="drop")
    sent = way.there(x.at[token].get(mode="fill", fill_value=0))
    back = way.back(local(sent, here, share))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = _zeros(x.shape, wide, back).at[token].add(back.astype(wide), mode="drop")
    return y.astype(x.dtype)


class _Ways:
    """The exchange of rows between devices, there and back.

    Every device knows how many rows [n n] go from each to each. It sends its own one way behind the
    other, `leaving` in all at most; those from each device come in a block of `block` rows.
    """

    def __init__(self, axes: Axes, counts: Int[Array, "n n"], block: int, leaving: int):
        self.axes, self.counts, self.block, self.leaving = axes, counts, block, leaving
        self.start = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts
        self.n, self.me = len(counts), lax.axis_index(axes)
        # The collective for rows of any number exists on these only.
        self.ragged = target.current().platform in ("tpu", "gpu")

    def there(self, rows: Float[Array, "leaving D"]) -> Float[Array, "arriving D"]:
        """Rows to the devices that they go to; what no row came for is zeros."""
        start, sizes = self.start[self.me], self.counts[self.me]
        out = _zeros((self.n * self.block, rows.shape[1]), rows.dtype, rows)
        if self.ragged:
            first = jnp.full((self.n,), self.me * self.block, jnp.int32)
            coming = self.counts[:, self.me]
            return lax.ragged_all_to_all(
                rows, out, start, sizes, first, coming, axis_name=self.axes
            )
        inside = jnp.arange(self.block, dtype=jnp.int32)[None]
        index = jnp.where(inside < sizes[:, None], start[:, None] + inside, self.leaving)
        blocks = rows.at[index].get(mode="fill", fill_value=0)
        return lax.all_to_all(blocks, self.axes, 0, 0).reshape(out.shape)

    def back(self, rows: Float[Array, "arriving D"]) -> Float[Array, "leaving D"]:
        """Rows to where they came from, in the order in which they left."""
        start, sizes = self.start[self.me], self.counts[self.me]
        out = _zeros((self.leaving, rows.shape[1]), rows.dtype, rows)
        if self.ragged:
            first = jnp.arange(self.n, dtype=jnp.int32) * self.block
            coming, theirs = self.counts[:, self.me], self.start[:, self.me]
            return lax.ragged_all_to_all(
                rows, out, first, coming, theirs, sizes, axis_name=self.axes
            )
        blocks = lax.all_to_all(rows.reshape(self.n, self.block, -1), self.axes, 0, 0)
        inside = jnp.arange(self.block, dtype=jnp.int32)[None]
        index = jnp.where(inside < sizes[:, None], start[:, None] + inside, self.leaving)
        return out.at[index].set(blocks, mode="drop")


def _as(array, other):
    """An array that varies over the mesh as another does."""
    return sharding.varying(array, tuple(jax.typeof(other).mat.varying))


def _zeros(shape, dtype, after):
    """Zeros that vary over the mesh as another array does, on a GPU made behind it.

    XLA for GPUs makes the zeros of all layers in one kernel, at once, and keeps them.
    """
    zeros = _as(jnp.zeros(shape, dtype), after)
    if target.current().platform != "gpu":
        return zeros
    return lax.optimization_barrier((zeros, after))[0]


def _local(run, kernels, x, experts, weights, *, parts: int):
    """This device's part of the sum of each token's experts, [M D].

    Of the pairs that a device might have it has one in `parts` in the mean. They are put side by
    side, and a first round does twice the mean, most often all. What is left is done in rounds
    that are left out where nothing is: so neither memory nor work grows with the pairs of others.
    """
    (tokens, chosen), count = experts.shape, kernels[0].shape[0]
    pairs = tokens * chosen
    size = max(_LEAST, -(-2 * pairs // parts))
    if size >= pairs:
        return run(x, experts, weights, *kernels)
    sizes = _rounds(pairs, size)
    looped = -(-(pairs - sum(sizes)) // size)
    places = sum(sizes) + looped * size
    flat = experts.reshape(-1)
    valid = flat < count
    place = jnp.where(valid, jnp.cumsum(valid, dtype=jnp.int32) - 1, places)
    put = lambda a, fill: _as(jnp.full((places,), fill, a.dtype), a)  # noqa: E731
    side = lambda a, fill: put(a, fill).at[place].set(a, mode="drop")  # noqa: E731
    token = side(jnp.arange(pairs, dtype=jnp.int32) // chosen + 0 * flat, tokens)
    expert, weight = side(flat, count), side(weights.reshape(-1), 0)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    @jax.checkpoint
    def some(y, token, expert, weight, x, kernels):
        rows = x.at[token].get(mode="fill", fill_value=0)
        own = run(rows, expert[:, None], weight[:, None], *kernels)
        return y.at[token].add(own.astype(wide), mode="drop")

    def of_round(start, size):
        return [a[start : start + size] for a in (token, expert, weight)]

    def step(y, given):
        add = lambda y: some(y, *given, x, kernels)  # noqa: E731
        return lax.cond(given[1][0] < count, add, lambda y: y, y), None

    def rest(y):
        """All rounds but the first, as far as there are pairs."""
        start = sizes[0]
        for more in sizes[1:]:
            y, start = step(y, of_round(start, more))[0], start + more
        if not looped:
            return y
        last = of_round(start, looped * size)
        return lax.scan(step, y, [a.reshape(looped, -1) for a in last])[0]

    y = some(_zeros(x.shape, wide, x), *of_round(0, size), x, kernels)
    # Most often that was all. There is no loop where none is needed: kernels that go into one are
    # copied to another layout on some TPUs, and memory for them is set aside in every step.
    return lax.cond(expert[size] < count, rest, lambda y: y, y).astype(x.dtype)


def _rounds(pairs: int, first: int) -> list[int]:
    """How many pairs the rounds before the loop take: all, or the first where they would be many.

    >>> _rounds(2048, 256), _rounds(100_000, 3000)
    ([256, 768, 768, 256], [3000])
    """
    following = -(-(pairs - first) // _MORE)
    if first > _LEAST or following > _FOLLOWING:
        return [first]
    return [first, *[_MORE] * (following - 1), pairs - first - _MORE * (following - 1)]
