"""The indexer of sparse attention: which K tokens every query attends to.

DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1). Beside the layer's own
latents every token has one index key (I numbers), and every query J small heads with a weight each:

    x ------------ wk > k_norm > rope ----------> index_key [B T I]  --> cache
    q_latent ----- wq_b > rope -----------------> query     [B T J I]
    x ------------ weights_proj ----------------> weights   [B T J]    float32
    score(t, s) = sum_j weights(t, j) (J I)^-0.5 relu(query(t, j) . index_key(s)), best K visible

It learns by a loss of its own (`indexer_loss`): nothing flows back into the layer, neither through
the choice nor through what the indexer reads.

Letters: B batch, T query tokens, S slots, D hidden size, J index heads, I index-key channels,
K chosen slots, L tokens of a pool, P rotary channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mla_jax import ops, rope
from mla_jax.cache import Dense, Store
from mla_jax.config import MLAConfig
from mla_jax.layers import query_scale
from mla_jax.layers.projection import Projection, apart
from mla_jax.ops.seen import Seen

_INPUT_EPS = 1e-6  # of the LayerNorm on x that stands in for a query latent


class Indexer(nnx.Module):
    """Index keys of tokens, and each query's choice among them.

    Kernels: `wq_b` [Q J I] (or [D J I] behind `q_input_norm` where there is no query latent), `wk`
    [D I], `k_norm` [I] with a bias, `weights_proj` [D J], which is float32 whatever param_dtype
    says. By the config: `ssmax_scale` and `ssmax_bias` [J]; `kpool_gate` [D I] and `kpool_bias`
    [L I], by which the keys of a pool's tokens are weighted.

    Args:
        config: of the layer; index_topk is given.
        dtype, param_dtype, precision, kernel_init, rngs: as in `MultiHeadLatentAttention`.

    >>> config = MLAConfig.from_preset("tiny").replace(index_topk=2, index_n_heads=4)
    >>> indexer = Indexer(config, dtype=None, param_dtype=jnp.float32, precision=None,
    ...                   kernel_init=nnx.initializers.lecun_normal(), rngs=nnx.Rngs(0))
    >>> indexer.keys(jnp.ones((1, 5, 128)), by=None).shape
    (1, 5, 128)
    """

    def __init__(self, config: MLAConfig, *, dtype, param_dtype, precision, kernel_init, rngs):
        heads, width = config.index_n_heads, config.index_head_dim
        assert heads is not None  # the config has seen to it
        self.config = config
        # The main attention's rotation, in the layout of the indexer's own weights.
        self.layout = config.replace(rope_interleave=config.indexer_rope_interleave)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def linear(inputs, outputs, **types):
            return Projection(inputs, outputs, use_bias=False, kernel_init=kernel_init, **types)

        def norm(channels, epsilon):
            # The fast variance, a difference of squares, loses digits that the choice may hang on.
            return nnx.LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, **types)

        source = config.q_lora_rank or config.hidden_size
        if config.q_lora_rank is None:
            self.q_input_norm = norm(config.hidden_size, _INPUT_EPS)
        self.wq_b = linear((source,), (heads, width), precision=precision, **types)
        self.wk = linear((config.hidden_size,), (width,), precision=precision, **types)
        self.k_norm = norm(width, config.index_norm_eps)
        exact = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": "highest"}
        self.weights_proj = linear((config.hidden_size,), (heads,), rngs=rngs, **exact)
        if config.index_query_scale_ssmax:
            self.ssmax_scale = nnx.Param(jnp.zeros((heads,), param_dtype))
            self.ssmax_bias = nnx.Param(jnp.ones((heads,), param_dtype))
        if config.index_kpool is not None:
            self.kpool_gate = linear((config.hidden_size,), (width,), precision=precision, **types)
            self.kpool_bias = nnx.Param(jnp.zeros((config.index_kpool, width), param_dtype))

    @staticmethod
    def width(config: MLAConfig) -> int:
        """Numbers that the cache holds of a token for its index key; a pool's gates come beside."""
        return config.index_head_dim * (1 if config.index_kpool is None else 2)

    def keys(self, x: Float[Array, "B T D"], by: rope.Rotation | None) -> Float[Array, "B T I"]:
        """What the cache holds of tokens: rotated keys, with pools followed by their gates.

        Args:
            x: the layer's input.
            by: the rotation at the tokens' positions.
        """
        with jax.named_scope("index_keys"):
            x = jax.lax.stop_gradient(x)
            key = self._rotate(self.k_norm(self.wk(x)), by)
            if self.config.index_kpool is None:
                return key
            return jnp.concatenate([key, self.kpool_gate(x).astype(key.dtype)], axis=-1)

    def queries(
        self,
        x: Float[Array, "B T D"],
        q_latent: Float[Array, "B T Q"],
        positions: Int[Array, "T"] | Int[Array, "B T"],
        by: rope.Rotation | None,
    ) -> tuple[Float[Array, "B T J I"], Float[Array, "B T J"]]:
        """Rotated queries, and the weights of their heads with all that scales the scores.

        Args:
            x: the layer's input.
            q_latent: what the layer's queries are made from, or x.
            positions: of the tokens.
            by: the rotation at these positions.
        """
        config = self.config
        with jax.named_scope("index_queries"):
            x, q_latent = jax.lax.stop_gradient((x, q_latent))
            if config.q_lora_rank is None:
                q_latent = self.q_input_norm(x)
            query = apart(self.wq_b(q_latent), config.index_n_heads or 1)
            if config.index_query_scale_ssmax:
                parameters = self.ssmax_scale[...], self.ssmax_bias[...]
                query = query * query_scale.ssmax(positions, *parameters).astype(query.dtype)
            query = self._rotate(query, by)
            scale = (query.shape[-2] * query.shape[-1]) ** -0.5
            return query, self.weights_proj(x.astype(jnp.float32)) * scale

    def choose(
        self,
        queries: tuple[Float[Array, "B T J I"], Float[Array, "B T J"]],
        store: Store,
        seen: Seen,
        implementation: ops.dispatch.Implementation = None,
    ) -> Int[Array, "B T K"]:
        """The slots of `store` that queries attend to, of those that they see.

        Args:
            queries: of `queries`.
            store: with the keys of all slots, these tokens' included.
            seen: what each query may see.
            implementation: backends by name, as a layer keeps them; None chooses.

        Raises:
            ValueError: packed sequences (segments) with pools, which begin with the row.
            NotImplementedError: a mesh splits the slots, or a backend that is named cannot serve.
        """
        config, bias = self.config, None
        if config.index_kpool is not None:
            bias = self.kpool_bias[...]
            if seen.segments is not None:
                raise ValueError(
                    f"segment_ids: index_kpool={config.index_kpool} pools tokens from the row's "
                    "first on; give every sequence a row of its own."
                )
        assert config.index_topk is not None
        with jax.named_scope("choose_slots"):
            return ops.choose_slots(
                *jax.lax.stop_gradient(queries), store, seen, count=config.index_topk,
                pool_bias=bias, tail=config.index_kpool_always_select_tail,
                implementation=implementation,
            )  # fmt: skip

    def scores(
        self,
        queries: tuple[Float[Array, "B T J I"], Float[Array, "B T J"]],
        keys: Float[Array, "B S I"],
    ) -> Float[Array, "B T S"]:
        """The scores of all slots, visible or not, in float32: what `indexer_loss` learns from."""
        return ops.index_scores(*queries, Dense({"index_key": keys}))

    def _rotate(self, x, by):
        """Rotates the first or the last P channels of keys [B T I] or queries [B T J I]."""
        width, last = self.config.qk_rope_head_dim, self.config.index_rope_last
        if by is None:
            return x
        first, second = jnp.split(x, [x.shape[-1] - width if last else width], axis=-1)
        if last:
            second = rope.rotate(second, by, self.layout)
        else:
            first = rope.rotate(first, by, self.layout)
        return jnp.concatenate([first, second], axis=-1)


def indexer_loss(
    target: Float[Array, "B T S"],
    scores: Float[Array, "B T S"],
    seen: Bool[Array, "B T S"],
) -> Float[Array, ""]:
    """KL divergence of the indexer's distribution from the main attention's, mean over queries.

    sum_s p_s (ln p_s - ln softmax(scores)_s) over what a query sees: all visible tokens while the
    indexer warms up beside dense attention, the chosen ones afterwards (arXiv 2512.02556, equations
    3 and 4). No gradient flows into the target.

    Args:
        target: the attention's weights summed over heads, of any positive sum.
        scores: of the indexer.
        seen: what counts; a query that sees nothing does not count.

    >>> even = jnp.full((1, 1, 4), 0.25)
    >>> float(indexer_loss(even, jnp.zeros((1, 1, 4)), jnp.ones((1, 1, 4), bool)))
    0.0
    """
    target = jnp.where(seen, jax.lax.stop_gradient(target).astype(jnp.float32), 0)
    total = target.sum(-1, keepdims=True)
    target = target / jnp.where(total > 0, total, 1)
    # Finite where nothing is seen, so that no gradient is NaN.
    learned = jax.nn.log_softmax(jnp.where(seen, scores, -1e30), axis=-1)
    entropy = jnp.where(target > 0, target * jnp.log(jnp.where(target > 0, target, 1)), 0)
    divergence = (entropy - jnp.where(seen, target * learned, 0)).sum(-1)
    counts = seen.any(-1) & (total[..., 0] > 0)
    return jnp.where(counts, divergence, 0).sum() / jnp.maximum(counts.sum(), 1)
