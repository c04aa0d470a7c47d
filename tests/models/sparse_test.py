"""DeepSeek-V3.2, GLM-5 and LongCat-Flash as whole models: against float64 numpy, and saved."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, PLAIN, drawn, emptied, put, relative
from flax import nnx
from numpy_decoder import NumpyDecoder
from safetensors.numpy import load_file, save_file

from mla_jax import checkpoint, families, generation
from mla_jax.models import Decoder, DecoderConfig, random_decoder

MIXTURE = DecoderConfig(
    attention=MICRO.replace(
        num_hidden_layers=2, attention_bias=False, mla_scale_q_lora=False, mla_scale_kv_lora=False,
        index_topk=3, index_n_heads=2, index_head_dim=6,
    ),
    vocab_size=31, intermediate_size=20, moe_intermediate_size=9, n_routed_experts=4,
    num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, scoring_func="sigmoid",
    norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
    model_type="deepseek_v32",
)  # fmt: skip
CONFIGS = {
    "deepseek_v32": MIXTURE,
    "glm_moe_dsa": MIXTURE.replace(
        attention=MIXTURE.attention.replace(
            rope_scaling=None, indexer_rope_interleave=True
        ),
        indexer_types=("full", "shared"), model_type="glm_moe_dsa",
    ),
    "longcat_flash": DecoderConfig(
        attention=MICRO.replace(
            num_hidden_layers=2, num_mla_layers=4, attention_bias=False, rope_scaling=None
        ),
        vocab_size=31, intermediate_size=20, moe_intermediate_size=9, n_routed_experts=4,
        num_experts_per_tok=3, routed_scaling_factor=6.0, zero_expert_num=3, selection_bias=True,
        shortcut=True, model_type="longcat_flash",
    ),
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def make(name):
    config = CONFIGS[name]
    mtp = config.num_nextn_predict_layers == 1
    model = drawn(lambda: Decoder(config, mtp=mtp, precision="highest", rngs=nnx.Rngs(0)))
    random = np.random.default_rng(1)
    for path, parameter in nnx.iter_graph(model):
        if isinstance(parameter, nnx.Variable) and path[-1] in ("scale", "bias"):
            noise = 0.2 * random.standard_normal(parameter.shape)
            parameter.set_value(put((path[-1] == "scale") + noise, np.float32))
    return model


_full = jax.jit(lambda model, tokens: model(tokens))
_prefill = jax.jit(lambda model, *arguments: model.prefill(*arguments))
_draft = jax.jit(lambda model, *arguments: model.draft(*arguments))


@FAMILIES
def test_logits_and_greedy_text_are_float64s(name, rng):
    model = make(name)
    exact = NumpyDecoder(model)
    tokens = rng.integers(0, 31, (2, 9))
    expected = [exact.logits(row) for row in tokens]
    assert relative(_full(model, np.int32(tokens)), np.stack(expected)) < 3e-6
    # Ragged chunks, then text of the model's own, on a cache with more slots than are attended to.
    texts = [tokens[0, :7].tolist(), tokens[1, :4].tolist()]
    cache = emptied(lambda: model.init_cache(2, 128, pages=2))
    logits, cache = _prefill(model, np.int32(tokens), cache, np.int32([7, 4]))
    logits = np.asarray(logits)
    assert relative(logits[1, :4], expected[1][:4]) < 3e-6
    written, last = [[], []], logits[[0, 1], [6, 3]]
    for _ in range(4):
        for row, token in zip(written, last.argmax(-1).tolist(), strict=True):
            row.append(token)
        if name == "deepseek_v32":
            new, counts = np.int32([row[-1:] for row in written]), None
        else:  # by the prompts' program
            new, counts = np.int32([row[-1:] * 9 for row in written]), np.int32([1, 1])
        last, cache = _prefill(model, new, cache, counts)
        last = np.asarray(last)[:, 0]
    check_greedy(exact, texts, written)


def check_greedy(exact, texts, written):
    for text, row in zip(texts, written, strict=True):
        for token in row:
            assert int(exact.logits(np.array(text))[-1].argmax()) == int(token)
            text.append(int(token))


@pytest.mark.slow
def test_text_with_drafts_is_float64s(rng):
    """By the loop, whose programs are the largest."""
    model = make("glm_moe_dsa")
    texts = [rng.integers(0, 31, length).tolist() for length in (7, 4)]
    result = generation.generate(model, texts, max_new_tokens=4, draft="mtp", speculate=2)
    check_greedy(NumpyDecoder(model), texts, result.tokens)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_drafts_are_float64s(name, rng):
    model = make(name)
    exact, tokens = NumpyDecoder(model), rng.integers(0, 31, 8)
    hidden = exact.hidden(tokens)
    expected = exact.draft(hidden[:-1], tokens[1:])
    cache = emptied(lambda: model.init_draft_cache(1, 16))
    states, _ = _draft(model, np.float32(hidden[None, :-1]), np.int32(tokens[None, 1:]), cache)
    assert relative(states[0], expected) < 3e-6


@FAMILIES
def test_a_saved_model_is_the_same(name, tmp_path, rng):
    model = make(name)
    checkpoint.save_decoder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == name
    if name == "longcat_flash":
        assert (config["num_layers"], config["moe_topk"]) == (2, 3)
        assert "num_hidden_layers" not in config
    mtp = model.predictor is not None
    back = checkpoint.load_decoder(tmp_path, mtp=mtp, dtype=jnp.float32, precision="highest")
    assert back.config == model.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))


def test_experts_that_return_their_input_may_have_tensors(tmp_path):
    model = make("longcat_flash")
    checkpoint.save_decoder(model, tmp_path)
    names = set(checkpoint.Checkpoint(tmp_path))
    assert {"model.layers.1.mlp.router.classifier.weight",
            "model.layers.0.self_attn.1.o_proj.weight",
            "model.layers.0.mlps.1.up_proj.weight", "model.layers.1.input_layernorm.1.weight",
            "model.layers.0.mlp.router.e_score_correction_bias"} <= names  # fmt: skip
    file = next(tmp_path.glob("*.safetensors"))
    tensors = {name: value.copy() for name, value in load_file(file).items()}
    (tmp_path / "model.safetensors.index.json").unlink()
    file.unlink()
    unread = {
        "model.layers.0.mlp.experts.6.up_proj.weight": np.ones((9, 24), np.float32),
        "model.mtp.layers.0.eh_proj.weight": np.ones((24, 48), np.float32),
    }
    save_file(tensors | unread, str(tmp_path / "model.safetensors"))
    back = checkpoint.load_decoder(tmp_path, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))
    wrong = {"model.layers.0.mlp.experts.7.up_proj.weight": np.ones((9, 24), np.float32)}
    save_file(tensors | wrong, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"experts\.7\.up_proj\.weight in .* is not used"):
        checkpoint.load_decoder(tmp_path)


def test_a_layer_whose_indexer_is_another_s_has_no_tensors_for_one():
    full, shared = (block.attention for block in make("glm_moe_dsa").blocks)
    tensors = checkpoint.attention_tensors(full)
    assert tensors.keys() - checkpoint.attention_tensors(shared) == {
        f"indexer.{name}" for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias",
                                       "weights_proj.weight")}  # fmt: skip
    with pytest.raises(ValueError, match=r"unexpected \['indexer\.k_norm\.bias'"):
        checkpoint.load_attention(shared, tensors)


@FAMILIES
def test_random_weights_and_presets(name):
    mtp = make(name).predictor is not None
    random = nnx.eval_shape(lambda: random_decoder(CONFIGS[name], mtp=mtp))
    shapes = lambda model: jax.tree.map(jnp.shape, nnx.state(model))  # noqa: E731
    assert shapes(random) == shapes(make(name))
    preset = {"glm_moe_dsa": "glm_5_2"}.get(name, name)
    config = DecoderConfig.from_preset(preset)
    assert config.model_type == name
    kept = DecoderConfig.from_hf(families.config_json(config, "bfloat16"))
    assert kept == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indexer_types": ("full",)}, r"indexer_types=.*num_hidden_layers=2"),
        ({"indexer_types": ("shared", "full")}, "the first of them 'full'"),
        ({"attention": PLAIN.replace(num_hidden_layers=2), "indexer_types": ("full", "shared")},
         "index_topk is None"),
        ({"shortcut": True}, "first_k_dense_replace=1"),
        ({"shortcut": True, "first_k_dense_replace": 0}, "num_nextn_predict_layers=1"),
        ({"zero_expert_num": -1}, "zero_expert_num=-1"),
    ],
)  # fmt: skip
def test_config_names_the_bad_key(changes, message):
    with pytest.raises(ValueError, match=message):
        MIXTURE.replace(**changes)
