"""Pairs of token and expert in tiles of rows, each tile of one expert: what every sorted way uses.

No tile is shared by two experts, so that no product is masked or cut; the price is that each
expert's last tile is filled up with rows of zeros.

Letters: M tokens, K experts per token, E experts, J tiles, L rows of all tiles.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_FEW_PAIRS = 1024  # pairs whose ranks are compared, not sorted


class Tiles(NamedTuple):
    """Where every pair of token and expert goes.

    Attributes:
        token: the token of every row; M, which is none, for a row that fills a tile up.
        owner: the expert of every tile.
        used: how many tiles have rows that count; they come first.
        place: each pair's row.
        first: each expert's first tile.
        needed: each expert's number of tiles.
    """

    token: Int[Array, "L"]
    owner: Int[Array, "J"]
    used: Int[Array, "1"]
    place: Int[Array, "M K"]
    first: Int[Array, "E"]
    needed: Int[Array, "E"]

    def rows_of(self, x: Float[Array, "M D"]) -> Float[Array, "L D"]:
        """Each row's token; rows that fill a tile up are zeros."""
        return x.at[self.token].get(mode="fill", fill_value=0)

    def of_pairs(self, x: Float[Array, "L *D"], partial: bool = False) -> Float[Array, "M K *D"]:
        """Each pair's row; with `partial` zeros for a pair that has none."""
        if not partial:
            return x[self.place]
        return x.at[self.place].get(mode="fill", fill_value=0)


def make_tiles(experts: Int[Array, "M K"], groups: int, rows: int, partial: bool = False) -> Tiles:
    """Cuts the pairs of a router's choice into tiles of `rows` rows for `groups` = E experts.

    With `partial` there may be pairs of the expert E, which are dropped: they have no row, and
    their place is past all rows.
    """
    flat = experts.reshape(-1).astype(jnp.int32)
    tokens, pairs = experts.shape[0], flat.size
    expert = np.arange(groups, dtype=np.int32)
    sizes = (flat[None] == expert[:, None]).sum(1, dtype=jnp.int32)
    needed = lax.div(sizes + (rows - 1), jnp.int32(rows))
    before = expert[None] < expert[:, None]  # sums, not scans: these are a kernel each on a GPU
    first = jnp.where(before, needed[None], 0).sum(1, dtype=jnp.int32)
    if isinstance(pairs, int) and pairs <= _FEW_PAIRS:
        pair = np.arange(pairs, dtype=np.int32)
        earlier = (flat[None] == flat[:, None]) & (pair[None] < pair[:, None])
        rank = earlier.sum(1, dtype=jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True)
        start = jnp.where(before, sizes[None], 0).sum(1, dtype=jnp.int32)
        position = (
            jnp.zeros_like(flat)
            .at[order]
            .set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
        )
        rank = position - start[flat]
    place = first[flat] * rows + rank
    # Each used expert has at most one tile that is not full.
    most = min(groups, pairs) if isinstance(pairs, int) else groups
    count = most + pairs // rows
    if partial:
        nowhere = count * rows + jnp.arange(pairs, dtype=jnp.int32)
        place = jnp.where(flat < groups, place, nowhere)
    token = jnp.full((count * rows,), tokens, jnp.int32)
    token = token.at[place].set(
        jnp.arange(pairs, dtype=jnp.int32) // experts.shape[1], unique_indices=True
    )
    tile = jnp.arange(count, dtype=jnp.int32)
    owner = ((first + needed)[None] <= tile[:, None]).sum(1, dtype=jnp.int32)
    return Tiles(
        token=token,
        owner=jnp.minimum(owner, groups - 1),
        used=needed.sum(keepdims=True),
        place=place.reshape(experts.shape),
        first=first,
        needed=needed,
    )


class Chosen(NamedTuple):
    """The experts that some token has chosen, in order.

    Attributes:
        owner: the expert of every place; behind the places in use it is any expert.
        rank: the place of every expert that has one; behind these E numbers, once or more often,
            how many places are in use.
        arrivals: zeros, of which the first counts for a kernel whose thread blocks meet. It is zero
            again after it, and no constant: programs share these.
    """

    owner: Int[Array, "places"]
    rank: Int[Array, "ranks"]
    arrivals: Int[Array, "zeros"]


def no_arrivals(owner: Int[Array, "places"]) -> Int[Array, "1"]:
    """The `arrivals` of a table of these owners, a zero that no compiler folds."""
    return jnp.where(owner[:1] < 0, 1, 0).astype(jnp.int32)


def chosen_experts(experts: Int[Array, "M K"], groups: int) -> Chosen:
    """Which of `groups` = E experts a router's choice names; the number E names none.

    >>> chosen = chosen_experts(jnp.array([[2, 0], [2, 3]]), 4)
    >>> chosen.owner[:chosen.rank[-1]].tolist(), chosen.rank[jnp.array([0, 2, 3])].tolist()
    ([0, 2, 3], [0, 1, 2])
    """
    flat = experts.reshape(-1).astype(jnp.int32)
    expert = np.arange(groups, dtype=np.int32)
    named = (flat[None] == expert[:, None]).any(1)
    before = expert[None] < np.arange(groups + 1, dtype=np.int32)[:, None]
    rank = jnp.where(before, named[None], False).sum(1, dtype=jnp.int32)
    place = np.arange(min(groups, flat.size), dtype=np.int32)
    here = named[None] & (rank[None, :-1] == place[:, None])
    owner = jnp.where(here, expert[None], 0).sum(1, dtype=jnp.int32)
    return Chosen(owner, rank, no_arrivals(owner))
