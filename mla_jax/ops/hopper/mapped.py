"""A kernel's calls under `jax.vmap`: they become one call of more rows.

Letters: B batch rows of a call.
"""

import jax.numpy as jnp


def joined(size, arrays, of_arrays, table, of_table):
    """Operands of `size` mapped calls as those of one call of more rows, and what joins others.

    Args:
        size: how many calls.
        arrays: pattern, q_rope, latent and k_rope.
        of_arrays: for each of them, whether its first axis is that of the calls.
        table: of a paged store, or None.
        of_table: whether its first axis is that of the calls.

    Returns:
        arrays, table, and `join(x, is_mapped)` for other arrays [B ...].
    """

    def join(x, is_mapped):
        x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])  # of which P may be 0

    queries = [join(*pair) for pair in zip(arrays[:2], of_arrays[:2], strict=True)]
    held, of_held = arrays[2:], of_arrays[2:]
    if table is not None:
        rows = table.shape[of_table]
        table = join(table, of_table)
        if any(of_held):  # the pools of all calls, one after the other
            pages = held[0].shape[of_held[0]]
            before = jnp.repeat(jnp.arange(size, dtype=table.dtype) * pages, rows)[:, None]
            table = jnp.where(table < pages, table + before, size * pages)
    if table is None or any(of_held):
        held = [join(*pair) for pair in zip(held, of_held, strict=True)]
    return (*queries, *held), table, join
