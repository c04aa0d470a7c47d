"""What the TPU kernel computes of a block: its scores, and the sum of its latents by their weights.

The rows keep a running maximum and a running sum (Milakov and Gimelshein 2018, arXiv 1805.02867) in
base 2. A block of one row that all the row's queries see is computed at once. Of any other block
each piece is computed by itself, with the queries of its row, and masked.

Letters: T query tokens, N heads, R latent, P rotary channels, M = T N queries of a row, padded to
whole tiles.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from mla_jax.ops.tpu.planning import LANES, TILE
from mla_jax.ops.tpu.walk import Walk

_MASKED = -1e30  # finite, so that masked minus masked is 0 and not NaN


class Compute:
    """The two halves of a step, `score` of one block and `mix` of the block before it.

    The running values of rows are stored once for every piece of a block, at its number: `top`,
    `total` and `mixed` there cover the piece's row up to the end of that piece, and `fade` is how
    much the piece before counts less under the new maximum. A whole block uses the last number
    only, from which the next block goes on.
    """

    def __init__(self, walk: Walk, vmem: dict[str, Any], keys, parts):
        """`keys` names the parts of a key; `parts()` are those of the first block."""
        self.walk, self.plan, self.vmem, self.keys, self.parts = walk, walk.plan, vmem, keys, parts
        self.rows, self.rank = vmem["mixed"].shape[1:]
        self.last = walk.pieces - 1
        exact = vmem["latent"].dtype == jnp.float32
        self.dot = functools.partial(
            lax.dot_general,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST if exact else None,
        )

    def columns(self, first, end):
        """The slots of a block from a piece to another, as a slice of its scores."""
        return slice(first * self.plan.piece, end * self.plan.piece)

    def score(self, step, start, whole, arrive=None):
        """Scores of a block, and the running maximum of its rows; arrive(piece) before a part."""
        vmem, walk, buffer = self.vmem, self.walk, self.walk.buffer(step)
        top = vmem["top"][(step + 1) & 1, self.last]
        for first, end, place in walk.units(start, whole):
            parts, scores = [(first, end)], []
            if arrive and whole:
                parts = [(piece, end) for piece, end, _ in self.parts()]
            for part in parts:
                if arrive:
                    arrive(part[0])
                pattern = _rows(vmem["pattern"][walk.held(place.row)])
                latent = self.latents(buffer, *part)
                scores.append(self.dot(pattern, latent, (((1,), (1,)), ((), ()))))
            scores = jnp.concatenate(scores, axis=1)
            if "k_rope" in self.keys:
                q_rope = _rows(vmem["q_rope"][walk.held(place.row)])
                tiles = range(*(n * self.plan.piece // LANES for n in (first, end)))
                k_rope = [_rows(vmem["k_rope"][buffer, :, tile]) for tile in tiles]
                k_rope = jnp.concatenate(k_rope, axis=1)
                scores += self.dot(q_rope, k_rope, (((1,), (0,)), ((), ())))
            scores = scores * walk.sizes.scale
            if not whole:
                scores = self.masked(place, scores)
            last = jnp.where(walk.opens(step, first, place), _MASKED, top)
            top = jnp.maximum(last, scores.max(-1, keepdims=True))
            vmem["scores"][:, self.columns(first, end)] = scores
            vmem["top"][step & 1, end - 1] = top
            vmem["fade"][end - 1] = jnp.exp2(last - top)

    def latents(self, buffer, first, end):
        """[slots R] of a block from a piece to another."""
        tiles = slice(*(n * self.plan.piece // TILE for n in (first, end)))
        return _rows(self.vmem["latent"][buffer, tiles])

    def masked(self, place, scores):
        """Scores of a piece, `_MASKED` where a query does not see the slot."""
        sizes = self.walk.sizes
        limits = [limit - place.piece * self.plan.piece for limit in self.walk.limits(place.row)]
        token = lax.broadcasted_iota(jnp.int32, scores.shape, 0) // sizes.heads
        limit = functools.reduce(
            lambda rest, t: jnp.where(token >= t, limits[t], rest),
            range(1, sizes.tokens),
            limits[0],
        )
        slot = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jnp.where(slot < limit, scores, _MASKED)

    def weigh(self, step, start, whole):
        """Weights of a block from its scores, summed in `total` (by lane); what `mix` needs."""
        vmem, weighed = self.vmem, []
        total = vmem["total"][self.last]
        for first, end, place in self.walk.units(start, whole):
            top, fade = vmem["top"][step & 1, end - 1], vmem["fade"][end - 1]
            scores = vmem["scores"][:, self.columns(first, end)]
            weights = jnp.exp2(scores - _repeat(top, scores.shape[1]))
            parts = [weights[:, i : i + LANES] for i in range(0, weights.shape[1], LANES)]
            opens = self.walk.opens(step, first, place)
            total = jnp.where(opens, 0.0, total * fade) + functools.reduce(jnp.add, parts)
            vmem["total"][end - 1], vmem["peak"][end - 1] = total, top
            weighed.append((first, end, opens, weights.astype(vmem["latent"].dtype), fade))
        return weighed

    def mix(self, step, weighed, results):
        """Sums a block's latents by their weights in `mixed`; with the results after each piece."""
        vmem, buffer, mixed = self.vmem, self.walk.buffer(step), self.vmem["mixed"][self.last]
        for first, end, opens, weights, fade in weighed:
            new = self.dot(weights, self.latents(buffer, first, end), (((1,), (0,)), ((), ())))
            mixed = new + jnp.where(opens, 0.0, mixed) * _repeat(fade, self.rank)
            vmem["mixed"][end - 1] = mixed
            if results:
                self.result(step, end - 1)

    def normalized(self, number):
        """(out [M R] float32, lse by lane [groups 128]) of a row that ends with a piece."""
        top = self.vmem["peak"][number]
        total = jnp.broadcast_to(self.vmem["total"][number].sum(-1, keepdims=True), top.shape)
        some = ~(top <= _MASKED / 2)  # NaN is a score, too
        share = jnp.where(some, 1 / total, 0.0)
        out = self.vmem["mixed"][number] * _repeat(share, self.rank)
        lse = jnp.where(some, (top + jnp.log2(total)) * math.log(2), -jnp.inf)
        groups = []
        for i in range(0, self.rows, LANES):
            part = lse[i : i + LANES]
            diagonal = lax.broadcasted_iota(jnp.int32, part.shape, 0) == lax.broadcasted_iota(
                jnp.int32, part.shape, 1
            )
            groups.append(jnp.where(diagonal, part, 0.0).sum(0, keepdims=True))
        return out, jnp.concatenate(groups)

    def result(self, step, number):
        """Puts the result of a row that ends with a piece where its copy to HBM begins."""
        vmem, turn = self.vmem, step & 1
        out, lse = self.normalized(number)
        vmem["out"][turn, number] = out.astype(vmem["out"].dtype).reshape(-1, TILE, self.rank)
        vmem["lse"][turn, number] = lse


def _repeat(x, width):
    """[M 128] to [M width] by whole vector registers, so that no data moves."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def _rows(x):
    """[.. /8 8 K] to [.. K]."""
    return x.reshape(-1, x.shape[-1])
