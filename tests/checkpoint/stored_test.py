"""Stored forms against their definitions: any index, any grain; what a config must announce."""

import functools
import json
import pathlib
from typing import ClassVar

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import MICRO, drawn
from flax import nnx
from hypothesis import strategies as st
from quantized import E4M3, packed, scaled
from safetensors.numpy import save_file

from mla_jax import MultiHeadLatentAttention, checkpoint
from mla_jax.checkpoint import scheme

NAME = "model.layers.0.mlp.up_proj.weight"
BLOCKS = {"block": (128, 128), "row": (1, None), "tensor": (None, None), "odd": (80, 65)}


def compressed(kind="pack-quantized", **weights):
    given = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | weights
    return {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": given,
                                          "input_activations": None}}}  # fmt: skip


def write(folder, tensors, quantization=None, config=()):
    folder = pathlib.Path(folder)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()},
              str(folder / "model.safetensors"))  # fmt: skip
    if quantization is not None:
        keys = dict(config) | {"quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(keys))
    return folder


# name: (dtype, block, suffix of the scale, quantization_config)
FORMS = {
    "fp8 per block": (E4M3, "block", "weight_scale_inv", {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
        "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}),
    "fp8 per other block": (E4M3, "odd", "weight_scale_inv", {
        "quant_method": "fp8", "weight_block_size": [80, 65]}),
    "fp8 per tensor": (E4M3, "tensor", "weight_scale", {
        "quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 per row": (E4M3, "row", "weight_scale", {"quant_method": "fbgemm_fp8"}),
    "fp8 per row, compressed-tensors": (E4M3, "row", "weight_scale", compressed(
        "float-quantized", type="float", strategy="channel")),
    "fp8 per block, compressed-tensors": (E4M3, "odd", "weight_scale", compressed(
        "float-quantized", type="float", strategy="block", block_structure=[80, 65])),
    "e5m2 per tensor": (ml_dtypes.float8_e5m2, "tensor", "weight_scale", {
        "quant_method": "fp8", "fmt": "e5m2"}),
    "int8 per row": (np.int8, "row", "weight_scale", {"quant_method": "w8a8_int8"}),
    "int8 per row, compressed-tensors": (np.int8, "row", "weight_scale", compressed(
        "int-quantized", strategy="channel")),
    "int8 per block": (np.int8, "block", "weight_scale_inv", {
        "quant_method": "blockwise_int8", "weight_block_size": [128, 128]}),
    "int8 per block, unannounced": (np.int8, "block", "weight_scale_inv", None),
    "int8 per row, unannounced": (np.int8, "row", "weight_scale", None),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_numbers_are_values_times_scales(form, tmp_path, rng):
    dtype, block, suffix, config = FORMS[form]
    weight = rng.standard_normal((160, 130))
    values, scale, exact = scaled(weight, dtype, BLOCKS[block], rng)
    stem = NAME.removesuffix("weight")
    files = checkpoint.Checkpoint(write(tmp_path, {NAME: values, stem + suffix: scale}, config))
    np.testing.assert_array_equal(files.read(NAME), exact)
    np.testing.assert_array_equal(files.read(NAME, dtype=jnp.bfloat16), exact.astype(jnp.bfloat16))
    held = files.stored(NAME)
    np.testing.assert_array_equal(held.values, values)
    np.testing.assert_array_equal(held.scale, scale)
    assert held.values.dtype == dtype
    assert held.names == (NAME, stem + suffix)
    flat = scale.reshape(-1) if scale.shape[1] == 1 else scale  # [M] as well as [M 1]
    write(tmp_path, {NAME: values, stem + suffix: flat})
    np.testing.assert_array_equal(checkpoint.Checkpoint(tmp_path).read(NAME), exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 12, None], ids=["groups", "odd groups", "rows"])
def test_packed_integers(bits, group, tmp_path, rng):
    weight = rng.standard_normal((9, 84))
    words, scale, shape, exact = packed(weight, group or 84, rng, bits)
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    stem = NAME.removesuffix("weight")
    tensors = {stem + "weight_packed": words, stem + "weight_scale": scale,
               stem + "weight_shape": shape}  # fmt: skip
    folder = write(tmp_path, tensors, compressed(num_bits=bits, **strategy))
    files = checkpoint.Checkpoint(folder)
    assert files.shape(NAME) == (9, 84)
    np.testing.assert_array_equal(files.read(NAME), exact)
    np.testing.assert_array_equal(files.read(NAME, (slice(2, 5), slice(13, 61))),
                                  exact[2:5, 13:61])  # fmt: skip
    assert files.stored(NAME).form.bits == bits


AXIS = st.slices(160) | st.integers(-160, 159)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint of a form, and its numbers: made once for all that is read of it."""

    @functools.cache
    def stored(name):
        rng = np.random.default_rng(0)
        dtype, block, suffix, config = FORMS[name]
        values, scale, exact = scaled(rng.standard_normal((160, 130)), dtype, BLOCKS[block], rng)
        tensors = {NAME: values, NAME.removesuffix("weight") + suffix: scale}
        folder = write(tmp_path_factory.mktemp("w"), tensors, config)
        return checkpoint.Checkpoint(folder), exact

    return stored


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(rows=AXIS, columns=st.slices(130) | st.integers(-130, 129), name=st.sampled_from(
    ["fp8 per block", "fp8 per other block", "int8 per row", "fp8 per tensor"]))  # fmt: skip
def test_an_index_reads_what_it_says(stored, rows, columns, name):
    files, exact = stored(name)
    for index in ((rows, columns), (rows,), rows, (..., columns)):
        np.testing.assert_array_equal(files.read(NAME, index), exact[index])


class Watched(np.ndarray):
    """An array that notes what is read of it."""

    seen: ClassVar[list] = []

    def __getitem__(self, index):
        self.seen.append(index)
        return super().__getitem__(index).view(np.ndarray)


def test_only_the_index_is_read_and_dequantised(rng):
    values, scale, exact = scaled(rng.standard_normal((300, 140)), E4M3, (128, 128), rng)
    form = scheme.Form(np.dtype(E4M3), (128, 128))
    held = checkpoint.Stored(("w", "s"), values.view(Watched), (300, 140), scale, form)
    got = held.read((slice(100, 270), slice(3, 5)))
    np.testing.assert_array_equal(got, exact[100:270, 3:5])
    assert sum(rows.stop - rows.start for rows, _ in Watched.seen) == 170
    assert {columns for _, columns in Watched.seen} == {slice(3, 5)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'"),
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "quant_method='mxfp4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo='NVFP4'"),
        ({"quant_method": "quark"}, "quant_method='quark'"),
        ({}, "quant_method=None"),
        ("fp8", "='fp8' must be an object"),
        ({"quant_method": "fp8", "fmt": "e3m4"}, "fmt='e3m4'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        ({"quant_method": "blockwise_int8"}, "lacks weight_block_size"),
        ({"quant_method": "blockwise_int8", "weight_block_size": [1, 64], "mf_format": True},
         "mf_format=True"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float"),
         "format='nvfp4-pack-quantized'"),
        (compressed("mxfp4-pack-quantized", num_bits=4, type="float"), "mxfp4-pack-quantized"),
        (compressed("marlin-24"), "format='marlin-24'"),
        (compressed(num_bits=3, strategy="channel"), "num_bits=3"),
        (compressed(num_bits=4, strategy="group", group_size=32, symmetric=False),
         "symmetric=False"),
        (compressed(num_bits=4, strategy="group", group_size=32, actorder="group"),
         "actorder='group'"),
        (compressed(num_bits=4, strategy="group"), "group_size=None"),
        (compressed("int-quantized", num_bits=4, strategy="channel"), "int-quantized has 8 bits"),
        (compressed(strategy="tensor_group"), "strategy='tensor_group'"),
        (compressed() | {"transform_config": {"config_groups": {"a": 1}}}, "transform_config="),
        (compressed() | {"config_groups": {}}, r"config_groups=\{\}"),
    ],
)  # fmt: skip
def test_other_schemes_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=f"config.json: quantization_config.*{message}"):
        scheme.forms({"quantization_config": config}, "config.json")
    with pytest.raises(ValueError, match=message):
        scheme.forms({"text_config": {"quantization_config": config}}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.uint8}, r"up_proj\.weight in .*holds uint8"),
        ({"weight": np.int32}, r"up_proj\.weight in .*holds int32"),
        ({"weight": ml_dtypes.float8_e4m3fn}, "which its quantization_config does not announce"),
        ({"weight_scale": np.int32}, r"weight_scale in .*holds int32: scales of .* are floats"),
        ({"weight_scale": np.uint8}, r"weight_scale in .*holds uint8: scales of .*scale_fmt"),
        ({"weight_scale": None}, "is int8 and has no scale"),
    ],
)
def test_a_form_that_does_not_fit_is_refused_by_name(change, message, tmp_path, rng):
    values, scale, _ = scaled(rng.standard_normal((20, 30)), np.int8, (1, None), rng)
    stem, tensors = NAME.removesuffix("weight"), {"weight": values, "weight_scale": scale}
    for key, dtype in change.items():
        tensors[key] = None if dtype is None else tensors[key].astype(dtype)
    kept = {stem + key: value for key, value in tensors.items() if value is not None}
    folder = write(tmp_path, kept, {"quant_method": "w8a8_int8"})
    with pytest.raises(ValueError, match=message):
        checkpoint.Checkpoint(folder).read(NAME)


def layer_of(seed, **types):
    return drawn(lambda: MultiHeadLatentAttention(MICRO, rngs=nnx.Rngs(0), **types), seed)


@pytest.mark.parametrize("through", ["files", "mapping"])
@pytest.mark.parametrize("form", ["int8 per row", "int8 per block", "fp8 per block"])
def test_a_layer_of_quantised_weights(form, through, tmp_path, rng):
    """The parameters are the exact products, cast once; the scales' names are not left over."""
    dtype, block, suffix, config = FORMS[form]
    tensors = checkpoint.attention_tensors(layer_of(0))
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        stored[name] = exact[name] = tensor
        if tensor.ndim == 2:
            values, scale, exact[name] = scaled(tensor, dtype, BLOCKS[block], rng)
            stored |= {name: values, name.removesuffix("weight") + suffix: scale}
    layer = layer_of(1, param_dtype=jnp.bfloat16)
    if through == "files":
        full = {f"model.layers.0.self_attn.{name}": value for name, value in stored.items()}
        checkpoint.load_attention(
            layer, checkpoint.Checkpoint(write(tmp_path, full, config)).attention(0)
        )
    else:
        checkpoint.load_attention(layer, stored)
    for name, tensor in checkpoint.attention_tensors(layer).items():
        np.testing.assert_array_equal(tensor, exact[name].astype(jnp.bfloat16), err_msg=name)
    del stored[f"o_proj.{suffix}"]
    with pytest.raises(ValueError, match=r"o_proj\.weight.* has no scale"):
        checkpoint.load_attention(layer, stored)
    stored |= {"o_proj.weight": tensors["o_proj.weight"], f"o_proj.{suffix}": np.ones(1, "f4")}
    with pytest.raises(ValueError, match=rf"unexpected \['o_proj\.{suffix}'\]"):
        checkpoint.load_attention(layer, stored)
