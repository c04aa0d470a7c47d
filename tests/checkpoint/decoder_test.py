"""Whole tiny models of the families' own code: logits, greedy tokens, every tensor used."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mla_jax import checkpoint
from mla_jax.decoding import decode_loop, prefill_step
from mla_jax.models import DeepseekConfig

FOLDERS = sorted((pathlib.Path(__file__).parents[1] / "testdata" / "decoders").iterdir())
_full = jax.jit(lambda model, tokens: model(tokens))


def load(folder, **options):
    options = {"dtype": jnp.float32, "precision": "highest"} | options
    return checkpoint.load_decoder(folder, **options)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_logits_and_greedy_tokens(folder):
    expected = np.load(folder / "expected.npz")
    model, tokens = load(folder), jnp.asarray(expected["tokens"], jnp.int32)
    # float32 rounding through three layers, on logits of a few units
    np.testing.assert_allclose(_full(model, tokens), expected["logits"], atol=3e-5)
    steps = expected["greedy"].shape[1]
    logits, cache = prefill_step(model, tokens, model.init_cache(2, 32))
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-5)
    first = logits[:, -1].argmax(-1)
    written, _, _ = decode_loop(model, first, cache, steps=steps - 1)
    written = np.concatenate([first[:, None], written], 1)
    np.testing.assert_array_equal(written, expected["greedy"])


@pytest.fixture
def copy(tmp_path):
    """A checkpoint in one file, to be changed: (tensors, write)."""
    source = next(folder for folder in FOLDERS if folder.name == "deepseek_v3")
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    shutil.copy(source / "config.json", tmp_path)

    def write():
        save_file(tensors, str(tmp_path / "model.safetensors"))
        return tmp_path

    return tensors, write


def test_blocks_for_drafting_are_skipped(copy):
    tensors, write = copy
    last = {name: value for name, value in tensors.items() if ".layers.2." in name}
    for name, value in last.items():
        tensors[name.replace("layers.2.", "layers.3.")] = value
    tensors["model.layers.3.eh_proj.weight"] = np.zeros((24, 48), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    model = load(write())
    assert len(model.blocks) == 3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", None, r"lacks model\.layers\.1\.mlp\.exp"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", None, "lacks .*correction_bias"),
        ("lm_head.weight", None, r"lacks lm_head\.weight"),
        ("model.norm.weight", np.ones(3, np.float32), r"model\.norm\.weight in .* shape \(3,\)"),
        ("model.layers.0.hc_fn", np.ones(3, np.float32), r"1 tensors.*not use.*layers\.0\.hc_fn"),
        ("model.layers.1.self_attn.kv_a_proj_with_mqa.weight", None, r"layers \[0, 2\].*says 3"),
    ],
)
def test_errors_name_the_tensor(copy, name, change, message):
    tensors, write = copy
    tensors.pop(name, None)
    if change is not None:
        tensors[name] = change
    with pytest.raises(ValueError, match=message):
        load(write())


def test_sharded_and_in_bfloat16(copy):
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])
    experts = jax.NamedSharding(mesh, jax.P("ep"))
    whole = jax.NamedSharding(mesh, jax.P())
    place = lambda path, shape: experts if "mlp.gate_proj" in path and len(shape) == 3 else whole  # noqa: E731
    model = load(copy[1](), dtype=jnp.bfloat16, sharding=place)
    kernel = model.blocks[1].mlp.gate_proj[...]
    assert kernel.sharding == experts
    assert kernel.addressable_shards[0].data.shape == (4, 24, 10)
    assert kernel.dtype == jnp.bfloat16
    assert model.blocks[1].mlp.router.kernel.dtype == jnp.float32
    assert model.blocks[0].attention.q_b_proj.kernel[...].sharding == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "longcat_flash"}, "model_type='longcat_flash'.*MultiHeadLatentAttention"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"n_group": 3}, "n_group=3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: only 4"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"intermediate_size": "x"}, "intermediate_size='x'"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types.*come first"),
    ],
)
def test_configs_of_other_shapes_are_refused(changes, message):
    source = next(folder for folder in FOLDERS if folder.name == "deepseek_v3")
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        DeepseekConfig.from_hf(config | changes)


def test_no_config(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
