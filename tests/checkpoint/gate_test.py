"""Whatever one tensor of a checkpoint becomes: the right weights, or an error that names it."""

import functools
import itertools
import json
import pathlib
import re

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import MICRO, drawn, slow
from flax import nnx
from hypothesis import strategies as st
from quantized import E4M3, packed, scaled
from safetensors.numpy import load_file, save_file

from mla_jax import MultiHeadLatentAttention, checkpoint, families
from mla_jax.checkpoint import tensors as tables

DECODERS = pathlib.Path(__file__).parents[1] / "testdata" / "decoders"
BF16, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu
MTP = "model.layers.3."
BLOCKS = {"fp8": (16, 16), "int8": (1, None), "int4": (1, 8)}  # that share a scale, in `base`
COPIES = {  # which a block for drafting may leave out
    f"{MTP}embed_tokens.weight": "model.embed_tokens.weight",
    f"{MTP}shared_head.head.weight": "lm_head.weight",
}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}}},
}  # fmt: skip
PROJECTION = re.compile(r"(proj|proj_with_mqa)\.weight$")


@functools.cache
def source(name):
    """(config, tensors) of a family's own tiny model, with its block for drafting."""
    folder, found = DECODERS / name, {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    config = json.loads((folder / "config.json").read_text())
    if config.get("num_nextn_predict_layers"):
        for key, value in list(found.items()):
            if ".layers.2." in key:
                found[key.replace("layers.2.", "layers.3.")] = value[::-1].copy()
        random = np.random.default_rng(3)
        for key, shape in (("enorm", 24), ("hnorm", 24), ("shared_head.norm", 24),
                           ("eh_proj", (24, 48))):  # fmt: skip
            found[f"{MTP}{key}.weight"] = random.standard_normal(shape).astype(np.float32)
        found[f"{MTP}embed_tokens.weight"] = found["model.embed_tokens.weight"]
        found[f"{MTP}shared_head.head.weight"] = found["lm_head.weight"]
    return config, found


@functools.cache
def base(name):
    """(config, stored tensors, {tensor: (numbers, names that it is made of)})."""
    family, _, form = name.partition(" ")
    config, plain = source(family)
    random = np.random.default_rng(0)
    tensors, numbers = {}, {}
    for key, value in plain.items():
        stem = key.removesuffix("weight")
        quantised = form and PROJECTION.search(key) and ("experts" in key or form != "int4")
        if not quantised:
            tensors[key], numbers[key] = value, (value, (key,))
        elif form == "int4":
            words, scale, shape, exact = packed(value, BLOCKS[form][1], random)
            parts = {"weight_packed": words, "weight_scale": scale, "weight_shape": shape}
            tensors |= {stem + part: array for part, array in parts.items()}
            numbers[key] = exact, tuple(stem + part for part in parts)
        else:
            dtype, suffix = {
                "fp8": (E4M3, "weight_scale_inv"), "int8": (np.int8, "weight_scale"),
            }[form]  # fmt: skip
            values, scale, exact = scaled(value, dtype, BLOCKS[form], random)
            tensors |= {key: values, stem + suffix: scale}
            numbers[key] = exact, (key, stem + suffix)
    quantization = {
        "": None, "int4": COMPRESSED, "int8": {"quant_method": "w8a8_int8"},
        "fp8": {"quant_method": "fp8", "weight_block_size": [16, 16]},
    }[form]  # fmt: skip
    return config | ({"quantization_config": quantization} if form else {}), tensors, numbers


BASES = ["deepseek_v2", "deepseek_v3", "minicpm3", "youtu", "glm4_moe_lite", "deepseek_v3 fp8",
         "deepseek_v3 int8", "deepseek_v3 int4"]  # fmt: skip
DTYPES = [np.float64, np.float32, np.float16, BF16, E4M3, ml_dtypes.float8_e5m2,
          E8M0, np.int8, np.uint8, np.int32, np.int64, np.bool_]  # fmt: skip
UNKNOWN = [
    "lm_head.bias", "model.norm.bias", "model.embed_tokens.bias", "extra.weight", "model.extra",
    "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.1.hc_fn", "mtp.norm.weight",
    "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", "model.layers.1.mlp.gate.bias",
    "model.layers.0.post_mlp_layernorm.weight", "model.layers.7.input_layernorm.weight",
    "model.layers.0.self_attn.indexer.wk.weight", "model.layers.0.self_attn.k_scale",
    "vision_tower.patch.weight", "model.layers.1.mlp.experts.8.up_proj.weight",
    "model.layers.1.mlp.experts.0.up_proj.weight_scale_2", "transformer.h.0.weight",
    "model.layers.0.self_attn.o_proj.qweight", "model.layers.0.self_attn.o_proj.bias",
]  # fmt: skip
BESIDE = ["weight_scale", "weight_scale_inv", "scale", "qscale_weight", "weight_shape",
          "weight_zero_point", "weight_packed", "bias", "input_scale",
          "weight_scale_2"]  # fmt: skip


@st.composite
def changes(draw):
    name = draw(st.sampled_from(BASES))
    _, tensors, _ = base(name)
    key = draw(st.sampled_from(sorted(tensors)))
    kind = draw(st.sampled_from(["drop", "cast", "rename", "unknown", "beside", "shape", "copy"]))
    value: object = None
    if kind == "cast":
        value = draw(st.sampled_from(DTYPES))
    elif kind == "rename":
        other = draw(st.sampled_from(sorted(tensors)))
        value = draw(st.sampled_from([
            other if other != key else f"x.{key}", f"x.{key}", f"{key}.x",
            key.removeprefix("model."), key.replace("self_attn", "attention"),
            key.replace("layers.2", "layers.5"),
        ]))  # fmt: skip
    elif kind == "unknown":
        value = draw(st.sampled_from(UNKNOWN))
    elif kind == "beside":
        value = draw(st.sampled_from(BESIDE))
    elif kind == "shape":
        value = draw(st.sampled_from(["transposed", "longer", "flat", "scalar"]))
    elif kind == "copy":
        value = draw(st.sampled_from(["layers.9", "layers.3", "layers.4"]))
    return name, key, kind, value


def apply(tensors, key, kind, value):
    """The changed checkpoint, and the name that an error must hold; None where nothing changed."""
    tensors, array = dict(tensors), tensors[key]
    if kind == "drop":
        del tensors[key]
    elif kind == "cast":
        with np.errstate(all="ignore"):
            tensors[key] = array.astype(np.float64).astype(np.float32).astype(value)
    elif kind == "rename":
        if value == key:
            return tensors, None
        tensors[value] = tensors.pop(key)
    elif kind == "unknown":
        tensors[value] = np.ones(3, np.float32)
    elif kind == "beside":
        head = key.rpartition(".")[0]
        if f"{head}.{value}" in tensors:
            return tensors, None
        tensors[f"{head}.{value}"] = np.ones(array.shape[:1], np.float32)
    elif kind == "shape":
        if value == "transposed" and array.ndim == 2 and array.shape[0] != array.shape[1]:
            tensors[key] = np.ascontiguousarray(array.T)
        elif value == "longer" and array.ndim:
            tensors[key] = np.concatenate([array, array[-1:]])
        elif value == "flat" and array.ndim == 2 and 1 not in array.shape:
            tensors[key] = array.reshape(-1)
        elif value == "scalar" and array.size > 1:
            tensors[key] = array.reshape(-1)[0].reshape(())
        else:
            return tensors, None
    elif kind == "copy":
        target = key.replace("layers.2", value)
        if target in tensors:
            return tensors, None
        tensors[target] = array
    return tensors, key


def weights_of(model):
    """{tensor: numbers} of a model, through the table of its family."""
    family = families.find(model.config.model_type)
    entries = tables.decoder_table(model, family)
    head = tables.head_entry(model, "lm_head.weight")
    entries += [] if head is None else [head]
    if model.predictor is not None:
        entries += tables.predictor_table(model, family)
        entries += tables.predictor_copies(model, family)
    return {entry.name: entry.value() for entry in entries}


def expected(name, tensors):
    """The numbers that a checkpoint means, by the formats' definitions, in whatever dtype."""
    _, old, numbers = base(name)
    found = {}
    for key, (exact, parts) in numbers.items():
        if all(part in tensors for part in parts):
            same = all(tensors[part].dtype == old[part].dtype for part in parts)
            found[key] = exact if same else None
            if len(parts) == 1:
                found[key] = tensors[key]
            elif not same and tensors[parts[1]].dtype in (np.float64, np.float32, np.float16, BF16):
                found[key] = rescaled(
                    exact, old[parts[1]], tensors[parts[1]], BLOCKS[name.split()[1]]
                )
    return found


def rescaled(exact, old, new, block):
    """The products with scales of another dtype: every block's divided by one and times another."""
    steps = [step or size for step, size in zip(block, exact.shape, strict=True)]

    def grow(scale):
        whole = np.repeat(np.repeat(np.float64(scale), steps[0], 0), steps[1], 1)
        return whole[: exact.shape[0], : exact.shape[1]]

    return exact / grow(old) * grow(new)


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True, parents=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()},
              str(folder / "model.safetensors"))  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder, **options):
    return checkpoint.load_decoder(folder, dtype=jnp.float32, **options)


def _right_weights_or_a_named_refusal(change, mtp, folder):
    name, key, kind, value = change
    config, tensors, _ = base(name)
    mtp = mtp and "v3" in name
    changed, must_name = apply(tensors, key, kind, value)
    write(folder, config, changed)
    try:
        model = load(folder, mtp=mtp)
    except ValueError as error:
        message = str(error)
    else:
        want, got = expected(name, changed), weights_of(model)
        for tensor, numbers in got.items():
            source_of = tensor if tensor in want else COPIES.get(tensor)
            assert source_of in want, f"{tensor} was made up"
            wanted = want[source_of]
            assert wanted is not None, f"{tensor} has other numbers than its file"
            wanted = np.asarray(wanted, np.float32)
            np.testing.assert_allclose(numbers, wanted, rtol=1e-6, err_msg=tensor)
        unused = changed.keys() - {part for t in got for part in base(name)[2][t][1]}
        for left in unused:  # only a block for drafting that nobody asked for
            ignored = left.startswith(MTP) and not mtp
            assert ignored or left == "lm_head.weight" or left.endswith("input_scale"), left
        return
    assert must_name is not None, message
    renamed = [value] if isinstance(value, str) else []
    stems = {n.rpartition(".")[0].removeprefix("model.") for n in (must_name, *renamed)}
    assert any(stem in message for stem in stems if stem) or (
        "latent attention" in message and "kv_a_proj" in must_name + str(value)
    ), message


@pytest.mark.filterwarnings("ignore:.*is not the embedding.*:UserWarning")
@pytest.mark.unchecked
@pytest.mark.parametrize("examples", [15, slow(60)])
def test_any_change_of_a_tensor_gives_the_right_weights_or_a_named_refusal(
    examples, tmp_path_factory
):
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(change=changes(), mtp=st.booleans())
    def check(change, mtp):
        _right_weights_or_a_named_refusal(change, mtp, tmp_path_factory.mktemp("c"))

    check()


@functools.cache
def fresh(seed):
    return drawn(lambda: MultiHeadLatentAttention(MICRO, rngs=nnx.Rngs(0)), seed)


@functools.cache
def attention_base(form):
    random, stored = np.random.default_rng(1), {}
    for name, tensor in checkpoint.attention_tensors(fresh(0)).items():
        stored[name] = tensor
        if tensor.ndim == 2 and form:
            dtype, suffix = {"fp8": (E4M3, "weight_scale_inv"), "int8": (np.int8, "weight_scale")}[
                form
            ]
            values, scale, _ = scaled(tensor, dtype, (1, None), random)
            stored |= {name: values, name.removesuffix("weight") + suffix: scale}
    return stored


@pytest.mark.unchecked
@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_change_of_an_attention_tensor(data):
    stored = attention_base(data.draw(st.sampled_from(["", "fp8", "int8"])))
    key = data.draw(st.sampled_from(sorted(stored)))
    kind = data.draw(st.sampled_from(["drop", "cast", "rename", "beside", "shape"]))
    value = {
        "cast": st.sampled_from(DTYPES), "shape": st.sampled_from(["transposed", "longer", "flat"]),
        "rename": st.sampled_from([f"{key}.x", f"x.{key}", "g_proj.weight", "q_proj.bias"]),
        "beside": st.sampled_from(BESIDE),
    }.get(kind, st.none())  # fmt: skip
    value = data.draw(value)
    changed, named = apply(stored, key, kind, value)
    layer = nnx.clone(fresh(2))
    try:
        checkpoint.load_attention(layer, changed)
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        told = [part for part in (key, value) if isinstance(part, str)]
        assert named is None or any(part.split(".")[0] in message for part in told)
        return
    for name, tensor in checkpoint.attention_tensors(layer).items():
        stem, wanted = name.removesuffix("weight"), np.float32(changed[name])
        for suffix in ("weight_scale", "weight_scale_inv"):  # one a row
            if stem + suffix in stored:
                scale = changed[stem + suffix]  # bytes are exponents of two
                scale = scale.view(E8M0) if scale.dtype == np.uint8 else scale
                wanted = wanted * np.float32(scale).reshape(-1, 1)
        np.testing.assert_array_equal(tensor, wanted, err_msg=name)


@pytest.fixture
def v3(tmp_path):
    config, tensors, _ = base("deepseek_v3")
    return config, dict(tensors), lambda c, t: write(tmp_path / "model", c, t)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.bias", r"lm_head\.bias in .*model\.safetensors is not used: .* no such bias"),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", "is an adapter's: merge it"),
        ("other.weight", r"other\.weight in .* is not used"),
        ("vision_tower.x.weight", r"vision_tower\.x\.weight in .* is not used"),
        ("model.layers.0.self_attn.o_proj.weight_scale", "nothing is multiplied by this scale"),
        ("model.layers.0.self_attn.o_proj.input_scale", "nothing is multiplied by this scale"),
        ("model.layers.0.self_attn.o_proj.qweight", "looks like AWQ or GPTQ"),
        ("model.layers.1.mlp.experts.0.up_proj.weight_scale_2", "looks like NVFP4"),
        ("model.layers.4.input_layernorm.weight", "num_hidden_layers=3 and num_nextn_predict_lay"),
        ("model.layers.4.eh_proj.weight", "num_hidden_layers=3 and num_nextn_predict_layers=1"),
    ],
)
def test_what_is_left_over_is_named_with_its_reason(v3, name, message):
    config, tensors, put = v3
    tensors[name] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=message):
        load(put(config, tensors))


def test_a_layer_behind_the_last_is_no_block_for_drafting_without_eh_proj(v3):
    config, tensors, put = v3
    load(put(config, tensors))
    del tensors[f"{MTP}eh_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.3\..* and a block for drafting has eh_"):
        load(put(config, tensors))
    config, tensors = config | {"num_nextn_predict_layers": 0}, base("deepseek_v3")[1]
    with pytest.raises(ValueError, match=r"model\.layers\.3\..*num_nextn_predict_layers=0"):
        load(put(config, tensors))


def test_a_layer_behind_the_last_is_refused_by_attention_layers_too(v3):
    config, tensors, put = v3
    folder = put(config, tensors)
    assert checkpoint.Checkpoint(folder).layers() == [0, 1, 2]
    checkpoint.Checkpoint(folder).attention(0)
    silent = {key: value for key, value in config.items() if key != "num_nextn_predict_layers"}
    checkpoint.Checkpoint(put(silent, tensors)).attention(0)
    del tensors[f"{MTP}eh_proj.weight"]
    for drafts, other in ((None, silent), (0, config | {"num_nextn_predict_layers": 0})):
        message = rf"model\.layers\.3\..*num_hidden_layers=3 and num_nextn_predict_layers={drafts}"
        with pytest.raises(ValueError, match=message):
            checkpoint.Checkpoint(put(other, tensors)).attention(0)


@pytest.mark.parametrize("through", ["decoder", "attention"])
def test_an_adapter_beside_the_weights(v3, through):
    config, tensors, put = v3
    folder = put(config, tensors)

    def read():
        if through == "decoder":
            return load(folder)
        with checkpoint.Checkpoint(folder) as files:
            return files.attention(0)

    read()
    save_file({"base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": np.ones((2, 2))},
              str(folder / "adapter_model.safetensors"))  # fmt: skip
    with pytest.raises(ValueError, match=r"lora_A\.weight in .*adapter_model\.safetensors"):
        read()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read()


def test_a_file_that_the_index_does_not_know(v3):
    config, tensors, put = v3
    folder = put(config, tensors)
    checkpoint.save_tensors(folder, tensors)
    load(folder)
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, str(folder / "copy.safetensors"))
    load(folder)  # a second copy says nothing new
    save_file({"lm_head.bias": np.ones(40, np.float32)}, str(folder / "more.safetensors"))
    with pytest.raises(ValueError, match=r"lm_head\.bias in .*more\.safetensors: the index does"):
        load(folder)


def test_a_tied_models_own_head_is_used(tmp_path):
    config, tensors, _ = base("youtu")
    embed = tensors["model.embed_tokens.weight"]
    tied = load(write(tmp_path / "a", config, tensors))
    copied = load(write(tmp_path / "b", config, tensors | {"lm_head.weight": embed}))
    assert tied.head is copied.head is None
    other = np.roll(embed, 1, 0)
    folder = write(tmp_path / "c", config, tensors | {"lm_head.weight": other})
    with pytest.warns(UserWarning, match=r"lm_head\.weight in .* is not the embedding"):
        untied = load(folder)
    assert not untied.config.tie_word_embeddings
    hidden = np.random.default_rng(0).standard_normal((1, 3, 24)).astype(np.float32)
    logits = jax.jit(lambda models, hidden: [model.logits(hidden) for model in models])
    one, two = logits([untied, tied], hidden)
    np.testing.assert_allclose(one, np.roll(two, 1, -1), atol=1e-5)
    checkpoint.save_decoder(untied, tmp_path / "d")
    np.testing.assert_array_equal(load(tmp_path / "d").head.kernel[...].T, other)


def test_quantised_models_are_those_of_their_numbers(tmp_path):
    for name in ("deepseek_v3 fp8", "deepseek_v3 int8", "deepseek_v3 int4"):
        config, tensors, numbers = base(name)
        plain = {k: v for k, v in config.items() if k != "quantization_config"}
        exact = {key: np.float32(value) for key, (value, _) in numbers.items()}
        a = load(write(tmp_path / "a", config, tensors))
        b = load(write(tmp_path / "b", plain, exact))
        assert nnx.graphdef(a) == nnx.graphdef(b)  # one program serves both
        jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the model on one device of a form, made once for all axes."""

    @functools.cache
    def whole(form):
        config, tensors, _ = base(f"deepseek_v3{form}")
        folder = write(tmp_path_factory.mktemp("whole"), config, tensors)
        return folder, load(folder, mtp=True)

    return whole


FORMS = "", " fp8", " int8", " int4"
SPLIT = [("", -1), (" fp8", 0), (" int8", 1), (" int4", -1)]


@pytest.mark.parametrize(
    ("form", "axis"),
    [*SPLIT, *(slow(*case) for case in itertools.product(FORMS, (0, 1, -1)) if case not in SPLIT)],
    ids=lambda value: (value.strip() or "plain") if isinstance(value, str) else str(value),
)
def test_any_axis_of_any_weight_can_be_split(form, axis, whole):
    """Heads' channels, too, which are not next to each other in torch's rows."""
    folder, model = whole(form)
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    split = []

    def place(path, shape):
        at = axis % len(shape) if axis < len(shape) else 0
        if shape[at] % 2:
            return jax.NamedSharding(mesh, jax.P())
        split.append(path)
        return jax.NamedSharding(mesh, jax.P(*(["x" if i == at else None for i in range(at + 1)])))

    parts = load(folder, mtp=True, sharding=place)
    assert len(split) > 20
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(parts)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a[...]), np.asarray(b[...]), err_msg=str(path))


def test_a_vision_towers_tensors_may_stay(tmp_path):
    """As DeepSeek-VL2 names its parts: the language model is nested, and so is its config."""
    config, tensors = source("deepseek_v2")
    inside = {f"language.{name}": value for name, value in tensors.items()}
    inside |= {
        name: np.zeros(2, np.float32)
        for name in (
            "vision.blocks.0.weight",
            "projector.layers.0.weight",
            "image_newline",
            "view_seperator",
        )
    }
    nested = {"model_type": "deepseek_vl_v2", "language_config": config}
    got = weights_of(load(write(tmp_path, nested, inside)))
    for name, value in got.items():
        np.testing.assert_array_equal(value, tensors[name])
    inside["vision_tower.x"] = np.zeros(2, np.float32)  # not a name of this family's
    with pytest.raises(ValueError, match=r"vision_tower\.x in .* is not used"):
        load(write(tmp_path, nested, inside))
