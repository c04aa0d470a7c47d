"""What the cores ask of their operands before a backend sees them; errors name the argument.

Letters: B batch, T query tokens, S slots, N heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mla_jax.ops.seen import Seen

DTYPES = ("bfloat16", "float16", "float32", "float64")


def checked_soft_cap(soft_cap: float | None) -> float | None:
    """A cap of scores as a number, or None; ValueError where it is not positive."""
    if soft_cap is None:
        return None
    if not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: it must be positive, or None.")
    return float(soft_cap)


def shape_of(name: str, array: Array, letters: str) -> tuple[int, ...]:
    """The shape of an array; ValueError unless it has an axis for every letter."""
    if array.ndim != len(letters.split()):
        raise ValueError(f"{name} has shape {array.shape}: it must be [{letters}].")
    return array.shape


def expect_shape(name: str, array: Array, shape: tuple[int, ...], letters: str) -> None:
    """Raises ValueError unless an array has the shape that the other arguments ask for."""
    if array.shape != shape:
        raise ValueError(
            f"{name} has shape {array.shape}: it must be [{letters}] = {shape} to go with the "
            "other arguments."
        )


def common_dtype(**arrays: Array) -> str:
    """The dtype of all operands; ValueError where they have several, or one no core takes."""
    names = {name: jnp.dtype(array.dtype).name for name, array in arrays.items()}
    for name, dtype in names.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}: attention takes {', '.join(DTYPES)}.")
    if len(set(names.values())) > 1:
        given = ", ".join(f"{name} {dtype}" for name, dtype in names.items())
        raise ValueError(f"mixed dtypes: {given}. Cast them to one, that of the cache.")
    return next(iter(names.values()))


def checked_seen(lengths, batch, tokens, slots, heads, window, mask, segment_ids, chosen) -> Seen:
    """What each query sees, after a look at the arguments that say so."""
    if (isinstance(tokens, int) and not tokens) or (isinstance(slots, int) and not slots):
        raise ValueError(f"T = {tokens} query tokens, S = {slots} slots: both must be at least 1.")
    if lengths is not None:
        lengths = lengths if isinstance(lengths, jax.Array) else jnp.asarray(np.asarray(lengths))
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"lengths is {lengths.dtype}: it must be an integer array.")
        if lengths.shape not in ((batch,), (batch, tokens)):
            raise ValueError(
                f"lengths has shape {lengths.shape}: it must be [B] = ({batch},) or "
                f"[B T] = ({batch}, {tokens})."
            )
        # numpy: under jit, jax would trace the comparison even of a constant
        if not isinstance(lengths, jax.core.Tracer) and (np.asarray(lengths) > slots).any():
            raise ValueError(f"lengths={np.asarray(lengths)} go beyond the S = {slots} slots.")
    if window is not None and not window >= 1:
        raise ValueError(f"window={window}: it must be at least 1, or None.")
    if mask is not None:
        mask = checked_mask(mask, (batch, heads, tokens, slots))
    if segment_ids is not None:
        segment_ids = checked_ids("segment_ids", segment_ids, (batch, slots), "B S")
    if chosen is not None:
        count = chosen.shape[-1] if chosen.ndim == 3 else 0
        chosen = checked_ids("chosen", chosen, (batch, tokens, count), "B T K")
    return Seen.of(
        lengths,
        batch=batch,
        queries=tokens,
        slots=slots,
        window=window,
        mask=mask,
        segment_ids=segment_ids,
        chosen=chosen,
    )


def checked_mask(mask, full: tuple[int, int, int, int]) -> Bool[Array, "#B #N #T #S"]:
    """A mask as booleans; Flax's helpers make 0 and 1 of float32.

    Raises:
        ValueError: a dtype that is neither, values that are not 0 or 1, or a shape that does not
            broadcast to `full`, [B N T S].
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.ndim != 4 or any(m not in (1, f) for m, f in zip(mask.shape, full, strict=True)):
        raise ValueError(f"mask has shape {mask.shape}: not broadcastable to {full}, [B N T S].")
    if mask.dtype == jnp.bool_:
        return jnp.asarray(mask)
    if not isinstance(mask, jax.core.Tracer):
        values = np.unique(np.asarray(mask, np.float64))
        others = values[~np.isin(values, (0, 1))]
        if others.size:
            raise ValueError(
                f"mask is {mask.dtype} with values such as {others[0]}: it must be boolean, True = "
                "may attend, or 0 and 1."
            )
    return jnp.asarray(mask) != 0


def checked_ids(name: str, ids, shape: tuple[int, ...], letters: str) -> Int[Array, "..."]:
    """Integers of a shape, from an array or lists.

    Raises:
        ValueError: another shape, or numbers that are not whole.
    """
    ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"{name} is {ids.dtype} of shape {ids.shape}: it must be an integer array "
            f"[{letters}] = {shape}."
        )
    return jnp.asarray(ids)
