"""A pass without a cache: where tokens stand, and what each of them may see.

Letters: B batch, T tokens, M tokens of a memory, N heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from mla_jax import ops
from mla_jax.config import MLAConfig
from mla_jax.layers.memory import Memory
from mla_jax.layers.step import check_positions
from mla_jax.ops.seen import Seen


def whole_pass(
    config: MLAConfig,
    batch: int,
    tokens: int,
    *,
    positions=None,
    segment_ids=None,
    mask=None,
    causal: bool = True,
    memory: Memory | None = None,
) -> tuple[Int[Array, "T"] | Int[Array, "B T"], Seen]:
    """Positions, and what every one of B x T tokens may see; arguments as in the layer's call.

    Raises:
        ValueError: arguments that do not go together.
    """
    slots, lengths = tokens, None
    if memory is not None:
        memory.check(config, batch, segment_ids)
        slots, lengths, causal = memory.latent.shape[1], memory.lengths, False
    if not causal and config.sliding_window is not None:
        raise ValueError(f"causal=False: sliding_window={config.sliding_window} is causal.")
    if positions is None:
        place = jnp.arange if memory is None else jnp.zeros
        positions = place(tokens, dtype=jnp.int32)
    else:
        positions = check_positions(positions, batch, tokens)
    if segment_ids is not None:
        segment_ids = ops.checked_ids("segment_ids", segment_ids, (batch, tokens), "B T")
    if mask is not None:
        mask = ops.checked_mask(mask, (batch, config.num_attention_heads, tokens, slots))
        if config.index_topk is not None and mask.shape[1] != 1:
            raise ValueError(
                f"mask has shape {mask.shape}: with index_topk={config.index_topk} it must be "
                "[B 1 T T], since all heads attend to the same chosen tokens."
            )
    seen = Seen.of(
        lengths, batch=batch, queries=tokens, slots=slots, window=config.sliding_window, mask=mask,
        segment_ids=segment_ids, causal=causal,
    )  # fmt: skip
    return positions, seen
