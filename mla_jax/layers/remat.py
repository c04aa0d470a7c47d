"""What a rematerialised layer keeps of its forward pass: the layer's residuals, by their names.

A backward pass needs what the forward pass made. `jax.checkpoint` keeps a layer's input instead and
computes the rest again; what a policy names is kept too. MLA has good things to name: latents are
small, and behind them lie the widest inputs of the layer, D channels.

Letters: D hidden size, Q q_lora_rank, R kv_lora_rank, P qk_rope_head_dim, N heads, H nope, V value.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

Save = Literal["nothing", "latents", "queries", "all"]

# What each keeps beyond the one before it. Latents are named before their norms, whose backward
# needs what comes in: kept after them, they would be computed again all the same.
_NAMES: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "latents": ("q_latent", "latent"),
    "queries": ("query",),
    "all": ("keys_values", "heads", "lse"),
}


def remat_policy(save: Save) -> Callable[..., bool]:
    """A policy for `jax.checkpoint` or `nnx.remat` around a layer: what its backward finds.

    | save | numbers a token and layer | computed again in the backward |
    |---|---|---|
    | `"nothing"` | | the layer |
    | `"latents"` | Q + R + P | all but the projections to latents |
    | `"queries"` | and N (H + P) | keys, values, attention, and what is no attention |
    | `"all"` | and N (H + V) + N V | scores, and what is no attention |

    Without a policy and without `jax.checkpoint` nothing is computed again. The numbers are in the
    computation's dtype. With "all", backends whose kernels have a backward of their own find the
    heads and their lse (`pallas_gpu`) and do not attend again; cuDNN does.

    Args:
        save: what is kept, each with what those before it keep.

    Raises:
        ValueError: another `save`.

    >>> import jax.numpy as jnp, mla_jax
    >>> from flax import nnx
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> policy = mla_jax.remat_policy("latents")
    >>> forward = jax.checkpoint(lambda x: x + layer(x), policy=policy)
    >>> jax.eval_shape(jax.grad(lambda x: forward(x).sum()), jnp.ones((2, 5, 128))).shape
    (2, 5, 128)
    """
    return jax.checkpoint_policies.save_only_these_names(*saved_names(save))


def saved_names(save: Save) -> tuple[str, ...]:
    """The names that `remat_policy(save)` keeps.

    Raises:
        ValueError: another `save`.

    >>> saved_names("queries")
    ('q_latent', 'latent', 'query')
    """
    kinds = get_args(Save)
    if save not in kinds:
        raise ValueError(f"save={save!r}: it must be one of {', '.join(map(repr, kinds))}.")
    return sum((_NAMES[kind] for kind in kinds[: kinds.index(save) + 1]), ())


def rematerialised(function: Callable[..., Any], save: Save | None) -> Callable[..., Any]:
    """function(*arrays, **options) behind `jax.checkpoint` and its policy; itself for None.

    The function may close over parameters, whose gradients it then has as before.

    >>> float(jax.grad(rematerialised(lambda x: x * x, "nothing"))(3.0))
    6.0
    """
    if save is None:
        return function
    policy = remat_policy(save)

    def again(*arrays, **options):
        return jax.checkpoint(functools.partial(function, **options), policy=policy)(*arrays)

    return again
