"""The router of a mixture of experts: which experts a token goes to, and their weights.

DeepSeekMoE (arXiv 2401.06066), and DeepSeek-V3's bias on the choice (arXiv 2412.19437, section
2.1.2).

Letters: B any leading axes, M tokens, D hidden size, E experts, K experts per token.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import sharding
from mla_jax.layers.quantised import Kept
from mla_jax.ops.experts import choose, route
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.order import in_order


class _Attention(Protocol):
    @property
    def hidden_size(self) -> int: ...


class ExpertsConfig(Protocol):
    """What a mixture of experts asks of its config; `mla_jax.models.DecoderConfig` has it all."""

    @property
    def attention(self) -> _Attention: ...
    @property
    def moe_intermediate_size(self) -> int | None: ...
    @property
    def n_routed_experts(self) -> int | None: ...
    @property
    def num_experts_per_tok(self) -> int: ...
    @property
    def n_shared_experts(self) -> int: ...
    @property
    def scoring_func(self) -> str: ...
    @property
    def norm_topk_prob(self) -> bool: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def has_selection_bias(self) -> bool: ...
    @property
    def zero_expert_num(self) -> int: ...
    @property
    def n_group(self) -> int: ...
    @property
    def topk_group(self) -> int: ...


class SelectionBias(nnx.Variable):
    """The router's bias on the choice of experts [E]: state that the load moves, not a parameter.

    An optimizer made with `wrt=nnx.Param` leaves it alone, weight decay included; it is saved and
    loaded with the rest of the model's state.

    >>> from mla_jax.layers.experts import balance_bias
    >>> bias = SelectionBias(jnp.zeros(4))
    >>> bias.set_value(balance_bias(bias[...], jnp.array([3, 1, 2, 2])))
    >>> bias[...].tolist() == jnp.array([-1e-3, 1e-3, 0.0, 0.0]).tolist()
    True
    """


class Router(nnx.Module):
    """Which experts a token goes to, and their weights: float32 throughout.

    `bias` [E] (where the config has_selection_bias) shifts the choice but not the weights
    (DeepSeek-V3, arXiv 2412.19437, equation 16). E counts the experts that return their input, too.

    Args:
        config: number of experts, groups and the way of scoring.
        rngs: for the kernel [D E].
    """

    kept_kernel: Kept  # of a bound model: see `MixtureOfExperts.keep_parts`

    def __init__(self, config: ExpertsConfig, *, rngs: nnx.Rngs):
        self.config = config
        count = (config.n_routed_experts or 0) + config.zero_expert_num
        shape = (config.attention.hidden_size, count)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        if config.has_selection_bias:
            self.bias = SelectionBias(jnp.zeros(shape[1:], jnp.float32))

    def scores(self, x: Float[Array, "*B D"], row: int | None = None) -> Float[Array, "*B E"]:
        """Each token's affinity to every expert, without the bias, in float32.

        With `row`, which is that of `kept_kernel`, x is brought into its order before it is
        multiplied: for a step that asks for x in this order anyway.
        """
        x, kernel = self._operands(x, row)
        logits = jnp.dot(x.astype(jnp.float32), kernel, precision="highest")
        sigmoid = self.config.scoring_func == "sigmoid"
        return jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)

    def _operands(self, x, row):
        """X and the kernel, both in an order or none."""
        if row is None:
            return x, self.kernel[...]
        return in_order(x, row), self.kept_kernel[...]

    def __call__(self, x: Float[Array, "M D"]) -> tuple[Int[Array, "M K"], Float[Array, "M K"]]:
        """The chosen experts of every token, best first, and their weights."""
        return self.route(x)[:2]

    def route(
        self, x: Float[Array, "M D"], implementation: str | None = None, row: int | None = None
    ) -> tuple[Int[Array, "M K"], Float[Array, "M K"], Chosen | None]:
        """The same, and the table of the chosen experts, or None: see `ops.experts.choose`.

        `row` is as in `scores`.
        """
        config = self.config
        plain = config.scoring_func == "softmax" and config.n_group == 1
        if plain and not config.has_selection_bias:
            made = route(*self._operands(x, row), config.num_experts_per_tok, implementation)
            if made is not None:
                experts, weights, chosen = made
                return experts, self._scaled(weights), chosen
        scores = self.scores(x, row)
        if sharding.mesh_of(scores) is not None:
            return *self.choose(scores), None
        choice = self._choice(scores, *self._bias())
        experts, chosen = choose(choice, self.config.num_experts_per_tok, implementation)
        return experts, self._weights(scores, experts), chosen

    def choose(self, scores: Float[Array, "M E"]) -> tuple[Int[Array, "M K"], Float[Array, "M K"]]:
        """The chosen experts and their weights, from each token's scores."""
        return sharding.of_rows(self._choose, scores, *self._bias())

    def _bias(self):
        return [self.bias[...]] if self.config.has_selection_bias else []

    def _choose(self, scores, *bias):
        choice = self._choice(scores, *bias)
        experts = lax.top_k(choice, self.config.num_experts_per_tok)[1]
        return experts, self._weights(scores, experts)

    def _choice(self, scores, bias=None):
        """The scores by which experts are chosen: biased, and -inf outside the kept groups."""
        config, choice = self.config, scores
        if bias is not None:
            choice = scores + bias[None]
        if config.n_group > 1:
            groups = choice.reshape(scores.shape[0], config.n_group, -1)
            best = 2 if config.scoring_func == "sigmoid" else 1
            worth = lax.top_k(groups, min(best, groups.shape[-1]))[0].sum(-1)
            kept = lax.top_k(worth, config.topk_group)[1]
            allowed = jax.nn.one_hot(kept, config.n_group, dtype=bool).any(1)
            # -inf, not 0: with its bias a score may be negative, and 0 would win.
            choice = jnp.where(allowed[..., None], groups, -jnp.inf).reshape(choice.shape)
        return choice

    def _weights(self, scores, experts):
        return self._scaled(jnp.take_along_axis(scores, experts, axis=-1))

    def _scaled(self, weights):
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return weights * self.config.routed_scaling_factor
