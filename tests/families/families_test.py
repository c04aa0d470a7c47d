"""Every family's config and tensor names against float64 numpy that knows no code of ours.

It reads the family's own keys, and its own tensors as torch stores them. What a family's code does
beyond its config is `traits` here, by the families' own code and not by `mla_jax.families`.
"""

import functools
import json
import math

import jax
import numpy as np
import pytest
from common import drawn, emptied, slow
from flax import nnx

from mla_jax import MLAConfig, MultiHeadLatentAttention, checkpoint

D, N, Q, R, H, P, V = 24, 3, 10, 14, 6, 8, 5
BASE = {
    "hidden_size": D, "num_attention_heads": N, "num_key_value_heads": N, "q_lora_rank": Q,
    "kv_lora_rank": R, "qk_nope_head_dim": H, "qk_rope_head_dim": P, "v_head_dim": V,
    "num_hidden_layers": 4, "max_position_embeddings": 4096, "rms_norm_eps": 0.03,
    "rope_theta": 5000.0, "rope_scaling": None, "attention_bias": False, "head_dim": 64,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
LONG = {"type": "longrope", "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [1.0, 1.5, 3.0, 7.0]}  # fmt: skip
DIRECT = {"q_lora_rank": None}
J, Z = 2, 11
INDEX = {"index_topk": 4, "index_n_heads": J, "index_head_dim": Z}
PANGU = {"attention_q_lora_dim": Q, "attention_kv_lora_dim": R, "attention_qk_dim": H,
         "attention_qk_rope_dim": P, "attention_v_dim": V}  # fmt: skip
MISTRAL = {
    "dim": D, "n_heads": N, "n_layers": 4, "norm_eps": 0.03, "q_lora_rank": Q, "kv_lora_rank": R,
    "qk_nope_head_dim": H, "qk_rope_head_dim": P, "v_head_dim": V, "rope_theta": 5000.0,
    "max_position_embeddings": 4096, "head_dim": 99,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8},
    "yarn": {"alpha": 1, "beta": 32, "factor": 8, "original_max_position_embeddings": 32},
}  # fmt: skip

# name: (what the config says beyond BASE, traits)
CASES = {
    "deepseek_v2": ({**DIRECT, "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}, {}),
    "deepseek_v2 mscales differ": ({"model_type": "deepseek_v2", "rope_scaling": YARN | {
        "mscale": 0.7, "mscale_all_dim": 1.3}}, {}),
    "deepseek_v3": ({"rope_scaling": YARN}, {}),
    "deepseek_v3 biased": ({"attention_bias": True}, {"bias": ("q_a_proj", "kv_a_proj_with_mqa",
                                                               "o_proj")}),
    "deepseek_v3 direct, biased": ({"attention_bias": True, **DIRECT},
                                   {"bias": ("kv_a_proj_with_mqa", "o_proj")}),
    "deepseek_v3 half": ({"rope_interleave": False}, {"half": True}),
    "deepseek_v3 no nope": ({"qk_nope_head_dim": 0}, {}),
    "deepseek_v3 yarn without mscale": ({"rope_scaling": {
        k: v for k, v in YARN.items() if "mscale" not in k}}, {}),
    "deepseek_v3 linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {}),
    "kimi_k2": ({"rope_scaling": YARN | {"beta_fast": 1.0, "factor": 32.0}}, {}),
    "glm4_moe_lite": ({"v_head_dim": 9, "partial_rotary_factor": 1.0}, {}),
    "minicpm3": ({"rope_scaling": LONG}, {"half": True}),
    "minicpm3 short": ({"rope_scaling": LONG | {"original_max_position_embeddings": 64}},
                       {"half": True}),
    "minicpm3 not extended": ({"rope_scaling": LONG | {"original_max_position_embeddings": 64},
                               "max_position_embeddings": 64}, {"half": True}),
    "minicpm3 v by heads": ({"v_head_dim": None}, {"half": True, "v": D // N}),
    "longcat_flash": ({}, {"scaled": ("q", "kv")}),
    "longcat_flash unscaled q": ({"mla_scale_q_lora": False}, {"scaled": ("kv",)}),
    "longcat_flash_ngram": ({"num_layers": 2, "num_hidden_layers": None}, {"scaled": ("q", "kv")}),
    "youtu_llm": ({"rope_interleave": True}, {}),
    "youtu direct": (DIRECT, {}),
    "axk1": ({}, {}),
    "pangu_ultra_moe": (PANGU | dict.fromkeys((
        "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")), {}),
    "sarvam_mla": ({**DIRECT, "use_qk_norm": True, "rope_scaling": YARN | {
        "type": "deepseek_yarn"}}, {}),
    "sarvam_mla null": ({**DIRECT, "rope_theta": 5000.0}, {"yarn": {
        "type": "deepseek_yarn", "factor": 40, "original_max_position_embeddings": 4096,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "deepseek_v3 transmla": ({"qk_latent_layernorm": False, "attention_bias": True},
                             {"bias": ("q_b_proj", "kv_a_proj_with_mqa"), "norms": False}),
    "deepseek_v3 transmla direct": ({
        "qk_latent_layernorm": False, "attention_bias": True, **DIRECT},
        {"bias": ("q_proj", "kv_a_proj_with_mqa"), "norms": False}),
    "deepseek_v3 transmla normed": ({"qk_latent_layernorm": True, "attention_bias": False}, {}),
    "kimi_linear": ({**DIRECT, "mla_use_nope": True}, {"still": True}),
    "kimi_linear k3": ({"mla_use_nope": True, "mla_use_output_gate": True},
                       {"still": True, "gate": "g_proj", "gates": "elementwise"}),
    "bailing_hybrid": (DIRECT, {"gate": "g_proj", "gates": "head"}),
    "bailing_hybrid elementwise": ({"gated_attention_proj_granularity_type": "element_wise"},
                                   {"gate": "g_proj", "gates": "elementwise"}),
    "bailing_hybrid nope": ({**DIRECT, "use_mla_nope": True},
                            {"gate": "g_proj", "gates": "head", "rope": 0}),
    "bailing_moe_v2_5": ({"rope_scaling": YARN}, {}),
    "mistral4": ({"rope_parameters": YARN | {
        "rope_theta": 5000.0, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5}}, {"llama4": (0.1, 32)}),
    "hy_v4": ({"index_topk": None, "rope_scaling": YARN},
              {"half": True, "gate": "linear_gate", "gates": "elementwise", "sinks": True}),
    "axk2": ({"index_topk": None}, {"fused": True}),
    "mistral_large4": ({**DIRECT, "index_topk": None, "no_rope_layers": [1] * 4}, {
        "ssmax": True, "eps": 0.03}),
    "mistral_large4 unrotated": ({**DIRECT, "index_topk": None, "no_rope_layers": [0] * 4}, {
        "ssmax": True, "eps": 0.03, "nope": H + P, "rope": 0}),
    "dots3_note": ({
        "layer_types": ["sliding_attention"] * 4, "sliding_window": 4, "rope_theta": 8e7,
        "swa_rope_theta": 5000.0, "swa_num_attention_heads": N, "swa_q_lora_rank": Q,
        "swa_kv_lora_rank": R, "swa_qk_nope_head_dim": H, "swa_v_head_dim": V,
        "swa_qk_rope_head_dim": P,
    }, {"scaled": ("q", "kv"), "gate": "g_proj", "gates": "head", "k_norm": True, "window": 4,
        "eps": 0.03}),
    # Sparse attention: (index heads, channels), what its families' code does.
    "deepseek_v32": (INDEX | {"rope_scaling": YARN}, {"index": {}}),
    "glm_moe_dsa": (INDEX, {"index": {"pairs": True}}),
    "hy_v4 sparse": (INDEX, {"half": True, "gate": "linear_gate", "gates": "elementwise",
                             "sinks": True, "index": {"last": True, "eps": 0.03}}),
    "axk2 sparse": (INDEX, {"fused": True, "index": {}}),
    "mistral_large4 sparse": (INDEX | DIRECT | {"no_rope_layers": [1] * 4}, {
        "ssmax": True, "eps": 0.03, "index": {"pairs": True, "ssmax": True}}),
    "mistral_large4 sparse, unrotated": (INDEX | DIRECT | {"no_rope_layers": [0] * 4}, {
        "ssmax": True, "eps": 0.03, "nope": H + P, "rope": 0, "index": {"ssmax": True}}),
    "dots3_note sparse": (INDEX | {"layer_types": ["indexed_attention"] * 4}, {
        "scaled": ("q", "kv"), "gate": "g_proj", "gates": "head", "k_norm": True, "eps": 0.03,
        "index": {"pairs": True}}),
    "glm5_next": (INDEX | {"index_topk": 6, "index_kpool": 3}, {
        "still": True, "eps": 0.03, "index": {"pool": 3}}),
    "mistral": (MISTRAL, {"llama4": (0.1, 8)}),
    "mistral unscaled": (MISTRAL | {"yarn": MISTRAL["yarn"] | {"apply_scale": False}},
                         {"llama4": (0.1, 8), "unscaled": True}),
}  # fmt: skip


def styles(name):
    """The config as the hub, transformers 5 and a VLM write it; what numpy reads; traits."""
    changes, traits = CASES[name]
    family = name.split()[0]
    if family == "mistral":
        read = BASE | {"rope_scaling": YARN}
        return [changes], read, traits
    hub = BASE | {"model_type": family} | changes
    hub = {k: v for k, v in hub.items() if v is not None or k in ("q_lora_rank", "index_topk")}
    if family == "pangu_ultra_moe":
        del hub["q_lora_rank"]
    five = {k: v for k, v in hub.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(hub.get("rope_scaling") or {"type": "default"})
    rope = {"rope_type": scaling.pop("type"), "rope_theta": hub["rope_theta"], **scaling}
    if family == "dots3_note":
        rope = {
            "indexed_attention": rope,
            "full_attention": rope,
            "sliding_attention": rope | {"rope_theta": 5000.0},
        }
    five.setdefault("rope_parameters", rope)
    nested = {"model_type": "kimi_vl", "vision_config": {"hidden_size": 7}, "text_config": hub}
    read = BASE | ({} if family == "pangu_ultra_moe" else changes)
    read["rope_theta"] = 5000.0
    read["rope_scaling"] = read.get("rope_parameters") or read.get("rope_scaling")
    if "yarn" in traits:  # what the code takes for null
        read["rope_scaling"] = traits["yarn"]
        return [hub, {k: v for k, v in hub.items() if k != "q_lora_rank"}], read, traits
    return [hub, five, nested], read, traits


def frequencies(hf, width, length):
    """(inverse frequencies, factor on cos and sin, factor on the temperature)."""
    k = np.arange(width // 2)
    ex, s = hf["rope_theta"] ** (2 * k / width), hf["rope_scaling"]
    if not s or not width:
        return 1 / ex, 1.0, 1.0
    if s["type"] == "linear":
        return 1 / ex / s["factor"], 1.0, 1.0
    original = s["original_max_position_embeddings"]
    if s["type"] == "longrope":
        f = hf["max_position_embeddings"] / original
        divisor = np.array(s["long_factor" if length > original else "short_factor"])
        return 1 / ex / divisor, math.sqrt(1 + math.log(f) / math.log(original)), 1.0
    f = s["factor"]
    corr = lambda b: width * math.log(original / (2 * math.pi * b)) / 2 / math.log(hf["rope_theta"])  # noqa: E731
    low, high = max(math.floor(corr(s["beta_fast"])), 0), min(math.ceil(corr(s["beta_slow"])),
                                                              width - 1)  # fmt: skip
    ramp = np.clip((k - low) / (high - low + 0.001 * (high == low)), 0, 1)
    m = lambda a: 0.1 * a * math.log(f) + 1  # noqa: E731
    one, all_dim = s.get("mscale"), s.get("mscale_all_dim")
    factor = m(one) / m(all_dim) if one and all_dim else m(1)
    return ramp / (f * ex) + (1 - ramp) / ex, factor, m(all_dim) ** 2 if all_dim else 1.0


def sizes(hf, traits):
    heads = {"nope": hf["qk_nope_head_dim"], "rope": hf["qk_rope_head_dim"], "v": hf["v_head_dim"]}
    return hf["q_lora_rank"], *(traits.get(key, width) for key, width in heads.items())


def weights(hf, traits, rng):
    """Tensors under transformers' names, [out, in]."""
    q, h, p, v = sizes(hf, traits)
    out = N * (h + p + (v if traits.get("fused") else 0))
    shapes = {"q_proj": (out, D)} if q is None else {
        "q_a_proj": (q, D), "q_b_proj": (out, q * (2 if traits.get("fused") else 1))}  # fmt: skip
    shapes |= {
        "kv_a_proj_with_mqa": (R + p, D),
        "kv_b_proj": (N * (h + v), R),
        "o_proj": (D, N * v),
    }
    if "gate" in traits:
        shapes[traits["gate"]] = (N * (1 if traits["gates"] == "head" else v), D)
    w = {f"{k}.weight": rng.standard_normal(s) * s[1] ** -0.5 for k, s in shapes.items()}
    w |= {f"{k}.bias": rng.standard_normal(shapes[k][0]) for k in traits.get("bias", ())}
    norms = {"kv_a_layernorm": R} | ({} if q is None else {"q_a_layernorm": q})
    norms = norms if traits.get("norms", True) else {}
    norms |= {"k_rope_only_layernorm": p} if traits.get("k_norm") else {}
    w |= {f"{k}.weight": 1 + 0.3 * rng.standard_normal(n) for k, n in norms.items()}
    if "index" in traits:
        own = {"wq_b": (J * Z, D if q is None else q), "wk": (Z, D), "weights_proj": (J, D)}
        for name, shape in own.items():
            w[f"indexer.{name}.weight"] = rng.standard_normal(shape) * shape[1] ** -0.5
        for name, n in ({"k_norm": Z} | ({"q_input_norm": D} if q is None else {})).items():
            w[f"indexer.{name}.weight"] = 1 + 0.3 * rng.standard_normal(n)
            w[f"indexer.{name}.bias"] = 0.3 * rng.standard_normal(n)
        if traits["index"].get("ssmax"):
            for name in ("scale", "bias"):
                w[f"indexer.softmax_scaling.{name}"] = rng.standard_normal(J)
        if "pool" in traits["index"]:
            w["indexer.index_kpool_compress_ape"] = rng.standard_normal(
                (traits["index"]["pool"], Z)
            )
            w["indexer.index_kpool_compress_gate"] = rng.standard_normal((Z, D)) * D**-0.5
    if traits.get("sinks"):
        w["learnable_sink_param"] = rng.standard_normal(N)
    if traits.get("ssmax"):
        w |= {"softmax_scaling.scale": rng.standard_normal(N), "softmax_scaling.bias":
              rng.standard_normal(N)}  # fmt: skip
    return w


def expected(hf, traits, w, x):
    """Float64, a row of tokens at positions 0.., one head and token at a time."""
    q_rank, h, p, v = sizes(hf, traits)
    eps, length, position = traits.get("eps", 1e-6), len(x), np.arange(len(x))
    linear = lambda name, y: y @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # noqa: E731
    norm = lambda name, y: (  # noqa: E731
        y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]
        if f"{name}.weight" in w
        else y
    )
    if q_rank is None:
        q = linear("q_proj", x)
    else:
        raw = linear("q_a_proj", x)
        low = norm("q_a_layernorm", raw)
        if "q" in traits.get("scaled", ()):
            low = low * math.sqrt(D / q_rank)
        q = linear("q_b_proj", np.concatenate([low, raw], -1) if traits.get("fused") else low)
    q = q.reshape(length, N, -1)
    gate = 1.0
    if traits.get("fused"):
        q, gate = q[..., : h + p], 1 / (1 + np.exp(-q[..., h + p :]))
    latent, k_rope = np.split(linear("kv_a_proj_with_mqa", x), [R], -1)
    latent = norm("kv_a_layernorm", latent)
    if "kv" in traits.get("scaled", ()):
        latent = latent * math.sqrt(D / R)
    if traits.get("k_norm"):
        k_rope = norm("k_rope_only_layernorm", k_rope)
    kv = linear("kv_b_proj", latent).reshape(length, N, h + v)
    inverse, factor, temperature = frequencies(hf, hf["qk_rope_head_dim"], length)
    if traits.get("still"):
        factor, inverse = 1.0, 0 * inverse
    scale = (h + p) ** -0.5 * (1 if traits.get("unscaled") else temperature)
    factor = 1.0 if traits.get("unscaled") else factor

    def rotate(y, t):
        if not p:
            return y
        first, second = np.split(y, 2) if traits.get("half") else (y[0::2], y[1::2])
        turned = (first + 1j * second) * np.exp(1j * t * inverse) * factor
        return np.concatenate([turned.real, turned.imag])

    chosen = None
    if "index" in traits:
        turn = lambda y, t: y if traits.get("still") else rotated(y, t, inverse, factor, p, traits)  # noqa: E731
        chosen = choose(hf, traits["index"], w, x, x if q_rank is None else low, turn)
    out = np.zeros((length, N, v))
    for t, n in np.ndindex(length, N):
        query = np.concatenate([q[t, n, :h], rotate(q[t, n, h:], t)])
        if "llama4" in traits:
            beta, original = traits["llama4"]
            query = query * (1 + beta * math.log(1 + t // original))
        if traits.get("ssmax"):
            query = query * (w["softmax_scaling.scale"][n] * math.log(t + 1)
                             + w["softmax_scaling.bias"][n])  # fmt: skip
        seen = [s for s in position[: t + 1] if s > t - traits.get("window", length)]
        seen = seen if chosen is None else chosen[t]
        logits = np.array([scale * query @ np.concatenate([kv[s, n, :h], rotate(k_rope[s], s)])
                           for s in seen])  # fmt: skip
        p_s = np.exp(logits - logits.max())
        sink = np.exp(w["learnable_sink_param"][n] - logits.max()) if traits.get("sinks") else 0
        out[t, n] = p_s @ kv[seen, n, h:] / (p_s.sum() + sink)
    if "gate" in traits:
        gate = 1 / (1 + np.exp(-linear(traits["gate"], x).reshape(length, N, -1)))
    return linear("o_proj", (out * gate).reshape(length, -1))


def rotated(y, t, inverse, factor, p, traits):
    """An index key or query: its first or last p channels turned."""
    last = traits["index"].get("last")
    part = y[len(y) - p :] if last else y[:p]
    first, second = (part[0::2], part[1::2]) if traits["index"].get("pairs") else np.split(part, 2)
    turned = (first + 1j * second) * np.exp(1j * t * inverse) * factor if p else np.zeros(0)
    turned = np.concatenate([turned.real, turned.imag])
    return np.concatenate([y[: len(y) - p], turned] if last else [turned, y[p:]])


def choose(hf, index, w, x, low, turn):
    """The tokens that each attends to, from the weights below "indexer."."""
    w = {k.removeprefix("indexer."): v for k, v in w.items() if k.startswith("indexer.")}
    norm = lambda y, eps: (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)  # noqa: E731
    if "q_input_norm.weight" in w:
        low = norm(x, 1e-6) * w["q_input_norm.weight"] + w["q_input_norm.bias"]
    key = norm(x @ w["wk.weight"].T, index.get("eps", 1e-6))
    key = key * w["k_norm.weight"] + w["k_norm.bias"]
    query = (low @ w["wq_b.weight"].T).reshape(len(x), J, Z)
    share = x @ w["weights_proj.weight"].T * J**-0.5
    key = np.stack([turn(row, t) for t, row in enumerate(key)])
    pool, chosen = index.get("pool", 1), []
    if pool > 1:
        gate = np.exp(x @ w["index_kpool_compress_gate"].T)
        whole = len(x) // pool
        gate = gate[: whole * pool].reshape(whole, pool, Z) * np.exp(w["index_kpool_compress_ape"])
        key = (gate / gate.sum(1, keepdims=True) * key[: whole * pool].reshape(gate.shape)).sum(1)
    for t in range(len(x)):
        scores = []
        for s in range((t + 1) // pool):
            products = []
            for j in range(J):
                q = query[t, j]
                if index.get("ssmax"):
                    q = q * (w["softmax_scaling.scale"][j] * math.log(t + 1)
                             + w["softmax_scaling.bias"][j])  # fmt: skip
                products.append(max(turn(q, t) @ key[s] * Z**-0.5, 0))
            scores.append(share[t] @ products)
        best = sorted(range(len(scores)), key=lambda s: (-scores[s], s))[: hf["index_topk"] // pool]
        tail = range((t + 1) // pool * pool, t + 1)
        chosen.append([s * pool + i for s in best for i in range(pool)] + list(tail))
    return chosen


def same(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()), rtol=0)


FORMS = "absorbed", "expanded"
# `contract_test` compares both forms of every option: the gate has them by turns.
GATE = [(name, FORMS[number % 2]) for number, name in enumerate(CASES)]
REST = [slow(name, FORMS[1 - number % 2]) for number, name in enumerate(CASES)]


@functools.partial(jax.jit, static_argnames="form")
def by_steps(layer, x, cache, form):
    """Steps of one token, of which a pool of three has all states."""

    def step(cache, token):
        out, cache = layer.decode(token[None, None], cache, form=form)
        return cache, out[0, 0]

    return jax.lax.scan(step, cache, x)[1]


@pytest.mark.parametrize(("name", "form"), [*GATE, *REST])
def test_families(name, form, rng, tmp_path):
    """Outside jit: each operation is a program that all families of its shapes share."""
    configs, hf, traits = styles(name)
    w = weights(hf, traits, rng)
    w = {key: np.float64(np.float32(value)) for key, value in w.items()}
    x = np.float64(np.float32(rng.standard_normal((13, D))))
    want = expected(hf, traits, w, x)
    config = MLAConfig.from_hf(configs[0])
    for other in configs[1:]:
        (tmp_path / "config.json").write_text(json.dumps(other))
        assert MLAConfig.from_hf(tmp_path) == config
    layer = drawn(lambda: MultiHeadLatentAttention(config, precision="highest", rngs=nnx.Rngs(0)))
    checkpoint.load_attention(layer, {key: np.float32(value) for key, value in w.items()})
    x, cache = jax.device_put(np.float32(x)), emptied(lambda: layer.init_cache(1, 16))
    if form == "expanded":
        same(layer(x[None], form=form)[0], want)
    elif "pool" in traits.get("index", ()):
        same(by_steps(layer, x, cache, form), want)
    else:
        same(layer.prefill(x[None], cache, form=form)[0][0], want)
