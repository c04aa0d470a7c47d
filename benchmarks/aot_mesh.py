"""Compiles whole models for a pod or several hosts, without one, and reads what the compilers say.

DeepSeek-V3 and Kimi-K2 in bf16, a decode step (cache donated) and a prefill, for 64 TPU chips
(v5p, v6e, tpu7x) and for 4 hosts of 8 H200s. Printed for each: HBM of a device, arguments and
temporaries; bytes that a device sends over links, by kind, beside those of the layout's closed
form; seconds to compile. Checked: nothing that moves is as large as the cache or as a weight, and a
decode step moves at most 1.3 times the closed form and has at most 0.2 GB of temporaries.

    python benchmarks/aot_mesh.py v6e h200 --what wide    some targets, some programs
    python benchmarks/aot_mesh.py --short                 a narrow layer on 8 chips: for CI
    python benchmarks/aot_mesh.py h200-host --models deepseek_v3 --what wide --weights float8_e4m3fn

The last one is one host of 8 H200s with weights kept in 8 bits, 32 rows of 8192 slots. Checked
there: a device's arguments and temporaries, and that no array of more than 8 bits has the shape of
a weight.

The short form also compiles a decode step of the attention layer alone, and what moves in it must
be what its layout names: kinds and sizes, no collective more and none less.

The TPUs need `libtpu` (pip install --group tpu-aot), the H200s jax's CUDA plugin and a CUDA
toolkit; a target whose tools are missing is left out with a word.

Layouts, on axes data and model (8 wide; on tpu7x, whose 64 chips are 128 devices, 16):
    wide     rows over all devices; heads, MLPs and words over model; experts over all. 8 rows of
             8192 slots a device (4 on tpu7x)
    helix    rows over data, slots over model, weights as above. 8 rows of 131072 slots in all
    prefill  wide, with 8 rows for each of data, 512 tokens each

Closed form of a decode step (`mla_jax.placement`), numbers of 2 bytes that one device sends in one
layer: b rows of a device, m devices of model, d of data, f(s) = s (m-1)/m.
    wide     inputs of q_a_proj exchanged f(b D), and its sums 2 f(m b Q); absorbed queries there
             and mixed latents back f(b N (R+P)) + f(b N R); sums of o_proj scattered f(m b D).
             Gated MLP (dense or shared): inputs gathered, sums scattered, 2 f(m b D). Experts
             exchanged, K b D each way at most, and the choices of all, 4 (n-1) b K. Once: as a
             gated MLP, and logits 2 f(b W)
    helix    sums of q_a_proj 2 f(b Q); queries gathered f(b N (R+P)); mixed latents with their lse
             exchanged f(b N (R+2)); sums of o_proj 2 f(b D), and of a gated MLP. Experts gathered:
             (d-1) b (2 D + 4 K), and sums 2 f(b D). Once: sums of the embedding 2 f(b D), logits
             2 f(b W)
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

CUDA = pathlib.Path(os.environ.get("CUDA_ROOT", "/usr/local/cuda"))
os.environ.update({
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={CUDA}",
})  # fmt: skip

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import links  # beside this file  # noqa: E402
import numpy as np  # noqa: E402
from aot_gpu import H200  # beside this file  # noqa: E402
from flax import nnx  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from mla_jax import MultiHeadLatentAttention, sharding  # noqa: E402
from mla_jax.layers.quantised import Frozen  # noqa: E402
from mla_jax.models import Decoder, DecoderConfig  # noqa: E402
from mla_jax.models.rounding import round_weights  # noqa: E402
from mla_jax.placing import placement  # noqa: E402
from mla_jax.sharding import Rules  # noqa: E402

# Topology, axes (data, model), HBM of a device in GB.
TARGETS: dict[str, tuple[str, tuple[int, int], float]] = {
    "v5p": ("v5p:4x4x4", (8, 8), 95),
    "v6e": ("v6e:8x8", (8, 8), 32),
    "tpu7x": ("tpu7x:4x4x4", (8, 16), 96),
    "h200": ("1x4x8", (4, 8), 141),
    "h200-host": ("1x1x8", (1, 8), 141),
}
ALL = ("data", "model")
WEIGHTS: dict[str, Any] = {"N": "model", "F": "model", "W": "model", "E": ALL, "A": "model"}
LAYOUTS = {
    "wide": Rules(B=ALL, **WEIGHTS),
    "helix": Rules(B="data", S="model", **WEIGHTS),
    "prefill": Rules(B=ALL, **WEIGHTS),
}
MODELS = ("deepseek_v3", "kimi_k2")
SHORT = ("v6e:2x4", (2, 4), 32)
# Of the layer alone, b rows of a device: kind and numbers of the result. Helix trades mixed latents
# and lse, which is as long as two numbers of 2 bytes.
MOVES: dict[str, tuple[Rules, Any]] = {
    "data": (Rules(B=ALL), lambda b, a: []),
    "tensor": (
        Rules(B="data", N="model"),
        lambda b, a: [("all-reduce", b * a.hidden_size)],
    ),
    "helix": (
        Rules(B="data", S="model", N="model"),
        lambda b, a: [
            ("all-gather", b * a.num_attention_heads * (a.kv_lora_rank + a.qk_rope_head_dim)),
            ("all-to-all", b * a.num_attention_heads * (a.kv_lora_rank + 2)),
            ("all-reduce", b * a.hidden_size),
        ],
    ),
}


def mesh_for(target: str):
    """The mesh of a target; None where its compiler is not installed."""
    shape, sizes, _ = TARGETS[target]
    if target.startswith("h200"):
        if importlib.util.find_spec("jax_plugins") is None or not (CUDA / "bin" / "ptxas").exists():
            return None
        topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology=shape)
    else:
        if importlib.util.find_spec("libtpu") is None:
            return None
        topology = topologies.get_topology_desc(shape, platform="tpu")
    devices = np.array(topology.devices).reshape(sizes)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    return jax.sharding.Mesh(devices, ALL, axis_types=kinds)


def narrow(config: DecoderConfig) -> DecoderConfig:
    """One layer with experts, of small widths."""
    attention = config.attention.replace(
        num_hidden_layers=1, num_attention_heads=8, hidden_size=256, q_lora_rank=128,
        kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32,
    )  # fmt: skip
    return config.replace(
        attention=attention, first_k_dense_replace=0, vocab_size=1024, n_routed_experts=32,
        moe_intermediate_size=128,
    )  # fmt: skip


def sizes_of(what: str, mesh, kept: bool, rows: int | None = None) -> tuple[int, int, int]:
    """Rows, slots and new tokens of a program, by whether weights are kept as stored.

    In the wide layout there are so many `rows` a device, by default 4 on many devices and with
    weights as stored, else 8.
    """
    if what == "helix":
        return 8, 131072, 1
    if what == "prefill":
        return mesh.size, 512, 512
    return (rows or (4 if mesh.size > 64 or kept else 8)) * mesh.size, 8192, 1


def program(mesh, what: str, config: DecoderConfig, sizes, weights: str | None = None):
    """(compiled, `_clock` of lowering, of compiling, shapes of a device's cache and kernels).

    And the shapes of a device's weights as stored in the form `weights`.
    """
    rows, slots, tokens = sizes
    place: Any = LAYOUTS[what]

    def laid(tree):
        def one(x, spot):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spot)

        return jax.tree.map(one, tree, place.of(tree))

    with jax.set_mesh(mesh):

        def made():
            model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
            if weights is not None:
                round_weights(model.blocks, weights)
            return model

        model = nnx.eval_shape(made)
        cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
        model, cache = laid(model), laid(cache)
        spot = jax.NamedSharding(mesh, sharding.pspec(place.B))
        given = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=spot)
        counts = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=spot)

        def step(model, cache, tokens, counts):
            if what == "prefill":
                logits, cache = model.prefill_last(tokens, cache.as_fresh(), counts)
            else:
                logits, cache = model.decode(tokens, cache)
                logits = logits[:, 0]
            logits = sharding.move(logits, place.B)
            return logits.argmax(-1).astype(jnp.int32), cache

        started = _clock()
        jitted = jax.jit(step, donate_argnums=1)
        platform = "cuda" if mesh.devices.flat[0].platform == "gpu" else "tpu"
        lowered = jitted.trace(model, cache, given, counts).lower(lowering_platforms=(platform,))
        lowering = _clock() - started
        started = _clock()
        compiled = lowered.compile()
        compiling = _clock() - started
    local = lambda x: x.sharding.shard_shape(x.shape)  # noqa: E731
    cached = {local(x) for x in jax.tree.leaves(cache) if x.ndim > 2}
    kernels = {local(x) for x in jax.tree.leaves(model) if x.size > 2**20}
    kernels |= {x.shape for x in jax.tree.leaves(model) if x.size > 2**20}
    frozen = [x for x in jax.tree.leaves(nnx.state(model, Frozen)) if x.dtype.itemsize == 1]
    stored = {shape for x in frozen for shape in (local(x), x.shape)}
    return compiled, lowering, compiling, cached | kernels, stored


def _clock() -> np.ndarray:
    """Seconds by the clock, and of all cores' work: on a shared machine they are far apart."""
    return np.array([time.perf_counter(), time.process_time()])


def closed_form(mesh, what: str, config: DecoderConfig, sizes) -> dict[str, float]:
    """Bytes that one device sends in a decode step, by part of the model."""
    rows, slots, _ = sizes
    found = placement(
        config, mesh=dict(mesh.shape), sharding=LAYOUTS[what], batch_size=rows, length=slots
    )
    return dict(found.link_bytes)


def look(target: str, mesh, name: str, what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Compiles one program; prints its row of the table.

    Raises:
        AssertionError: something moves that must not, or too much.
    """
    config, weights, layers = DecoderConfig.from_preset(name), options.weights, options.layers
    if layers:
        config = config.replace(
            attention=config.attention.replace(num_hidden_layers=layers), first_k_dense_replace=1
        )
    if options.short:
        config = narrow(config)
    sizes = sizes_of(what, mesh, weights is not None, options.rows)
    compiled, lowering, seconds, held, stored = program(mesh, what, config, sizes, weights)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    moved = links.collectives(text, mesh.size)
    kinds = links.by_kind(moved)
    sent = sum(sent for _, sent in kinds.values())
    form = closed_form(mesh, what, config, sizes) if what != "prefill" else {}
    least = sum(form.values())
    aliased = memory.alias_size_in_bytes
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - aliased
    fits = "" if total <= TARGETS[target][2] * 1e9 else ", more than it has"
    parts = ", ".join(f"{k} {n}: {s / 1e6:.2f}" for k, (n, s) in sorted(kinds.items()))
    print(
        f"| {target} | {name}, layers: {config.attention.num_hidden_layers}, {what} | "
        f"{memory.argument_size_in_bytes / 1e9:.2f} + {memory.temp_size_in_bytes / 1e9:.2f}{fits}"
        " | "
        f"{sent / 1e6:.1f} ({parts}) | "
        + (f"{least / 1e6:.1f}, {sent / least:.2f}" if least else "-")
        + f" | {lowering[0]:.0f} + {seconds[0]:.0f} ({lowering[1]:.0f} + {seconds[1]:.0f}) |",
        flush=True,
    )  # fmt: skip
    wide = widened(text, stored, config.attention.num_attention_heads // mesh.shape["model"])
    assert not wide, f"makes arrays of more than 8 bits in the shape of a stored weight: {wide}"
    if weights is not None and target == "h200-host":
        limits = (92e9 if config.attention.num_hidden_layers == 61 else math.inf), 1e9
        found = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        within = all(a <= b for a, b in zip(found, limits, strict=True))
        assert within, f"{found} bytes are above {limits}"
    if what != "prefill" and weights is None:
        assert memory.temp_size_in_bytes <= 0.2e9, f"{memory.temp_size_in_bytes} of temporaries"
    large = [one for one in moved if any(_shape(s) in held for s in one.shapes)]
    assert not large, f"moves what is as large as a weight or the cache: {large[:3]}"
    if what != "prefill":
        looped = [one for one in moved if one.looped]
        assert not looped, f"moves in a loop: {looped[:3]}"
        assert sent <= 1.3 * least, f"moves {sent / least:.2f} of the closed form {form}"
    return {
        "target": target, "model": name, "what": what, "layers": layers,
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "moved": kinds, "closed_form": form, "lower_s": list(lowering), "compile_s": list(seconds),
    }  # fmt: skip


def widened(text: str, stored: set[tuple[int, ...]], heads: int) -> list[str]:
    """Arrays of 16 or 32 bits a number that a program writes in the shape of a stored weight.

    Axes may stand in another order. A layer's weight counts, an expert's alone, and that of so many
    heads with an axis of its own for these, or half of it, such as the keys' part of kv_b_proj.
    """
    shapes = set(stored)
    for *_, rows, columns in stored:
        shapes |= {(rows, columns), (heads, rows // heads, columns)}
        shapes.add((heads, rows // heads // 2, columns))
    bare = lambda shape: tuple(sorted(size for size in shape if size > 1))  # noqa: E731
    weights = {bare(shape) for shape in shapes}
    _, lines = links.computations(text)
    inside = {  # a fusion writes its result alone
        name
        for own in lines.values()
        for line in own
        if " fusion(" in line
        for name in links.called(line)
    }
    found = []
    for line in (line for name, own in lines.items() if name not in inside for line in own):
        # What a kernel writes is a product: 32 tiles of 64 tokens are as large as an expert.
        if re.search(r" (parameter|bitcast|get-tuple-element)\(|mosaic_gpu", line):
            continue
        for made in re.findall(r" = (?:bf16|f16|f32)\[([\d,]+)\]", line):
            if bare(map(int, made.split(","))) in weights:
                found.append(line.strip().partition("(")[0][-80:])
    return found


def layer_moves(mesh, layout: str) -> None:
    """Compiles a decode step of the attention layer alone; prints what moves.

    Raises:
        AssertionError: it is not what the layout names.
    """
    place, form = MOVES[layout]
    config = narrow(DecoderConfig.from_preset("deepseek_v3")).attention
    rows = 4 * mesh.size

    def laid(tree):
        spots = place.of(tree)
        return jax.tree.map(
            lambda x, spot: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spot), tree, spots
        )

    with jax.set_mesh(mesh):
        layer = nnx.eval_shape(
            lambda: MultiHeadLatentAttention(
                config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
            )
        )
        cache = jax.eval_shape(lambda: layer.init_cache(rows, 4096))
        spot = jax.NamedSharding(mesh, sharding.pspec(place.B))
        x = jax.ShapeDtypeStruct((rows, 1, config.hidden_size), jnp.bfloat16, sharding=spot)
        step = jax.jit(lambda layer, x, cache: layer.decode(x, cache), donate_argnums=2)
        lowered = step.trace(laid(layer), x, laid(cache)).lower(lowering_platforms=("tpu",))
        moved = links.collectives(lowered.compile().as_text(), mesh.size)
    found = sorted((one.kind, sum(math.prod(_shape(s)) for s in one.shapes)) for one in moved)
    own = rows // sharding.count(mesh, place.B)
    wanted = sorted(form(own, config))
    print(f"a layer, {layout}: moves {found or 'nothing'}", flush=True)
    assert found == wanted, f"moves {found} where its layout names {wanted}"


def _shape(text: str) -> tuple[int, ...]:
    sizes = re.fullmatch(r"\w+\[([\d,]*)\]", text)
    assert sizes
    return tuple(int(size) for size in sizes[1].split(",") if size)


def main() -> None:
    """Compiles what the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--what", nargs="*", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument("--layers", type=int, help="fewer, the first one dense")
    parser.add_argument("--rows", type=int, help="of a device, in the wide layout")
    parser.add_argument("--weights", help="keep them in this form: float8_e4m3fn, int8 or int4")
    parser.add_argument("--short", action="store_true", help="a narrow layer on 8 v6e")
    parser.add_argument("--alone", nargs="*", default=list(MOVES), choices=list(MOVES),
                        help="of --short, layouts of the attention layer alone")  # fmt: skip
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if options.short:
        options.models, options.targets = ["deepseek_v3"], ["v6e"]
        options.what = [what for what in options.what if what != "prefill"]
        TARGETS["v6e"] = SHORT
    print(
        "| target | program | HBM of a device, GB: arguments + temporaries | MB sent in it, by "
        "kind | closed form MB, ratio | lower + compile s (of cores) |\n|---|---|---|---|---|---|",
        flush=True,
    )  # fmt: skip
    rows, wrong = [], []
    for target in options.targets:
        mesh = mesh_for(target)
        if mesh is None:
            print(f"{target}: its compiler is not installed, left out", flush=True)
            continue
        for name in options.models:
            for what in options.what:
                try:
                    rows.append(look(target, mesh, name, what, options))
                except Exception as error:  # the compilers' and ours: the others still run
                    first = f"{type(error).__name__}: {error}".splitlines()[0][:400]
                    print(f"| {target} | {name}, {what} | {first} | | | |", flush=True)
                    wrong.append(f"{target} {name} {what}")
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
    mesh = mesh_for("v6e") if options.short else None
    for layout in options.alone if mesh is not None else ():
        layer_moves(mesh, layout)
    if wrong:
        sys.exit("wrong: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
