"""The layer among Flax's transformations, its dtypes, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import MICRO, PLAIN, drawn, emptied, gate, relative, slow
from flax import nnx

import mla_jax
from mla_jax import MultiHeadLatentAttention

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, MICRO.hidden_size), np.float32))


def make(config=MICRO, **options):
    return drawn(lambda: MultiHeadLatentAttention(config, rngs=nnx.Rngs(0), **options))


def test_parameters_have_the_names_of_the_design():
    names = {"kv_a_proj", "kv_a_norm", "kv_b_proj", "o_proj"}
    state = nnx.to_pure_dict(nnx.state(make()))
    assert set(state) == names | {"q_a_proj", "q_a_norm", "q_b_proj"}
    assert set(nnx.to_pure_dict(nnx.state(make(PLAIN)))) == names | {"q_proj"}
    assert state["kv_b_proj"]["kernel"].shape == (16, 3, 17)
    assert set(state["o_proj"]) == {"kernel", "bias"}
    assert not nnx.state(make(), nnx.RngState)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def flax_mode(request):
    with nnx.set_graph_mode(request.param), nnx.set_graph_updates(request.param):
        yield request.param


def test_parameters_of_the_variations():
    config = MICRO.replace(
        output_gate="head", k_rope_norm=True, attention_sinks=True, query_scale_ssmax=True,
        latent_norm=False, attention_bias=("q_b_proj", "kv_a_proj"),
    )  # fmt: skip
    state = nnx.to_pure_dict(nnx.state(make(config)))
    assert set(state) == {"q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj", "g_proj",
                          "k_rope_norm", "sinks", "ssmax_scale", "ssmax_bias"}  # fmt: skip
    assert state["g_proj"]["kernel"].shape == (24, 3, 1)
    assert {name for name, own in state.items() if isinstance(own, dict) and "bias" in own} == {
        "q_b_proj",
        "kv_a_proj",
    }
    gated = nnx.to_pure_dict(nnx.state(make(MICRO.replace(output_gate="query"))))
    assert gated["q_b_proj"]["kernel"].shape == (24, 3, 7 + 4 + 10)


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_jit_and_split(jit, flax_mode):
    layer = make()
    expected = layer(X)
    assert relative(jit(lambda layer, x: layer(x))(layer, X), expected) < 1e-6
    graph, state = nnx.split(layer)
    assert relative(nnx.merge(graph, state)(X), expected) < 1e-6


@pytest.mark.parametrize("jit", [jax.jit, nnx.jit])
def test_the_cache_goes_through_jit(jit, flax_mode):
    layer = make()
    step = jit(lambda layer, x, cache: layer.decode(x, cache))
    cache = layer.init_cache(2, 8)
    _, eager = layer.decode(X, cache)
    y, cache = step(layer, X, cache)
    np.testing.assert_array_equal(cache.length, [5, 5])
    np.testing.assert_allclose(cache.latent, eager.latent, atol=1e-6)
    assert relative(y, layer(X)) < 1e-5


@pytest.mark.parametrize("remat", [slow(False), True])
def test_scan_over_layers(remat, flax_mode):
    make_layers = nnx.vmap(lambda rngs: MultiHeadLatentAttention(PLAIN, rngs=rngs))
    layers = make_layers(nnx.Rngs(0).split(2))
    cut = lambda tree, i: jax.tree.map(lambda a: np.asarray(a)[i], tree)  # noqa: E731
    if flax_mode:
        apart = [cut(nnx.state(layers), i) for i in range(2)]
    else:
        apart = [nnx.state(cut(layers, i)) for i in range(2)]
    add = nnx.remat(lambda x, layer: x + layer(x)) if remat else lambda x, layer: x + layer(x)
    forward = nnx.scan(add, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    loss, grads = nnx.jit(nnx.value_and_grad(lambda layers: (forward(X, layers) ** 2).mean()))(
        layers
    )
    graph = nnx.graphdef(make(PLAIN))

    def unrolled(states):
        x = X
        for state in states:
            x = x + nnx.merge(graph, state)(x)
        return (x**2).mean()

    expected, expected_grads = jax.jit(jax.value_and_grad(unrolled))(apart)
    assert relative(loss, expected) < 1e-6
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *expected_grads)
    for got, want in zip(jax.tree.leaves(nnx.state(grads)), jax.tree.leaves(stacked), strict=True):
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
def test_shard_map_over_rows(form):
    layer = make()
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("rows")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P(), rows, rows), out_specs=(rows, rows)
    )
    def step(layer, x, cache):
        return layer.decode(x, cache, form=form)

    random = np.random.default_rng(2)
    draw = lambda *shape: jax.device_put(random.standard_normal(shape).astype(np.float32))  # noqa: E731
    cache = emptied(lambda: layer.init_cache(2, 8))
    stores = jax.tree.map(lambda held: draw(*held.shape), cache.stores)
    cache = cache.replace(stores=stores, length=jax.device_put(np.int32([5, 2])))
    new = draw(2, 2, MICRO.hidden_size)
    expected, expected_cache = jax.jit(lambda *given: layer.decode(*given))(new, cache)
    y, cache = step(layer, new, cache)
    assert relative(y, expected) < 1e-5
    np.testing.assert_allclose(cache.latent, expected_cache.latent, atol=1e-6)
    np.testing.assert_array_equal(cache.length, [7, 4])


def test_training_with_nnx_optimizer():
    layer = make()
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        loss, grads = nnx.value_and_grad(lambda layer: ((layer(X) - 1) ** 2).mean())(layer)
        optimizer.update(layer, grads)
        return loss

    losses = [float(step(layer, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_linen():
    model = nnx.bridge.to_linen(MultiHeadLatentAttention, MICRO)
    variables = model.init(jax.random.key(0), X)
    assert model.apply(variables, X).shape == X.shape
    assert "params" in variables


def test_orbax(tmp_path):
    layer = make()
    _, cache = layer.prefill(X, layer.init_cache(2, 8))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "cache", cache)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "cache", cache)
    np.testing.assert_array_equal(restored.latent, cache.latent)
    assert isinstance(restored, mla_jax.Cache)


def test_segments_positions_and_padding():
    ids = np.array([[0, 0, 1, 1, 1]] * 2)

    @jax.jit
    def run(layer):
        found = []
        for form in ("auto", "expanded", "absorbed"):
            positions = np.array([0, 1, 0, 1, 2])
            found.append(layer(X, segment_ids=ids, positions=positions, form=form))
            if form != "auto":
                positions = np.array([[1, 1, 0, 1, 2]] * 2)
                mask = (ids == 1)[:, None, None]
                found.append(layer(X, mask=mask, form=form, positions=positions))
        return layer(X[:, 2:]), found

    alone, found = jax.device_get(run(make()))
    for packed in found:
        np.testing.assert_allclose(packed[:, 2:], alone, atol=3e-6)


def test_lists_are_arrays_and_masks_may_be_zeros_and_ones():
    ids, places = [[0, 0, 1, 1, 1]] * 2, [0, 1, 0, 1, 2]
    mask = nnx.make_causal_mask(np.ones((2, 5)))
    assert mask.dtype == jnp.float32
    mask = np.asarray(mask)

    @jax.jit
    def run(layer):
        want = layer(X, segment_ids=jnp.array(ids), positions=jnp.array(places), mask=mask > 0)
        return want, [
            layer(X, segment_ids=ids, positions=places, mask=given, form=form)
            for form in ("expanded", "absorbed")
            for given in (jnp.array(mask), mask.tolist(), mask.astype(bool))
        ]

    layer = make()
    want, found = run(layer)
    for got in found:
        assert relative(got, want) < 2e-6
    _, cache = layer.prefill(X, layer.init_cache(np.int64(2), np.int32(8)), [5, 2])
    assert cache.length.tolist() == [5, 2]


def test_dtypes():
    half = make(dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda: half(X)).dtype == jnp.bfloat16
    assert half.kv_b_proj.kernel.dtype == jnp.float32
    assert (
        jax.eval_shape(lambda: half.init_cache(1, 4)).stores[0].arrays["latent"].dtype
        == jnp.bfloat16
    )
    both = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert both.kv_b_proj.kernel.dtype == jnp.bfloat16
    x = jax.ShapeDtypeStruct(X.shape, jnp.bfloat16)
    y, _ = jax.eval_shape(lambda x: both.decode(x, both.init_cache(2, 8)), x)
    assert y.dtype == jnp.bfloat16
    assert jax.eval_shape(make(), x).dtype == jnp.float32  # promoted, as Flax does


def test_folds_accumulate_in_float32_for_one_token():
    layer = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    cache = layer.init_cache(2, 4)
    lowered = jax.jit(lambda x, cache: layer.decode(x, cache)).lower(
        X[:, :1].astype(jnp.bfloat16), cache
    )
    folds = [
        line for line in lowered.as_text().splitlines()
        if "dot_general" in line and "tensor<16x3x" in line
    ]  # fmt: skip
    assert len(folds) == 2
    assert all("xf32>" in line.split("->")[1] for line in folds)


BAD = [
    (lambda layer: layer(X[..., 1:]), r"x has shape \(2, 5, 23\).*hidden_size = 24"),
    (lambda layer: layer(X[0]), "x has shape"),
    (lambda layer: layer(X[:, :0]), "T >= 1"),
    (lambda layer: layer(X.astype(jnp.float8_e4m3fn)), "x is float8_e4m3fn"),
    (lambda layer: layer(X.astype(jnp.int32)), "x is int32"),
    (lambda layer: layer(X, form="folded"), "form='folded'"),
    (lambda layer: layer(X, positions=jnp.arange(4)), r"positions is int32 of shape \(4,\)"),
    (lambda layer: layer(X, segment_ids=jnp.zeros(5, int)), "segment_ids is int"),
    (lambda layer: layer(X, mask=jnp.ones((2, 5), bool)), "mask has shape"),
    (lambda layer: layer(X, segment_ids=[[0.5] * 5] * 2), "segment_ids is float64"),
    (lambda layer: layer(X, positions=[0, 1]), r"positions is int64 of shape \(2,\)"),
    (lambda layer: layer.decode(X, make(PLAIN.replace(kv_lora_rank=8)).init_cache(2, 8)),
     r"cache.latent has shape \(2, 8, 8\)"),
    (lambda layer: layer.decode(X, layer.init_cache(3, 8)), "cache has 1 stores of 3 rows"),
    (lambda layer: layer.decode(X, layer.init_cache(2, 8, jnp.bfloat16)), "holds bfloat16"),
    (lambda layer: layer.prefill(X, layer.init_cache(2, 8), jnp.array([6, 1])), "each must"),
    (lambda layer: layer.prefill(X, layer.init_cache(2, 4)), "max_length=4"),
    (lambda layer: make(implementation="triton"), "implementation='triton'"),
    (lambda layer: make(MICRO.replace(index_topk=4)), "index_n_heads=None: index_n_heads must"),
    (lambda layer: MultiHeadLatentAttention({"hidden_size": 3}, rngs=nnx.Rngs(0)), "MLAConfig"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(make())


WRAPPED = {"q_a_proj": 12, "q_b_proj": 33, "kv_a_proj": 20, "kv_b_proj": 51, "o_proj": 24}


class _Doubled(nnx.Module):
    """An adapter that Flax does not know."""

    def __init__(self, base):
        self.base = base

    def __call__(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("name", gate([*WRAPPED, "all", "kv_b_proj by another adapter"], 5, 6))
def test_wrapped_projections_are_their_merged_weights(name):
    """Absorbed, expanded and with weights merged in float64: one result, cached or not."""
    layer, merged = make(), make()
    inputs = {"q_a_proj": 24, "q_b_proj": 12, "kv_a_proj": 24, "kv_b_proj": 16, "o_proj": 30}
    for index, each in enumerate(WRAPPED if name == "all" else [name.split()[0]]):
        base, kernel = getattr(layer, each), getattr(merged, each).kernel
        if "adapter" in name:
            setattr(layer, each, _Doubled(base))
            kernel[...] = 2 * kernel[...]
            continue
        wrapped = nnx.LoRA(inputs[each], 3, WRAPPED[each], base_module=base, rngs=nnx.Rngs(index))
        noise = np.random.default_rng(index).standard_normal((3, WRAPPED[each]))
        wrapped.lora_b.set_value(jax.device_put(np.float32(0.2 * noise)))
        setattr(layer, each, wrapped)
        update = np.asarray(wrapped.lora_a[...], np.float64) @ np.float64(wrapped.lora_b[...])
        value = np.asarray(kernel[...], np.float64) + update.reshape(kernel.shape)
        kernel.set_value(jax.device_put(np.float32(value)))

    @jax.jit
    def run(layer, merged):
        found = []
        for form in ("absorbed", "expanded"):
            first, cache = layer.prefill(X[:, :3], layer.init_cache(2, 8), form=form)
            rest, _ = layer.decode(X[:, 3:], cache, form=form)
            found += [layer(X, form=form), jnp.concatenate([first, rest], 1)]
        return merged(X), make()(X), found

    full, plain, found = run(layer, merged)
    assert relative(full, plain) > 1e-2
    for got in found:
        assert relative(got, full) < 3e-6
