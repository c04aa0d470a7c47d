"""The routed experts, every way against a float64 loop; which backend serves, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gate, relative
from experts_oracle import gradients, loop, problem
from jax import export

from mla_jax.ops.experts import BACKENDS, Call, report, routed_experts, xla
from mla_jax.ops.experts.tiles import make_tiles
from mla_jax.target import Target

WAYS = {
    "by_pair": xla.by_pair,
    "all_experts": xla.all_experts,
    "by_block": lambda *a, **k: xla.by_block(*a, **k, rows=4),
    "by_one_block": xla.by_block,
    "ragged": lambda x, experts, weights, kernels, precision: BACKENDS["ragged"].run(
        x, experts, weights, *kernels, precision=precision, target=TPU,
        call=Call(len(x), experts.size, len(kernels[0]), (24, 9), "float32"),
    ),
}  # fmt: skip
H200 = Target("gpu", "NVIDIA H200", 9.0, 132)
CPU, TPU = Target("cpu", "cpu"), Target("tpu", "TPU v5p")


def call(tokens=4096, experts=64, widths=(2048, 1408), dtype="bfloat16"):
    return Call(tokens, 6 * tokens, experts, widths, dtype)


@functools.cache
def results_and_gradients(way):
    @jax.jit
    def run(experts, cotangent, *arrays):
        call = lambda x, weights, *kernels: WAYS[way](  # noqa: E731
            x, experts, weights, kernels, precision="highest"
        )
        return call(*arrays), jax.vjp(call, *arrays)[1](cotangent)

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("routing", ["spread", "one", "few"])
@pytest.mark.parametrize("tokens", gate([1, 2, 40], 0, 2))
def test_every_way_and_its_gradients_are_float64s(way, routing, tokens):
    arrays, experts = problem(tokens, count=12, chosen=3, widths=(24, 9), routing=routing)
    x = arrays[0]
    cotangent = np.cos(np.arange(x.size)).reshape(x.shape)
    y, found = results_and_gradients(way)(experts, jnp.asarray(cotangent, jnp.float32), *arrays)
    assert relative(y, loop(experts, *arrays)) < 2e-6
    for name, own, right in zip(
        ("x", "weights", "gate", "up", "down"), found, gradients(experts, cotangent, *arrays),
        strict=True,
    ):  # fmt: skip
        assert relative(own, right) < 3e-6, name


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, "by_pair"), (6, "all_experts"), (257, "by_block")]
)
def test_the_way_follows_from_the_shapes(tokens, expected):
    assert xla.way(call(tokens)) == expected


def test_order_of_preference_and_reasons():
    def runs(call, target):
        return next(name for name, reason in report(call, target) if reason is None)

    assert [name for name, _ in report(call(), CPU)] == ["pallas_gpu", "ragged", "xla"]
    assert runs(call(), H200) == runs(call(tokens=1), H200) == "pallas_gpu"
    assert runs(call(dtype="float32"), H200) == runs(call(), CPU) == "xla"
    assert runs(call(), TPU) == "ragged"
    assert runs(call(tokens=256), TPU) == "xla"
    assert "bfloat16" in dict(report(call(dtype="float32"), H200))["pallas_gpu"]
    assert "128, not 2048 and 1400" in dict(report(call(widths=(2048, 1400)), H200))["pallas_gpu"]
    assert "needs an NVIDIA GPU, this is cpu" in dict(report(call(), CPU))["pallas_gpu"]
    assert (
        "9.x (Hopper), this is 10.0"
        in dict(report(call(), Target("gpu", "NVIDIA B200", 10.0)))["pallas_gpu"]
    )
    assert "needs a TPU" in dict(report(call(), H200))["ragged"]


def test_a_mesh_of_hopper_gpus_gets_the_kernel():
    """Under an abstract mesh there is no device to ask, only its kind."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    arrays, experts = problem(4, count=4, chosen=2, widths=(128, 128), dtype=jnp.bfloat16)

    def stages():
        trace = jax.jit(routed_experts).trace(arrays[0], experts, *arrays[1:])
        return {str(e.source_info.name_stack) for e in trace.jaxpr.eqns}

    assert any("routed_experts.xla" in stage for stage in stages())
    with jax.sharding.use_abstract_mesh(mesh):
        assert any("routed_experts.pallas_gpu" in stage for stage in stages())


@pytest.mark.parametrize("tokens", [2, 40, 600])  # the three ways of XLA, on 20 to 300 of them
def test_rows_on_several_devices(tokens):
    """Inside `shard_map`: each device's own tokens, gradients of kernels summed over devices."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays, experts = problem(tokens, count=12, chosen=3, widths=(24, 9))
    over, whole = jax.P("data"), jax.P()
    local = jax.shard_map(
        routed_experts, mesh=mesh, in_specs=(over, over, over, whole, whole, whole), out_specs=over
    )

    @jax.jit
    def run(dy, x, *rest):
        y, pull = jax.vjp(lambda x, *rest: local(x, experts, *rest), x, *rest)
        return y, *pull(dy)

    dy = jnp.asarray(np.cos(np.arange(arrays[0].size)).reshape(arrays[0].shape), jnp.float32)
    expected = loop(experts, *arrays), *gradients(experts, dy, *arrays)
    for own, right in zip(run(dy, *arrays), expected, strict=True):
        assert relative(own, right) < 5e-6


def test_kernels_on_a_mesh_of_hopper_gpus():
    """What is traced for two devices that are not there: the forward and the backward kernels."""
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), abstract_device=device
    )
    arrays, experts = problem(40, count=3, chosen=2, widths=(128, 128), dtype=jnp.bfloat16)
    over, whole = jax.P("data"), jax.P()
    specs = (over, over, over, whole, whole, whole)
    with jax.sharding.use_abstract_mesh(mesh):
        local = jax.shard_map(routed_experts, in_specs=specs, out_specs=over)

        def total(x, experts, *rest):
            return local(x, experts, *rest).astype(jnp.float32).sum()

        given = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, spec))
            for a, spec in zip((arrays[0], experts, *arrays[1:]), specs, strict=True)
        ]
        program = str(jax.jit(jax.grad(total, (0, 2, 3, 4, 5))).trace(*given).jaxpr)
    for kernel in ("grouped_matmul_gate_up", "grouped_matmul", "grouped_gradient"):
        assert f"name={kernel}" in program


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_named_backend_serves_or_raises(dtype):
    arrays, experts = problem(4, count=4, chosen=2, widths=(24, 9), dtype=jnp.dtype(dtype))
    x, *rest = arrays
    named = routed_experts(x, experts, *rest, implementation="xla")
    assert named.dtype == dtype
    np.testing.assert_array_equal(named, routed_experts(x, experts, *rest))
    for name in ("pallas_gpu", "ragged"):
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot serve these .* needs a"):
            routed_experts(x, experts, *rest, implementation=name)
    with pytest.raises(ValueError, match="implementation='cudnn' is not known for experts: it mus"):
        routed_experts(x, experts, *rest, implementation="cudnn")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.ones((2, 4, 24))}, r"x has shape \(2, 4, 24\): it must be \[M D\]"),
        ({"x": jnp.ones((4, 23))}, r"gate has shape .* \[E D F\] = \(4, 23, 9\) to go with x"),
        ({"x": jnp.ones((4, 24), jnp.int32)}, "x is int32: it must be floating"),
        ({"experts": jnp.ones((4, 2))}, "experts is float32: it must be an integer"),
        ({"experts": jnp.ones((3, 2), jnp.int32)}, r"it must be \[M K\] with M = 4"),
        ({"weights": jnp.ones((4, 3))}, r"weights has shape \(4, 3\): it must be \[M K\] = \(4, 2"),
        ({"up": jnp.ones((4, 9, 24))}, r"up has shape .* \[E D F\] = \(4, 24, 9\)"),
        ({"down": jnp.ones((4, 24, 9))}, r"down has shape .* \[E F D\] = \(4, 9, 24\)"),
    ],
)
def test_bad_input(changes, message):
    (x, weights, gate, up, down), experts = problem(4, count=4, chosen=2, widths=(24, 9))
    given = {"x": x, "experts": experts, "weights": weights, "gate": gate, "up": up, "down": down}
    with pytest.raises(ValueError, match=message):
        routed_experts(**given | changes)


def test_a_symbolic_number_of_tokens():
    (count,) = export.symbolic_shape("m")
    arrays, _ = problem(1, count=4, chosen=2, widths=(24, 9))
    struct = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    made = export.export(jax.jit(routed_experts))(
        struct((count, 24)), struct((count, 2), jnp.int32), struct((count, 2)),
        *(struct(kernel.shape) for kernel in arrays[2:]),
    )  # fmt: skip
    for tokens in (1, 300):
        (x, weights, *kernels), experts = problem(tokens, count=4, chosen=2, widths=(24, 9))
        found = made.call(x, experts, weights, *kernels)
        assert relative(found, loop(experts, x, weights, *kernels)) < 2e-6


@pytest.mark.parametrize("pairs", [(7, 3), (600, 2)])  # ranks compared, ranks by a sort
def test_tiles_hold_every_pair_once(pairs, rng):
    experts = rng.integers(0, 5, pairs)
    experts[experts == 2] = 3  # an expert without tokens
    made = jax.jit(make_tiles, static_argnums=(1, 2))(jnp.asarray(experts), 5, 4)
    tiles = jax.device_get(made)
    sizes = np.bincount(experts.ravel(), minlength=5)
    np.testing.assert_array_equal(tiles.needed, -(-sizes // 4))
    assert int(tiles.used[0]) == sum(-(-sizes // 4))
    assert len(np.unique(tiles.place)) == experts.size
    for m, k in np.ndindex(*pairs):
        row = int(tiles.place[m, k])
        assert (tiles.token[row], tiles.owner[row // 4]) == (m, experts[m, k])
        first, needed = tiles.first[experts[m, k]], tiles.needed[experts[m, k]]
        assert first <= row // 4 < first + needed
    assert int((tiles.token < pairs[0]).sum()) == experts.size
    rows = np.asarray(jax.jit(made.rows_of)(np.ones((pairs[0], 2), np.float32)))
    assert rows.sum() == 2 * experts.size  # all the others are zeros
