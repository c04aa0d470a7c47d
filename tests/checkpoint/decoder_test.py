"""Whole tiny models of the families' own code: logits, greedy tokens, every tensor used."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from common import emptied, slow
from flax import nnx
from safetensors.numpy import load_file, save_file

from mla_jax import checkpoint
from mla_jax.generation.steps import decode_loop, prefill_step
from mla_jax.models import DecoderConfig

FOLDERS = sorted((pathlib.Path(__file__).parents[1] / "testdata" / "decoders").iterdir())
_full = jax.jit(lambda model, tokens: model(tokens))


def load(folder, **options):
    options = {"dtype": jnp.float32, "precision": "highest"} | options
    return checkpoint.load_decoder(folder, **options)


# A pass over a text and its continuation has one program, a loop that writes it has two.
LOOPED = "deepseek_v3"


@pytest.mark.parametrize(
    "folder",
    [folder if folder.name != LOOPED else slow(folder) for folder in FOLDERS],
    ids=lambda folder: folder.name,
)
def test_logits_and_greedy_tokens_at_once(folder):
    expected = np.load(folder / "expected.npz")
    tokens, greedy = (expected[name].astype(np.int32) for name in ("tokens", "greedy"))
    logits = np.asarray(_full(load(folder), np.concatenate([tokens, greedy[:, :-1]], 1)))
    # float32 rounding through three layers, on logits of a few units
    length = tokens.shape[1]
    np.testing.assert_allclose(logits[:, :length], expected["logits"], atol=3e-5)
    np.testing.assert_array_equal(logits[:, length - 1 :].argmax(-1), greedy)


@pytest.mark.parametrize(
    "folder",
    [folder if folder.name == LOOPED else slow(folder) for folder in FOLDERS],
    ids=lambda folder: folder.name,
)
def test_logits_and_greedy_tokens(folder):
    expected = np.load(folder / "expected.npz")
    model, tokens = load(folder), expected["tokens"].astype(np.int32)
    steps = expected["greedy"].shape[1]
    logits, cache = prefill_step(model, tokens, emptied(lambda: model.init_cache(2, 32)))
    np.testing.assert_allclose(logits, expected["logits"], atol=3e-5)
    first = np.asarray(logits)[:, -1].argmax(-1).astype(np.int32)
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


MTP = "model.layers.3."


@pytest.fixture
def drafting(copy, rng):
    """The same with a block for multi-token prediction, layer 2 again between its own tensors."""
    tensors, write = copy
    for name, value in list(tensors.items()):
        if ".layers.2." in name:
            tensors[name.replace("layers.2.", "layers.3.")] = value.copy()
    for name, shape in (("enorm", 24), ("hnorm", 24), ("shared_head.norm", 24),
                        ("eh_proj", (24, 48))):  # fmt: skip
        tensors[f"{MTP}{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
    tensors[f"{MTP}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors[f"{MTP}shared_head.head.weight"] = tensors["lm_head.weight"].copy()
    return tensors, write


def leaves(module):
    return jax.tree.leaves(nnx.state(module, nnx.Param))


def test_blocks_for_drafting_are_skipped(drafting):
    tensors, write = drafting
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    model = load(write())
    assert len(model.blocks) == 3
    assert model.predictor is None


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "shared"])
def test_a_block_for_drafting(drafting, copies):
    tensors, write = drafting
    if not copies:
        del tensors[f"{MTP}embed_tokens.weight"], tensors[f"{MTP}shared_head.head.weight"]
    model = load(write(), mtp=True)
    predictor = model.predictor
    for name, parameter in (
        ("enorm", predictor.enorm.scale), ("hnorm", predictor.hnorm.scale),
        ("shared_head.norm", predictor.norm.scale), ("eh_proj", predictor.eh_proj.kernel),
    ):  # fmt: skip
        np.testing.assert_array_equal(parameter, tensors[f"{MTP}{name}.weight"].T)
    for own, same in zip(leaves(predictor.block), leaves(model.blocks[2]), strict=True):
        np.testing.assert_array_equal(own, same)
    assert predictor.embed is predictor.head is None


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_and_a_head_of_its_own(drafting, tied):
    tensors, write = drafting
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"{MTP}{name}.weight"][-1, -1] += 1
    folder = write()
    if tied:
        del tensors["lm_head.weight"]
        config = json.loads((write() / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = load(folder, mtp=True, dtype=jnp.bfloat16)
    predictor = model.predictor
    for name, parameter in (("embed_tokens", predictor.embed.embedding),
                            ("shared_head.head", predictor.head.kernel[...].T)):  # fmt: skip
        want = tensors[f"{MTP}{name}.weight"].astype(jnp.bfloat16)
        np.testing.assert_array_equal(parameter, want)
    hidden = jax.device_put(np.ones((1, 1, 24), jnp.bfloat16))
    heads = jax.jit(lambda model: (model.draft_logits(hidden), model.logits(hidden)))(model)
    changed = np.not_equal(*map(np.asarray, heads)).nonzero()[-1]
    cache = emptied(lambda: model.init_draft_cache(1, 4))

    @jax.jit
    def draft(model, token):
        with_own = model.draft(hidden, token[None, None], cache)[0]
        model.predictor.embed = None
        return with_own, model.draft(hidden, token[None, None], cache)[0]

    same = [np.array_equal(*draft(model, np.int32(token))) for token in (39, 0)]
    assert same == [False, True]
    assert tied or changed.tolist() == [39]  # tied, the model's head is its embedding


def test_a_block_for_drafting_in_fp8(drafting, rng):
    """The blocks' scales belong to it; the router stays float32, as in other layers."""
    tensors, write = drafting
    exact = {}
    for name in ("eh_proj", "mlp.experts.5.up_proj", "self_attn.kv_b_proj"):
        weight = tensors[f"{MTP}{name}.weight"].astype(ml_dtypes.float8_e4m3fn)
        scale = rng.uniform(0.5, 2, (1, 1)).astype(np.float32)
        tensors |= {f"{MTP}{name}.weight": weight, f"{MTP}{name}.weight_scale_inv": scale}
        exact[name] = (weight.astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
    predictor = load(write(), mtp=True, dtype=jnp.bfloat16).predictor
    np.testing.assert_array_equal(predictor.eh_proj.kernel, exact["eh_proj"].T)
    experts = predictor.block.mlp
    np.testing.assert_array_equal(experts.up_proj[5], exact["mlp.experts.5.up_proj"].T)
    kernel = predictor.block.attention.kv_b_proj.kernel[...]
    np.testing.assert_array_equal(kernel.reshape(16, -1), exact["self_attn.kv_b_proj"].T)
    assert experts.router.kernel.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("eh_proj.weight", None, r"lacks model\.layers\.3\.eh_proj\.weight"),
        ("mlp.experts.7.gate_proj.weight", None, r"lacks model\.layers\.3\.mlp\.experts\.7"),
        ("self_attn.o_proj.weight", None, r"lacks model\.layers\.3\.self_attn\.o_proj"),
        ("eh_proj.weight", np.zeros((24, 24), np.float32), r"eh_proj.* in .*shape \(24, 24\)"),
        ("shared_head.head.weight", np.zeros((9, 24), np.float32), r"head.* in .*shape \(9, 24\)"),
        ("extra.weight", np.zeros(3, np.float32), r"layers\.3\.extra\.weight in .* is not used"),
    ],
)
def test_errors_name_the_tensor_of_a_block_for_drafting(drafting, name, change, message):
    tensors, write = drafting
    tensors.pop(MTP + name, None)
    if change is not None:
        tensors[MTP + name] = change
    with pytest.raises(ValueError, match=message):
        load(write(), mtp=True)


def test_no_block_for_drafting(copy):
    with pytest.raises(ValueError, match=r"nothing under model\.layers\.3\.,.*prompt lookup"):
        load(copy[1](), mtp=True)
    with pytest.raises(ValueError, match=r"deepseek_v2: num_nextn_predict_layers=0: mtp needs"):
        load(FOLDERS[0], mtp=True)


@pytest.mark.parametrize(
    ("root", "head"),
    [("language_model.model.", "language_model.lm_head."), ("model.language_model.", "lm_head."),
     slow("language_model.model.", "lm_head.")],
)  # fmt: skip
def test_the_language_model_of_another(copy, root, head):
    tensors, write = copy
    want = load(write())
    inside = {
        name.replace("model.", root, 1) if name.startswith("model.") else head + "weight": value
        for name, value in tensors.items()
    }
    tensors.clear()
    tensors |= inside | {"vision_tower.blocks.0.weight": np.zeros(2, np.float32)}
    for ours, theirs in zip(leaves(load(write())), leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", None, r"lacks model\.layers\.1\.mlp\.exp"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", None, "lacks .*correction_bias"),
        ("lm_head.weight", None, r"lacks lm_head\.weight"),
        ("model.norm.weight", np.ones(3, np.float32), r"model\.norm\.weight in .* shape \(3,\)"),
        (
            "model.layers.0.hc_fn",
            np.ones(3, np.float32),
            r"layers\.0\.hc_fn in .*not used: .*layers have no",
        ),
        (
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            None,
            r"lacks model\.layers\.1\.self_attn\.kv_a",
        ),
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
        ({"model_type": "mistral4"}, "model_type='mistral4'.*MultiHeadLatentAttention"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"n_group": 3}, "n_group=3"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5: only 4"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"intermediate_size": "x"}, "intermediate_size='x'"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x'"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor=-1"),
        ({"norm_topk_prob": 2}, "norm_topk_prob=2"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no'"),
        ({"eos_token_id": ["a"]}, "eos_token_id="),
        ({"model_type": "minicpm3", "scale_depth": {}}, "scale_depth={}"),
        ({"model_type": "minicpm3", "dim_model_base": "x"}, "dim_model_base='x'"),
        ({"model_type": "minicpm3", "scale_emb": 0}, "scale_emb=0"),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types.*come first"),
    ],
)
def test_configs_of_other_shapes_are_refused(changes, message):
    source = next(folder for folder in FOLDERS if folder.name == "deepseek_v3")
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(config | changes)


def test_sarvams_groups_are_of_eight_experts():
    source = next(folder for folder in FOLDERS if folder.name == "deepseek_v3")
    config = json.loads((source / "config.json").read_text()) | {"model_type": "sarvam_mla"}
    for key in ("n_group", "topk_group", "n_routed_experts"):
        del config[key]
    config |= {"num_experts": 128, "num_experts_per_tok": 8}
    found = DecoderConfig.from_hf(config)
    assert (found.n_routed_experts, found.n_group, found.topk_group) == (128, 16, 2)
    found = DecoderConfig.from_hf(config | {"n_group": 1, "topk_group": 1})
    assert (found.n_group, found.topk_group) == (1, 1)


def test_no_config(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)


def test_progress_counts_up_to_all_parts():
    heard = []
    load(FOLDERS[0], on_progress=lambda done, total: heard.append((done, total)))
    totals = {total for _, total in heard}
    assert len(totals) == 1
    assert [done for done, _ in heard] == list(range(totals.pop() + 1))
