"""Weights as a checkpoint stores them: the same numbers, the same files again, and no copy."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import relative
from flax import nnx
from quantized import E4M3, packed, scaled
from safetensors.numpy import load_file, save_file

from mla_jax import checkpoint
from mla_jax.layers.quantised import Quantised
from mla_jax.sharding import Rules

SOURCE = pathlib.Path(__file__).parents[1] / "testdata" / "decoders" / "deepseek_v3"
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                            "group_size": 8}}}}  # fmt: skip
# Names: what config.json says, and the scale's dtype, where blocks do not divide the widths.
FORMS = {
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, np.float32),
    "fp8 exponents": ({"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
                      np.uint8),
    "int8 rows": ({"quant_method": "w8a8_int8"}, np.float32),
    "int4 groups": (COMPRESSED, ml_dtypes.bfloat16),
}  # fmt: skip


def quantised_folder(folder, name, rng):
    """The tiny DeepSeek-V3 with every linear map in a stored form, and a block for drafting."""
    quantization, scale_dtype = FORMS[name]
    tensors, found = {}, {}
    for file in SOURCE.glob("*.safetensors"):
        tensors |= load_file(file)
    for key, value in list(tensors.items()):
        if ".layers.2." in key:
            tensors[key.replace("layers.2.", "layers.3.")] = value
    for key, shape in (("enorm", 24), ("hnorm", 24), ("shared_head.norm", 24),
                       ("eh_proj", (24, 48))):  # fmt: skip
        tensors[f"model.layers.3.{key}.weight"] = rng.standard_normal(shape).astype(np.float32)
    for key, value in tensors.items():
        stem = key.removesuffix("weight")
        if "_proj" not in key or not key.endswith("weight"):
            found[key] = value
        elif name == "int4 groups":
            words, scale, shape, _ = packed(value, 8, rng)
            found |= {f"{stem}weight_packed": words, f"{stem}weight_scale": scale,
                      f"{stem}weight_shape": shape}  # fmt: skip
        elif name == "int8 rows":
            found[key], found[f"{stem}weight_scale"], _ = scaled(value, np.int8, (1, None), rng)
        else:
            values, scale, _ = scaled(value, E4M3, (16, 16), rng)
            if scale_dtype == np.uint8:
                scale = rng.integers(120, 123, scale.shape).astype(np.uint8)
            found |= {key: values, f"{stem}weight_scale_inv": scale}
    config = json.loads((SOURCE / "config.json").read_text())
    config |= {"quantization_config": quantization, "num_nextn_predict_layers": 1}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(found, str(folder / "model.safetensors"))
    return folder, found


def load(folder, **options):
    options = {"dtype": jnp.float32, "precision": "highest", "mtp": True} | options
    return checkpoint.load_decoder(folder, **options)


@pytest.mark.parametrize("name", FORMS)
def test_the_numbers_and_the_files_are_the_same(name, tmp_path, rng):
    folder, tensors = quantised_folder(tmp_path / "a", name, rng)
    kept, plain = load(folder, weights="as stored"), load(folder)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(plain, nnx.Param)))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(kept)))
    assert held < parameters
    modules, others = [], []
    for path in ("attention.q_b_proj", "attention.kv_b_proj", "attention.o_proj", "mlp.down_proj"):
        for block in (0, 2):
            module, other = kept.blocks[block], plain.blocks[block]
            for step in path.split("."):
                module, other = getattr(module, step), getattr(other, step)
            assert isinstance(module, Quantised)
            modules.append(module)
            others.append(other[...] if isinstance(other, nnx.Variable) else other.kernel[...])
    numbers = jax.jit(lambda modules: [one.weight.dense(jnp.float32) for one in modules])(modules)
    for dense, other in zip(map(np.asarray, numbers), map(np.asarray, others), strict=True):
        axes = dense.shape[:-2]
        back = np.swapaxes(dense, -1, -2).reshape(*axes, -1)
        np.testing.assert_array_equal(back, other.reshape(*axes, -1))
    assert isinstance(kept.predictor.eh_proj, Quantised)
    checkpoint.save_decoder(kept, tmp_path / "b")
    with checkpoint.Checkpoint(tmp_path / "b") as files:
        again = {key: np.array(files.raw(key)) for key in files}
    copies = [f"model.layers.3.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")]
    assert again.keys() - set(copies) == tensors.keys()
    for key, value in tensors.items():
        assert (again[key].dtype, again[key].shape) == (value.dtype, value.shape), key
        np.testing.assert_array_equal(again[key].view(np.uint8), value.view(np.uint8), key)
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["quantization_config"] == FORMS[name][0]
    if name == "fp8 blocks":
        shutil.rmtree(tmp_path / "a")
        kept = load(tmp_path / "b", weights="as stored")
        for model in (plain, kept):  # what an MLP's layer has, one of experts has too
            model.blocks = nnx.List([model.blocks[2]])
        tokens = np.int32([[3, 1, 4, 1, 5, 9]])
        expected = jax.jit(lambda model: model(tokens))(plain)
        # Absorbed, which folds kv_b_proj by its blocks.
        found, _ = jax.jit(lambda model: model.decode(tokens, model.init_cache(1, 8)))(kept)
        assert relative(found, expected) < 1e-5  # float32, sums in another order


def test_each_device_of_a_mesh_keeps_its_own_part(tmp_path, rng):
    folder, tensors = quantised_folder(tmp_path / "a", "fp8 blocks", rng)
    with jax.set_mesh(jax.make_mesh((3, 2), ("x", "y"), devices=jax.devices()[:6])):
        model = load(folder, weights="as stored", sharding=Rules(N="x", E="y"))
    attention, mlp = model.blocks[2].attention, model.blocks[2].mlp
    for module, values, scale in (
        (attention.q_b_proj, ("x", None), (None, None)),
        (attention.o_proj, (None, "x"), (None, None)),
        (mlp.up_proj, ("y", None, None), ("y", None, None)),
    ):
        assert tuple(module.values[...].sharding.spec) == values
        assert tuple(module.scale[...].sharding.spec) == scale
    found = np.asarray(attention.o_proj.values[...])
    wanted = tensors["model.layers.2.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(found.view(np.uint8), wanted.view(np.uint8))


def test_what_cannot_be_kept_or_loaded(tmp_path, rng):
    folder, tensors = quantised_folder(tmp_path / "a", "fp8 blocks", rng)
    with pytest.raises(ValueError, match="weights='fp8': it must be 'as stored' or a dtype"):
        load(folder, weights="fp8")
    with pytest.raises(ValueError, match=r"param_dtype=.*says it already"):
        load(folder, weights="float16", param_dtype=jnp.float32)
    assert load(folder, weights=jnp.float16).embed.embedding.dtype == jnp.float16
    layer = load(folder, weights="as stored").blocks[0].attention
    with pytest.raises(ValueError, match="q_a_proj of this layer keeps another checkpoint's"):
        checkpoint.load_attention(layer, checkpoint.attention_tensors(layer))
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensors[name] = np.zeros(tensors[name].shape, np.float32)
    del tensors[f"{name}_scale_inv"]
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(ValueError, match=f"{name} in .* is stored otherwise than .*experts.0"):
        load(folder, weights="as stored")
