"""What every query may attend to: one object says it, for all layers and backends of a step.

Letters: B batch, T query tokens, S slots, N heads.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """Which slots each query sees: those below its limit, in its window and segment, unmasked.

    Attributes:
        limits: int32 [B T], a query sees slots below it only; 0 sees nothing.
        ends: int32 [B], where a row's queries are its last tokens: the slots in use. Query t then
            sees ends - (T-1-t) slots, and kernels need one number a row. None where limits say all.
        counts: int32 [B], where rows are padded on the right: the first `counts` of a row's queries
            count. They are its last tokens, query t sees ends - (counts-1-t) slots, and the queries
            after them see nothing. None: all T count.
        segments: ids of the queries [B T] and of the slots [B S]; a query sees its own segment's.
        mask: boolean, broadcastable to [B N T S], True = may attend.
        chosen: int32 [B T K], the slots that each query attends to, of those that the rest lets it
            see; no slot twice, and one at S or beyond does not count. None is all.
        plan: how the backend that was chosen cuts its work, made of these limits by
            `dispatch.plan`; None makes it within the call.
        window: a query sees only the last `window` slots below its limit; None is all.
        full: all S slots hold tokens, so that none may hold garbage.

    >>> Seen.of(jnp.array([5, 0]), batch=2, queries=2, slots=8).limits
    Array([[4, 5],
           [0, 0]], dtype=int32)
    """

    limits: Int[Array, "B T"]
    ends: Int[Array, "B"] | None = None
    counts: Int[Array, "B"] | None = None
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None
    mask: Bool[Array, "#B #N #T #S"] | None = None
    chosen: Int[Array, "B T K"] | None = None
    plan: Any = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    full: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def of(
        cls,
        lengths: Int[Array, "B"] | Int[Array, "B T"] | None,
        *,
        batch: int,
        queries: int,
        slots: int,
        window: int | None = None,
        mask: Bool[Array, "#B #N #T #S"] | None = None,
        segment_ids: Int[Array, "B S"] | None = None,
        causal: bool = True,
        chosen: Int[Array, "B T K"] | None = None,
    ) -> "Seen":
        """What `lengths` of the public functions mean, the one place that says so.

        [B]: the queries are the last T of `lengths[b]` tokens, so query t sees lengths[b] - (T-1-t)
        slots, itself the last. [B T]: given per query. None: the queries are the last T of S.
        Without `causal` every query sees all of the row's tokens.
        """
        segments = None if segment_ids is None else (segment_ids[:, slots - queries :], segment_ids)
        more = {"window": window, "mask": mask, "segments": segments, "full": lengths is None}
        more["chosen"] = chosen
        ends = jnp.full((batch,), slots, jnp.int32) if lengths is None else lengths
        ends = jnp.clip(jnp.asarray(ends).astype(jnp.int32), 0, slots)
        if not causal and ends.ndim == 1:
            ends = jnp.broadcast_to(ends[:, None], (batch, queries))
        if ends.ndim == 2:
            return cls(limits=ends, **more)
        token = jnp.arange(queries, dtype=jnp.int32)[None]
        limits = jnp.maximum(ends[:, None] - (queries - 1 - token), 0)
        return cls(limits=limits, ends=ends, **more)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of what is asked for beyond plain causal attention, sorted."""
        used = {
            "lengths": not self.full and (self.ends is not None or self.limits.shape[1] == 1),
            "lengths per query": self.ends is None and self.limits.shape[1] != 1,
            "window": self.window is not None,
            "mask": self.mask is not None,
            "chosen": self.chosen is not None,
            "segment_ids": self.segments is not None,
        }
        return tuple(sorted(name for name, is_used in used.items() if is_used))

    @property
    def row_ends(self) -> Int[Array, "B"]:
        """The one number that gives a row's limits: `ends`, or with T = 1 the query's own limit."""
        if self.limits.shape[1] == 1:
            return self.limits[:, 0]
        assert self.ends is not None, "limits per query have no single end"
        return self.ends

    def visible(self, slots: Int[Array, "S"]) -> Bool[Array, "B #N T S"]:
        """Whether each query sees each of all S `slots`."""
        seen = visible(
            self.limits, slots, window=self.window, segment_ids=self.segments, mask=self.mask
        )
        if self.chosen is None:
            return seen
        return seen & members(self.chosen, slots.shape[0])

    def queries(self, first: Int[Array, ""] | int, count: int) -> Self:
        """The same for the `count` queries from `first` on."""
        cut = lambda array, axis=1: jax.lax.dynamic_slice_in_dim(array, first, count, axis)  # noqa: E731
        segments, mask, chosen = self.segments, self.mask, self.chosen
        if segments is not None:
            segments = (cut(segments[0]), segments[1])
        if mask is not None and mask.shape[2] > 1:
            mask = cut(mask, 2)
        return self.replace(
            limits=cut(self.limits),
            ends=None,
            counts=None,
            segments=segments,
            mask=mask,
            chosen=None if chosen is None else cut(chosen),
        )

    def masked(self, slots: int) -> Self:
        """The same with a mask in place of the chosen ones of S `slots`."""
        if self.chosen is None:
            return self
        mask = members(self.chosen, slots)
        return self.replace(chosen=None, mask=mask if self.mask is None else mask & self.mask)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields replaced; a plan does not outlive the limits it was made of."""
        return dataclasses.replace(self, **({"plan": None} | changes))

    def last(self, x: Array) -> Array:
        """Queries [B T ...] with those that count moved to the end of their rows."""
        return x if self._shift is None else _roll(x, -self._shift)

    def first(self, x: Array) -> Array:
        """Results of such queries, moved back to where they came from."""
        return x if self._shift is None else _roll(x, self._shift)

    @property
    def _shift(self):
        tokens = self.limits.shape[1]
        return None if self.counts is None or tokens == 1 else tokens - self.counts


def members(chosen: Int[Array, "B T K"], slots: int) -> Bool[Array, "B 1 T S"]:
    """Which of S slots are chosen.

    >>> members(jnp.array([[[2, 4]]]), 4)
    Array([[[[False, False,  True, False]]]], dtype=bool)
    """
    batch, tokens, _ = chosen.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None, None]
    token = jnp.arange(tokens, dtype=jnp.int32)[None, :, None]
    none = jnp.zeros((batch, tokens, slots), bool)
    return none.at[row, token, chosen].set(True, mode="drop")[:, None]


def visible(
    limits: Int[Array, "B T"],
    slots: Int[Array, "S"],
    *,
    window: int | None = None,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
) -> Bool[Array, "B #N T S"]:
    """Which slots a query attends to: causal, within its window and segment, and unmasked."""
    limits, slots = limits[:, None, :, None], slots[None, None, None]
    seen = slots < limits
    if window is not None:
        seen &= slots >= limits - window
    if segment_ids is not None:
        of_query, of_slot = segment_ids
        seen &= of_query[:, None, :, None] == of_slot[:, None, None, :]
    if mask is not None:
        seen = seen & mask
    return seen


def _roll(x, by):
    """x[b, (t + by[b]) mod T] at [b, t]."""
    token = jnp.arange(x.shape[1], dtype=jnp.int32)[None] + by[:, None]
    index = (token % x.shape[1]).reshape(*token.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1)
