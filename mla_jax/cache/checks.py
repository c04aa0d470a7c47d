"""What a cache refuses, and in which words.

Letters: B batch rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mla_jax.cache.dense import Dense
from mla_jax.cache.paged import PAGE, Pages
from mla_jax.cache.scaled import ENCODINGS, is_encoding
from mla_jax.plain import Whole


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


def sizes(**given: Any) -> None:
    """Raises ValueError unless every size is a whole number of at least 1, or a symbol."""
    for name, value in given.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        # Under jax.export a size may be a symbol, which is no int.
        if not (whole or jax.export.is_symbolic_dim(value)) or (whole and value < 1):
            raise ValueError(f"{name}={value!r}: {name} must be a whole number of at least 1.")


def whole_pages(max_length: Whole) -> None:
    """Raises ValueError unless that many slots are whole pages."""
    if max_length % PAGE:
        raise ValueError(
            f"max_length={max_length}: with pages it must be a multiple of their {PAGE} "
            f"slots, such as {-(-max_length // PAGE) * PAGE}."
        )


def rows(given: Any, batch_size: int) -> Bool[Array, "B"]:
    """Which rows are meant, as an array; raises ValueError unless they are bool [B]."""
    given = given if isinstance(given, jax.Array) else np.asarray(given)
    if given.shape != (batch_size,) or given.dtype != jnp.bool_:
        raise ValueError(
            f"rows is {given.dtype} of shape {given.shape}: it must be bool [{batch_size}]."
        )
    return jnp.asarray(given)


def number(name: str, given: Any, batch_size: int) -> None:
    """Raises ValueError unless the number is that of a row; never under jit."""
    if not isinstance(given, jax.core.Tracer) and not 0 <= given < batch_size:
        raise ValueError(f"{name}={given}: this cache has rows 0 to {batch_size - 1}.")


def alike(stores: Sequence[Dense], others: Sequence[Dense]) -> None:
    """Raises ValueError unless the row's stores, the others, are those of the same model."""
    if len(stores) != len(others):
        raise ValueError(
            f"row has {len(others)} stores, this cache {len(stores)}: they must be "
            "of the same model."
        )
    for here, there in zip(stores, others, strict=True):
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


def room(ends: Any, held: Any, max_length: int, pages: Pages | None = None, needed: Any = 0):
    """Raises ValueError where rows would hold more than they have room for; never under jit.

    Args:
        ends: [B], how many tokens each would hold.
        held: for how many there is room, a number or [B].
        max_length: S of the cache.
        pages: those of the cache; `needed` [B] more of them would be taken.
    """
    if any(isinstance(x, jax.core.Tracer) for x in (ends, held)):
        return
    over = np.flatnonzero(np.asarray(ends) > np.asarray(held))
    if not over.size:
        return
    wanted = np.asarray(ends)[over].tolist()
    if pages is not None and (np.asarray(ends)[over] <= max_length).all():
        raise ValueError(
            f"pages run out: rows {over.tolist()} would hold {wanted} tokens, which takes "
            f"{int(np.asarray(needed).sum())} more pages, and {int(pages.available)} of "
            f"{pages.count} are free: make the cache with more pages, or reset rows."
        )
    raise ValueError(
        f"rows {over.tolist()} would hold {wanted} tokens, the cache has max_length="
        f"{max_length} slots: make it longer or truncate rows."
    )


def copied(failed: Bool[Array, "B"], pages: Pages) -> None:
    """Raises ValueError where rows got no page for a copy that they need; never under jit."""
    if not isinstance(failed, jax.core.Tracer) and np.asarray(failed).any():
        raise ValueError(
            f"pages run out: rows {np.flatnonzero(np.asarray(failed)).tolist()} need a copy of "
            f"a page that other rows hold too, and {int(pages.available)} of "
            f"{pages.count} are free: make the cache with more pages, or reset rows."
        )
