"""The parameters of an attention layer, and the maps that they make of single tokens.

    x [B T D] > q_nope [B T N H], q_rope [B T N P], latent [B T R], k_rope [B T P]
    q_nope -- w_uk --> pattern [B T N R]        latent -- kv_b_proj --> k_nope, value
    out_latent -- w_uv --> heads [B T N V] -- sinks, gate -- o_proj --> y [B T D]

Tokens meet in `layers.attention`.

Letters: B batch, T query tokens, N heads, D hidden size, Q q_lora_rank, R kv_lora_rank,
H qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mla_jax import rope, sharding
from mla_jax.config import MLAConfig
from mla_jax.layers import query_scale
from mla_jax.layers.indexer import Indexer
from mla_jax.layers.memory import Memory
from mla_jax.layers.mixer import Mixer
from mla_jax.layers.norm import RMSNorm
from mla_jax.layers.projection import Projection, apart, kernel_of, together
from mla_jax.layers.quantised import Kept, Quantised, made, maps_of
from mla_jax.layers.step import check_positions, row_counts
from mla_jax.ops import dispatch
from mla_jax.ops.append import append_token
from mla_jax.ops.hopper import order
from mla_jax.ops.weights_mesh import fold_keys, unfold_values
from mla_jax.plain import Plain

_BIASED = ("q_a_proj", "kv_a_proj", "o_proj")  # what attention_bias=True means
# Of each kernel's axes; ranks count as D, the axis that FSDP splits. A is that of q_a_proj alone.
_LETTERS = {
    "q_proj": ("D", "N", None), "q_a_proj": ("A", "D"), "q_b_proj": ("D", "N", None),
    "kv_a_proj": ("D", None), "kv_b_proj": ("D", "N", None), "g_proj": ("D", "N", None),
    "o_proj": ("N", None, "D"),
}  # fmt: skip


class LatentMaps(Mixer):
    """What `MultiHeadLatentAttention` computes of every token alone; see there for arguments.

    `by` is everywhere the rotation at the tokens' positions, a `rope.Rotation`, or None.
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        implementation: dispatch.Implementation = None,
        dropout_rate: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if not isinstance(config, MLAConfig):
            raise ValueError(f"config={config!r}: it must be an MLAConfig.")
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = dispatch.frozen(implementation)
        if not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate={dropout_rate}: it must be at least 0 and below 1.")
        # What `model.train()` and `model.eval()` of Flax set.
        self.dropout_rate, self.deterministic = dropout_rate, True

        bias = config.attention_bias
        biased = _BIASED if bias is True else bias or ()

        def linear(name, inputs, outputs):
            return Projection(
                inputs, outputs, letters=_LETTERS[name], use_bias=name in biased, dtype=dtype,
                param_dtype=param_dtype, kernel_init=kernel_init, precision=precision, rngs=rngs,
            )  # fmt: skip

        def norm(width):
            return RMSNorm(
                width, epsilon=config.latent_norm_eps, dtype=dtype, param_dtype=param_dtype,
                rngs=rngs,
            )  # fmt: skip

        width, heads, value = config.hidden_size, config.num_attention_heads, config.v_head_dim
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        if config.q_lora_rank is None:
            self.q_proj = linear("q_proj", (width,), (heads, config.qk_head_dim))
        else:
            gated = config.output_gate == "query"
            channels = config.qk_head_dim + value if gated else config.qk_head_dim
            self.q_a_proj = linear("q_a_proj", (width,), (config.q_lora_rank,))
            if config.latent_norm:
                self.q_a_norm = norm(config.q_lora_rank)
            self.q_b_proj = linear(
                "q_b_proj", ((2 if gated else 1) * config.q_lora_rank,), (heads, channels)
            )
        if config.kv_source_layer is None:
            self.kv_a_proj = linear("kv_a_proj", (width,), (rank + rope,))
            if config.latent_norm:
                self.kv_a_norm = norm(rank)
            if config.k_rope_norm:
                self.k_rope_norm = norm(rope)
        self.kv_b_proj = linear("kv_b_proj", (rank,), (heads, config.qk_nope_head_dim + value))
        if config.output_gate in ("head", "elementwise"):
            gates = 1 if config.output_gate == "head" else value
            self.g_proj = linear("g_proj", (width,), (heads, gates))
        if config.attention_sinks:
            self.sinks = nnx.Param(jnp.zeros((heads,), param_dtype), **sharding.metadata("N"))
        if config.query_scale_ssmax:
            of_heads = sharding.metadata("N")
            self.ssmax_scale = nnx.Param(jnp.zeros((heads,), param_dtype), **of_heads)
            self.ssmax_bias = nnx.Param(jnp.ones((heads,), param_dtype), **of_heads)
        self.o_proj = linear("o_proj", (heads, value), (width,))
        if config.has_indexer:
            self.indexer = Indexer(
                config, dtype=dtype, param_dtype=param_dtype, precision=precision,
                kernel_init=kernel_init, rngs=rngs,
            )  # fmt: skip

    @property
    def w_uk(self) -> Float[Array, "R N H"]:
        """W_UK, the part of kv_b_proj that makes keys: folded into the query when absorbed."""
        if hasattr(self, "kept_uk"):
            return self.kept_uk[...]
        return self._kv_b()[..., : self.config.qk_nope_head_dim]

    @property
    def w_uv(self) -> Float[Array, "R N V"]:
        """W_UV, the part of kv_b_proj that makes values: applied after mixing when absorbed."""
        if hasattr(self, "kept_uv"):
            return self._restored(self.kept_uv[...])
        return self._kv_b()[..., self.config.qk_nope_head_dim :]

    def keep_parts(self) -> None:
        """Keeps W_UK and W_UV apart beside kv_b_proj, of which they are copies; or their shapes.

        XLA for GPUs cuts them out of kv_b_proj by a kernel each in every step, and each takes as
        long as the product. Those of a `Quantised` are made of its numbers and scales, rounded once
        to the dtype of the computation: scales of blocks would be two kernels more. The copies take
        as much memory as kv_b_proj in that dtype. Where it lies on a mesh, or is a `Quantised` that
        computes in whatever its input comes in, nothing is kept.

        Where o_proj has a kernel that asks for heads in an order of its own, the outputs of W_UV
        stand in that order, `kept_order`: see `ops.hopper.order`.
        """
        follows = isinstance(self.kv_b_proj, Quantised) and self.kv_b_proj.dtype is None
        if follows or sharding.mesh_of(self.kv_b_proj) is not None:
            return
        w_uk, w_uv = made(lambda layer: (layer.w_uk, layer.w_uv), self)
        self.kept_order = None
        if isinstance(self.o_proj, Quantised):
            row = self.o_proj.order_for(w_uv.dtype)
            self.kept_order = row if row and w_uv.shape[-1] % row == 0 else None
        if self.kept_order is not None:
            w_uv = made(functools.partial(order.in_order, row=self.kept_order), w_uv)
        self.kept_uk, self.kept_uv = Kept(w_uk), Kept(w_uv)

    def _restored(self, x):
        """What W_UV makes, or itself, as it is without an order."""
        return x if self.kept_order is None else order.restored(x, self.kept_order)

    def _kv_b(self):
        config = self.config
        heads = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim)
        kernel = kernel_of(self.kv_b_proj, config.kv_lora_rank, heads)
        return sharding.move(kernel, (), sharding.spec(kernel)[1])  # FSDP splits R

    def _projected(self, x):
        """What the first maps of queries and of latents make of x, where one kernel may make both.

        Else None and None: each is then made where it is used.
        """
        if self.config.kv_source_layer is not None or not isinstance(self.kv_a_proj, Quantised):
            return None, None
        with jax.named_scope("queries"):
            first = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
            return maps_of(x, (first, self.kv_a_proj))

    def _queries(self, x, positions, by, made=None):
        """q_nope [B T N H], rotated q_rope [B T N P], the gate's logits [B T N 1 or V] or None.

        And what an indexer reads: the query latent [B T Q], scaled as it is, or x. `made` is what
        the first map makes of x, where that is known.
        """
        config, gate, q_latent = self.config, None, x
        with jax.named_scope("queries"):
            if config.q_lora_rank is None:
                made = self.q_proj(x) if made is None else made
                query = apart(made, config.num_attention_heads)
            else:
                raw = checkpoint_name(self.q_a_proj(x) if made is None else made, "q_latent")
                q_latent = self.q_a_norm(raw) if config.latent_norm else raw
                if config.output_gate == "query":
                    query = self.q_b_proj(jnp.concatenate([q_latent, raw], axis=-1))
                    query = apart(query, config.num_attention_heads)
                    query, gate = jnp.split(query, [config.qk_head_dim], axis=-1)
                else:
                    query = apart(self.q_b_proj(q_latent), config.num_attention_heads)
                if config.mla_scale_q_lora:
                    scale = math.sqrt(config.hidden_size / config.q_lora_rank)
                    query, q_latent = query * scale, q_latent * scale
                q_latent = sharding.beside(q_latent, x)
            q_nope, q_rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
        with jax.named_scope("rope"):
            q_rope = rope.rotate(q_rope, by, config)
        if config.llama_4_scaling_beta is not None or config.query_scale_ssmax:
            scale = self._query_scale(positions).astype(query.dtype)
            q_nope, q_rope = q_nope * scale, q_rope * scale
        if config.output_gate in ("head", "elementwise"):
            with jax.named_scope("g_proj"):
                gate = apart(self.g_proj(x), config.num_attention_heads)
        q_nope, q_rope = checkpoint_name(q_nope, "query"), checkpoint_name(q_rope, "query")
        return q_nope, q_rope, gate, q_latent

    def _query_scale(self, positions):
        """What queries are multiplied by at their positions, float32 [B T N 1] or smaller."""
        config = self.config
        scale = jnp.ones((), jnp.float32)
        if config.llama_4_scaling_beta is not None:
            original = config.llama_4_original_max_position_embeddings or 1
            scale = query_scale.llama_4(positions, config.llama_4_scaling_beta, original)
        if config.query_scale_ssmax:
            parameters = self.ssmax_scale[...], self.ssmax_bias[...]
            scale = scale * query_scale.ssmax(positions, *parameters)
        return scale

    def _latents(self, x, by):
        """Normalized `latent` [B T R] and rotated `k_rope` [B T P], as the cache holds them."""
        return self._normalised(*self._raw_latents(x, by))

    def _raw_latents(self, x, by, made=None):
        """Latents before their norm, and rotated keys; `made` as in `_queries`."""
        config = self.config
        with jax.named_scope("latents"):
            raw = checkpoint_name(self.kv_a_proj(x) if made is None else made, "latent")
            latent, k_rope = jnp.split(raw, [config.kv_lora_rank], axis=-1)
            if config.k_rope_norm:
                k_rope = self.k_rope_norm(k_rope)
        with jax.named_scope("rope"):
            return latent, rope.rotate(k_rope, by, config)

    def _normalised(self, latent, k_rope):
        config = self.config
        with jax.named_scope("latents"):
            if config.latent_norm:
                latent = self.kv_a_norm(latent)
            if config.mla_scale_kv_lora:
                latent = latent * math.sqrt(config.hidden_size / config.kv_lora_rank)
        return {"latent": latent, "k_rope": k_rope}

    def _appended(self, queries, x, by, made, view, step, absorbed):
        """A store with a step's tokens, and these as later ones will find them.

        Args:
            queries: q_nope and q_rope, which may come by the same kernel.
            x, by, made: as in `_raw_latents`.
            view: of the store.
            step: with slots for the tokens.
            absorbed: attention reads the new tokens from the store alone, so that one kernel may
                append them.

        Returns:
            the queries; the store; and the new tokens' arrays by name, or {}.
        """
        config, new = self.config, {}
        if config.kv_source_layer is None:
            raw = self._raw_latents(x, by, made)
            appended = self._append_token(queries, raw, view, step) if absorbed else None
            if appended is not None:
                q_nope, q_rope, own = appended
                return (step.copied(q_nope), step.copied(q_rope)), own, {}
            new = {name: step.own(array) for name, array in self._normalised(*raw).items()}
        x = step.own(x)
        if config.has_indexer:
            new["index_key"] = self.indexer.keys(x, by)
        with jax.named_scope("cache_append"):
            nothing = {} if new else {"index_key": x[..., :0].astype(view.index_key.dtype)}
            own = view.write(step.place, **new, **nothing)  # `nothing`: see `_widths`
            if "latent" in new:  # new tokens are attended to as later ones will find them
                new |= own.decode(own.encode({"latent": new["latent"]}))
        return queries, own, new

    def _append_token(self, queries, raw, view, step):
        """Queries and store by `ops.append_token`; None where that does not serve."""
        norm = getattr(self, "kv_a_norm", None)
        if not isinstance(norm, RMSNorm) or norm.scale is None or self.config.mla_scale_kv_lora:
            return None
        named = dispatch.normalized(self.implementation).get("latent_attention")
        if named not in (None, "pallas_gpu"):
            return None
        (q_nope, q_rope), (latent, k_rope) = queries, raw
        latent, scale = norm.promote_dtype((latent, norm.scale[...]), dtype=norm.dtype)
        with jax.named_scope("cache_append"):
            return append_token(
                q_nope, q_rope, latent, k_rope, scale, view, step.place, norm.epsilon
            )

    def remember(
        self,
        x: Float[Array, "B M D"],
        lengths: Int[Array, "B"] | Plain | None = None,
        *,
        positions: Int[Array, "M"] | Int[Array, "B M"] | Plain | None = None,
    ) -> Memory:
        """What the layer keeps of a sequence that others attend to: the call's `memory`.

        Args:
            x: states of that sequence, rows right-padded.
            lengths: int [B], tokens of each row, 0 to M; None is M for all.
            positions: int [M] or [B M], default 0..M-1; queries stand at 0 by default.

        Raises:
            ValueError: as the call; lengths that cannot be; or a layer that attends to the latents
                of another.
        """
        batch, tokens = self.check_input(x)
        if self.config.kv_source_layer is not None:
            raise ValueError(f"kv_source_layer={self.config.kv_source_layer}: it has no latents.")
        if positions is None:
            positions = jnp.arange(tokens, dtype=jnp.int32)
        by = rope.rotation(check_positions(positions, batch, tokens), self.config, tokens)
        if lengths is not None:
            lengths = row_counts(lengths, batch, tokens)
            valid = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
            x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
        return Memory(**self._latents(x, by), lengths=lengths)

    def _pattern(self, q_nope):
        """What each head looks for among the latents, [B T N R]."""
        with jax.named_scope("w_uk"):
            if isinstance(self.kv_b_proj, Quantised) and not hasattr(self, "kept_uk"):
                return fold_keys(q_nope, self.kv_b_proj.weight, precision=self.precision)
            return self._fold("BTNH,RNH->BTNR", q_nope, self.w_uk)

    def _heads(self, out_latent):
        """Heads [B T N V] from mixed latents [B T N R]."""
        with jax.named_scope("w_uv"):
            if isinstance(self.kv_b_proj, Quantised) and not hasattr(self, "kept_uv"):
                return unfold_values(
                    out_latent, self.kv_b_proj.weight, self.config.v_head_dim,
                    precision=self.precision,
                )  # fmt: skip
            if hasattr(self, "kept_uv"):
                made = self._fold("BTNR,RNV->BTNV", out_latent, self.kept_uv[...])
                return self._restored(made)
            return self._fold("BTNR,RNV->BTNV", out_latent, self.w_uv)

    def _fold(self, letters, x, kernel):
        """An einsum with a slice of kv_b_proj that accumulates in float32 for any T."""
        y = jnp.einsum(
            letters, x, kernel.astype(x.dtype), precision=self.precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )  # fmt: skip
        return y.astype(x.dtype)

    def _keys_values(self, latent):
        """Per-head k_nope [B T N H] and value [B T N V] from latents."""
        with jax.named_scope("kv_b_proj"):
            flat = checkpoint_name(self.kv_b_proj(latent), "keys_values")
            both = apart(flat, self.config.num_attention_heads)
            return jnp.split(both, [self.config.qk_nope_head_dim], axis=-1)

    def _output(self, heads, lse, gate):
        """`y` [B T D] from heads [B T N V], their lse [B T N] and the gate's logits."""
        dtype = heads.dtype
        if self.config.attention_sinks:
            with jax.named_scope("sinks"):
                # exp(sink) more in the denominator: heads * exp(lse) / (exp(lse) + exp(sink)).
                sinks = self.sinks[...].astype(lse.dtype)[None, None]
                heads = heads * jax.nn.sigmoid(lse - sinks)[..., None]
        if gate is not None:
            with jax.named_scope("gate"):
                heads = heads * jax.nn.sigmoid(gate.astype(lse.dtype))
        with jax.named_scope("o_proj"):
            return self.o_proj(together(checkpoint_name(heads.astype(dtype), "heads")))

    def check_input(self, x: Float[Array, "B T D"]) -> tuple[int, int]:
        """B and T, or ValueError: x is not [B T D] of a float dtype."""
        width = self.config.hidden_size
        if x.ndim != 3 or x.shape[-1] != width or not x.shape[0] or not x.shape[1]:
            raise ValueError(
                f"x has shape {x.shape}: it must be [B T D] with B >= 1, T >= 1 and "
                f"D = hidden_size = {width}."
            )
        if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
            raise ValueError(
                f"x is {x.dtype}: it must be bfloat16, float16, float32 or float64; cast it first."
            )
        return x.shape[0], x.shape[1]
