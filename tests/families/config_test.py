"""Every family's config.json, as its hub has it, gives the preset; what is unsupported is named."""

import json

import annotations
import hypothesis
import pytest
from hypothesis import strategies as st

from mla_jax import MLAConfig

V3 = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "num_hidden_layers": 61, "rms_norm_eps": 1e-6, "attention_bias": False, "rope_theta": 10000,
    "max_position_embeddings": 163840, "head_dim": 64, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
PLAIN = V3 | {"rope_scaling": None}
LITE = PLAIN | {"hidden_size": 2048, "num_attention_heads": 16, "q_lora_rank": None,
                "num_hidden_layers": 27}  # fmt: skip
K2 = V3 | {"model_type": "kimi_k2", "num_attention_heads": 64, "rope_theta": 50000.0,
           "max_position_embeddings": 262144}  # fmt: skip


def yarn(**changes):
    return {"rope_scaling": V3["rope_scaling"] | changes}


LONGCAT = {k: v for k, v in PLAIN.items() if k != "num_hidden_layers"}
MISTRAL = {  # params.json of Mistral Large 3
    "dim": 7168, "head_dim": 192, "hidden_dim": 16384, "kv_lora_rank": 512,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "max_position_embeddings": 294912, "moe": {"num_experts": 128}, "n_heads": 128,
    "n_kv_heads": 128, "n_layers": 61, "norm_eps": 1e-06, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rope_theta": 10000.0, "v_head_dim": 128,
    "tied_embeddings": False, "vocab_size": 131072,
    "yarn": {"alpha": 1, "apply_scale": False, "beta": 32, "factor": 36,
             "original_max_position_embeddings": 8192},
}  # fmt: skip
PANGU = {k: v for k, v in PLAIN.items() if "head_dim" not in k and "lora" not in k} | {
    "model_type": "pangu_ultra_moe", "hidden_size": 7680, "rope_theta": 25600000.0,
    "attention_q_lora_dim": 1536, "attention_kv_lora_dim": 512, "attention_qk_dim": 128,
    "attention_qk_rope_dim": 64, "attention_v_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip
LING = LITE | {
    "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"],
    "hidden_size": 2560, "num_attention_heads": 32, "num_hidden_layers": 42, "head_dim": 128,
    "max_position_embeddings": 262144, "rope_theta": 6000000, "partial_rotary_factor": 0.5,
    "gated_attention_proj_granularity_type": "head_wise", "use_mla_nope": False,
    "layer_group_size": 6,
    "use_qkv_bias": False, "rope_parameters": {
        "partial_rotary_factor": 0.5, "rope_theta": 6000000, "rope_type": "default"},
}  # fmt: skip
K3 = PLAIN | {"model_type": "kimi_linear", "num_attention_heads": 96, "num_hidden_layers": 93,
              "mla_use_nope": True, "mla_use_output_gate": True,
              "linear_attn_config": {"full_attn_layers": [*range(4, 93, 4), 93]},
              "max_position_embeddings": 1048576}  # fmt: skip
MISTRAL_SMALL = PLAIN | {
    "model_type": "mistral4", "hidden_size": 4096, "num_attention_heads": 32, "q_lora_rank": 1024,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "num_hidden_layers": 36,
    "max_position_embeddings": 1048576, "rope_parameters": {
        "type": "yarn", "rope_theta": 10000.0, "factor": 128.0, "mscale": 1.0,
        "original_max_position_embeddings": 8192, "max_position_embeddings": 1048576,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        "partial_rotary_factor": 0.5, "rope_type": "yarn"},
}  # fmt: skip
REAL = {
    "deepseek_v2": V3 | {"model_type": "deepseek_v2", "hidden_size": 5120,
                         "num_hidden_layers": 60},
    "deepseek_v2_lite": LITE | {"model_type": "deepseek_v2"} | yarn(mscale=0.707,
                                                                    mscale_all_dim=0.707),
    "deepseek_v3": V3,
    "kimi_k2_0711": K2 | {"max_position_embeddings": 131072} | yarn(factor=32, beta_fast=1.0),
    "kimi_k2_0905": K2 | yarn(factor=64.0, beta_fast=1.0),
    "kimi_k2_5": {"model_type": "kimi_k25", "vision_config": {"hidden_size": 1152},
                  "text_config": K2 | {"rms_norm_eps": 1e-5} | yarn(factor=64)},
    "moonlight": LITE | {"rope_theta": 50000.0, "max_position_embeddings": 8192},
    "kimi_vl": {"model_type": "kimi_vl", "text_config": LITE | {
        "rope_theta": 800000.0, "max_position_embeddings": 131072}},
    "glm_4_7_flash": LITE | {
        "model_type": "glm4_moe_lite", "num_attention_heads": 20, "q_lora_rank": 768,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "num_hidden_layers": 47,
        "rope_theta": 1000000, "rms_norm_eps": 1e-5, "max_position_embeddings": 202752},
    "longcat_flash": LONGCAT | {
        "model_type": "longcat_flash", "num_layers": 28, "hidden_size": 6144,
        "num_attention_heads": 64, "rope_theta": 10000000.0, "max_position_embeddings": 131072,
        "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_method": "MLA"},
    "longcat_flash_lite": LONGCAT | {
        "model_type": "longcat_flash_ngram", "num_layers": 14, "hidden_size": 3072,
        "num_attention_heads": 32, "rope_theta": 5000000.0, "max_position_embeddings": 327680},
    "youtu_2b": LITE | {"model_type": "youtu_llm", "q_lora_rank": 1536, "rope_theta": 100000,
                        "num_hidden_layers": 32, "max_position_embeddings": 131072},
    "axk1": PLAIN | {"model_type": "axk1", "num_attention_heads": 64,
                     "max_position_embeddings": 32768},
    "openpangu_ultra": PANGU,
    "sarvam_105b": LITE | {
        "model_type": "sarvam_mla", "hidden_size": 4096, "num_attention_heads": 64,
        "num_hidden_layers": 32, "max_position_embeddings": 131072, "use_qk_norm": True,
        "head_dim": 576} | yarn(type="deepseek_yarn"),
    "mistral_large_3": MISTRAL,
    "ling_3_flash": LING,
    "kimi_linear": {k: v for k, v in LITE.items() if k != "max_position_embeddings"} | {
        "model_type": "kimi_linear", "hidden_size": 2304, "num_attention_heads": 32,
        "mla_use_nope": True, "model_max_length": 1048576,
        "linear_attn_config": {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27]}},
    "kimi_k3": {"model_type": "kimi_k3", "text_config": K3},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_a_real_config_gives_the_preset(name, tmp_path):
    preset, real = MLAConfig.from_preset(name), REAL[name]
    assert MLAConfig.from_hf(real) == preset
    text = real.get("text_config", real)
    if "yarn" in real:
        (tmp_path / "params.json").write_text(json.dumps(real))
        assert MLAConfig.from_hf(tmp_path) == preset
        return
    five = {k: v for k, v in text.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(text["rope_scaling"] or {"type": "default"})
    scaling["rope_type"] = scaling.pop("type")
    five["rope_parameters"] = scaling | {"rope_theta": float(text["rope_theta"])}
    (tmp_path / "config.json").write_text(json.dumps(five))
    assert MLAConfig.from_hf(tmp_path) == preset
    assert MLAConfig.from_hf(tmp_path / "config.json") == preset


def test_the_two_files_of_mistral_disagree_on_the_temperature():
    small, native = MLAConfig.from_hf(MISTRAL_SMALL), MLAConfig.from_preset("mistral_small_4")
    assert small.scale == pytest.approx(0.194969, rel=5e-6)
    assert native.scale == pytest.approx(128**-0.5)
    assert small.replace(rope_scaling=native.rope_scaling) == native
    scaled = MISTRAL | {"yarn": MISTRAL["yarn"] | {"apply_scale": True}}
    assert MLAConfig.from_hf(scaled).scale == pytest.approx(0.133160, rel=5e-6)


def test_what_only_the_code_of_a_family_says():
    hy = MLAConfig.from_hf(PLAIN | {"model_type": "hy_v4", "index_topk": None})
    assert (hy.rope_interleave, hy.attention_sinks, hy.output_gate) == (False, True, "elementwise")
    assert MLAConfig.from_hf(LING | {"use_mla_nope": True}).qk_rope_head_dim == 0
    older = {k: v for k, v in LING.items() if k != "gated_attention_proj_granularity_type"}
    assert MLAConfig.from_hf(older).output_gate == "head"
    older["architectures"] = ["BailingMoeV2_5ForCausalLM"]
    assert MLAConfig.from_hf(older).output_gate is None
    assert MLAConfig.from_hf(K3 | {"mla_use_output_gate": False}).output_gate is None
    both = REAL["longcat_flash"] | {"num_hidden_layers": 56}
    assert MLAConfig.from_hf(both) == MLAConfig.from_preset("longcat_flash")
    off = {"sliding_window": 4096, "use_sliding_window": False}
    assert MLAConfig.from_hf(V3 | off).sliding_window is None
    mini = {k: v for k, v in PLAIN.items() if k != "v_head_dim"} | {"model_type": "minicpm3"}
    assert MLAConfig.from_hf(mini).v_head_dim == 56
    bare = {k: v for k, v in V3.items() if k != "model_type"}
    assert MLAConfig.from_hf(bare) == MLAConfig.from_preset("deepseek_v3")


DOTS = PLAIN | {
    "model_type": "dots3_note", "hidden_size": 5120, "q_lora_rank": 1024, "num_hidden_layers": 46,
    "max_position_embeddings": 524288, "rope_theta": 80000000, "swa_rope_theta": 50000,
    "index_topk": 2048, "sliding_window_size": 513, "swa_num_attention_heads": 64,
    "swa_kv_lora_rank": 1024, "rms_norm_eps": 1e-5,
}  # fmt: skip


def test_layers_that_differ():
    sliding = MLAConfig.from_hf(DOTS, layer=2)
    assert (sliding.num_attention_heads, sliding.kv_lora_rank) == (64, 1024)
    assert (sliding.qk_nope_head_dim, sliding.qk_rope_head_dim) == (192, 64)
    assert (sliding.sliding_window, sliding.rope_theta) == (513, 50000.0)
    assert (sliding.k_rope_norm, sliding.latent_norm_eps) == (True, 1e-5)
    sparse = MLAConfig.from_hf(DOTS, layer=5)
    assert (sparse.index_topk, sparse.index_n_heads, sparse.indexer_rope_interleave) == (
        2048,
        64,
        True,
    )
    dense = MLAConfig.from_hf(DOTS | {"use_dsa": False}, layer=5)
    assert (dense.num_attention_heads, dense.sliding_window) == (128, None)
    with pytest.raises(ValueError, match=r"layer_types.*give layer="):
        MLAConfig.from_hf(DOTS)
    with pytest.raises(ValueError, match="layer=46: there are layers 0 to 45"):
        MLAConfig.from_hf(DOTS, layer=46)
    large = PLAIN | {"model_type": "mistral_large4", "index_topk": None}
    rotated, not_rotated = (MLAConfig.from_hf(large, layer=layer) for layer in (2, 3))
    assert rotated.qk_rope_head_dim == 64
    assert (not_rotated.qk_nope_head_dim, not_rotated.qk_rope_head_dim) == (192, 0)
    assert rotated.query_scale_ssmax


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 2048}, "index_topk=2048: model_type='deepseek_v3' is not known to have"),
        ({"model_type": "deepseek_v32", "index_n_heads": None}, "index_n_heads=None"),
        (
            {"model_type": "deepseek_v32", "index_head_dim": 32},
            "index_head_dim=32.*at least qk_rope",
        ),
        ({"model_type": "deepseek_v32", "sliding_window": 5}, "sliding_window=5"),
        ({"model_type": "glm_moe_dsa", "indexer_types": ["full"]}, "indexer_types=.*num_hidden"),
        (
            {"model_type": "glm_moe_dsa", "index_topk_pattern": "SF" * 40},
            "first layer must be 'full'",
        ),
        ({"model_type": "glm_moe_dsa", "index_topk_freq": "4"}, "index_topk_freq='4'"),
        (
            {"model_type": "glm5_next", "index_topk": 100},
            "index_topk=100.*multiple of index_kpool=16",
        ),
        (
            {"model_type": "mistral_large4", "kv_source_layers": [0, 2, 2]},
            "kv_source_layers.*earlier",
        ),
        (
            {"model_type": "mistral_large4", "kv_source_layers": [0, 0]},
            "kv_source_layers.*give layer",
        ),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"model_type": "deepseek_v4"}, "model_type='deepseek_v4' needs shared-KV"),
        ({"model_type": ["deepseek_v3"]}, r"model_type=\['deepseek_v3'\]"),
        ({"kv_source_layers": [0, 0]}, "kv_source_layers.*another layer's cache"),
        ({"use_mla": False}, "use_mla=False"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"model_type": "kimi_linear", "mla_use_nope": False}, "mla_use_nope=False"),
        ({"gated_attention_proj_granularity_type": "x"}, "output_gate='x'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size='7168'"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63.*even"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling=.*lacks rope_type"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "lacks rope_type"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"type": "yarn", "factr": 2}}, "Did you mean 'factor'"),
    ],
)
def test_refusals_name_the_key(changes, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_hf(V3 | changes)


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"neither config\.json nor params\.json"):
        MLAConfig.from_hf(tmp_path)
    for content, message in ((b"{", "not valid JSON"), (b"[]", "a list"), (b"\xff{}", "not valid"),
                             (b"[" * 200_000, "not valid JSON")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            MLAConfig.from_hf(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip
BASES = [*REAL.values(), DOTS, MISTRAL_SMALL, PLAIN | {"model_type": "mistral_large4"}]
KEYS = sorted({key for base in BASES for key in base} | {"layer_types", "kv_source_layers",
        "per_layer_config", "no_rope_layers", "rope_parameters", "llama_4_scaling"})  # fmt: skip


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    base=st.sampled_from(BASES),
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3),
    layer=st.none() | st.integers(-1, 50),
)
def test_any_config_gives_a_layer_or_a_clear_error(base, changes, layer):
    try:
        with annotations.unchecked():
            config = MLAConfig.from_hf(base | changes, layer=layer)
    except ValueError as error:
        message = str(error)
    else:
        hash(config)
        assert config.scale > 0
        return
    assert "=" in message or "lacks" in message or "unknown key" in message
