"""Experts, whole models and texts on a mesh of eight devices, and what moves between these.

Letters: B rows, T tokens, D hidden size, N heads, R latent, P rotary channels, W words.
"""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import drawn, emptied, gate, slow
from flax import nnx
from sharding_test import BOTH, FAST, LAYOUTS, B, assert_close, laid, mesh, put

import mla_jax
from mla_jax import MLAConfig, MultiHeadLatentAttention, explain, sharding
from mla_jax.cache.stripes import Stripes
from mla_jax.generation import generate
from mla_jax.layers.experts import MixtureOfExperts, expert_load
from mla_jax.layers.indexer import Indexer
from mla_jax.models import Decoder, DecoderConfig, rounding
from mla_jax.ops import guard
from mla_jax.sharding import Rules

ATTENTION = MLAConfig(
    hidden_size=24, num_attention_heads=4, q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=8, num_hidden_layers=1, max_position_embeddings=2048,
)  # fmt: skip
CONFIG = DecoderConfig(
    attention=ATTENTION, vocab_size=64, intermediate_size=32, moe_intermediate_size=8,
    n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=1, scoring_func="sigmoid",
    n_group=4, topk_group=2, num_nextn_predict_layers=1,
)  # fmt: skip
EXPERTS = {
    "each_its_tokens_and_all_experts": Rules(B="data", D="data"),
    "gathered": LAYOUTS["experts"],
    "gathered_in_columns": LAYOUTS["experts_tensor"],
    "all_tokens_everywhere": Rules(E=BOTH),
    "exchanged": Rules(B=BOTH, E=("model", "data"), F="model"),
}


@functools.partial(jax.jit, compiler_options=FAST)
def mixed(layer, x):
    """A mixture of experts, and its gradients."""

    def loss(layer, x):
        y = layer(x)
        return (jnp.sin(y) ** 2).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


@functools.cache
def mixture(tokens):
    """On one device. Most of many tokens want the same three experts, which lie on one device."""
    layer = drawn(lambda: MixtureOfExperts(CONFIG, rngs=nnx.Rngs(0)))
    if tokens > 1:
        bias = np.array(layer.router.bias[...])
        bias[:3] = 10.0
        layer.router.bias.set_value(jax.device_put(bias))
    x = np.random.default_rng(0).normal(size=(B, tokens, 24)).astype(np.float32)
    return layer, x, jax.device_get(mixed(layer, x))


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        *((name, 1) for name in EXPERTS if name != "exchanged"),
        ("exchanged", 50),
        slow("exchanged", 1),
        slow("gathered", 50),
    ],
)
def test_experts_on_a_mesh_are_the_experts(layout, tokens):
    place, (layer, x, wanted) = EXPERTS[layout], mixture(tokens)
    with jax.set_mesh(mesh()):
        got = mixed(laid(layer, place), put(x, place.B))
    assert sharding.spec(got[0][1])[0] == place.B
    kernels = got[1][0]
    assert sharding.spec(kernels.gate_proj[...])[0] == place.E
    for tree in (got, wanted):
        tree[1][0].router.bias = None  # the choice has no derivative
    assert_close(jax.device_get(got), wanted)


def test_tokens_that_meet_all_experts_choose_them_without_a_move():
    layer, x, _ = mixture(1)
    with jax.set_mesh(mesh()):
        layer, x = laid(layer, Rules(B=BOTH)), put(x, BOTH)
        program = jax.jit(lambda layer, x: layer(x), compiler_options=FAST).lower(layer, x)
        assert moves(program.compile().as_text()) == []


def test_the_load_of_experts_is_that_of_all_devices():
    random = np.random.default_rng(0)
    experts, valid = random.integers(0, 5, (B, 3, 2)), random.random((B, 3)) < 0.7
    with jax.set_mesh(mesh()):
        load = expert_load(put(experts, BOTH), 5, valid=put(valid, BOTH))
        assert sharding.spec(load) == ((),)
    assert load.tolist() == np.bincount(experts[valid].ravel(), minlength=5).tolist()


def test_kernels_of_experts_that_are_split_otherwise_are_refused():
    layer, x, _ = mixture(1)
    with jax.set_mesh(mesh()):
        layer = laid(layer, Rules())
        layer.gate_proj.set_value(put(layer.gate_proj[...], (), (), ("model",)))
        with pytest.raises(NotImplementedError, match="only E may be, and alike for all three"):
            layer(x)


@pytest.mark.parametrize(("tied", "mlp"), [(False, "dense"), (True, None), slow(False, "experts")])
def test_a_split_vocabulary_has_the_same_gradients(tied, mlp):
    """Tied to the embedding with nothing between them, else behind a block."""
    config = CONFIG.replace(tie_word_embeddings=tied, first_k_dense_replace=int(mlp == "dense"))
    model = drawn(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    if mlp is None:
        model.blocks = nnx.List()
    tokens = np.random.default_rng(1).integers(0, 64, (B, 3)).astype(np.int32)
    place = Rules(B=BOTH, D="data", N="model", F="model", W="model", E=BOTH)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(model, tokens):
        def loss(model):
            logits = model(tokens)
            labels = sharding.move(tokens, *sharding.spec(logits)[:2])
            named = (logits * jax.nn.one_hot(labels, 64)).sum(-1)  # no word is looked up
            return (jax.nn.logsumexp(logits, -1) - named).mean(), logits

        return jax.grad(loss, has_aux=True)(model)

    wanted = jax.device_get(run(model, tokens))
    with jax.set_mesh(mesh()):
        got = jax.device_get(run(laid(model, place), put(tokens, BOTH)))
    for tree in (got, wanted) if mlp == "experts" else ():
        tree[0].blocks[0].mlp.router.bias = None
    assert_close(got, wanted)


def test_what_is_no_word_is_none_of_a_split_vocabulary():
    """NaN, as on one device."""
    model = drawn(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0)))
    tokens = np.array([[64, 63], [0, -1], *[[1, 17]] * (B - 2)], np.int32)
    wanted = np.asarray(model.embed.embedding[...])[tokens % 64]
    wanted[[0, 1], [0, 1]] = np.nan
    with jax.set_mesh(mesh()):
        placed = laid(model, Rules(D="data", W="model"))
        got = jax.jit(lambda model, tokens: model._embed(tokens))(placed, put(tokens, BOTH))
    np.testing.assert_array_equal(jax.device_get(got), wanted)


STORED = Rules(B="data", D="data", N="model", F="model", W="model", E=BOTH, A="model")


def rounded_decoder(block, make=lambda rounded, model: jax.jit(rounded)(model)):
    """The sparse layer of a model with weights as stored, in blocks of so many rows and columns."""
    config = CONFIG.replace(first_k_dense_replace=0)
    model = drawn(lambda: Decoder(config, precision="highest", rngs=nnx.Rngs(0)))

    def rounded(model):
        rounding.round_weights(model.blocks, "float8_e4m3fn")
        return model

    with mock.patch.dict(rounding.FORMS, {"float8_e4m3fn": (block, 448.0)}):
        return make(rounded, model)


@functools.partial(jax.jit, compiler_options=FAST)
def prompt_and_token(model, tokens, x):
    """The expanded form of the whole model, then the absorbed one of its attention."""
    cache = model.init_cache(B, 128)
    logits, cache = model.prefill(tokens, cache)
    return logits, model.blocks[0].attention.decode(x, cache)[0]


def test_weights_as_stored_on_a_mesh_are_those_of_one_device():
    """Blocks of 16 rows straddle devices: of q_b_proj's 48 rows each of four has 12."""
    model = rounded_decoder((16, 2))
    random = np.random.default_rng(1)
    tokens = random.integers(0, 64, (B, 3)).astype(np.int32)
    x = random.normal(size=(B, 1, 24)).astype(np.float32)
    wanted = jax.device_get(prompt_and_token(model, tokens, x))
    with jax.set_mesh(mesh()):
        placed = laid(model, STORED)
        given = put(tokens, STORED.B), put(x, STORED.B)
        got = jax.device_get(prompt_and_token(placed, *given))
        attention, mlp = placed.blocks[0].attention, placed.blocks[0].mlp
        for module, place in (
            (attention.q_a_proj, (("data",), ("model",))),
            (attention.q_b_proj, (("model",), ("data",))),
            (attention.o_proj, (("data",), ("model",))),
            (mlp.gate_proj, (BOTH, (), ())),
        ):
            assert sharding.spec(module.values[...]) == place
        assert sharding.spec(attention.q_b_proj.scale[...]) == ((), ())
        assert sharding.spec(mlp.gate_proj.scale[...]) == (BOTH, (), ())
    assert_close(got, wanted)


def test_inputs_as_stored_are_split_between_blocks_only():
    shapes = rounded_decoder((16, 3), jax.eval_shape)
    model = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    tokens, x = np.zeros((B, 3), np.int32), np.zeros((B, 1, 24), np.float32)
    with jax.set_mesh(mesh()):  # o_proj has 32 inputs, 8 on each of four devices
        given = laid(model, STORED), put(tokens, STORED.B), put(x, STORED.B)
        with pytest.raises(NotImplementedError, match=r"its 32 inputs into parts of 8\. Load"):
            jax.eval_shape(prompt_and_token, *given)


PROMPTS = [np.arange(1, n + 1) * 7 % 64 for n in (3, 130, 17, 1, 64, 5, 9, 40)]
ONE_CHUNK = [prompt[:128] for prompt in PROMPTS]  # a second one is another program
HELIX = Rules(B="data", S="model", N="model", F="model", E=BOTH, W="model")
DRAFTS = {"speculate": 2, "logprobs": True}
SAMPLES = {"speculate": 2, "draft": "mtp", "temperature": 1.0, "top_k": 20, "samples": 2}
TEXTS = {
    "helix_multi_token": (HELIX, ONE_CHUNK, SAMPLES | {"logprobs": True}),
    "helix_drafts": (HELIX, ONE_CHUNK, DRAFTS),
    "data_multi_token": (Rules(B=BOTH, D="data", W="model"), ONE_CHUNK, SAMPLES),
    "helix_chunks": (HELIX, PROMPTS, DRAFTS),
    "exchanged_multi_token": (Rules(B=BOTH, D="data", E=BOTH, W="model"), ONE_CHUNK, SAMPLES),
}


@pytest.mark.parametrize("name", gate(list(TEXTS), 0))
def test_texts_are_those_of_one_device(name):
    place, prompts, options = TEXTS[name]
    options |= {"max_new_tokens": 6, "block": 3}  # slots that split are the call's concern
    dense = 0 if place.E else 2  # blocks, with that for drafts
    config = CONFIG.replace(first_k_dense_replace=dense)
    model = drawn(lambda: Decoder(config, mtp="draft" in options, rngs=nnx.Rngs(0)))
    wanted = generate(model, prompts, **options)
    with jax.set_mesh(mesh()):
        placed = laid(model, place)
        got = generate(placed, prompts, sharding=place, **options)
    assert got.tokens == wanted.tokens
    assert got.accepted == wanted.accepted
    assert sharding.spec(got.cache.stores[0].latent)[:2] == (place.B, place.S)
    if options.get("logprobs"):
        for ours, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# What moves in a decode step of the layer, as kind and shape on a device. Rows are 8, over 2 or 8;
# R + P = 20 is what a head asks, R + 1 = 17 what it found, 4 heads go to 4 devices.
MOVES = {
    "data": [],
    "tensor": [("all-reduce", "f32[4,1,24]")],
    "helix": [
        ("all-gather", "f32[4,1,4,20]"), ("all-to-all", "u32[1,4,1,1,1,17]"),
        ("all-reduce", "f32[4,1,24]"),
    ],
    "context": [("all-to-all", "u32[1,4,1,1,1,17]"), ("all-gather", "f32[4,1,4,16]")],
    "data_core_of_split_heads": [  # q_a_proj's inputs and sums, queries, mixed latents, o_proj's
        ("all-to-all", "f32[1,1,1,1,6]"), ("all-reduce", "f32[4,1,12]"),
        ("all-to-all", "f32[1,1,1,1,1,20]"), ("all-to-all", "f32[1,1,1,1,1,16]"),
        ("all-reduce", "f32[4,1,24]"),
    ],
    "fsdp": [
        ("all-gather", shape)
        for shape in ("f32[24,12]", "f32[12,4,12]", "f32[24,20]", "f32[16,4,16]", "f32[4,8,24]")
    ],
}  # fmt: skip
_MOVE = (
    r"= \(?(\w+\[[\d,]*\])[^=]*? (all-\w+(?:-\w+)*|collective-permute|reduce-scatter)(?:-start)?\("
)


def moves(program):
    found = re.findall(_MOVE, program)
    return sorted((kind.removesuffix("-start"), shape) for shape, kind in found)


@pytest.mark.parametrize("layout", MOVES)
def test_a_step_moves_what_its_layout_says_and_nothing_else(layout):
    place = LAYOUTS[layout]
    with jax.set_mesh(mesh()):
        layer = drawn(lambda: MultiHeadLatentAttention(ATTENTION, rngs=nnx.Rngs(0)))
        layer = laid(layer, place)
        cache = jax.eval_shape(lambda: layer.init_cache(B, 1024, sharding=place))
        x = put(np.ones((B, 1, 24), np.float32), place.B)
        step = jax.jit(lambda layer, x, cache: layer.decode(x, cache), donate_argnums=2)
        program = step.lower(layer, x, cache).compile().as_text()
    assert moves(program) == sorted(MOVES[layout])
    loops = re.findall(r"body=%(\S+?)[,\s]", program)
    for loop in loops:
        body = program.split(f"%{loop} ", 1)[1].split("\n}", 1)[0]
        assert not moves(body)


@pytest.mark.parametrize("heads", [4, 3])  # which the four devices share out, and cannot
def test_parts_of_large_scores_are_merged(heads):
    """Whole numbers, so that scores up to 400 are exact in any order; exp(400) is not finite."""
    draw = lambda *shape: np.random.default_rng(3).integers(-5, 6, shape).astype(np.float32)  # noqa: E731
    arrays = draw(2, 3, heads, 8), draw(2, 3, heads, 2), draw(2, 512, 8), draw(2, 512, 2)
    lengths = np.array([512, 130], np.int32)
    attend = jax.jit(functools.partial(mla_jax.latent_attention, lengths=lengths, scale=2.0))
    wanted = attend(*arrays)
    assert np.max(wanted[1]) > 200
    with jax.set_mesh(mesh()):
        queries = [put(x, ("data",), (), ("model",) if heads == 4 else ()) for x in arrays[:2]]
        held = [put(striped(x, 4), ("data",), ("model",)) for x in arrays[2:]]
        got = attend(*queries, *held)
    assert_close(jax.device_get(got), jax.device_get(wanted))


def striped(x, n):
    """Slots [B S ...] in the order in which n devices have them."""
    blocks = x.reshape(x.shape[0], -1, n, 128, *x.shape[2:])  # round, turn
    rows = []
    for row, own in enumerate(blocks):
        turns = [own[:, (device - row) % n] for device in range(n)]
        rows.append(np.concatenate(turns).reshape(x.shape[1:]))
    return np.stack(rows)


def test_rows_come_and_go_between_devices():
    """`fork` and `insert` where rows and their slots lie on several devices."""
    place = Rules(B="data", S="model")
    layer = drawn(lambda: MultiHeadLatentAttention(ATTENTION, rngs=nnx.Rngs(0)))
    x = jax.device_put(np.random.default_rng(2).normal(size=(B, 200, 24)).astype(np.float32))
    lengths = np.array([200, 3, 0, 128, 129, 1, 199, 50], np.int32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(layer, cache, row):
        _, cache = layer.prefill(x, cache, lengths, form="absorbed")
        _, row = layer.prefill(x[:1, :140] * 2, row, form="absorbed")
        cache = cache.fork(6, np.arange(B) % 3 == 2, 150).insert(row, 3)
        return layer.decode(x[:, :1], cache)[0], cache.length

    empty = lambda rows: emptied(lambda: layer.init_cache(rows, 512), 0)  # noqa: E731
    wanted = run(layer, empty(B), empty(1))
    with jax.set_mesh(mesh()):
        placed = laid(layer, place)
        cache = layer.init_cache(B, 512, sharding=place)
        got = run(placed, cache, layer.init_cache(1, 512, sharding=Rules(S="model")))
    assert_close(jax.device_get(got), jax.device_get(wanted))


def test_sparse_attention_chooses_on_every_device_for_its_rows():
    config = ATTENTION.replace(index_topk=8, index_n_heads=2, index_head_dim=8)
    layer = drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(4).normal(size=(B, 20, 24)).astype(np.float32)

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(layer, cache, x):
        y, cache = layer.prefill(x, cache)
        return y, layer.decode(x[:, :1], cache)[0]

    wanted = jax.device_get(run(layer, emptied(lambda: layer.init_cache(B, 512), 0), x))
    with jax.set_mesh(mesh()):
        for place in (Rules(B="data", S="model"), Rules(B=BOTH, N="model", A="model")):
            x, placed = put(x, place.B), laid(layer, place)
            cache = layer.init_cache(B, 512, sharding=place)
            if place.S:
                with pytest.raises(NotImplementedError, match="sparse attention chooses among a"):
                    run(placed, cache, x)
            else:
                queries = {"autospec": True, "side_effect": Indexer.queries}
                with mock.patch.object(Indexer, "queries", **queries) as asked:
                    assert_close(jax.device_get(run(placed, cache, x)), wanted)
                latents = [call.args[2] for call in asked.call_args_list]
                assert all(sharding.spec(latent)[0] == place.B for latent in latents)


@pytest.mark.parametrize("rows", [8, 32])
def test_rows_of_any_length_keep_all_devices_busy(rows):
    lengths = np.random.default_rng(rows).integers(0, 2048, rows)  # of 8192 slots, S/8 in the mean
    live = []

    @jax.jit
    def of_device(lengths, device):
        stripes = Stripes(np.arange(rows), device, 8)
        slots = stripes.slots(1024)
        return stripes.seen(lengths[:, None]), slots, stripes.place(slots, 1024)

    for device in range(8):
        seen, slots, places = of_device(lengths, device)
        live.append(np.asarray(seen)[:, 0])
        below = np.asarray(slots) < lengths[:, None]
        np.testing.assert_array_equal(below.sum(1), live[-1])
        np.testing.assert_array_equal(places, np.broadcast_to(np.arange(1024), slots.shape))
    live = np.array(live)
    np.testing.assert_array_equal(live.sum(0), lengths)
    assert live.sum(1).max() <= 1.15 * live.sum(1).mean()


def test_a_kernel_s_operands_are_not_gathered_without_a_word():
    axes = (jax.sharding.AxisType.Auto,)
    auto = jax.make_mesh((2,), ("x",), axis_types=axes)
    guarded = jax.jit(guard.unsplit(lambda x, y: [x + y], "pallas_gpu"))
    x = np.ones((4, 3), np.float32)
    split, whole = (jax.device_put(x, jax.NamedSharding(auto, jax.P(axis))) for axis in ("x", None))
    assert guarded(x, x)[0].sum() == guarded(whole, whole)[0].sum() == 24
    rows = jax.P("x")
    mapped = jax.shard_map(guarded, mesh=auto, in_specs=(rows, rows), out_specs=[rows])
    assert jax.jit(mapped)(split, split)[0].sum() == 24
    with pytest.raises(jax.errors.JaxRuntimeError, match="pallas_gpu: operands are split as"):
        guarded(split, whole)


def test_explain_tells_what_each_device_of_a_mesh_runs(capsys):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    abstract = jax.sharding.AbstractMesh((4, 8), BOTH, axis_types=kinds, abstract_device=device)
    config = DecoderConfig.from_preset("deepseek_v3")
    place = Rules(B="data", S="model", N="model", E=BOTH)
    explain(config, batch_size=8, length=131072, mesh=abstract, sharding=place)
    text = capsys.readouterr().out
    assert "on each of 32 devices: 2 rows (of 8, over data), 16384 slots" in text
    assert "8 experts (of 256, over data, model)" in text
    assert text.count("pallas_gpu: runs") == 2
    with pytest.raises(ValueError, match="B = 6 does not divide over the 4 devices"):
        explain(config, batch_size=6, mesh=abstract, sharding=place)
    with pytest.raises(ValueError, match="sharding needs the mesh"):
        explain(config, sharding=place)


def test_a_guarded_kernel_is_mapped_over_an_axis():
    guarded = guard.unsplit(lambda x, y: [x + y, 2 * y], "pallas_gpu")
    x, y = np.arange(6.0, dtype=np.float32).reshape(3, 2), np.ones(2, np.float32)
    got = jax.jit(jax.vmap(guarded, (0, None)))(x, y)
    assert_close(got, [x + y, np.broadcast_to(2 * y, x.shape)])
