"""Gated MLPs, and mixtures of them behind a router (DeepSeekMoE, arXiv 2401.06066).

The experts of one layer are one array, never a loop in Python.

Letters: D hidden size, F intermediate size, M tokens of all rows, E experts, K experts per token,
G groups of experts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import target
from mla_jax.layers.mlp import GatedMLP
from mla_jax.ops import hopper
from mla_jax.ops.experts import grouped

_DENSE_TOKENS = 256  # up to here reading every expert once beats sorting
_BLOCK = 256  # tokens of one expert in a matmul
_FEW_PAIRS = 1024  # whose ranks are compared, not sorted


class _Tiles(NamedTuple):
    """Pairs of token and expert in tiles of rows, each tile of one expert; unused rows at its end.

    Attributes:
        token: of every row; an unused row has any.
        owner: the expert of every tile.
        used: how many tiles have a row that counts; they come first.
        place: each pair's row.
    """

    token: Int[Array, "J*rows"]
    owner: Int[Array, "J"]
    used: Int[Array, "1"]
    place: Int[Array, "M K"]


def _tiles(experts: Int[Array, "M K"], groups: int, rows: int) -> _Tiles:
    flat = experts.reshape(-1).astype(jnp.int32)
    expert = np.arange(groups, dtype=np.int32)
    sizes = (flat[None] == expert[:, None]).sum(1, dtype=jnp.int32)
    needed = lax.div(sizes + (rows - 1), jnp.int32(rows))
    before = expert[None] < expert[:, None]  # sums, not scans: these are a kernel each on a GPU
    starts = jnp.where(before, needed[None], 0).sum(1, dtype=jnp.int32)
    if flat.size <= _FEW_PAIRS:
        pair = np.arange(flat.size, dtype=np.int32)
        earlier = (flat[None] == flat[:, None]) & (pair[None] < pair[:, None])
        rank = earlier.sum(1, dtype=jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True)
        first = jnp.where(before, sizes[None], 0).sum(1, dtype=jnp.int32)
        position = (
            jnp.zeros_like(flat)
            .at[order]
            .set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
        )
        rank = position - first[flat]
    place = starts[flat] * rows + rank
    # Each used expert has at most one tile that is not full.
    count = min(groups, flat.size) + flat.size // rows
    token = jnp.zeros((count * rows,), jnp.int32)
    token = token.at[place].set(
        jnp.arange(flat.size, dtype=jnp.int32) // experts.shape[1], unique_indices=True
    )
    tile = np.arange(count, dtype=np.int32)
    owner = ((starts + needed)[None] <= tile[:, None]).sum(1, dtype=jnp.int32)
    return _Tiles(
        token=token, owner=jnp.minimum(owner, groups - 1), used=needed.sum(keepdims=True),
        place=place.reshape(experts.shape),
    )  # fmt: skip


class Router(nnx.Module):
    """Which experts a token goes to, and their weights: float32 throughout.

    `bias` [E] (sigmoid scoring) shifts the choice but not the weights (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2).
    """

    def __init__(self, config, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.attention.hidden_size, config.n_routed_experts)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), shape, jnp.float32))
        if config.scoring_func == "sigmoid":
            self.bias = nnx.Param(jnp.zeros((config.n_routed_experts,), jnp.float32))

    def __call__(self, x: Float[Array, "M D"]) -> tuple[Int[Array, "M K"], Float[Array, "M K"]]:
        config = self.config
        logits = jnp.dot(x.astype(jnp.float32), self.kernel[...], precision="highest")
        if config.scoring_func == "sigmoid":
            scores = jax.nn.sigmoid(logits)
            choice = scores + self.bias[...][None]
        else:
            scores = choice = jax.nn.softmax(logits, axis=-1)
        if config.n_group > 1:
            groups = choice.reshape(len(x), config.n_group, -1)
            best = 2 if config.scoring_func == "sigmoid" else 1
            worth = lax.top_k(groups, min(best, groups.shape[-1]))[0].sum(-1)
            kept = lax.top_k(worth, config.topk_group)[1]
            allowed = jax.nn.one_hot(kept, config.n_group, dtype=bool).any(1)
            # -inf, not 0: with its bias a score may be negative, and 0 would win.
            choice = jnp.where(allowed[..., None], groups, -jnp.inf).reshape(choice.shape)
        experts = lax.top_k(choice, config.num_experts_per_tok)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return experts, weights * config.routed_scaling_factor


class MixtureOfExperts(nnx.Module):
    """A router's choice of experts, and a shared one: kernels [E D F], [E D F] and [E F D]."""

    def __init__(self, config, *, precision, dtype, param_dtype, rngs):
        width, inner = config.attention.hidden_size, config.moe_intermediate_size
        assert inner is not None
        assert config.n_routed_experts is not None
        self.config, self.precision, self.dtype = config, precision, dtype
        self.router = Router(config, rngs=rngs)
        initial = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", 1, 2, (0,))

        def kernel(*shape):
            return nnx.Param(initial(rngs.params(), shape, param_dtype))

        self.gate_proj = kernel(config.n_routed_experts, width, inner)
        self.up_proj = kernel(config.n_routed_experts, width, inner)
        self.down_proj = kernel(config.n_routed_experts, inner, width)
        shared = inner * config.n_shared_experts
        types = {"precision": precision, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.shared = GatedMLP(width, shared, **types) if shared else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        flat = x.reshape(-1, x.shape[-1])
        with jax.named_scope("router"):
            experts, weights = self.router(flat)
        with jax.named_scope("experts"):
            mixed = self._experts(flat, experts, weights).reshape(x.shape)
        if self.shared is None:
            return mixed
        with jax.named_scope("shared_expert"):
            return mixed + self.shared(x)

    def _experts(self, x, experts, weights):
        """Every token through its experts, by whichever way moves the fewest weights for M tokens.

        On Hopper GPUs a kernel reads the chosen experts only, for any M. `lax.ragged_dot` is made
        for this and used on TPUs. Elsewhere jax may turn it into a product with E masked copies of
        its input, [E MK D], as it does on CPUs, and on GPUs but for two experimental flags of XLA.
        """
        dtype = self.dtype or jnp.promote_types(x.dtype, self.gate_proj.dtype)
        x, pairs = x.astype(dtype), experts.size
        if grouped.why_not(self.gate_proj.shape, dtype, target.current()) is None:
            mixed = self._grouped(x, experts, weights)
        elif 2 * pairs <= self.gate_proj.shape[0]:
            mixed = self._by_pair(x, experts, weights)
        elif len(x) <= _DENSE_TOKENS:
            mixed = self._all_experts(x, experts, weights)
        else:
            mixed = self._sorted(x, experts, weights)
        return mixed.astype(dtype)

    def _gated(self, letters, back, x, kernels):
        """Gated MLPs as two einsums: `letters` takes x to [... F], `back` returns it."""
        gate, up, down = (kernel.astype(x.dtype) for kernel in kernels)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        einsum = functools.partial(
            jnp.einsum, precision=self.precision, preferred_element_type=wide
        )
        hidden = jax.nn.silu(einsum(letters, x, gate)) * einsum(letters, x, up)
        return einsum(back, hidden.astype(x.dtype), down)

    def _kernels(self):
        return self.gate_proj[...], self.up_proj[...], self.down_proj[...]

    def _by_pair(self, x, experts, weights):
        """Few pairs of token and expert: the kernels of just those, gathered."""
        chosen = [kernel[experts] for kernel in self._kernels()]
        own = self._gated("MD,MKDF->MKF", "MKF,MKFD->MKD", x, chosen)
        return (own * weights[..., None]).sum(1)

    def _all_experts(self, x, experts, weights):
        """Some tokens, which need most experts: all experts for all tokens, kernels read once."""
        own = self._gated("MD,EDF->EMF", "EMF,EFD->EMD", x, self._kernels())
        rows = jnp.arange(len(x))[:, None]
        share = jnp.zeros((len(x), len(own)), weights.dtype).at[rows, experts].add(weights)
        return jnp.einsum("EMD,ME->MD", own, share, precision=self.precision)

    def _sorted(self, x, experts, weights):
        """Many tokens: sorted by expert, then ragged matmuls, or matmuls of one expert's block."""
        count, groups = self.config.num_experts_per_tok, self.gate_proj.shape[0]
        if target.current().platform == "tpu":
            flat = experts.reshape(-1)
            order = jnp.argsort(flat, stable=True)
            sizes = jnp.bincount(flat, length=groups).astype(jnp.int32)
            outputs = self._ragged(x[order // count], sizes)
            own = outputs[jnp.argsort(order)]  # back in the tokens' order
            return (own.reshape(len(x), count, -1) * weights[..., None]).sum(1)
        tiles = _tiles(experts, groups, _BLOCK)
        outputs = self._by_block(x[tiles.token], self._kernels(), tiles.owner)
        return (outputs[tiles.place] * weights[..., None]).sum(1)

    def _by_block(self, x, kernels, owner):
        """Gated MLPs of tiles of rows, each of one expert: [J*M D] to [J*M D]."""

        def one(block):
            tokens, expert = block
            return self._gated("MD,DF->MF", "MF,FD->MD", tokens, [k[expert] for k in kernels])

        blocks = x.reshape(len(owner), -1, x.shape[-1])
        outputs = lax.map(one, (blocks, owner), batch_size=min(16, len(owner)))
        return outputs.reshape(len(x), -1)

    def _grouped(self, x, experts, weights, sms=None, interpret=None):
        """Any number of tokens on a Hopper GPU: tiles of one expert each, through a kernel."""
        groups, device = self.gate_proj.shape[0], target.current()
        rows = grouped.MANY if experts.size >= groups * grouped.MANY // 2 else grouped.FEW
        tiles = _tiles(experts, groups, rows)
        product = functools.partial(
            grouped.grouped_matmul, owner=tiles.owner, used=tiles.used, rows=rows,
            sms=sms or hopper.multiprocessors(device), interpret=interpret,
        )  # fmt: skip

        @jax.custom_jvp
        def outputs(x, kernels):
            gate, up, down = (kernel.astype(x.dtype) for kernel in kernels)
            wide = jnp.promote_types(x.dtype, jnp.float32)
            hidden = jax.nn.silu(product(x, gate).astype(wide)) * product(x, up)
            return product(hidden.astype(x.dtype), down)

        @outputs.defjvp
        def _(primals, tangents):
            blocks = lambda x, kernels: self._by_block(x, kernels, tiles.owner).astype(x.dtype)  # noqa: E731
            return jax.jvp(blocks, primals, tangents)

        own = outputs(x[tiles.token], self._kernels())[tiles.place]
        return (own * weights[..., None]).sum(1)

    def _ragged(self, x, sizes):
        ragged = functools.partial(
            lax.ragged_dot, group_sizes=sizes, precision=self.precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )  # fmt: skip
        gate, up, down = (kernel.astype(x.dtype) for kernel in self._kernels())
        hidden = jax.nn.silu(ragged(x, gate)) * ragged(x, up)
        return ragged(hidden.astype(x.dtype), down)
