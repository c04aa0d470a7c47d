"""The experts through XLA's own products, in the way that moves the fewest weights for M tokens.

* by pair: the kernels of each pair of token and expert are gathered; for a few tokens.
* all experts: every expert multiplies every token, so that each kernel is read once; for some
  tokens, which need most experts anyway.
* by block: tiles of one expert each, a few at a time; for many tokens.

`lax.ragged_dot` is made for this, but jax may turn it into a product with E masked copies of its
input, [E MK D], as it does on CPUs, and on GPUs but for two experimental flags of XLA.

Letters: M tokens, K experts per token, E experts, D hidden size, F inner size, J tiles.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mla_jax.ops.experts import stored
from mla_jax.ops.experts.call import Call
from mla_jax.ops.experts.tiles import make_tiles
from mla_jax.target import Target

DENSE_TOKENS = 256  # tokens up to which reading every expert once beats sorting
BLOCK = 256  # rows of one expert in a matmul
_AT_ONCE = 16  # blocks in one batched matmul


def why_not(call: Call, target: Target) -> str | None:
    """Nothing: XLA serves every call on every device."""
    return None


def way(call: Call) -> str:
    """Which of the three ways serves this call; a symbolic number of tokens goes by block."""
    if not call.static:
        return "by_block"
    if 2 * call.pairs <= call.experts:
        return "by_pair"
    return "all_experts" if call.tokens <= DENSE_TOKENS else "by_block"


def run(x, experts, weights, gate, up, down, *, precision, call: Call, target: Target):
    """See `routed_experts`."""
    if call.stored:
        return stored.run(
            x, experts, weights, gate, up, down, precision=precision, partial=call.partial
        )
    chosen = {"by_pair": by_pair, "all_experts": all_experts, "by_block": by_block}[way(call)]
    options = {"precision": precision, "partial": call.partial}
    mixed = chosen(x, experts, weights, (gate, up, down), **options)
    return mixed.astype(x.dtype)


def by_pair(x, experts, weights, kernels, *, precision=None, partial=False):
    """Few pairs of token and expert: the kernels of just those, gathered."""
    some = jnp.minimum(experts, len(kernels[0]) - 1) if partial else experts
    chosen = [kernel[some] for kernel in kernels]
    own = _gated("MD,MKDF->MKF", "MKF,MKFD->MKD", x, chosen, precision)
    if partial:
        own = jnp.where((experts < len(kernels[0]))[..., None], own, 0)
    return (own * weights[..., None]).sum(1)


def all_experts(x, experts, weights, kernels, *, precision=None, partial=False):
    """Some tokens: all experts for all of them, kernels read once."""
    del partial  # to a weight that has no column nothing is added
    own = _gated("MD,EDF->EMF", "EMF,EFD->EMD", x, kernels, precision)
    rows = jnp.arange(x.shape[0])[:, None]
    share = jnp.zeros((x.shape[0], len(own)), weights.dtype).at[rows, experts].add(weights)
    return jnp.einsum("EMD,ME->MD", own, share, precision=precision)


def by_block(x, experts, weights, kernels, *, precision=None, partial=False, rows=BLOCK):
    """Many tokens: sorted into tiles of `rows` rows of one expert each."""
    tiles = make_tiles(experts, len(kernels[0]), rows, partial)

    def one(block):
        tokens, expert = block
        own = [kernel[expert] for kernel in kernels]
        return _gated("MD,DF->MF", "MF,FD->MD", tokens, own, precision)

    blocks = tiles.rows_of(x).reshape(-1, rows, x.shape[1])
    count = blocks.shape[0]
    together = min(_AT_ONCE, count) if isinstance(count, int) else None
    outputs = lax.map(one, (blocks, tiles.owner), batch_size=together)
    own = tiles.of_pairs(outputs.reshape(-1, x.shape[1]), partial)
    return (own * weights[..., None]).sum(1)


def _gated(letters, back, x, kernels, precision):
    """Gated MLPs as einsums: `letters` takes x to [... F], `back` returns it."""
    gate, up, down = (kernel.astype(x.dtype) for kernel in kernels)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    hidden = jax.nn.silu(einsum(letters, x, gate)) * einsum(letters, x, up)
    return einsum(back, hidden.astype(x.dtype), down)
