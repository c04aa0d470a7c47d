import dataclasses
import json
import subprocess
import sys
import zipfile

import pytest

import mla_jax
from mla_jax import MLAConfig, RopeScaling
from mla_jax.config import configs_dir

# softmax temperatures of the released models' own code
SCALES = {
    "deepseek_v2": 0.135234, "deepseek_v2_lite": 0.114721, "deepseek_v3": 0.135234,
    "kimi_k2_0711": 0.130861, "glm_4_7_flash": 0.0625, "minicpm3": 96**-0.5,
    "longcat_flash": 192**-0.5, "kimi_linear": 192**-0.5, "tiny": 48**-0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
def test_preset(name):
    config = MLAConfig.from_preset(name)
    assert config.scale == pytest.approx(SCALES[name], rel=5e-6)
    hash(config)
    assert config.replace(num_attention_heads=8).num_attention_heads == 8
    text = (configs_dir() / "models" / f"{name}.toml").read_text()
    assert "Source:" in text


def test_every_preset_is_listed():
    assert set(mla_jax.presets()) == set(SCALES)


V3 = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "num_hidden_layers": 61, "rms_norm_eps": 1e-6,
    "attention_bias": False, "rope_theta": 10000, "max_position_embeddings": 163840, "head_dim": 64,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def test_from_hf_reads_both_styles_and_files(tmp_path):
    assert MLAConfig.from_hf(V3) == MLAConfig.from_preset("deepseek_v3")
    five = {k: v for k, v in V3.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = dict(V3["rope_scaling"])
    scaling["rope_type"] = scaling.pop("type")
    five["rope_parameters"] = scaling | {"rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(five))
    assert MLAConfig.from_hf(tmp_path) == MLAConfig.from_hf(tmp_path / "config.json")
    assert MLAConfig.from_hf(tmp_path) == MLAConfig.from_preset("deepseek_v3")
    assert MLAConfig.from_hf({"text_config": V3}) == MLAConfig.from_preset("deepseek_v3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index_topk": 2048}, "index_topk=2048.*sparse"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "7168"}, "hidden_size='7168'"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim=63.*even"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type='dynamic'"),
    ],
)
def test_from_hf_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig.from_hf(V3 | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"kv_lora_rank": 512.0}, "kv_lora_rank=512.0"),
        ({"attention_bias": 1}, "attention_bias=1"),
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


def test_configs_are_data():
    config = MLAConfig.from_preset("kimi_k2_0711")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
