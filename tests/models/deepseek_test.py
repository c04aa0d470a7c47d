"""The decoder against a float64 one in numpy, its experts three ways, its router, its presets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, relative
from flax import nnx

from mla_jax import rope
from mla_jax.decoding import decode_step, prefill_step
from mla_jax.models import DeepseekConfig, DeepseekDecoder, decoder_presets
from mla_jax.models import experts as experts_module

SIGMOID = DeepseekConfig(
    attention=PLAIN.replace(num_hidden_layers=3), vocab_size=31, intermediate_size=20,
    moe_intermediate_size=9, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
    first_k_dense_replace=1, scoring_func="sigmoid", norm_topk_prob=True, n_group=4, topk_group=2,
    routed_scaling_factor=2.5, residual_scale=0.7, embed_scale=3.0, logit_scale=0.5,
)  # fmt: skip
SOFTMAX = SIGMOID.replace(
    attention=MICRO.replace(num_hidden_layers=2), scoring_func="softmax", norm_topk_prob=False,
    n_shared_experts=0, tie_word_embeddings=True,
)  # fmt: skip
CONFIGS = {"sigmoid": SIGMOID, "softmax": SOFTMAX}


@functools.cache
def make(name, **options):
    model = DeepseekDecoder(CONFIGS[name], precision="highest", rngs=nnx.Rngs(0), **options)
    random = np.random.default_rng(1)
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Param) and (path[-1] in ("scale", "bias")):
            shift = -2.0 if path[-2] == "router" else 1  # negative biases: a masked 0 would win
            noise = 0.2 * random.standard_normal(parameter.shape)
            parameter.set_value(jnp.asarray(shift + noise, jnp.float32))
    return model


class Numpy:
    """The same model in float64, one token of one row at a time, from the papers' equations."""

    def __init__(self, model):
        self.config = model.config
        self.weights = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def logits(self, tokens):
        w, c = self.weights, self.config
        x = w["embed"]["embedding"][tokens] * c.embed_scale
        for layer in range(c.attention.num_hidden_layers):
            b = w["blocks"][layer]
            x = x + c.residual_scale * self.attention(
                b["attention"], self.norm(x, b["attention_norm"], c.rms_norm_eps)
            )
            h = self.norm(x, b["mlp_norm"], c.rms_norm_eps)
            x = x + c.residual_scale * (
                np.stack([self.experts(b["mlp"], row) for row in h])
                if "router" in b["mlp"] else self.mlp(b["mlp"], h)
            )  # fmt: skip
        x = self.norm(x, w["norm"], c.rms_norm_eps)
        head = w["embed"]["embedding"].T if c.tie_word_embeddings else w["head"]["kernel"]
        return x @ head * c.logit_scale

    def norm(self, x, w, eps):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w["scale"]

    def mlp(self, w, x):
        gate = x @ w["gate_proj"]["kernel"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["up_proj"]["kernel"])) @ w["down_proj"][
            "kernel"
        ]

    def choose(self, w, x):
        """{expert: weight} of one token."""
        c = self.config
        scores = x @ w["kernel"]
        if c.scoring_func == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
            choice = scores + w["bias"]
        else:
            scores = choice = np.exp(scores) / np.exp(scores).sum()
        groups = choice.reshape(c.n_group, -1)
        best = 2 if c.scoring_func == "sigmoid" else 1
        worth = np.sort(groups, -1)[:, -best:].sum(-1)
        size = groups.shape[1]
        allowed = [
            e for g in np.argsort(-worth)[: c.topk_group] for e in range(g * size, g * size + size)
        ]
        chosen = sorted(allowed, key=lambda e: -choice[e])[: c.num_experts_per_tok]
        total = scores[chosen].sum() if c.norm_topk_prob else 1
        return {e: scores[e] / total * c.routed_scaling_factor for e in chosen}

    def experts(self, w, x):
        out = np.zeros_like(x)
        for e, share in self.choose(w["router"], x).items():
            one = {k: {"kernel": w[k][e]} for k in ("gate_proj", "up_proj", "down_proj")}
            out += share * self.mlp(one, x)
        return out + (self.mlp(w["shared"], x) if self.config.n_shared_experts else 0)

    def linear(self, w, x):
        kernel = w["kernel"].reshape(x.shape[-1], -1)
        y = x @ kernel + w.get("bias", np.zeros(1)).reshape(-1)
        return y.reshape(*x.shape[:-1], *w["kernel"].shape[1:])

    def attention(self, w, x):
        c = self.config.attention
        if c.q_lora_rank is None:
            q = self.linear(w["q_proj"], x)
        else:
            q = self.norm(self.linear(w["q_a_proj"], x), w["q_a_norm"], c.latent_norm_eps)
            q = self.linear(w["q_b_proj"], q)
            q = q * (np.sqrt(c.hidden_size / c.q_lora_rank) if c.mla_scale_q_lora else 1)
        latent, k_rope = np.split(self.linear(w["kv_a_proj"], x), [c.kv_lora_rank], -1)
        latent = self.norm(latent, w["kv_a_norm"], c.latent_norm_eps)
        latent = latent * (np.sqrt(c.hidden_size / c.kv_lora_rank) if c.mla_scale_kv_lora else 1)
        kv = np.einsum("tr,rnk->tnk", latent, w["kv_b_proj"]["kernel"])
        k_nope, value = np.split(kv, [c.qk_nope_head_dim], -1)
        q_nope, q_rope = np.split(q, [c.qk_nope_head_dim], -1)
        turn = np.exp(1j * np.arange(len(x))[:, None] * rope.inverse_frequencies(c))
        turn = turn * rope.attention_factor(c)

        def rotate(y, turn):
            pairs = y[..., 0::2] + 1j * y[..., 1::2]
            if not c.rope_interleave:
                first, second = np.split(y, 2, -1)
                pairs = first + 1j * second
            return pairs * turn

        q_rope, k_rope = rotate(q_rope, turn[:, None]), rotate(k_rope, turn)
        heads = np.zeros(value.shape)
        for t, n in np.ndindex(*heads.shape[:2]):
            scores = k_nope[: t + 1, n] @ q_nope[t, n]
            scores = c.scale * (scores + (k_rope[: t + 1] * q_rope[t, n].conj()).real.sum(-1))
            p = np.exp(scores - scores.max())
            heads[t, n] = p / p.sum() @ value[: t + 1, n]
        o = w["o_proj"]
        return heads.reshape(len(x), -1) @ o["kernel"].reshape(-1, len(x[0])) + o.get("bias", 0)


_full = jax.jit(lambda model, tokens: model(tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens_are_float64s(name, rng):
    model = make(name)
    exact = Numpy(model)
    tokens = rng.integers(0, 31, (2, 9))
    expected = np.stack([exact.logits(row) for row in tokens])
    assert relative(_full(model, jnp.asarray(tokens)), expected) < 2e-6
    logits, cache = prefill_step(
        model, jnp.asarray(tokens[:, :7]), model.init_cache(2, 16), jnp.array([7, 4])
    )
    assert relative(logits[0], expected[0, :7]) < 2e-6
    assert relative(logits[1, :4], expected[1, :4]) < 2e-6
    rows = [list(tokens[0, :7]), list(tokens[1, :4])]
    for b, t in enumerate((6, 3)):
        rows[b].append(int(logits[b, t].argmax()))
    for _ in range(4):
        step = jnp.asarray([[row[-1]] for row in rows], jnp.int32)
        logits, cache = decode_step(model, step, cache)
        for row, own in zip(rows, logits, strict=True):
            wanted = exact.logits(np.array(row))[-1]
            assert relative(own[0], wanted) < 3e-6
            assert int(own[0].argmax()) == int(wanted.argmax())
            row.append(int(own[0].argmax()))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_every_way(name, tokens, rng, monkeypatch):
    mlp, exact = make(name).blocks[1].mlp, Numpy(make(name))
    x = rng.standard_normal((tokens, 24)).astype(np.float32)
    weights = exact.weights["blocks"][1]["mlp"]
    shared = exact.mlp(weights["shared"], x.astype(np.float64)) if "shared" in weights else 0
    expected = np.stack([exact.experts(weights, row) for row in x.astype(np.float64)]) - shared
    x = jnp.asarray(x)
    experts, share = mlp.router(x)
    assert relative(mlp._experts(x, experts, share), expected) < 2e-6
    for way in (mlp._by_pair, mlp._all_experts, mlp._sorted):
        assert relative(way(x, experts, share), expected) < 2e-6
    monkeypatch.setattr(experts_module, "_BLOCK", 4)
    assert relative(mlp._sorted(x, experts, share), expected) < 2e-6
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # lowered for a CPU all the same
    assert relative(mlp._sorted(x, experts, share), expected) < 2e-6


def test_every_token_to_one_expert(rng, monkeypatch):
    monkeypatch.setattr(experts_module, "_BLOCK", 4)
    mlp = make("softmax").blocks[1].mlp
    x = jnp.asarray(rng.standard_normal((10, 24)), jnp.float32)
    experts = jnp.broadcast_to(jnp.array([[5, 11, 0]]), (10, 3))
    share = jnp.broadcast_to(jnp.array([[1.0, 2.0, 3.0]]), (10, 3))
    assert relative(mlp._sorted(x, experts, share), mlp._by_pair(x, experts, share)) < 2e-6


def test_many_tokens_do_not_multiply_memory():
    """What `lax.ragged_dot` costs where it is not native: activations once per expert."""
    config = SOFTMAX.replace(n_routed_experts=64, n_group=1, topk_group=1)
    mlp = nnx.eval_shape(lambda: DeepseekDecoder(config, rngs=nnx.Rngs(0)).blocks[1].mlp)
    x = jax.ShapeDtypeStruct((1, 8192, 24), jnp.float32)
    memory = jax.jit(lambda mlp, x: mlp(x)).lower(mlp, x).compile().memory_analysis()
    pairs = 4 * 8192 * 3 * 24  # bytes of every token once per chosen expert
    assert memory.temp_size_in_bytes < 12 * pairs


def test_the_router_is_float32_in_a_bfloat16_model(rng):
    model = DeepseekDecoder(SIGMOID, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    mlp = model.blocks[1].mlp
    assert mlp.router.kernel.dtype == jnp.float32
    assert mlp.gate_proj.dtype == jnp.bfloat16
    x = jnp.asarray(rng.standard_normal((1, 5, 24)), jnp.bfloat16)
    assert mlp.router(x[0])[1].dtype == jnp.float32
    assert mlp(x).dtype == jnp.bfloat16
    assert model(jnp.zeros((1, 3), jnp.int32)).dtype == jnp.float32


def test_presets_have_the_parameters_that_their_names_say():
    billions = {"deepseek_v2": 235.7, "deepseek_v2_lite": 15.7, "deepseek_v3": 671.0,
                "kimi_k2_0711": 1026, "moonlight": 16.0, "glm_4_7_flash": 29.9,
                "minicpm3": 4.07, "youtu_2b": 1.96, "tiny": 0.0}  # fmt: skip
    assert set(decoder_presets()) == set(billions)
    for name, expected in billions.items():
        config = DeepseekConfig.from_preset(name)
        model = nnx.eval_shape(lambda config=config: DeepseekDecoder(config, rngs=nnx.Rngs(0)))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert count / 1e9 == pytest.approx(expected, rel=0.01, abs=0.002)
    with pytest.raises(ValueError, match="'axk1' describes the attention only; whole models: deep"):
        DeepseekConfig.from_preset("axk1")


def test_bad_input():
    model = make("softmax")
    with pytest.raises(ValueError, match="tokens is float32"):
        model(jnp.zeros((1, 2)))
    with pytest.raises(ValueError, match="cache has 1 layers, the model 2"):
        model.decode(jnp.zeros((1, 1), jnp.int32), model.init_cache(1, 4)[:1])
