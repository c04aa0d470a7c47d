"""The device compiled for, real or abstract, and the backends that are chosen for it."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import put, relative, slow
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec

import mla_jax
from mla_jax import target
from mla_jax.ops import dispatch

TPUS = ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"]
LATENT = dispatch.Call(
    "latent_attention", 8, 1, 4096, 128, (512, 64), 512, "bfloat16", ("lengths",)
)
EXPANDED = dispatch.Call("expanded_attention", 8, 4096, 4096, 128, (128, 64), 128, "bfloat16")


def mesh_of(kind, platform, axis="x", axis_type=jax.sharding.AxisType.Explicit):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform=platform)
    return AbstractMesh((4,), (axis,), axis_types=(axis_type,), abstract_device=device)


@pytest.mark.parametrize("where", ["mesh", "jit", "shard_map"])
@pytest.mark.parametrize(
    ("kind", "platform", "latent", "expanded"),
    [("NVIDIA H200", "gpu", "pallas_gpu", "pallas_gpu"),
     ("NVIDIA A100-SXM4-80GB", "gpu", "xla", "xla"),
     *((kind, "tpu", "pallas_tpu", "pallas_tpu") for kind in TPUS)],
)  # fmt: skip
def test_kernels_are_chosen_for_a_device_that_is_not_there(kind, platform, latent, expanded, where):
    chosen = []

    def look(x):
        chosen.append((dispatch.choose(LATENT), dispatch.choose(EXPANDED), target.current().kind))
        return x

    mesh = mesh_of(kind, platform)
    with jax.sharding.use_abstract_mesh(mesh):
        if where == "mesh":
            look(1)
        elif where == "jit":
            jax.jit(look).trace(jax.ShapeDtypeStruct((4,), jnp.float32))
        else:
            spec = PartitionSpec("x")
            place = jax.NamedSharding(mesh, spec)
            jax.jit(jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec)).trace(
                jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)
            )
    assert chosen[-1] == (latent, expanded, kind)


@pytest.mark.parametrize(
    ("kind", "platform", "kernel"),
    [("NVIDIA H200", "gpu", "pallas_gpu"), ("TPU v5", "tpu", "pallas_tpu")],
)
def test_kernels_refuse_a_mesh_that_xla_would_split(kind, platform, kernel):
    mesh = mesh_of(kind, platform, axis_type=jax.sharding.AxisType.Auto)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.choose(LATENT) == "xla"
        with pytest.raises(NotImplementedError, match=r"the axes x of the mesh are Auto: .*Rules"):
            dispatch.choose(LATENT, kernel)


@pytest.mark.parametrize(("kind", "platform", "kernel"), [
    ("NVIDIA H200", "gpu", "pallas_gpu"), (TPUS[0], "tpu", "pallas_tpu"),
    *(slow(kind, "tpu", "pallas_tpu") for kind in TPUS[1:]),
])  # fmt: skip
def test_explain_says_what_runs_there(kind, platform, kernel, capsys):
    config = mla_jax.MLAConfig.from_preset("deepseek_v3")
    with jax.sharding.use_abstract_mesh(mesh_of(kind, platform)):
        mla_jax.explain(config, batch_size=8)
    text = capsys.readouterr().out
    assert text.startswith(f"{kind} ({platform}), bfloat16")
    assert f"  {kernel}: runs\n" in text
    assert "expanded_attention" not in text  # a decode step does not call it


@pytest.mark.parametrize(("kind", "capability"), [
    ("NVIDIA H200", 9.0), ("NVIDIA H100 80GB HBM3", 9.0), ("NVIDIA GH200 480GB", 9.0),
    ("NVIDIA B200", 10.0), ("NVIDIA A100-SXM4-80GB", 8.0), ("NVIDIA L4", 8.9), ("Tesla T4", 7.5),
    ("NVIDIA A10G", 8.6), ("AMD Instinct MI300X", None), ("NVIDIA X999", None),
])  # fmt: skip
def test_compute_capability_by_the_name_of_a_kind(kind, capability):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=7, platform="gpu")
    known = target.of(device)
    assert (known.capability, known.cores) == (capability, 7)


def test_a_real_device_says_itself_what_it_can_do():
    card = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA X999", compute_capability="9.0", core_count=99
    )
    assert target.of(card) == target.Target("gpu", "NVIDIA X999", 9.0, 99)
    card.compute_capability = "gfx942"
    assert target.of(card).capability is None
    assert target.of(jax.devices("cpu")[0]) == target.Target("cpu", "cpu")


def test_the_default_device_counts():
    with jax.default_device(jax.devices("cpu")[1]):
        assert target.current().platform == "cpu"
    with jax.default_device("cpu"):
        assert target.current().platform == "cpu"


H200, V6E = ("NVIDIA H200", "gpu", "pallas_gpu"), ("TPU v6 lite", "tpu", "pallas_tpu")


@pytest.mark.parametrize(
    ("kind", "platform", "kernel", "tokens", "padded"),
    [
        (*H200, 1, True), (*H200, 3, False), (*V6E, 1, False), (*V6E, 8, True),
        slow(*H200, 1, False), slow(*H200, 8, True), slow(*V6E, 1, True), slow(*V6E, 3, False),
    ],
)  # fmt: skip
def test_stop_tokens_and_padding_keep_the_kernel(
    kind, platform, kernel, tokens, padded, monkeypatch
):
    """A row that has stopped is given no token, which is a length of 0: the same backend serves."""
    config = mla_jax.MLAConfig.from_preset("deepseek_v2_lite").replace(hidden_size=64)
    layer = nnx.eval_shape(
        lambda: mla_jax.MultiHeadLatentAttention(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    cache = jax.eval_shape(lambda: layer.init_cache(4, 256))
    x = jax.ShapeDtypeStruct((4, tokens, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32) if padded else None
    chosen, real = [], dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *a: chosen.append(real(*a)) or chosen[-1])
    with jax.sharding.use_abstract_mesh(mesh_of(kind, platform)):
        step = jax.jit(lambda layer, x, cache, lengths: layer.prefill(x, cache, lengths))
        step.trace(layer, x, cache, lengths)
    assert set(chosen) == {kernel}


MODES = {
    "pallas_gpu": (plgpu.force_gpu_interpret_mode, jnp.bfloat16),
    "pallas_tpu": (pltpu.force_tpu_interpret_mode, jnp.float32),
}


@pytest.fixture
def attend(name, rng):
    """Attention of one token to 77 of 128, in the kernel's dtype."""
    draw = lambda *shape: put(rng.standard_normal(shape), MODES[name][1])  # noqa: E731
    args = draw(1, 1, 4, 128), draw(1, 1, 4, 16), draw(1, 128, 128), draw(1, 128, 16)
    lengths = put([77], np.int32)
    return functools.partial(mla_jax.latent_attention, *args, lengths=lengths, scale=0.1)


@pytest.mark.parametrize("name", MODES)
def test_a_kernel_needs_its_device_outside_an_interpret_mode(name, attend):
    with pytest.raises(NotImplementedError, match=f"'{name}': needs a"):
        attend(implementation=name)


@pytest.mark.parametrize("name", ["pallas_gpu", slow("pallas_tpu")])
@pytest.mark.usefixtures("few_merged_at_once")
def test_a_kernel_runs_on_the_cpu_in_an_interpret_mode(name, attend, monkeypatch):
    # A wave of as many thread blocks as an H200 has would take the interpreter minutes.
    monkeypatch.setattr("mla_jax.ops.hopper._H200_SMS", 2)
    mode, dtype = MODES[name]
    want, want_lse = attend(implementation="reference")
    with mode():
        out, lse = jax.block_until_ready(attend(implementation=name))
    pltpu.reset_tpu_interpret_mode_state()
    assert relative(out, want) < 2 * float(jnp.finfo(dtype).eps) + 3e-6
    np.testing.assert_allclose(lse, want_lse, atol=2e-5)
