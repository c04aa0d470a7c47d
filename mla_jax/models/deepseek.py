"""The decoder of DeepSeek-V2 and V3, and of the models that share its shape.

Embedding, layers of x + attention(norm(x)) and x + mlp(norm(x)), final norm, head. The first
layers' MLPs are dense and gated; the others' are mixtures of experts: a float32 router scores all
experts, each token goes to its best few, and a shared expert sees every token. By their configs:
DeepSeek-V2, V3 and R1, Kimi-K2, Moonlight, GLM-4.7-Flash, Youtu-LLM, A.X-K1, Sarvam and MiniCPM3.

The layers are a Python loop, not a scan: a scan would slice each layer's experts out of one stacked
array, and XLA copies such a slice before a library's matmul reads it, doubling what a decode step
moves. The experts of one layer are one array, never a loop in Python.

Letters: B batch, T tokens, D hidden size, F intermediate size, W words, M = B T tokens in a row,
E experts, K experts per token, G groups of experts.
"""

import dataclasses
import functools
import math
import os
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from mla_jax import huggingface
from mla_jax.attention import MultiHeadLatentAttention
from mla_jax.cache import LatentCache
from mla_jax.config import MLAConfig, configs_dir

_FAMILIES = (
    "deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "kimi_vl", "glm4_moe_lite", "youtu",
    "youtu_llm", "axk1", "AXK1", "sarvam_mla", "minicpm3",
)  # fmt: skip
_DENSE_TOKENS = 256  # up to here reading every expert once beats sorting
_BLOCK = 256  # tokens of one expert in a matmul


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekConfig:
    """Shape of a `DeepseekDecoder`; keys are the Hugging Face config's where it has them.

    Attributes:
        attention: of every layer; its hidden_size and num_hidden_layers are the model's.
        vocab_size: W.
        intermediate_size: F of the dense layers.
        moe_intermediate_size: F of one expert.
        n_routed_experts: E; None has dense layers only.
        num_experts_per_tok: K.
        n_shared_experts: experts' widths that every token's shared expert has; 0 is none.
        first_k_dense_replace: dense layers before the first mixture.
        scoring_func: how the router scores: "softmax" (V2) or "sigmoid" (V3).
        norm_topk_prob: the chosen experts' weights are divided by their sum.
        routed_scaling_factor: and multiplied by this.
        n_group: G; where above 1, experts are chosen from the best `topk_group` groups only.
        topk_group: those groups. A group counts as its best expert under softmax, as the sum of its
            two best under sigmoid.
        rms_norm_eps: epsilon of the norms around attention and MLP.
        tie_word_embeddings: the head is the embedding.
        embed_scale, residual_scale, logit_scale: MiniCPM3's factors on embeddings, on what a layer
            adds, and on logits.
        eos_token_ids: tokens that end a text.

    Raises:
        ValueError: a value that cannot be; the message names the key.
    """

    attention: MLAConfig
    vocab_size: int
    intermediate_size: int
    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int = 1
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        whole = ["vocab_size", "intermediate_size", "n_group", "topk_group", "num_experts_per_tok"]
        if self.n_routed_experts is not None:
            whole += ["n_routed_experts", "moe_intermediate_size"]
        for key in whole:
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{key}={value!r}: {key} must be a positive whole number.")
        for key in ("n_shared_experts", "first_k_dense_replace"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{key}={value!r}: {key} must be a whole number >= 0.")
        if self.scoring_func not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring_func={self.scoring_func!r}: must be softmax or sigmoid.")
        experts = self.n_routed_experts or self.num_experts_per_tok
        inside = self.topk_group * (experts // self.n_group)
        if experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_group={self.n_group}: it must divide n_routed_experts={experts} and be at "
                f"least topk_group={self.topk_group}."
            )
        if self.num_experts_per_tok > inside:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}: only {inside} can be chosen from."
            )

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str) -> Self:
        """The whole shape of a released model: a preset of `MLAConfig` with a [decoder] table.

        Raises:
            ValueError: no such preset, or one that describes the attention only.
        """
        attention = MLAConfig.from_preset(name)
        path = configs_dir() / "models" / f"{MLAConfig.preset_file(name)}.toml"
        decoder = tomllib.loads(path.read_text(encoding="utf-8")).get("decoder")
        if decoder is None:
            raise ValueError(
                f"the preset {name!r} describes the attention only; whole models: "
                f"{', '.join(decoder_presets())}."
            )
        return cls(attention=attention, **decoder)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | os.PathLike) -> Self:
        """Reads a config.json: see `MLAConfig.from_hf`.

        Raises:
            ValueError: a family whose decoder has another shape, or a key that asks for what this
                decoder does not do.
        """
        hf, where = huggingface.read_config(config)
        attention = MLAConfig.from_hf(hf)
        hf = huggingface.language_model(hf)
        family = hf.get("model_type")
        if family is not None and family not in _FAMILIES:
            raise ValueError(
                f"{where}: model_type={family!r}: this decoder has the shape of "
                f"{', '.join(_FAMILIES)}; other families' attention layers load into "
                "MultiHeadLatentAttention."
            )
        for key, allowed in (("hidden_act", ("silu",)), ("mlp_bias", (False,)),
                             ("moe_layer_freq", (1,))):  # fmt: skip
            if hf.get(key) not in (None, *allowed):
                raise ValueError(f"{where}: {key}={hf[key]!r}: supported is {allowed[0]!r}.")
        names = {field.name for field in dataclasses.fields(cls)} - {"attention"}
        fields = {key: hf[key] for key in names if hf.get(key) is not None}
        for theirs, ours in (("num_experts", "n_routed_experts"),
                             ("num_shared_experts", "n_shared_experts")):  # fmt: skip
            if hf.get(theirs) is not None:
                fields.setdefault(ours, hf[theirs])
        if "scoring_func" not in fields:
            sigmoid = family not in ("deepseek_v2", None) or hf.get("topk_method") == "noaux_tc"
            fields["scoring_func"] = "sigmoid" if sigmoid else "softmax"
        if fields["scoring_func"] == "sigmoid":
            fields.setdefault("norm_topk_prob", True)
        if hf.get("topk_method") == "greedy":
            fields |= {"n_group": 1, "topk_group": 1}
        kinds = hf.get("mlp_layer_types")
        if isinstance(kinds, list):
            dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
            if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
                raise ValueError(
                    f"{where}: mlp_layer_types={kinds!r}: dense layers must come first."
                )
            fields["first_k_dense_replace"] = dense
        if family == "minicpm3":
            depth, base = hf.get("scale_depth"), hf.get("dim_model_base")
            fields["embed_scale"] = float(hf.get("scale_emb", 12))
            if depth is not None:
                fields["residual_scale"] = depth / math.sqrt(attention.num_hidden_layers)
            if base is not None:
                fields["logit_scale"] = base / attention.hidden_size
            fields.setdefault("tie_word_embeddings", True)
        stop = hf.get("eos_token_id")
        fields["eos_token_ids"] = (
            tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,)
        )
        missing = [key for key in ("vocab_size", "intermediate_size") if key not in fields]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}.")
        try:
            return cls(attention=attention, **fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error


def decoder_presets() -> tuple[str, ...]:
    """Presets that describe a whole decoder."""
    files = sorted((configs_dir() / "models").glob("*.toml"))
    return tuple(file.stem for file in files if "\n[decoder]" in file.read_text(encoding="utf-8"))


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x), arXiv 2002.05202."""

    def __init__(self, width: int, inner: int, *, precision, **types):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, precision=precision, **types)

        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nnx.Module):
    """Which experts a token goes to, and their weights: float32 throughout.

    `bias` [E] (sigmoid scoring) shifts the choice but not the weights (DeepSeek-V3,
    arXiv 2412.19437, section 2.1.2).
    """

    def __init__(self, config: DeepseekConfig, *, rngs: nnx.Rngs):
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

    def __init__(self, config: DeepseekConfig, *, precision, dtype, param_dtype, rngs):
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

        `lax.ragged_dot` is made for this and used on TPUs. Elsewhere jax may turn it into a product
        with E masked copies of its input, [E MK D], as it does on CPUs.
        """
        config = self.config
        dtype = self.dtype or jnp.promote_types(x.dtype, self.gate_proj.dtype)
        x, pairs = x.astype(dtype), experts.size
        if 2 * pairs <= config.n_routed_experts:
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
        count, groups = self.config.num_experts_per_tok, self.config.n_routed_experts
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=groups).astype(jnp.int32)
        if jax.default_backend() == "tpu":
            outputs = self._ragged(x[order // count], sizes)
            own = outputs[jnp.argsort(order)]  # back in the tokens' order
        else:
            # Every expert's tokens start a block of their own; at most one block each is not full.
            blocks = -(-flat.size // _BLOCK) + groups
            needed = -(-sizes // _BLOCK)
            ends = jnp.cumsum(needed)
            starts, before = ends - needed, jnp.cumsum(sizes) - sizes
            ranked = flat[order]
            rank = jnp.arange(flat.size, dtype=jnp.int32) - before[ranked]
            place = starts[ranked] * _BLOCK + rank
            padded = (
                jnp.zeros((blocks * _BLOCK, x.shape[-1]), x.dtype)
                .at[place]
                .set(x[order // count], unique_indices=True)
            )
            owner = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
            kernels = self._kernels()

            def one(block):
                tokens, expert = block
                return self._gated("MD,DF->MF", "MF,FD->MD", tokens, [k[expert] for k in kernels])

            blocked = padded.reshape(blocks, _BLOCK, -1)
            owner = jnp.minimum(owner, groups - 1)
            outputs = lax.map(one, (blocked, owner), batch_size=min(16, blocks))
            outputs = outputs.reshape(blocks * _BLOCK, -1)
            own = outputs[jnp.zeros_like(place).at[order].set(place, unique_indices=True)]
        return (own.reshape(len(x), count, -1) * weights[..., None]).sum(1)

    def _ragged(self, x, sizes):
        ragged = functools.partial(
            lax.ragged_dot, group_sizes=sizes, precision=self.precision,
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )  # fmt: skip
        gate, up, down = (kernel.astype(x.dtype) for kernel in self._kernels())
        hidden = jax.nn.silu(ragged(x, gate)) * ragged(x, up)
        return ragged(hidden.astype(x.dtype), down)


class DeepseekBlock(nnx.Module):
    """One layer: attention and MLP, each behind its norm."""

    def __init__(self, config: DeepseekConfig, layer: int, *, precision, implementation, **types):
        width = config.attention.hidden_size
        self.scale = config.residual_scale
        self.attention_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        self.attention = MultiHeadLatentAttention(
            config.attention, precision=precision, implementation=implementation, **types
        )
        self.mlp_norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        if config.is_sparse(layer):
            self.mlp = MixtureOfExperts(config, precision=precision, **types)
        else:
            self.mlp = GatedMLP(width, config.intermediate_size, precision=precision, **types)

    def add(self, x, y):
        """The sum, y scaled as MiniCPM3 does."""
        return x + (y if self.scale == 1 else y * self.scale)

    def feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP with its norm and residual."""
        with jax.named_scope("mlp"):
            return self.add(x, self.mlp(self.mlp_norm(x)))


class DeepseekDecoder(nnx.Module):
    """A language model of DeepSeek's shape.

    Args:
        config: its shape.
        dtype, param_dtype, precision, implementation, rngs: as in `MultiHeadLatentAttention`. The
            router's parameters are float32 whatever param_dtype says.

    >>> import mla_jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from mla_jax.models import DeepseekConfig, DeepseekDecoder
    >>> model = DeepseekDecoder(DeepseekConfig.from_preset("tiny"), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 256)
    """

    def __init__(
        self,
        config: DeepseekConfig,
        *,
        dtype=None,
        param_dtype=jnp.float32,
        precision=None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        width = config.attention.hidden_size
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, width, embedding_init=nnx.initializers.normal(width**-0.5), **types
        )
        self.blocks = nnx.List(
            DeepseekBlock(
                config, layer, precision=precision, implementation=implementation, **types
            )
            for layer in range(config.attention.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(width, epsilon=config.rms_norm_eps, **types)
        tied = config.tie_word_embeddings
        head = {"use_bias": False, "precision": precision, **types}
        self.head = None if tied else nnx.Linear(width, config.vocab_size, **head)

    def __call__(self, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T W"]:
        """Logits [B T W] in float32, without a cache; options as in the layer's `__call__`."""
        x = self._embed(tokens)
        for block in self.blocks:
            y = block.attention(block.attention_norm(x), **options)
            x = block.feed_forward(block.add(x, y))
        return self._logits(x)

    def init_cache(self, batch_size: int, max_length: int, dtype=None) -> tuple[LatentCache, ...]:
        """An empty cache per layer: see `MultiHeadLatentAttention.init_cache`."""
        return tuple(
            block.attention.init_cache(batch_size, max_length, dtype) for block in self.blocks
        )

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends `lengths[b]` tokens to row b: see `MultiHeadLatentAttention.prefill`.

        Returns:
            logits [B T W], meaningless past a row's length, and the new caches.
        """
        x, cache = self._hidden(tokens, cache, lengths)
        return self._logits(x), cache

    def prefill_last(
        self,
        tokens: Int[Array, "B T"],
        cache: tuple[LatentCache, ...],
        lengths: Int[Array, "B"],
    ) -> tuple[Float[Array, "B W"], tuple[LatentCache, ...]]:
        """`prefill` with the logits of each row's last token only: a prompt's are often too many.

        A row of length 0 gives logits that mean nothing.
        """
        x, cache = self._hidden(tokens, cache, lengths)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return self._logits(jnp.take_along_axis(x, last, axis=1))[:, 0], cache

    def decode(
        self, tokens: Int[Array, "B T"], cache: tuple[LatentCache, ...]
    ) -> tuple[Float[Array, "B T W"], tuple[LatentCache, ...]]:
        """Appends T new tokens to every row: see `MultiHeadLatentAttention.decode`."""
        x, cache = self._hidden(tokens, cache, None)
        return self._logits(x), cache

    def _hidden(self, tokens, cache, lengths):
        if len(cache) != len(self.blocks):
            raise ValueError(
                f"cache has {len(cache)} layers, the model {len(self.blocks)}: make it with "
                "model.init_cache()."
            )
        x, new = self._embed(tokens), []
        for block, held in zip(self.blocks, cache, strict=True):
            hidden = block.attention_norm(x)
            if lengths is None:
                y, held = block.attention.decode(hidden, held)
            else:
                y, held = block.attention.prefill(hidden, held, lengths)
            x = block.feed_forward(block.add(x, y))
            new.append(held)
        return x, tuple(new)

    def _embed(self, tokens):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens is {tokens.dtype} of shape {tokens.shape}: it must be integer [B T]."
            )
        x = self.embed(tokens)
        return x if self.config.embed_scale == 1 else x * self.config.embed_scale

    def _logits(self, x):
        with jax.named_scope("head"):
            x = self.norm(x)
            logits = self.embed.attend(x) if self.head is None else self.head(x)
            return logits.astype(jnp.float32) * self.config.logit_scale
