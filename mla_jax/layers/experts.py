"""A mixture of experts: a `router`, the experts that it chooses, and one that every token sees.

DeepSeekMoE (arXiv 2401.06066). The experts of one layer are one array, never a loop in Python.
The load is balanced without a loss by DeepSeek-V3's bias on the choice (arXiv 2412.19437, section
2.1.2): the bias is a variable of its own kind, which no optimizer of `nnx.Param` moves, and
`balance_bias` is its update.

Letters: B batch, T tokens of a row, M tokens of all rows, D hidden size, F inner size, E experts,
K experts per token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mla_jax import sharding
from mla_jax.layers.mlp import GatedMLP
from mla_jax.layers.quantised import Kept, Quantised, made
from mla_jax.layers.router import ExpertsConfig, Router
from mla_jax.ops.experts import routed_experts, takes_shared
from mla_jax.ops.experts.tiles import Chosen
from mla_jax.ops.hopper.order import in_order


class Routing(NamedTuple):
    """What one router did with the tokens of a step, or, with an axis more, what all of them did.

    Attributes:
        load: int32 [E], how many tokens each expert was given: `balance_bias` goes by it.
        balance: `sequence_balance_loss` of the best K scores, without its factor.
    """

    load: Int[Array, "*L E"]
    balance: Float[Array, "*L"]


class MixtureOfExperts(nnx.Module):
    """A router's choice of experts, and a shared one: kernels [E D F], [E D F] and [E F D].

    Args:
        config: widths, number of experts, and the router's.
        precision: of the matmuls, as in jax.lax.dot.
        dtype: of the computation; None follows the input and the parameters.
        param_dtype: of the kernels; the router's is float32.
        implementation: of the routed experts, as in `mla_jax.ops.experts.routed_experts`.
        rngs: for the parameters.

    Raises:
        ValueError: a config without experts; when called, an unknown implementation.
        NotImplementedError: when called, an implementation that cannot serve this call.

    >>> from mla_jax.models import DecoderConfig
    >>> layer = MixtureOfExperts(DecoderConfig.from_preset("deepseek_v2_lite").replace(
    ...     moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 3, 2048))).shape
    (1, 3, 2048)
    """

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        precision=None,
        dtype=None,
        param_dtype=jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        width, inner = config.attention.hidden_size, config.moe_intermediate_size
        count = config.n_routed_experts
        if inner is None or count is None:
            raise ValueError(
                f"moe_intermediate_size={inner!r}, n_routed_experts={count!r}: a mixture of "
                "experts needs both."
            )
        self.config, self.precision, self.dtype = config, precision, dtype
        self.implementation = implementation
        self.router = Router(config, rngs=rngs)
        initial = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 1, 2, (0,))

        def kernel(*shape):
            letters = sharding.metadata("E", None, None)
            return nnx.Param(initial(rngs.params(), shape, param_dtype), **letters)

        self.gate_proj = kernel(count, width, inner)
        self.up_proj = kernel(count, width, inner)
        self.down_proj = kernel(count, inner, width)
        shared = inner * config.n_shared_experts
        types = {"precision": precision, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shared = GatedMLP(width, shared, **types) if shared else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Every token through its experts and the shared one."""
        with jax.named_scope("router"):
            flat = x.reshape(-1, x.shape[-1])
            kept = hasattr(self.router, "kept_kernel")
            row = self._order(flat.dtype, flat.shape[0]) if kept else None
            experts, weights, chosen = self.router.route(flat, self.implementation, row)
        return self._mix(x, experts, weights, chosen)

    def keep_parts(self) -> None:
        """Keeps the router's kernel, or its shape, in the order of tokens that kernels ask for.

        Those of stored experts do (`ops.hopper.order`). If the router does, too, the norm before
        both makes tokens so by its one kernel, as nobody asks for them as they were.
        """
        row, kernel = self._order(self.dtype or jnp.bfloat16), self.router.kernel.get_value()
        if row is None:
            return
        self.router.kept_kernel = Kept(made(lambda kernel: in_order(kernel.T, row).T, kernel))

    def _order(self, dtype, tokens=1) -> int | None:
        """The order in which so many tokens are multiplied with gate and up; None for none."""
        stored = isinstance(self.gate_proj, Quantised)
        if not stored or self.implementation not in (None, "pallas_gpu"):
            return None
        return self.gate_proj.order_for(dtype, tokens)

    def with_routing(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The same, and what its router did, for training.

        Args:
            x: activations.
            valid: tokens that count for load and balance, where some are padding.
        """
        with jax.named_scope("router"):
            scores = self.router.scores(x)
            experts, weights = self.router.choose(scores.reshape(-1, scores.shape[-1]))
            best = sharding.of_rows(
                lambda scores: lax.top_k(scores, self.config.num_experts_per_tok)[1], scores
            )
            chosen = experts.reshape(best.shape)
            routing = Routing(
                expert_load(chosen, scores.shape[-1], valid=valid),
                sequence_balance_loss(scores, best, valid=valid),
            )
        return self._mix(x, experts, weights), routing

    def _mix(self, x, experts, weights, chosen=None):
        """The routed experts' sum and the shared one's."""
        flat = x.reshape(-1, x.shape[-1])
        shared = self._shared(flat, experts, weights)
        with jax.named_scope("experts"):
            mixed = self.routed(flat, experts, weights, shared, chosen).reshape(x.shape)
            mixed = sharding.beside(mixed, x)
        if self.shared is None or shared is not None:
            return mixed
        with jax.named_scope("shared_expert"):
            return mixed + self.shared(x)

    def _kernels(self) -> list[Any]:
        return [
            kernel.weight if isinstance(kernel, Quantised) else kernel[...]
            for kernel in (self.gate_proj, self.up_proj, self.down_proj)
        ]

    def _shared(self, x, experts, weights):
        """Kernels of the shared expert where it goes through the routed experts' products."""
        if self.shared is None or self.dtype not in (None, x.dtype):
            return None
        shared = self.shared.kernels()
        if shared is None:
            return None
        kept = takes_shared(
            x, experts, weights, self._kernels(), shared, implementation=self.implementation
        )
        return shared if kept else None

    def routed(
        self,
        x: Float[Array, "M D"],
        experts: Int[Array, "M K"],
        weights: Float[Array, "M K"],
        shared: Any = None,
        chosen: Chosen | None = None,
    ) -> Float[Array, "M D"]:
        """The routed experts alone, for a choice that is given.

        Experts behind the E that have kernels return their input (LongCat-Flash, arXiv 2509.01322).
        With `shared`, kernels as in `routed_experts`, that expert is added. `chosen` is as there.
        """
        kernels = self._kernels()
        held = x.dtype if isinstance(self.gate_proj, Quantised) else kernels[0].dtype
        dtype = self.dtype or jnp.promote_types(x.dtype, held)
        x, count, identity = x.astype(dtype), kernels[0].shape[0], None
        if self.config.zero_expert_num:
            zero = experts >= count
            identity = jnp.where(zero, weights, 0).sum(-1, keepdims=True)
            # A weight of 0 for some expert or other, spread so that none is given many tokens.
            experts, weights = experts % count, jnp.where(zero, 0, weights)
            chosen = None
        mixed = routed_experts(
            x, experts, weights, *kernels, precision=self.precision,
            implementation=self.implementation, shared=shared, chosen=chosen,
        )  # fmt: skip
        return mixed if identity is None else mixed + (identity * x).astype(dtype)


def expert_load(
    experts: Int[Array, "*B K"], count: int, *, valid: Bool[Array, "*B"] | None = None
) -> Int[Array, "E"]:
    """How many tokens each of `count` experts was given.

    Args:
        experts: the router's choice.
        count: E.
        valid: tokens that count, where some are padding.

    >>> expert_load(jnp.array([[0, 2], [2, 1]]), 4).tolist()
    [1, 1, 2, 0]
    >>> expert_load(jnp.array([[0, 2], [2, 1]]), 4, valid=jnp.array([True, False])).tolist()
    [1, 0, 1, 0]
    """
    counted = jnp.ones(experts.shape[:-1], bool) if valid is None else valid
    # A sum, not a scatter: rows that are split over devices are summed over them.
    given = jax.nn.one_hot(experts, count, dtype=jnp.int32)
    given = jnp.where(counted[..., None, None], given, 0)
    return given.sum(tuple(range(experts.ndim)), dtype=jnp.int32)


def balance_bias(
    bias: Float[Array, "E"], load: Float[Array, "E"] | Int[Array, "E"], *, rate: float = 1e-3
) -> Float[Array, "E"]:
    """The selection bias after a training step: lower for overloaded experts, higher for others.

    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): after every step the bias of an expert that had
    more than the mean load falls by `rate` (there gamma, 0.001 and 0 in the last 500 G tokens), and
    that of one that had less rises by as much.

    Args:
        bias: of the router, `router.bias[...]`.
        load: tokens of every expert in the whole batch of the step (`expert_load`, summed over
            devices and accumulated micro-batches).
        rate: gamma.

    Raises:
        ValueError: a load of another shape, or a negative rate.

    >>> balance_bias(jnp.zeros(3), jnp.array([9, 0, 3]), rate=0.5).tolist()
    [-0.5, 0.5, 0.5]
    """
    if bias.shape != load.shape or bias.ndim != 1:
        raise ValueError(
            f"load has shape {load.shape}: it must be [E] = {bias.shape}, as the bias."
        )
    if rate < 0:
        raise ValueError(f"rate={rate}: it must not be negative.")
    load = load.astype(bias.dtype)
    return bias + rate * jnp.sign(load.mean() - load)


def sequence_balance_loss(
    scores: Float[Array, "B T E"],
    experts: Int[Array, "B T K"],
    *,
    valid: Bool[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """DeepSeek-V3's balance loss within each sequence, without its factor alpha (0.0001 there).

    sum_e f_e P_e, where f_e = E / (K T) (tokens of the sequence whose best K have e) and P_e is the
    mean of the scores divided by their sum over experts (arXiv 2412.19437, equations 17 to 20); the
    mean over sequences. It is 1 where the load is even, and differentiates through the scores.

    Args:
        scores: `router.scores(x)`.
        experts: the choice that counts. The paper counts the best K scores without the bias,
            `jax.lax.top_k(scores, K)[1]`; the router's own choice is what the experts really get.
        valid: tokens that count, where some are padding; a sequence of none adds nothing.

    Raises:
        ValueError: shapes that do not go together.

    >>> scores = jnp.full((2, 4, 4), 0.5)
    >>> float(sequence_balance_loss(scores, jnp.array([[[0], [1], [2], [3]]] * 2)))
    1.0
    """
    if scores.ndim != 3 or experts.ndim != 3 or scores.shape[:2] != experts.shape[:2]:
        raise ValueError(
            f"scores has shape {scores.shape} and experts {experts.shape}: they must be [B T E] "
            "and [B T K]."
        )
    if valid is None:
        valid = jnp.ones(scores.shape[:2], bool)
    tokens = jnp.maximum(valid.sum(1), 1)[:, None]
    chosen = jax.nn.one_hot(experts, scores.shape[-1], dtype=scores.dtype).sum(2)
    share = scores / scores.sum(-1, keepdims=True)
    counts, affinity = (
        jnp.where(valid[..., None], array, 0).sum(1) / tokens for array in (chosen, share)
    )
    losses = (counts * affinity).sum(-1) * (scores.shape[-1] / experts.shape[-1])
    present = valid.any(1)
    return jnp.where(present, losses, 0).sum() / jnp.maximum(present.sum(), 1)
