"""A family is one object: added, its configs are read and its checkpoints loaded, run and saved."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn
from flax import nnx
from numpy_decoder import NumpyDecoder
from safetensors.numpy import load_file, save_file

from mla_jax import MLAConfig, checkpoint, families
from mla_jax.families.decoder import mixture
from mla_jax.models import Decoder, DecoderConfig

CONFIG = {  # the made-up family's own keys; the widths that it leaves out are its class' defaults
    "model_type": "quail", "width": 24, "heads": 3, "num_hidden_layers": 2, "intermediate_size": 20,
    "vocab_size": 31, "num_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 9, "rope_theta": 500.0, "rotary_dim": 4, "emphasis": 3,
}  # fmt: skip


def _decoder(hf, attention, where):
    return mixture(hf, where) | {"embed_scale": float(hf["emphasis"])}


def _written(config, hf):
    return hf | {"emphasis": hf.pop("embed_scale")}


QUAIL = families.Family(
    model_types=("quail",),
    defaults={
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 7, "v_head_dim": 10,
        "first_k_dense_replace": 1, "rope_interleave": False, "emphasis": 1,
    },
    renamed={"width": "hidden_size", "heads": "num_attention_heads",
             "rotary_dim": "qk_rope_head_dim", "num_experts": "n_routed_experts"},
    refusals={"sandwich": (True, "a norm after each block")},
    names={"embed_tokens": "words", "layers": "h", "self_attn": "mixer", "mlp": "ffn",
           "mlp.gate": "ffn.router", "self_attn.o_proj": "mixer.out"},
    decoder=_decoder, written=_written,
)  # fmt: skip


@pytest.fixture
def quail(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    families.register(QUAIL)


@pytest.fixture
def folder(quail, tmp_path):
    """A checkpoint in the family's own names and keys."""
    config = DecoderConfig.from_hf(CONFIG)
    model = drawn(lambda: Decoder(config, rngs=nnx.Rngs(0), precision="highest"))
    checkpoint.save_decoder(model, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path, model


def test_one_object_adds_a_family(folder):
    path, made = folder
    config = DecoderConfig.from_hf(path)
    attention = config.attention
    assert (attention.hidden_size, attention.kv_lora_rank, attention.qk_rope_head_dim) == (
        24,
        16,
        4,
    )
    assert (config.embed_scale, config.scoring_func, config.model_type) == (3.0, "sigmoid", "quail")
    with checkpoint.Checkpoint(path) as files:
        assert {"model.words.weight", "model.h.1.ffn.router.weight", "model.h.0.mixer.out.weight",
                "model.h.1.ffn.experts.5.up_proj.weight"} <= set(files)  # fmt: skip
    model = checkpoint.load_decoder(path, dtype=jnp.float32, precision="highest")
    tokens = np.array([3, 1, 4, 1, 5], np.int32)
    run = jax.jit(lambda model, tokens: model(tokens))
    logits = np.asarray(run(model, tokens[None]))
    np.testing.assert_allclose(logits[0], NumpyDecoder(model).logits(tokens), atol=2e-5)
    np.testing.assert_array_equal(logits, run(made, tokens[None]))


def test_it_is_saved_in_its_own_keys(folder):
    _, model = folder
    written = families.config_json(model.config, "float32")
    assert (written["model_type"], written["emphasis"]) == ("quail", 3.0)
    assert DecoderConfig.from_hf(written) == model.config


def test_it_refuses_what_it_says(quail):
    with pytest.raises(ValueError, match="sandwich=True: a norm after each block"):
        MLAConfig.from_hf(CONFIG | {"sandwich": True})


def test_its_checkpoints_pass_the_same_gate(folder):
    path, _ = folder
    file = next(path.glob("*.safetensors"))
    tensors = {name: value.copy() for name, value in load_file(file).items()}
    for name in ("model.h.0.self_attn.o_proj.weight", "model.h.5.mixer.out.weight"):
        save_file(tensors | {name: np.ones(2, np.float32)}, str(path / "model.safetensors"))
        (path / "model.safetensors.index.json").unlink(missing_ok=True)
        with pytest.raises(ValueError, match=rf"{name.replace('.', '[.]')} in .* is not used"):
            checkpoint.load_decoder(path)


def test_names_are_taken_once(quail):
    with pytest.raises(ValueError, match="model_type='quail' is known already"):
        families.register(QUAIL)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


VL2_SMALL = {  # config.json of deepseek-ai/deepseek-vl2-small, as far as it goes
    "model_type": "deepseek_vl_v2", "architectures": ["DeepseekVLV2ForCausalLM"],
    "vision_config": {"width": 1152}, "projector_config": {"n_embed": 2048},
    "language_config": {
        "model_type": "deepseek_v2", "bos_token_id": 0, "eos_token_id": 1,
        "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
        "max_position_embeddings": 4096, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16,
        "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
    },
}  # fmt: skip


def test_keys_that_a_config_leaves_out_are_its_class_defaults():
    small = DecoderConfig.from_hf(VL2_SMALL)
    assert (small.attention.kv_lora_rank, small.vocab_size) == (512, 102400)
    lite = DecoderConfig.from_preset("deepseek_v2_lite")
    yarn = {"rope_scaling": lite.attention.rope_scaling, "max_position_embeddings": 163840}
    assert small.replace(attention=small.attention.replace(**yarn), eos_token_ids=()) == lite
    youtu = DecoderConfig.from_hf({"model_type": "youtu_llm"})
    assert youtu.tie_word_embeddings
    assert youtu.attention == MLAConfig.from_preset("youtu_2b").replace(rope_theta=10000.0)
    v3 = DecoderConfig.from_hf({"model_type": "deepseek_v3"})
    preset = DecoderConfig.from_preset("deepseek_v3")
    assert v3.replace(attention=preset.attention, eos_token_ids=()) == preset
    flash = DecoderConfig.from_hf({"model_type": "glm4_moe_lite"})
    assert flash.attention.replace(rope_theta=1e6) == MLAConfig.from_preset("glm_4_7_flash")
    three = DecoderConfig.from_hf({"model_type": "minicpm3"})
    assert (three.tie_word_embeddings, three.embed_scale, three.logit_scale) == (True, 12.0, 0.1)
    with pytest.raises(ValueError, match="lacks vocab_size"):  # null is no omission
        DecoderConfig.from_hf({"model_type": "deepseek_v3", "vocab_size": None})


DENSE = {
    "model_type": "deepseek_v3", "hidden_size": 24, "num_attention_heads": 3, "q_lora_rank": 12,
    "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "num_hidden_layers": 3, "vocab_size": 40, "intermediate_size": 20,
}  # fmt: skip
LEFT = {"num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "moe_intermediate_size": None,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [
        {"n_routed_experts": None},
        {"n_routed_experts": None} | LEFT,
        {"n_routed_experts": 7, "first_k_dense_replace": 3, "num_nextn_predict_layers": 0} | LEFT,
        {"mlp_layer_types": ["dense"] * 3, "num_nextn_predict_layers": 0} | LEFT,
        {"model_type": "youtu", "n_routed_experts": 7} | LEFT,
    ],
    ids=["null", "null, keys left", "all layers dense", "all types dense", "a dense family"],
)
def test_dense_configs_with_keys_about_experts(keys):
    config = DecoderConfig.from_hf(DENSE | keys)
    assert config.n_routed_experts is None
    assert not any(config.is_sparse(layer) for layer in range(4))
    nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("inner", "outer", "want"),
    [(None, 5, (5,)), (1, 5, (1, 5)), ([1, 2], [2, 3], (1, 2, 3)), (7, None, (7,)), (4, 4, (4,))],
)
def test_stop_tokens_beside_the_text_config_count(inner, outer, want):
    text = DENSE | {"n_routed_experts": None} | ({} if inner is None else {"eos_token_id": inner})
    config = {"model_type": "kimi_vl", "text_config": text} | {"eos_token_id": outer}
    assert DecoderConfig.from_hf(config).eos_token_ids == want


def test_what_stands_beside_the_text_config_counts_where_it_is_silent():
    text = DENSE | {"n_routed_experts": None}
    config = {"model_type": "kimi_vl", "text_config": text, "tie_word_embeddings": True}
    assert DecoderConfig.from_hf(config).tie_word_embeddings
    config["text_config"] = text | {"tie_word_embeddings": False}
    assert not DecoderConfig.from_hf(config).tie_word_embeddings


def test_one_rule_for_paths_and_repo_ids(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def fetched(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    assert MLAConfig.from_hf("some/model") == MLAConfig.from_hf(DENSE)
    assert DecoderConfig.from_hf("some/model") == DecoderConfig.from_hf(DENSE)
    assert "*.safetensors" not in asked[0][1]
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        checkpoint.load_decoder("some/model")
    # tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json,
    # tiktoken.model, tokenizer.model, chat_template.jinja
    assert asked[-1][1] == ["*.json", "*.model", "*.jinja", "*.safetensors"]
    assert checkpoint.resolve(tmp_path) == tmp_path
    count = len(asked)
    for name in ("nowhere", "./some/model", "/some/model", "a/b/c", "~/model", "some/"):
        for read in (checkpoint.resolve, MLAConfig.from_hf, checkpoint.load_decoder):
            with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
                read(name)
    assert len(asked) == count
