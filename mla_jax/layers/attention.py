"""Multi-head Latent Attention as a Flax layer (DeepSeek-V2, arXiv 2405.04434, section 2.1).

Every token becomes a latent (R numbers) and a rotary key (P numbers), shared by all heads; that is
all the cache holds. From one set of parameters two equal forms of the attention:

    expanded  keys and values per head are made from the latents, then ordinary attention;
    absorbed  W_UK is folded into the query, attention mixes latents, W_UV is applied once after.

    x [B T D]
    |- q_a_proj > q_a_norm > q_b_proj -+- q_nope [B T N H] -- w_uk --> pattern [B T N R]   per head
    |  (or q_proj)                     +- q_rope [B T N P] -- rope
    +- kv_a_proj -+- kv_a_norm ---------- latent [B T R]                                   shared
                  +- rope --------------- k_rope [B T P] --> cache
    latent_attention(pattern, q_rope, cache) -> out_latent [B T N R] -- w_uv --> heads [B T N V]
    heads -- sinks, gate -- o_proj --> y [B T D]

What only some families have (sinks, gates, query scales, more norms) is a line where it belongs in
this flow, switched on by the config.

Letters: B batch, T query tokens, S cache slots, N heads, D hidden size, Q q_lora_rank,
R kv_lora_rank, H qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from mla_jax.cache import LatentCache
from mla_jax.config import MLAConfig
from mla_jax.costs import choose_form
from mla_jax.ops import dense, dispatch, xla
from mla_jax.rope import apply_rope

Form = Literal["auto", "absorbed", "expanded"]
_BIASED = ("q_a_proj", "kv_a_proj", "o_proj")  # what attention_bias=True means


class MultiHeadLatentAttention(nnx.Module):
    """Causal self-attention whose cache holds one latent per token.

    Holds parameters only, no random state and no tables. Kernels: `q_a_proj` [D Q], `q_a_norm` [Q],
    `q_b_proj` [Q N H+P] (or `q_proj` [D N H+P] where q_lora_rank is None), `kv_a_proj` [D R+P],
    `kv_a_norm` [R], `kv_b_proj` [R N H+V], `o_proj` [N V D]. Where the config asks for them:
    `k_rope_norm` [P], `g_proj` [D N 1] or [D N V] (output_gate; "query" widens q_b_proj to
    [2Q N H+P+V]), `sinks` [N], `ssmax_scale` [N], `ssmax_bias` [N].

    Args:
        config: the widths, rotary embedding and scale factors.
        dtype: of the computation; None promotes the input's and the parameters'.
        param_dtype: of the parameters.
        precision: of the matmuls, as in jax.lax.dot.
        kernel_init: initializer of the kernels.
        implementation: backend of the attention core, one of `ops.dispatch.IMPLEMENTATIONS`; None
            chooses for the device and the shapes (`explain` tells what).
        rngs: for the initializers; not kept.

    Raises:
        ValueError: an implementation that does not exist, or a config with index_topk.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, mla_jax
    >>> config = mla_jax.MLAConfig.from_preset("tiny")
    >>> layer = mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0))
    >>> x = jnp.ones((2, 5, config.hidden_size))
    >>> layer(x).shape
    (2, 5, 128)
    >>> y, cache = layer.prefill(x, layer.init_cache(batch_size=2, max_length=16))
    >>> y, cache = layer.decode(x[:, :1], cache)
    >>> y.shape, cache.length
    ((2, 1, 128), Array([6, 6], dtype=int32))
    """

    def __init__(
        self,
        config: MLAConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        kernel_init: nnx.Initializer = nnx.initializers.lecun_normal(),  # noqa: B008
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if not isinstance(config, MLAConfig):
            raise ValueError(f"config={config!r}: it must be an MLAConfig.")
        if config.refusal is not None:
            raise ValueError(config.refusal)
        dispatch.check_implementation(implementation)
        self.config = config
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.implementation = implementation

        bias = config.attention_bias
        biased = _BIASED if bias is True else bias or ()

        def linear(name, inputs, outputs):
            return nnx.LinearGeneral(
                inputs, outputs, axis=tuple(range(-len(inputs), 0)), use_bias=name in biased,
                dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, precision=precision,
                dot_general=dense.dot_general, rngs=rngs,
            )  # fmt: skip

        def norm(width):
            return nnx.RMSNorm(
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
            self.sinks = nnx.Param(jnp.zeros((heads,), param_dtype))
        if config.query_scale_ssmax:
            self.ssmax_scale = nnx.Param(jnp.zeros((heads,), param_dtype))
            self.ssmax_bias = nnx.Param(jnp.ones((heads,), param_dtype))
        self.o_proj = linear("o_proj", (heads, value), (width,))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "#B #N #T #T"] | None = None,
        form: Form = "auto",
    ) -> Float[Array, "B T D"]:
        """Causal self-attention without a cache: training and scoring.

        Args:
            x: activations [B T D].
            positions: int [T] or [B T], default 0..T-1. Causality goes by index, not by position,
                so left-padded rows pass their own positions and a mask.
            segment_ids: int [B T]; tokens attend within their segment (packed sequences).
            mask: boolean, broadcastable to [B N T T], True = may attend; combined with the causal
                rule. A token that may attend to nothing gets zeros before o_proj.
            form: "auto" is expanded here, which is cheaper for any T without a cache.

        Returns:
            [B T D].

        Raises:
            ValueError: x is not [B T D] of a float dtype, or another argument does not go with it.
        """
        batch, tokens = self._check_input(x)
        _check_form(form)
        if positions is None:
            positions = jnp.arange(tokens, dtype=jnp.int32)
        else:
            positions = _check_positions(positions, batch, tokens)
        if segment_ids is not None and segment_ids.shape != (batch, tokens):
            raise ValueError(
                f"segment_ids has shape {segment_ids.shape}: it must be [B T] = {(batch, tokens)}."
            )
        q_nope, q_rope, gate = self._queries(x, positions, tokens)
        latent, k_rope = self._latents(x, positions, tokens)
        attend = self._absorbed if form == "absorbed" else self._expanded
        heads, lse = attend(
            q_nope, q_rope, latent, k_rope, lengths=None, mask=mask, segment_ids=segment_ids
        )
        return self._output(heads, lse, gate)

    def init_cache(self, batch_size: int, max_length: int, dtype=None) -> LatentCache:
        """An empty cache of `batch_size` rows with `max_length` slots each.

        `dtype` is by default that of the computation, or of the parameters where it is None.
        """
        dtype = dtype or self.dtype or self.param_dtype
        return LatentCache.init(self.config, batch_size, max_length, dtype)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        cache: LatentCache,
        lengths: Int[Array, "B"] | None = None,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        form: Form = "auto",
        empty: bool = False,
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """Appends `lengths[b]` tokens to row b, behind what the cache holds, and attends to all.

        A long prompt may come in chunks, and rows of different lengths share a batch.

        Args:
            x: activations [B T D], rows right-padded.
            cache: of this layer, B rows.
            lengths: int [B], tokens of each row, 0 to T; None is T for all.
            positions: int [T] or [B T]; by default they continue from `cache.length`. Causality and
                a sliding window go by cache slot all the same.
            form: "auto" goes by cost (`costs.choose_form`): expanded for a prompt, absorbed for a
                short continuation of a long cache.
            empty: says that rows with tokens hold none yet: what attends to a cached context is
                then not compiled, half of a prefill's program.

        Returns:
            outputs [B T D], zeros past a row's length, and the new cache.

        Raises:
            ValueError: arguments that do not go together, or, outside jit, a row that would
                overflow (under jit its `overflowed` is set) or is not empty as said.
        """
        if empty and not isinstance(cache.length, jax.core.Tracer):
            held = np.asarray(cache.length)
            given = np.ones_like(held) if lengths is None else np.asarray(lengths)
            if held[given > 0].any():
                raise ValueError(f"empty=True: rows hold {held.tolist()} tokens.")
        return self._extend(x, cache, lengths, positions, form, empty=empty)

    def decode(
        self,
        x: Float[Array, "B T D"],
        cache: LatentCache,
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        form: Form = "auto",
        schedule: Any = None,
    ) -> tuple[Float[Array, "B T D"], LatentCache]:
        """Appends T new tokens (1, or a few drafts) to every row; causal among themselves.

        Args, returns and errors are those of `prefill` without `lengths`. `schedule` is
        `decode_schedule(cache, T)`, worth making once where several layers share a step.
        """
        return self._extend(x, cache, None, positions, form, schedule)

    def decode_schedule(self, cache: LatentCache, queries: int = 1) -> Any:
        """How to cut a step's work among processors, the same for all layers of a model.

        Args:
            cache: before the step, of this layer or of any other whose rows are as long.
            queries: T, tokens of the step.

        Returns:
            `schedule` for `decode` of every layer; None where the backend needs none.
        """
        if choose_form(self.config, queries=queries, slots=cache.max_length) != "absorbed":
            return None
        lengths = jnp.minimum(cache.length + queries, cache.max_length)
        return dispatch.decode_schedule(
            self.config, lengths, slots=cache.max_length, queries=queries,
            dtype=cache.latent.dtype,
            implementation=dispatch.serving("latent_attention", self.implementation),
        )  # fmt: skip

    @property
    def w_uk(self) -> Float[Array, "R N H"]:
        """W_UK, the part of kv_b_proj that makes keys: folded into the query when absorbed."""
        return self.kv_b_proj.kernel[...][..., : self.config.qk_nope_head_dim]

    @property
    def w_uv(self) -> Float[Array, "R N V"]:
        """W_UV, the part of kv_b_proj that makes values: applied after mixing when absorbed."""
        return self.kv_b_proj.kernel[...][..., self.config.qk_nope_head_dim :]

    def _extend(self, x, cache, lengths, positions, form, schedule=None, empty=False):
        batch, tokens = self._check_input(x)
        self._check_cache(cache, batch)
        _check_form(form)
        if form == "auto":
            form = choose_form(self.config, queries=tokens, slots=cache.max_length)
        token = jnp.arange(tokens, dtype=jnp.int32)[None]
        start = cache.length[:, None]
        valid = None
        if lengths is not None:
            lengths = cache._row_counts(lengths, tokens)
            valid = token < lengths[:, None]
            x = jnp.where(valid[..., None], x, 0)  # padding may be NaN; 0 x NaN is NaN
        slot = start + token
        positions = slot if positions is None else _check_positions(positions, batch, tokens)
        q_nope, q_rope, gate = self._queries(x, positions, cache.max_length)
        latent, k_rope = self._latents(x, positions, cache.max_length)
        if latent.dtype != cache.latent.dtype:
            raise ValueError(
                f"cache.latent is {cache.latent.dtype}, the layer computes in {latent.dtype} for "
                f"this input: use init_cache(..., dtype=jnp.{latent.dtype}) or the layer's dtype "
                "argument."
            )
        with jax.named_scope("cache_append"):
            new = cache.append(latent, k_rope, lengths)
        seen = slot + 1 if valid is None else jnp.where(valid, slot + 1, 0)
        seen = jnp.minimum(seen, cache.max_length)
        if form == "absorbed":
            # A length per row, where there is one, tells kernels more than one per query.
            lengths = new.length if valid is None else seen
            heads, lse = self._absorbed(
                q_nope, q_rope, new.latent, new.k_rope, lengths=lengths, mask=None,
                segment_ids=None, schedule=schedule,
            )  # fmt: skip
        else:
            heads, lse = self._expanded_cached(
                q_nope, q_rope, latent, k_rope, new, None if empty else cache.length, seen
            )
        y = self._output(heads, lse, gate)
        return (y if valid is None else jnp.where(valid[..., None], y, 0)), new

    def _queries(self, x, positions, length):
        """q_nope [B T N H], rotated q_rope [B T N P] and the gate's logits [B T N 1 or V] or None.

        `length` says how long the context may become: see `rope.inverse_frequencies`.
        """
        config, gate = self.config, None
        with jax.named_scope("queries"):
            if config.q_lora_rank is None:
                query = self.q_proj(x)
            else:
                raw = self.q_a_proj(x)
                q_latent = self.q_a_norm(raw) if config.latent_norm else raw
                q_latent = checkpoint_name(q_latent, "q_latent")
                if config.output_gate == "query":
                    query = self.q_b_proj(jnp.concatenate([q_latent, raw], axis=-1))
                    query, gate = jnp.split(query, [config.qk_head_dim], axis=-1)
                else:
                    query = self.q_b_proj(q_latent)
                if config.mla_scale_q_lora:
                    query = query * math.sqrt(config.hidden_size / config.q_lora_rank)
            q_nope, q_rope = jnp.split(query, [config.qk_nope_head_dim], axis=-1)
        with jax.named_scope("rope"):
            q_rope = apply_rope(q_rope, positions, config, length)
        if config.llama_4_scaling_beta is not None or config.query_scale_ssmax:
            scale = self._query_scale(positions).astype(query.dtype)
            q_nope, q_rope = q_nope * scale, q_rope * scale
        if config.output_gate in ("head", "elementwise"):
            with jax.named_scope("g_proj"):
                gate = self.g_proj(x)
        return q_nope, q_rope, gate

    def _query_scale(self, positions):
        """What queries are multiplied by at their positions, float32 [B T N 1] or smaller."""
        config = self.config
        position = positions.reshape((-1, positions.shape[-1]))[..., None, None]
        scale = jnp.ones(position.shape, jnp.float32)
        if config.llama_4_scaling_beta is not None:
            turns = position // config.llama_4_original_max_position_embeddings
            scale = 1 + config.llama_4_scaling_beta * jnp.log1p(turns.astype(jnp.float32))
        if config.query_scale_ssmax:
            slope, offset = (
                parameter[...].astype(jnp.float32)[None, None, :, None]
                for parameter in (self.ssmax_scale, self.ssmax_bias)
            )
            scale = scale * (slope * jnp.log1p(position.astype(jnp.float32)) + offset)
        return scale

    def _latents(self, x, positions, length):
        """Normalized latent [B T R] and rotated k_rope [B T P], as the cache holds them."""
        config = self.config
        with jax.named_scope("latents"):
            latent, k_rope = jnp.split(self.kv_a_proj(x), [config.kv_lora_rank], axis=-1)
            if config.latent_norm:
                latent = self.kv_a_norm(latent)
            if config.mla_scale_kv_lora:
                latent = latent * math.sqrt(config.hidden_size / config.kv_lora_rank)
            if config.k_rope_norm:
                k_rope = self.k_rope_norm(k_rope)
        with jax.named_scope("rope"):
            k_rope = apply_rope(k_rope, positions, config, length)
        return checkpoint_name(latent, "latent"), checkpoint_name(k_rope, "k_rope")

    def _absorbed(self, q_nope, q_rope, latent, k_rope, **options):
        """Heads [B T N V] and lse [B T N] by the absorbed form, never making keys or values."""
        with jax.named_scope("w_uk"):
            pattern = self._fold("BTNH,RNH->BTNR", q_nope, self.w_uk)
        out_latent, lse = dispatch.latent_attention(
            pattern, q_rope, latent, k_rope, scale=self.config.scale,
            window=self.config.sliding_window, precision=self.precision,
            implementation=dispatch.serving("latent_attention", self.implementation), **options,
        )  # fmt: skip
        with jax.named_scope("w_uv"):
            return self._fold("BTNR,RNV->BTNV", out_latent, self.w_uv), lse

    def _fold(self, letters, x, kernel):
        """An einsum with a slice of kv_b_proj that accumulates in float32 for any T."""
        y = jnp.einsum(
            letters, x, kernel.astype(x.dtype), precision=self.precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )  # fmt: skip
        return y.astype(x.dtype)

    def _expanded(self, q_nope, q_rope, latent, k_rope, **options):
        """Heads [B T N V] and lse [B T N] by the expanded form, over the tokens given."""
        k_nope, value = self._keys_values(latent)
        return dispatch.expanded_attention(
            q_nope, q_rope, k_nope, k_rope, value, scale=self.config.scale,
            window=self.config.sliding_window, precision=self.precision,
            implementation=dispatch.serving("expanded_attention", self.implementation), **options,
        )  # fmt: skip

    def _expanded_cached(self, q_nope, q_rope, latent, k_rope, cache, context, seen):
        """Heads and lse by the expanded form over new tokens and the first `context` [B] cached.

        `context` is None where nothing is cached.

        Under a sliding window every token has its own first slot, so all of it goes through the
        cache, which holds the new tokens too: a token sees the last of its `seen` [B T] slots.
        """
        if self.config.sliding_window is not None:
            fresh, context = None, seen
        else:
            fresh = self._expanded(
                q_nope, q_rope, latent, k_rope, lengths=None, mask=None, segment_ids=None
            )
            if context is None:
                return fresh
        return xla.add_cached_context(
            fresh, q_nope, q_rope, cache.latent, cache.k_rope, self.kv_b_proj.kernel[...],
            lengths=context, scale=self.config.scale, window=self.config.sliding_window,
            precision=self.precision,
        )  # fmt: skip

    def _keys_values(self, latent):
        """Per-head k_nope [B T N H] and value [B T N V] from latents."""
        with jax.named_scope("kv_b_proj"):
            return jnp.split(self.kv_b_proj(latent), [self.config.qk_nope_head_dim], axis=-1)

    def _output(self, heads, lse, gate):
        """Y [B T D] from heads [B T N V], their lse [B T N] and the gate's logits."""
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
            return self.o_proj(checkpoint_name(heads.astype(dtype), "heads"))

    def _check_input(self, x):
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
        return x.shape[:2]

    def _check_cache(self, cache, batch):
        config = self.config
        for name, held, width in (
            ("latent", cache.latent, config.kv_lora_rank),
            ("k_rope", cache.k_rope, config.qk_rope_head_dim),
        ):
            if held.shape != (batch, cache.max_length, width):
                raise ValueError(
                    f"cache.{name} has shape {held.shape}: for this input and layer it must be "
                    f"({batch}, S, {width})."
                )


def _check_form(form: str) -> None:
    if form not in ("auto", "absorbed", "expanded"):
        raise ValueError(f"form={form!r}: it must be 'auto', 'absorbed' or 'expanded'.")


def _check_positions(positions, batch: int, tokens: int):
    if positions.shape not in ((tokens,), (batch, tokens)) or not jnp.issubdtype(
        positions.dtype, jnp.integer
    ):
        raise ValueError(
            f"positions is {positions.dtype} of shape {positions.shape}: it must be an integer "
            f"array [T] = ({tokens},) or [B T] = ({batch}, {tokens})."
        )
    return positions
