import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import MICRO, drawn, slow
from flax import nnx

from mla_jax import MLAConfig, MultiHeadLatentAttention, checkpoint

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
CASES = sorted(
    path
    for path in TESTDATA.glob("*.npz")
    if not path.stem.startswith("ckpt") and "shared" not in path.stem  # of two layers
)


# These go through both forms, and through `decode` in pieces of the file. Compiling a program takes
# longer than all else of a case: the others have a whole pass by one form, a cached by the other,
# and the gate has one of the two, by turns.
WHOLE = ("deepseek_v3_yarn_leftpad", "deepseek_v32_dsa")
OF = "whole", "cached"
GATE = [
    (path, of)
    for number, path in enumerate(CASES)
    for of in (OF if path.stem in WHOLE else OF[number % 2 :][:1])
]
REST = [slow(path, of) for path in CASES for of in OF if (path, of) not in GATE]


@functools.partial(jax.jit, static_argnames="forms")
def by_forms(layer, x, *, forms=("expanded", "absorbed"), **options):
    return [layer(x, form=form, **options) for form in forms]


@functools.partial(jax.jit, static_argnames=("method", "form"))
def step(layer, x, cache, *, method, form, **options):
    return getattr(layer, method)(x, cache, form=form, **options)


def empty(layer, *sizes):
    """`layer.init_cache`, whose zeros are programs, by shape."""
    shapes = jax.eval_shape(lambda: layer.init_cache(*sizes))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize(
    ("path", "of"), [*GATE, *REST], ids=lambda value: getattr(value, "stem", value)
)
def test_families(path, of):
    z = np.load(path)
    meta = json.loads(str(z["meta"]))
    weights = {key[2:]: z[key] for key in z.files if key.startswith("w/")}
    config = MLAConfig.from_hf(json.loads(str(z["config"])))
    assert config == MLAConfig.from_hf(json.loads(str(z["config_hub"])))
    layer = drawn(lambda: MultiHeadLatentAttention(config, precision="highest", rngs=nnx.Rngs(0)))
    checkpoint.load_attention(layer, weights)
    style = {"hy_v4": "transformers_hy_v4", "axk2": "transformers_axk2"}.get(path.stem)
    back = checkpoint.attention_tensors(layer, names=style or "huggingface")
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(back[name], tensor)

    x, real = z["in/hidden_states"], z["in/attention_mask"] == 1
    tolerance = {"atol": meta["atol"], "rtol": meta["rtol"]}
    options = {"positions": z["in/position_ids"], "mask": real[:, None, None]}
    cached = "out/cached" in z.files
    forms = ("absorbed", "expanded") if cached else ("expanded", "absorbed")  # of the cached pass
    if of == "whole":
        for y in by_forms(layer, x, forms=forms if path.stem in WHOLE else forms[1:], **options):
            np.testing.assert_allclose(np.asarray(y)[real], z["out/full"][real], **tolerance)
        return

    # The cached pass, rows moved to the left: padding comes first in the file, last in a chunk.
    batch, length = real.shape
    padding = (~real).sum(1)
    full = z["out/cached"] if cached else z["out/full"]
    first = int(z["in/position_ids"].min())
    cache, outputs, start = empty(layer, batch, length), np.zeros_like(full), 0
    pieces = meta["schedule"] if path.stem in WHOLE else [9] * (length // 9) + [length % 9]
    for count in pieces:
        decode = path.stem in WHOLE and count <= 3
        end, width = start + count, count if decode else max(pieces)  # padded to it: one program
        lengths = np.clip(end - np.maximum(start, padding), 0, count)
        chunk = np.zeros((batch, width, x.shape[-1]), np.float32)
        for b, n in enumerate(lengths):
            chunk[b, :n] = x[b, end - n : end]
        positions = first + np.asarray(cache.length)[:, None] + np.arange(width)
        options = {"positions": positions if first else None}
        if decode:
            y, cache = step(layer, chunk, cache, method="decode", form="absorbed", **options)
        else:
            form = "expanded" if path.stem in WHOLE else forms[0]
            options |= {"method": "prefill", "form": form, "lengths": lengths}
            y, cache = step(layer, chunk, cache, **options)
        for b, n in enumerate(lengths):
            outputs[b, end - n : end] = np.asarray(y)[b, :n]
        start = end
    np.testing.assert_allclose(outputs[real], full[real], **tolerance)
    if "cache/kv_latent" not in z.files:
        return
    latent, rotated = np.asarray(cache.latent), np.asarray(cache.k_rope)
    for b, n in enumerate(padding):
        np.testing.assert_allclose(latent[b, : length - n], z["cache/kv_latent"][b, n:], atol=1e-5)
        k_rope = z["cache/k_rope"][b, n:]
        if meta["rope_cache_layout"] == "interleaved":
            k_rope = np.concatenate([k_rope[:, 0::2], k_rope[:, 1::2]], axis=-1)
        np.testing.assert_allclose(rotated[b, : length - n], k_rope, atol=1e-5)
        if "cache/index_k" in z.files:
            keys = np.asarray(cache.stores[0].index_key)[b, : length - n]
            np.testing.assert_allclose(keys, z["cache/index_k"][b, n:], atol=1e-5)


def test_bf16_error_is_that_of_the_expanded_form():
    z = np.load(next(path for path in CASES if "realdims" in path.stem))
    weights = {key[2:]: z[key] for key in z.files if key.startswith("w/")}
    config = MLAConfig.from_hf(json.loads(str(z["config"])))
    types = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    layer = drawn(lambda: MultiHeadLatentAttention(config, **types, rngs=nnx.Rngs(0)))
    checkpoint.load_attention(layer, weights)
    x, real = z["in/hidden_states"].astype(jnp.bfloat16), z["in/attention_mask"] == 1
    positions, mask = z["in/position_ids"], real[:, None, None]

    def norm(y):
        return np.linalg.norm(np.asarray(y, np.float64)[real] - z["out/full"][real])

    expanded, absorbed = map(norm, by_forms(layer, x, positions=positions, mask=mask))
    assert absorbed < 1.5 * expanded
    assert expanded < 1.5 * norm(z["out/full_bf16"])


def test_errors_name_the_tensor():
    layer = drawn(lambda: MultiHeadLatentAttention(MICRO, rngs=nnx.Rngs(0)))
    tensors = checkpoint.attention_tensors(layer)
    assert "q_a_proj.bias" in tensors
    before = nnx.to_pure_dict(nnx.state(layer))
    other = {key: value for key, value in tensors.items() if key != "o_proj.weight"}
    other["g_proj.weight"] = tensors["o_proj.weight"]
    with pytest.raises(ValueError, match=r"o_proj.weight and wo.weight are the same tensor"):
        checkpoint.load_attention(layer, tensors | {"wo.weight": tensors["o_proj.weight"]})
    with pytest.raises(ValueError, match=r"missing \['o_proj.weight'\], unexpected \['g_proj"):
        checkpoint.load_attention(layer, other)
    with pytest.raises(ValueError, match=r"kv_b_proj.weight has shape \(2, 2\)"):
        checkpoint.load_attention(layer, tensors | {"kv_b_proj.weight": np.zeros((2, 2))})
    after = nnx.to_pure_dict(nnx.state(layer))
    np.testing.assert_array_equal(before["o_proj"]["kernel"], after["o_proj"]["kernel"])


def test_a_whole_checkpoint(tmp_path):
    """Two shards in bf16, an MTP block behind the last layer: exact weights, known outputs."""
    expected = np.load(TESTDATA / "ckpt_bf16_expected.npz")
    meta, x = json.loads(str(expected["meta"])), expected["in/hidden_states"]
    with checkpoint.Checkpoint(TESTDATA / "deepseek_v3_bf16") as files:
        config = MLAConfig.from_hf(files.config)
        assert files.layers() == [0, 1]
        layer = drawn(
            lambda: MultiHeadLatentAttention(config, precision="highest", rngs=nnx.Rngs(0))
        )
        for index in files.layers():
            checkpoint.load_attention(layer, files.attention(index))
            for name, tensor in checkpoint.attention_tensors(layer).items():
                full = f"expected/model.layers.{index}.self_attn.{name}"
                np.testing.assert_array_equal(tensor, expected[full])
            (y,) = by_forms(layer, x, forms=("expanded",))
            np.testing.assert_allclose(
                y, expected[f"out/layer{index}"], atol=meta["atol"], rtol=meta["rtol"]
            )
