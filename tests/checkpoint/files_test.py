"""Shards, indices, fp8 blocks and broken files; memory is measured, not assumed."""

import json
import pathlib
import subprocess
import sys

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import MICRO, drawn
from flax import nnx
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mla_jax import MLAConfig, MultiHeadLatentAttention, checkpoint, families
from mla_jax.checkpoint import names as naming
from mla_jax.checkpoint import tensors as tables

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
CONFIG = MICRO.replace(num_hidden_layers=2)


def make(config=CONFIG, seed=0, **options):
    return drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0), **options), seed)


def write(folder, tensors, index=True, config=None, split=2):
    """Shards a dict of tensors round robin, so that neighbours lie in different files."""
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    table = {}
    for shard in range(split):
        file = f"model-{shard + 1:05}-of-{split:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::split]}, str(folder / file))
        table |= dict.fromkeys(names[shard::split], file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("style", ["huggingface", "mistral", "deepseek", "bailing"])
def test_round_trip_is_exact(tmp_path, dtype, style):
    layers = {i: make(seed=i, param_dtype=dtype) for i in range(2)}
    checkpoint.save_attention(tmp_path, layers, names=style, shard_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with checkpoint.Checkpoint(tmp_path) as files:
        assert files.layers() == [0, 1]
        for index, layer in layers.items():
            new = make(seed=7, param_dtype=dtype)
            checkpoint.load_attention(new, files.attention(index))
            expected = checkpoint.attention_tensors(layer, names=style)
            for name, tensor in checkpoint.attention_tensors(new, names=style).items():
                assert tensor.dtype == dtype
                np.testing.assert_array_equal(tensor, expected[name])
                full = f"model.layers.{index}.self_attn.{name}"
                np.testing.assert_array_equal(files.tensor(full), tensor)


PREFIXES = {
    "model.layers.{}.self_attn.": "huggingface", "language_model.model.layers.{}.self_attn.":
    "huggingface", "model.layers.{}.attention.": "bailing", "layers.{}.attention.": "mistral",
    "layers.{}.attn.": "deepseek", "model.language_model.layers.{}.self_attn.": "huggingface",
}  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_and_blocks_for_drafting(tmp_path, prefix):
    tensors = {"model.embed_tokens.weight": np.zeros((3, 4), np.float32)}
    for index in range(3):  # the third is the multi-token-prediction block
        own = checkpoint.attention_tensors(make(seed=index), names=PREFIXES[prefix])
        tensors |= {prefix.format(index) + name: tensor for name, tensor in own.items()}
        tensors[prefix.format(index) + "rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    tensors["mtp.layers.0.self_attn.kv_a_proj_with_mqa.weight"] = np.zeros((2, 2), np.float32)
    write(tmp_path, tensors, config={"num_hidden_layers": 2})
    with checkpoint.Checkpoint(tmp_path) as files:
        assert files.layers() == [0, 1]
        layer = make(seed=5)
        checkpoint.load_attention(layer, files.attention(1))
        np.testing.assert_array_equal(layer.o_proj.kernel[...], make(seed=1).o_proj.kernel[...])
        with pytest.raises(ValueError, match=r"no latent attention in layer 2.*\[0, 1\]"):
            files.attention(2)


def test_two_attentions_in_a_layer(tmp_path):
    tensors = {
        f"model.layers.0.self_attn.{nth}.{name}": tensor
        for nth in (0, 1)
        for name, tensor in checkpoint.attention_tensors(make(seed=nth)).items()
    }
    write(tmp_path, tensors, index=False)
    files = checkpoint.Checkpoint(tmp_path)
    layer = make(seed=5)
    checkpoint.load_attention(layer, files.attention(0, 1))
    np.testing.assert_array_equal(layer.o_proj.kernel[...], make(seed=1).o_proj.kernel[...])
    with pytest.raises(ValueError, match="layer 0, attention 2"):
        files.attention(0, 2)


def quantize(weight, kind, rng):
    """An fp8 tensor, its scales as stored, and their exact product."""
    grid = [-(-size // 128) for size in weight.shape]
    exponent = rng.integers(-6, 3, grid)
    if kind == "f32":
        scale = stored = rng.uniform(0.01, 2, grid).astype(np.float32)
    elif kind == "bf16":
        stored = rng.uniform(0.01, 2, grid).astype(BF16)
        scale = stored.astype(np.float32)
    elif kind == "tensor":
        scale = stored = np.array(0.37, np.float32)
    else:
        scale = np.exp2(exponent).astype(np.float32)
        stored = scale.astype(E8M0) if kind == "e8m0" else (exponent + 127).astype(np.uint8)
    small = (weight * 8).astype(E4M3)
    exact = np.empty(weight.shape, np.float32)
    for i, j in np.ndindex(weight.shape):
        factor = scale if kind == "tensor" else scale[i // 128, j // 128]
        exact[i, j] = np.float32(small[i, j]) * np.float32(factor)
    return small, stored, exact


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("f32", "weight_scale_inv"), ("e8m0", "weight_scale_inv"), ("u8", "weight_scale_inv"),
     ("bf16", "weight_scale"), ("tensor", "qscale_weight")],
)  # fmt: skip
def test_fp8_blocks(tmp_path, rng, kind, suffix):
    stem = "model.layers.0.self_attn.kv_a_proj_with_mqa."
    small, stored, exact = quantize(rng.standard_normal((160, 130)), kind, rng)
    # the scale goes to another shard than its weight
    write(tmp_path, {stem + "weight": small, stem + suffix: stored, stem + "qscale_act": stored})
    files = checkpoint.Checkpoint(tmp_path)
    assert files.file_of(stem + "weight") != files.file_of(stem + suffix)
    np.testing.assert_array_equal(files.tensor(stem + "weight"), exact)
    half = files.tensor(stem + "weight", BF16)
    np.testing.assert_array_equal(half, exact.astype(BF16))
    assert list(files.attention(0)) == ["kv_a_proj_with_mqa.weight"]


def test_fp8_errors(tmp_path, rng):
    stem = "model.layers.0.self_attn.q_proj."
    small, stored, _ = quantize(rng.standard_normal((160, 130)), "f32", rng)
    write(tmp_path / "a", {stem + "weight": small})
    with pytest.raises(ValueError, match=r"q_proj\.weight in .*a/model-.* is fp8 and has no scale"):
        checkpoint.Checkpoint(tmp_path / "a").tensor(stem + "weight")
    write(tmp_path / "b", {stem + "weight": small, stem + "weight_scale_inv": stored[:1]})
    with pytest.raises(ValueError, match=r"weight_scale_inv.*shape \(1, 2\).*needs \(2, 2\)"):
        checkpoint.Checkpoint(tmp_path / "b").tensor(stem + "weight")
    config = {"quantization_config": {"weight_block_size": [80, 65]}}
    write(
        tmp_path / "c", {stem + "weight": small, stem + "weight_scale_inv": stored}, config=config
    )
    value = checkpoint.Checkpoint(tmp_path / "c").tensor(stem + "weight")
    assert value[79, 64] == np.float32(small[79, 64]) * stored[0, 0]
    assert value[80, 64] == np.float32(small[80, 64]) * stored[1, 0]
    config["quantization_config"]["weight_block_size"] = [128]
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"weight_block_size=\[128\]"):
        checkpoint.Checkpoint(tmp_path / "c").tensor(stem + "weight")


def test_an_fp8_layer_is_the_bf16_layer_of_its_products(tmp_path, rng):
    tensors = checkpoint.attention_tensors(make())
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        exact[name] = tensor
        full = f"model.layers.0.self_attn.{name}"
        stored[full] = tensor
        if tensor.ndim == 2:
            small, scale, exact[name] = quantize(tensor, "f32", rng)
            stored |= {full: small, full + "_scale_inv": scale}
    write(tmp_path, stored)
    one, two = make(seed=1, param_dtype=jnp.bfloat16), make(seed=2, param_dtype=jnp.bfloat16)
    checkpoint.load_attention(one, checkpoint.Checkpoint(tmp_path).attention(0))
    checkpoint.load_attention(two, exact)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


def test_reads_are_views_of_the_file_and_survive_a_release(tmp_path):
    tensors = {"model.layers.0.mlp.weight": np.arange(5000, dtype=np.float32)}
    write(tmp_path, tensors, split=1)
    with checkpoint.Checkpoint(tmp_path) as files:
        view = files.tensor("model.layers.0.mlp.weight")
        assert not view.flags.owndata
        assert not view.flags.writeable
        files.release()
        np.testing.assert_array_equal(view, tensors["model.layers.0.mlp.weight"])
        assert files.shape("model.layers.0.mlp.weight") == (5000,)
        assert files.tensor("model.layers.0.mlp.weight", np.float64).dtype == np.float64


def test_sharded_parameters(tmp_path):
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    heads = jax.NamedSharding(mesh, jax.P(None, "tp"))
    config = CONFIG.replace(num_attention_heads=4)
    layer = make(config)
    checkpoint.save_attention(tmp_path, {0: layer})
    new = nnx.eval_shape(lambda: make(config, seed=1))
    whole = jax.NamedSharding(mesh, jax.P())
    place = lambda path, shape: heads if path == "q_b_proj.kernel" else whole  # noqa: E731
    files = checkpoint.Checkpoint(tmp_path)
    checkpoint.load_attention(new, files.attention(0), sharding=place)
    kernel = new.q_b_proj.kernel[...]
    assert kernel.sharding == heads
    assert kernel.addressable_shards[0].data.shape == (12, 2, 11)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(layer), strict=True):
        np.testing.assert_array_equal(a, b)
    checkpoint.load_attention(new, files.attention(0), sharding={"q_a_proj.kernel": whole})
    assert new.q_a_proj.kernel[...].sharding == whole


def test_what_an_index_may_get_wrong(tmp_path):
    folder = write(tmp_path / "a", checkpoint.attention_tensors(make()))
    table = folder / "model.safetensors.index.json"
    good = json.loads(table.read_text())["weight_map"]
    name = "kv_b_proj.weight"

    def broken(weight_map):
        table.write_text(json.dumps({"weight_map": weight_map}))
        return checkpoint.Checkpoint(folder)

    with pytest.raises(
        FileNotFoundError, match=r"absent\.safetensors, which should hold kv_b_proj"
    ):
        broken(good | {name: "absent.safetensors"}).tensor(name)
    other = next(file for file in set(good.values()) if file != good[name])
    with pytest.raises(ValueError, match=rf"{other} holds {name}: it does not"):
        broken(good | {name: other}).tensor(name)
    with pytest.raises(ValueError, match=r"'\.\./x\.safetensors', is not in its folder"):
        broken(good | {name: "../x.safetensors"})
    for content, message in (("{}", "no weight_map"), ("[]", "a list"), ("{", "not valid JSON")):
        table.write_text(content)
        with pytest.raises(ValueError, match=rf"index\.json.*{message}"):
            checkpoint.Checkpoint(folder)
    with pytest.raises(KeyError, match=r"has no tensor 'nothing'"):
        broken(good).tensor("nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no safetensors files"):
        checkpoint.Checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder"):
        checkpoint.Checkpoint(tmp_path / "nowhere")


def test_a_repository_that_cannot_be_fetched(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise OSError("no network\nat all")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"^some/model is neither .* fetched: no network$"):
        checkpoint.Checkpoint("some/model")


def test_a_single_file_and_files_without_an_index(tmp_path):
    tensors = {f"model.layers.0.self_attn.{k}": v
               for k, v in checkpoint.attention_tensors(make()).items()}  # fmt: skip
    folder = write(tmp_path / "a", tensors, index=False)
    assert set(checkpoint.Checkpoint(folder)) == set(tensors)
    save_file(tensors, str(folder / "consolidated.safetensors"))  # Mistral's second copy
    assert set(checkpoint.Checkpoint(folder)) == set(tensors)
    assert set(checkpoint.Checkpoint(folder / "consolidated.safetensors")) == set(tensors)
    save_file({"x": np.zeros(1)} | tensors, str(folder / "model-again.safetensors"))
    with pytest.raises(ValueError, match="both hold"):
        checkpoint.Checkpoint(folder)


def test_layers_that_are_not_the_configs(tmp_path):
    layer = make()
    checkpoint.save_attention(tmp_path, {0: layer})
    files = checkpoint.Checkpoint(tmp_path)
    gated = make(CONFIG.replace(output_gate="head"))
    with pytest.raises(ValueError, match=r"self_attn\. in .*missing \['g_proj.weight'\]"):
        checkpoint.load_attention(gated, files.attention(0))
    wider = make(CONFIG.replace(v_head_dim=11))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.kv_b_proj.weight in .*has shape"):
        checkpoint.load_attention(wider, files.attention(0))


def test_a_broken_shard_is_an_error_of_the_layers_in_it(tmp_path):
    checkpoint.save_attention(tmp_path, {0: make(), 1: make(), 2: make()}, shard_bytes=1)
    files = checkpoint.Checkpoint(tmp_path)
    first, second = (f"model.layers.{i}.self_attn.kv_b_proj.weight" for i in (1, 2))
    files.file_of(first).unlink()
    cut = files.file_of(second)
    cut.write_bytes(cut.read_bytes()[:-1])
    for _ in range(2):
        layer = make(seed=5)
        checkpoint.load_attention(layer, files.attention(0))
        np.testing.assert_array_equal(layer.o_proj.kernel[...], make().o_proj.kernel[...])
    with pytest.raises(FileNotFoundError, match=rf"{files.file_of(first)}.*hold {first}, is miss"):
        checkpoint.load_attention(make(), files.attention(1))
    with pytest.raises(ValueError, match=rf"{second}: {cut} is not a whole safetensors file"):
        checkpoint.load_attention(make(), files.attention(2))


def test_unexpected_tensors_are_named_with_their_file(tmp_path):
    prefix = "model.layers.0.self_attn."
    tensors = {prefix + k: v for k, v in checkpoint.attention_tensors(make()).items()}
    tensors[prefix + "indexer.wq_b.weight"] = np.zeros((2, 2), np.float32)
    files = checkpoint.Checkpoint(write(tmp_path, tensors))
    with pytest.raises(ValueError, match=rf"{prefix}indexer\.wq_b\.weight in .*model-0000\d-of"):
        checkpoint.load_attention(make(), files.attention(0))


CONTENT = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, BF16)}


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_damaged_files_give_clear_errors(tmp_path_factory, data):
    """Bytes changed, cut off or added: the right tensors or an error that names the file."""
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    save_file(CONTENT, str(path))
    raw = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, header - 1))
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    raw += data.draw(st.binary(max_size=3))
    path.write_bytes(raw)
    try:
        files = checkpoint.Checkpoint(path)
        for name in files:
            value = files.tensor(name)
            assert value.shape == files.shape(name)
            assert value.nbytes <= len(raw)
    except ValueError as error:
        message = str(error)
    else:
        return
    assert "model.safetensors" in message


def test_canonical_names():
    for style, table in families.styles().items():
        for ours, theirs in table.items():
            kind = "" if ours in tables.VECTORS.values() else ".weight"
            assert naming.canonical(theirs + kind) == ours + kind
            assert naming.rename(ours + kind, style) == theirs + kind
    with pytest.raises(ValueError, match="names='hugging'"):
        naming.rename("q_proj.weight", "hugging")


_CHILD = """
import sys
import jax, numpy
from flax import nnx
from mla_jax import MLAConfig, MultiHeadLatentAttention, checkpoint
from mla_jax.checkpoint import host
config = MLAConfig.from_preset("deepseek_v2_lite").replace(num_hidden_layers=1)
make = lambda: MultiHeadLatentAttention(config, param_dtype="bfloat16", rngs=nnx.Rngs(0))
layers = [nnx.eval_shape(make) for _ in range(int(sys.argv[2]))]
host.place(numpy.zeros((2, 2)), "bfloat16")
peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
before = peak()
with checkpoint.Checkpoint(sys.argv[1]) as files:
    for index, layer in enumerate(layers):
        checkpoint.load_attention(layer, files.attention(index))
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads Linux's counters")
def test_peak_memory_is_the_parameters_and_a_layer(tmp_path):
    config = MLAConfig.from_preset("deepseek_v2_lite").replace(num_hidden_layers=1)
    layer = make(config, param_dtype=jnp.bfloat16)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(layer))  # 28 MB
    count = 4
    checkpoint.save_attention(tmp_path, dict.fromkeys(range(count), layer))
    found = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), str(count)], check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    peak = int(found.stdout)
    assert peak > count * size * 0.9  # the parameters did arrive
    assert peak < count * size + 1.5 * size
