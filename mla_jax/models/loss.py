"""What a decoder is trained on: the next token, the one after it, and an even load of experts.

Letters: B batch, T tokens, L layers with experts, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mla_jax.layers.remat import Save
from mla_jax.models.decoder import Decoder


class LossTerms(NamedTuple):
    """What a training loss consists of, each without its weight.

    Attributes:
        next_token: mean cross-entropy of the next tokens, in nats.
        draft: that of the tokens next but one, by the block for multi-token prediction; None in a
            model without.
        balance: `sequence_balance_loss`, summed over layers; None in a model without experts.
        load: int32 [L E], how many tokens each expert was given, that block's last:
            `Decoder.balance` takes it. None in a model without experts.

    >>> terms = LossTerms(jnp.ones(()), draft=None, balance=None, load=None)
    >>> float(terms.next_token)
    1.0
    """

    next_token: Float[Array, ""]
    draft: Float[Array, ""] | None
    balance: Float[Array, ""] | None
    load: Int[Array, "L E"] | None


def training_loss(
    model: Decoder,
    tokens: Int[Array, "B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    valid: Bool[Array, "B T"] | None = None,
    remat: Save | None = None,
    mtp_weight: float = 0.3,
    balance_weight: float = 1e-4,
    chunk: int = 2048,
) -> tuple[Float[Array, ""], LossTerms]:
    """The loss of DeepSeek-V3's pre-training (arXiv 2412.19437, sections 2.1.2 and 2.2).

    next_token + mtp_weight draft + balance_weight balance. The bias on the router's choice has no
    gradient: move it after every step, `model.balance(terms.load)`.

    Args:
        model: with `mtp=True` its block is trained too.
        tokens: int [B T], T >= 2 (3 with mtp); the model reads all but the last one.
        segment_ids: int [B T], texts packed into a row: a token attends within its own, and no
            loss is of a token that begins another.
        valid: tokens that are no padding; None is all.
        remat: what every layer's backward pass finds: see `mla_jax.remat_policy`.
        mtp_weight: lambda; DeepSeek-V3 took 0.3 for the first 10 T tokens, then 0.1.
        balance_weight: alpha; 0.0001 there.
        chunk: tokens whose logits exist at once: see `mla_jax.mean_linear_cross_entropy`.

    Returns:
        The loss, a mean over the tokens that count, and its terms.

    Raises:
        ValueError: arguments that do not go together.

    >>> from flax import nnx
    >>> from mla_jax.models import Decoder, DecoderConfig
    >>> model = Decoder(DecoderConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    >>> loss, terms = jax.eval_shape(training_loss, model, jnp.array([[3, 1, 4, 1, 5]]))
    >>> loss.shape, terms.load.shape  # of three layers with eight experts each
    ((), (3, 8))
    """
    least = 2 if model.predictor is None else 3
    if tokens.ndim != 2 or tokens.shape[1] < least:
        raise ValueError(f"tokens has shape {tokens.shape}: it must be [B T] with T >= {least}.")
    for name, array in (("segment_ids", segment_ids), ("valid", valid)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(
                f"{name} has shape {array.shape}: it must be [B T] = {tokens.shape}, as tokens."
            )
    follows = jnp.ones(tokens.shape, bool) if valid is None else valid
    counted = follows[:, :-1] & follows[:, 1:]
    if segment_ids is not None:
        counted &= segment_ids[:, :-1] == segment_ids[:, 1:]
    read = None if segment_ids is None else segment_ids[:, :-1]
    options = {"segment_ids": read, "valid": follows[:, :-1], "remat": remat}
    hidden, routings = model.states_with_routing(tokens[:, :-1], **options)
    next_token = model.loss(hidden, tokens[:, 1:], counted, chunk=chunk)
    loss, draft = next_token, None
    if model.predictor is not None:
        # As many positions as the model's, the last of which counts for nothing: kernels like
        # lengths that are round.
        states, routing = model.draft_states(hidden, tokens[:, 1:], **options)
        routings += () if routing is None else (routing,)
        labels, after = _earlier(tokens[:, 1:]), counted & _earlier(counted)
        draft = model.draft_loss(states, labels, after, chunk=chunk)
        loss += mtp_weight * draft
    if not routings:
        return loss, LossTerms(next_token, draft, None, None)
    balance = jnp.stack([routing.balance for routing in routings]).sum()
    load = jnp.stack([routing.load for routing in routings])
    terms = LossTerms(next_token, draft, balance, jax.lax.stop_gradient(load))
    return loss + balance_weight * balance, terms


def _earlier(x):
    """x[b, t + 1] at [b, t]; zeros or False at the last."""
    return jnp.pad(x[:, 1:], [(0, 0), (0, 1)])
