import dataclasses
import math
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from flax import nnx

import mla_jax
from mla_jax import MLAConfig, RopeScaling, rope
from mla_jax.config import aliases, configs_dir

# Softmax temperatures of the released models' own code.
SCALES = {
    "axk1": 192**-0.5, "deepseek_tiny": 32**-0.5, "deepseek_v2": 0.135234,
    "deepseek_v2_lite": 0.114721, "deepseek_v3": 0.135234, "deepseek_v32": 0.135234,
    "glm_4_7_flash": 0.0625, "glm_5": 256**-0.5, "glm_5_2": 256**-0.5, "kimi_k2_0711": 0.130861,
    "kimi_k2_0905": 0.144680, "kimi_k2_5": 0.144680, "kimi_k3": 192**-0.5,
    "kimi_linear": 192**-0.5, "kimi_vl": 192**-0.5, "ling_3_flash": 192**-0.5,
    "longcat_flash": 192**-0.5, "longcat_flash_lite": 192**-0.5, "minicpm3": 96**-0.5,
    "mistral_large_3": 192**-0.5, "mistral_small_4": 0.088388, "moonlight": 192**-0.5,
    "openpangu_ultra": 192**-0.5, "sarvam_105b": 0.135234, "tiny": 48**-0.5,
    "youtu_2b": 192**-0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_preset(name):
    config = MLAConfig.from_preset(name)
    assert config.scale == pytest.approx(SCALES[name], rel=5e-6)
    hash(config)
    assert config.replace(num_attention_heads=8).num_attention_heads == 8
    text = (configs_dir() / "models" / f"{name}.toml").read_text()
    assert "Source:" in text
    assert max(map(len, text.splitlines())) <= 100


# (theta, P, factor, beta_fast, original) of the released models under YaRN
YARN = {
    "deepseek_v2": (1e4, 64, 40, 32, 4096), "deepseek_v2_lite": (1e4, 64, 40, 32, 4096),
    "deepseek_v3": (1e4, 64, 40, 32, 4096), "deepseek_v32": (1e4, 64, 40, 32, 4096),
    "sarvam_105b": (1e4, 64, 40, 32, 4096), "kimi_k2_0711": (5e4, 64, 32, 1, 4096),
    "kimi_k2_0905": (5e4, 64, 64, 1, 4096), "kimi_k2_5": (5e4, 64, 64, 32, 4096),
    "mistral_small_4": (1e4, 64, 128, 32, 8192), "mistral_large_3": (1e4, 64, 36, 32, 8192),
}  # fmt: skip
THETA = {
    "axk1": 1e4, "deepseek_tiny": 1e4, "glm_4_7_flash": 1e6, "glm_5": 1e6, "glm_5_2": 8e6,
    "kimi_vl": 8e5, "ling_3_flash": 6e6, "longcat_flash": 1e7, "longcat_flash_lite": 5e6,
    "moonlight": 5e4, "openpangu_ultra": 2.56e7, "youtu_2b": 1e5, "tiny": 1e4,
}  # fmt: skip


@pytest.mark.parametrize("name", [*YARN, *THETA])
def test_preset_frequencies(name):
    got = rope.inverse_frequencies(MLAConfig.from_preset(name))
    assert rope.attention_factor(MLAConfig.from_preset(name)) == 1
    if name in THETA:
        width = 2 * len(got)
        np.testing.assert_allclose(got, THETA[name] ** (-np.arange(0, width, 2) / width))
        return
    theta, width, factor, fast, original = YARN[name]

    def correction(rotations):
        return width * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(correction(fast)), 0)
    high = min(math.ceil(correction(1)), width - 1)
    for k, value in enumerate(got):
        ramp = min(max((k - low) / max(high - low, 1e-3), 0), 1)
        plain = theta ** (-2 * k / width)
        assert value == pytest.approx(ramp * plain / factor + (1 - ramp) * plain, rel=1e-12)


def test_names_of_releases_that_share_a_preset():
    assert MLAConfig.from_preset("kimi_k2") == MLAConfig.from_preset("kimi_k2_0711")
    assert MLAConfig.from_preset("deepseek_r1") == MLAConfig.from_preset("deepseek_v3")


def test_every_preset_is_listed():
    assert set(mla_jax.presets()) == set(SCALES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"kv_lora_rank": 512.0}, "kv_lora_rank=512.0"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"attention_bias": ()}, r"attention_bias=\(\)"),
        ({"attention_bias": ("qkv_proj",)}, "attention_bias.*kv_a_proj"),
        ({"output_gate": "heads"}, "output_gate='heads'.*elementwise"),
        ({"output_gate": "query", "q_lora_rank": None}, "output_gate='query'.*q_lora_rank"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"index_topk": -1}, "index_topk=-1"),
        ({"num_mla_layers": 0}, "num_mla_layers=0"),
        ({"num_mla_layers": True}, "num_mla_layers=True"),
        ({"rope_inv_freq": (1.0, 0.5)}, "rope_inv_freq.*length qk_rope_head_dim / 2 = 32"),
        ({"qk_rope_head_dim": 0, "k_rope_norm": True}, "k_rope_norm"),
        ({"llama_4_scaling_beta": 0.1}, "llama_4_original_max_position_embeddings=None"),
        ({"llama_4_original_max_position_embeddings": 8}, "if and only if"),
        ({"qk_nope_head_dim": 0, "qk_rope_head_dim": 0}, "qk_nope_head_dim=0"),
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"q_lora_rank": -1}, "q_lora_rank=-1"),
        ({"mla_scale_q_lora": True, "q_lora_rank": None}, "mla_scale_q_lora"),
        ({"kv_lora_ran": 512}, "Did you mean 'kv_lora_rank'"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_preset("deepseek_v3").replace(**changes)


def test_longrope_needs_lists_of_the_right_length():
    scaling = {"type": "longrope", "original_max_position_embeddings": 8, "short_factor": [1.0],
               "long_factor": [1.0]}  # fmt: skip
    with pytest.raises(ValueError, match="length qk_rope_head_dim / 2 = 8"):
        MLAConfig.from_preset("tiny").replace(rope_scaling=scaling)
    with pytest.raises(ValueError, match="short_factor"):
        RopeScaling(rope_type="longrope", original_max_position_embeddings=8)


def test_unknown_preset_lists_what_there_is():
    with pytest.raises(ValueError, match=r"deepseek_v4.*Did you mean.*tiny"):
        MLAConfig.from_preset("deepseek_v4")


def test_toml_errors_name_the_file(tmp_path):
    path = tmp_path / "model.toml"
    path.write_text("hidden_size = ")
    with pytest.raises(ValueError, match=r"model\.toml is not valid TOML"):
        MLAConfig.from_toml(path)
    path.write_text("hidden_sizes = 3")
    with pytest.raises(ValueError, match=r"model\.toml has the unknown key 'hidden_sizes'"):
        MLAConfig.from_toml(path)


def test_the_wheel_has_the_presets(tmp_path):
    root = configs_dir().parent
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root],
        check=True, capture_output=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in mla_jax.presets():
        assert f"mla_jax/configs/models/{name}.toml" in names
    assert "mla_jax/configs/devices.toml" in names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import mla_jax; print(mla_jax.__file__, mla_jax.MLAConfig.from_preset('tiny').scale)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert str(tmp_path) in found.stdout


@pytest.mark.parametrize("name", mla_jax.presets())
def test_every_preset_makes_a_layer(name):
    config = MLAConfig.from_preset(name)
    nnx.eval_shape(lambda: mla_jax.MultiHeadLatentAttention(config, rngs=nnx.Rngs(0)))


def test_mla_layers_follow_the_layers_unless_they_are_counted():
    plain = MLAConfig.from_preset("tiny")
    assert plain.replace(num_hidden_layers=9).mla_layers == 9
    assert plain.replace(num_hidden_layers=9, num_mla_layers=3).mla_layers == 3


def test_aliases_are_of_presets():
    found = {name: aliases(name) for name in mla_jax.presets()}
    assert found["kimi_k2_0711"] == ("kimi_k2",)
    for name, others in found.items():
        for other in others:
            assert MLAConfig.from_preset(other) == MLAConfig.from_preset(name)


def test_configs_are_data():
    config = MLAConfig.from_preset("kimi_k2_0711")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
